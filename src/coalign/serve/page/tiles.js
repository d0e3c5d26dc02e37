// Images as a grid of links: arrows move through it, Enter opens.

import { request } from "./api.js";
import { $, caption, el, picture } from "./dom.js";
import { link } from "./state.js";

const SIDE = devicePixelRatio > 1 ? 512 : 256;
const items = new Map(); // "collection/row" -> item; what any answer has told of an image

/** Remembers the items of an answer. */
export function learn(collection, hits) {
  for (const hit of hits) items.set(`${collection}/${hit.row}`, hit);
}

export const known = (place) => items.get(place);
export const byKey = (collection, key) => [...items].find(([place, item]) => item.key === key && place.startsWith(`${collection}/`));

/** An image's key, captions and tags, by "collection/row". */
export async function item(place) {
  if (!items.has(place)) items.set(place, await request(`item/${place}`));
  return items.get(place);
}

/** One image. `mark` is a remark under it, such as its rank in the other collection. */
export function tile(collection, hit, { score = true, mark = "" } = {}) {
  const place = `${collection}/${hit.row}`;
  const name = caption(hit);
  const open = link(
    { open: place },
    { className: "open", data: { place } },
    picture(collection, hit.row, SIDE, ""),
    el("span", { className: "caption", dir: "auto" }, name),
  );
  const like = moreLike(collection, hit, { "aria-label": `More like this: ${name}` });
  const note = score && Number.isFinite(hit.score) ? el("span", { className: "note", title: "Similarity: compare it within one query only" }, hit.score.toFixed(3).replace("-", "−")) : "";
  const parts = [open, el("div", { className: "line" }, note, like)];
  if (mark) parts.push(el("p", { className: "mark" }, mark));
  return el("li", { className: mark ? "tile marked" : "tile" }, ...parts);
}

export const moreLike = (collection, hit, properties) =>
  link({ view: "search", in: String(collection), like: hit.key, image: "", text: "", not: "", top: "60" }, properties, "More like this");

export function grid(tiles, label) {
  const list = el("ul", { className: "grid", "aria-label": label }, ...tiles);
  if (tiles.length) select(tiles[0]);
  return list;
}

/** Of a grid only one tile takes part in the order of Tab. */
function select(chosen) {
  for (const each of chosen.parentElement?.children ?? [chosen]) {
    each.querySelectorAll("a").forEach((link) => (link.tabIndex = each === chosen ? 0 : -1));
  }
}

export const tileOf = (place) => document.querySelector(`section:not([hidden]) .open[data-place="${CSS.escape(place)}"]`);

/** The images before and after one on the page. */
export function neighbors(place) {
  const places = [...document.querySelectorAll("section:not([hidden]) .open")].map((link) => link.dataset.place);
  const at = places.indexOf(place);
  return at < 0 ? [] : [places[at - 1], places[at + 1]];
}

function move(from, key) {
  const tiles = [...from.parentElement.children];
  const at = tiles.indexOf(from);
  const columns = tiles.findIndex((each) => each.offsetTop > tiles[0].offsetTop);
  const down = columns < 0 ? tiles.length : columns;
  const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -down, ArrowDown: down, Home: -at, End: tiles.length - 1 - at }[key];
  if (step === undefined) return false;
  const target = tiles[at + step];
  if (target) target.querySelector(".open").focus();
  else if (key === "ArrowUp") $("text").focus();
  return true;
}

document.addEventListener("focusin", (event) => {
  const focused = event.target.closest?.(".tile");
  if (focused) select(focused);
});

document.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const from = event.target.closest?.(".tile");
  if (from && move(from, event.key)) event.preventDefault();
  if (event.target.id === "text" && event.key === "ArrowDown") {
    const first = document.querySelector("section:not([hidden]) .open");
    if (first) event.preventDefault();
    first?.focus();
  }
});
