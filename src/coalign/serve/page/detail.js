// One image in a dialog: its captions, where a text is in it, and which labels fit.

import { request, requestImage } from "./api.js";
import { $, caption, drawn, el, lines, percent, picture, say } from "./dom.js";
import { TOO_FEW } from "./labels.js";
import { collections, go, link, pictures } from "./state.js";
import { byKey, item, moreLike, neighbors, tileOf } from "./tiles.js";

const SIDE = 1024;
const dialog = $("detail");
let place = ""; // "collection/row", or "picture/name" for a picture that was chosen as a query
let latest = []; // labels, kept from image to image
let asked = { where: "", labels: "" }; // what the shown heat map and bars belong to

/** Opens, changes or closes the dialog as the state says. */
export async function showDetail(state) {
  if (!state.open) {
    if (dialog.open) dialog.close();
    return;
  }
  if (state.open !== place || !dialog.open) await open(state);
  if (state.open === place) await Promise.all([where(state), classify(state)]);
}

async function open(state) {
  place = state.open;
  asked = { where: "", labels: "" };
  $("detail-picture").replaceChildren();
  $("detail-facts").replaceChildren();
  $("detail-title").textContent = "";
  $("bars").replaceChildren();
  say($("where-status"), "");
  say($("detail-error"), "");
  const [before, after] = neighbors(place);
  $("previous").disabled = !before;
  $("next").disabled = !after;
  if (!dialog.open) {
    dialog.showModal();
    $("detail-title").focus();
  }
  try {
    const [source, name] = place.split("/");
    await (source === "picture" ? openPicture(name) : openItem(Number(source)));
  } catch (error) {
    say($("detail-error"), error.message);
  }
}

async function openPicture(name) {
  const file = pictures.get(name);
  $("where").hidden = true;
  $("detail-title").textContent = file?.name || "The chosen picture";
  if (!file) throw new Error("This picture is no longer on the page. Choose it again.");
  $("detail-picture").replaceChildren(await drawn(file, "The chosen picture", SIDE));
}

async function openItem(id) {
  const here = place;
  const collection = collections.find((each) => each.id === id);
  if (!collection) throw new Error(`There is no collection ${id}. Start coalign serve with it, or search another one.`);
  $("where").hidden = !collection.can.localize;
  const found = await item(here);
  if (here !== place) return;
  $("detail-picture").replaceChildren(picture(id, found.row, SIDE, caption(found)));
  $("detail-title").textContent = found.captions[0] ?? found.key;
  const facts = found.captions.slice(1).map((text) => el("p", { dir: "auto" }, text));
  if (found.tags.length) {
    const tags = found.tags.map((tag) => link({ view: "search", tag: [tag], text: tag, image: "", like: "", not: "", top: "60" }, { className: "pill", dir: "auto" }, tag));
    facts.push(el("p", { className: "pills" }, ...tags));
  }
  const similarity = Number.isFinite(found.score) && tileOf(here) ? ` · similarity ${found.score.toFixed(3).replace("-", "−")}` : "";
  facts.push(el("p", { className: "quiet key" }, el("code", {}, found.key), ` in ${collection.name}${similarity}`));
  facts.push(el("p", {}, moreLike(id, found, { className: "button" })));
  $("detail-facts").replaceChildren(...facts);
}

async function where(state) {
  if ($("where").hidden || state.where === asked.where) return;
  const here = place;
  const [collection, row] = here.split("/").map(Number);
  asked.where = state.where;
  $("where-text").value = state.where;
  if (!state.where) {
    say($("where-status"), "");
    $("detail-picture").replaceChildren(picture(collection, row, SIDE, $("detail-title").textContent));
    return;
  }
  say($("where-status"), "Comparing image regions with the text …");
  try {
    const map = await requestImage("localize", { collection, row, text: state.where });
    const canvas = await drawn(map, `Heat map: where the picture matches “${state.where}”`, SIDE);
    if (here !== place || asked.where !== state.where) return;
    $("detail-picture").replaceChildren(canvas);
    const back = link({ open: here }, {}, "Show the picture without the map");
    $("where-status").replaceChildren(`Red regions match “${state.where}”. `, back);
  } catch (error) {
    if (here === place && asked.where === state.where) say($("where-status"), error.message);
  }
}

