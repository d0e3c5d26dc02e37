// Elements and numbers. Whatever comes from the collection enters the page as text, never as HTML.

export const $ = (id) => document.getElementById(id);

/** An element with properties (`data` sets data attributes, `aria-…` and `role` attributes) and children. */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "data") Object.assign(element.dataset, value);
    else if (name.startsWith("aria-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

export const count = (value) => value.toLocaleString("en");
export const images = (value) => `${count(value)} ${value === 1 ? "image" : "images"}`;
export const percent = (value) => `${(100 * value).toFixed(1)} %`;
export const lines = (text) => [...new Set(text.split("\n").map((line) => line.trim()).filter(Boolean))];

/** Shows a sentence; an alert is hidden if there is none, while a status stays, as screen readers expect. */
export function say(element, sentence) {
  element.textContent = sentence;
  if (element.role !== "status") element.hidden = !sentence;
}

/** An item's first caption; its key if it has none. */
export const caption = (item) => item.captions[0] || item.key;

/** An image of the collection. What cannot be read is replaced by a sentence. */
export function picture(collection, row, side, alt) {
  const image = el("img", { src: `api/image/${collection}/${row}?side=${side}`, alt, loading: "lazy", decoding: "async" });
  image.addEventListener("error", () => image.replaceWith(el("span", { className: "missing" }, "This image cannot be read.")));
  return image;
}

/** Draws an image file on a canvas: a strict content policy allows no address of a file in memory. */
export async function drawn(blob, label, side) {
  const bitmap = await createImageBitmap(blob);
  const scale = Math.min(1, side / Math.max(bitmap.width, bitmap.height));
  const canvas = el("canvas", { role: "img", "aria-label": label });
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas;
}