async function classify(state) {
  if (state.label.length) latest = state.label;
  const labels = JSON.stringify([latest, state.prompt]);
  if (labels === asked.labels) return;
  asked.labels = labels;
  $("classify-labels").value = latest.join("\n");
  if (!latest.length) {
    $("bars").replaceChildren();
    return;
  }
  const here = place;
  const form = new FormData();
  const [source, name] = here.split("/");
  if (source === "picture" && !pictures.has(name)) return;
  form.set("collection", source === "picture" ? state.in : source);
  if (source === "picture") form.set("image", pictures.get(name));
  else form.set("row", name);
  latest.forEach((label) => form.append("labels", label));
  state.prompt.forEach((prompt) => form.append("prompts", prompt));
  let shown;
  try {
    shown = [bars((await request("classify", form)).labels)];
  } catch (error) {
    shown = [el("p", { className: "problem" }, error.message)];
  }
  if (here === place && labels === asked.labels) $("bars").replaceChildren(...shown);
}

/** Labels with bars, the most probable first. */
export function bars(labels) {
  const sorted = [...labels].sort((a, b) => b.probability - a.probability);
  const rows = sorted.map(({ label, probability }) => {
    const bar = el("span", { className: "bar-fill", "aria-hidden": "true" });
    bar.style.width = `${100 * probability}%`;
    return el("li", {}, el("span", { className: "bar-label", dir: "auto" }, label), el("span", { className: "note" }, percent(probability)), el("span", { className: "bar-track" }, bar));
  });
  return el("ol", { className: "bars", "aria-label": "Labels by probability" }, ...rows);
}

/** What a search is like: the image's link, or the chosen picture. */
export async function queryChip(state) {
  if (state.like) {
    const known = byKey(state.in, state.like);
    const name = known ? caption(known[1]) : state.like;
    const parts = known ? [picture(state.in, known[1].row, 128, "")] : [];
    return [...parts, el("span", { dir: "auto" }, `like ${name}`), remove("like")];
  }
  if (!state.image) return [];
  const file = pictures.get(state.image);
  const preview = file ? await drawn(file, "The chosen picture", 96).catch(() => el("span", {}, file.name)) : el("span", {}, "a picture");
  return [link({ open: `picture/${state.image}` }, { title: "Open, and classify" }, preview), remove("image")];
}

function remove(field) {
  const button = el("button", { type: "button", "aria-label": field === "like" ? "Do not search like this image" : "Remove the picture" }, "×");
  button.addEventListener("click", () => go({ [field]: "" }));
  return button;
}

/** Closing goes back to where the dialog was opened, or drops it from the address that it came with. */
function close() {
  if (history.state?.opened) history.back();
  else go({ open: "", where: "" }, true);
}

function turn(step) {
  const target = neighbors(place)[step];
  if (target) go({ open: target, where: "" }, true);
}

export function startDetail() {
  $("close").addEventListener("click", close);
  $("previous").addEventListener("click", () => turn(0));
  $("next").addEventListener("click", () => turn(1));
  dialog.addEventListener("cancel", (event) => {
    event.preventDefault();
    close();
  });
  dialog.addEventListener("close", () => {
    tileOf(place)?.focus();
    place = "";
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) close(); // outside of its contents
  });
  dialog.addEventListener("keydown", (event) => {
    if (event.target.matches("input, textarea")) return;
    if (event.key === "ArrowLeft") turn(0);
    if (event.key === "ArrowRight") turn(1);
  });
  $("where").addEventListener("submit", (event) => {
    event.preventDefault();
    go({ where: $("where-text").value.trim() }, true);
  });
  $("classify").addEventListener("submit", (event) => {
    event.preventDefault();
    const label = lines($("classify-labels").value);
    if (label.length === 1) {
      $("bars").replaceChildren(el("p", { className: "problem" }, TOO_FEW));
      return;
    }
    latest = label;
    go({ label }, true);
  });
}
