// The page: reads the state from the address, fills the forms, and shows one of the three views.

import { request } from "./api.js";
import { queryChip, showDetail, startDetail } from "./detail.js";
import { $, el, images, say } from "./dom.js";
import { showLabels, startLabels } from "./labels.js";
import { showMap, startMap } from "./map.js";
import { inWords, showSearch } from "./search.js";
import { chosen, collections, go, href, isQuery, keepPicture, read } from "./state.js";

const VIEWS = { search: showSearch, labels: showLabels, map: showMap };
const START = { text: "", like: "", image: "", not: "", tag: [], folder: "", top: "60", open: "", where: "" };

async function render() {
  const state = read();
  if (!collections.length) return;
  header(state);
  fill(state);
  for (const view of Object.keys(VIEWS)) $(`view-${view}`).hidden = view !== state.view;
  $("search").hidden = state.view === "labels";
  $("clear").hidden = state.view === "labels" || !(isQuery(state) || state.not || state.tag.length || state.folder);
  $("clear").href = href(START, state);
  await VIEWS[state.view](state);
  if (state.like) chip(state, chosen(state)); // the results told its caption
  await showDetail(read());
}

function header(state) {
  const collection = chosen(state);
  say($("about"), collections.length > 1 ? "" : `${images(collection.size)} · ${collection.model}`);
  const what = { search: inWords(state), labels: "Labels", map: "Map" }[state.view];
  document.title = [what, collection.name, "coalign"].filter(Boolean).join(" · ");
  for (const link of document.querySelectorAll("[data-view]")) {
    const view = link.dataset.view;
    link.href = href({ view, open: "", where: "" }, state);
    if (view === state.view) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (collections.length < 2) return;
  $("collections").hidden = false;
  const option = ({ id, name, size }) => el("option", { value: String(id) }, `${name} (${images(size)})`);
  $("in").replaceChildren(...collections.map(option));
  $("in").value = state.in;
  $("beside").replaceChildren(el("option", { value: "" }, "none"), ...collections.filter(({ id }) => String(id) !== state.in).map(option));
  $("beside").value = state.beside;
  $("beside").parentElement.hidden = state.view !== "search";
}

let filled = "";

/** Fills the form, unless only what it does not show has changed. */
function fill(state) {
  const name = JSON.stringify([state.text, state.not, state.like, state.image, state.tag, state.folder, state.in]);
  if (name === filled) return;
  filled = name;
  const collection = chosen(state);
  $("text").value = state.text;
  $("not").value = state.not;
  $("tag").value = "";
  $("tags").replaceChildren(...collection.tags.map(([tag, number]) => el("option", { value: tag, label: `${tag} (${number})` })));
  $("tags-field").hidden = !collection.tags.length;
  const folders = collection.folders.map(([folder, number]) => el("option", { value: folder }, `${folder} (${number})`));
  $("folder").replaceChildren(el("option", { value: "" }, "any"), ...folders);
  if (state.folder && !collection.folders.some(([folder]) => folder === state.folder)) $("folder").append(el("option", { value: state.folder }, state.folder));
  $("folder").value = state.folder;
  $("folders-field").hidden = collection.folders.length < 2 && !state.folder;
  const chips = state.tag.map((tag) => {
    const button = el("button", { type: "button", "aria-label": `Remove the tag ${tag}` }, "×");
    button.addEventListener("click", () => go({ tag: read().tag.filter((each) => each !== tag) }));
    return el("span", { className: "chip" }, el("span", { dir: "auto" }, tag), button);
  });
  $("chips").replaceChildren(...chips);
  if (state.not || state.tag.length || state.folder) showFilters(true);
  chip(state, collection);
}

async function chip(state, collection) {
  const name = filled;
  const parts = await queryChip(state);
  if (name !== filled) return;
  $("picture").replaceChildren(...parts);
  $("picture").hidden = !parts.length;
  const joint = collection.can.joint ? "Add words: both are embedded as one sequence" : "Add words to the picture";
  $("text").placeholder = parts.length ? joint : "Describe an image";
}

/** What the form holds, as changes of the state. */
function typed() {
  const tag = $("tag").value.trim();
  const tags = read().tag;
  return { text: $("text").value.trim(), not: $("not").value.trim(), folder: $("folder").value, tag: tag && !tags.includes(tag) ? [...tags, tag] : tags, top: "60", open: "", where: "" };
}

function showFilters(open) {
  $("search").classList.toggle("open", open);
  $("filters").setAttribute("aria-expanded", String(open));
}

function choose(file) {
  if (!file) return;
  const view = read().view === "labels" ? "search" : read().view;
  go({ ...typed(), view, image: keepPicture(file), like: "" });
}

function startForm() {
  $("search").addEventListener("submit", (event) => {
    event.preventDefault();
    go(typed());
    if (!isQuery(read()) && (read().not || read().tag.length || read().folder)) say($("status"), "Type a text or choose a picture to search for.");
  });
  $("filters").addEventListener("click", () => showFilters(!$("search").classList.contains("open")));
  $("folder").addEventListener("change", () => go(typed()));
  $("tag").addEventListener("change", () => chosen(read()).tags.some(([tag]) => tag === $("tag").value) && go(typed()));
  $("in").addEventListener("change", () => go({ in: $("in").value, beside: $("beside").value === $("in").value ? read().in : read().beside, tag: [], folder: "", top: "60" }));
  $("beside").addEventListener("change", () => go({ beside: $("beside").value }));
  $("file").addEventListener("change", () => {
    choose($("file").files[0]);
    $("file").value = "";
  });
  addEventListener("paste", (event) => {
    const file = [...(event.clipboardData?.files ?? [])].find(({ type }) => type.startsWith("image/"));
    if (file) event.preventDefault();
    choose(file);
  });
}

function startDrop() {
  const hasFile = (event) => event.dataTransfer?.types.includes("Files");
  addEventListener("dragover", (event) => {
    if (!hasFile(event)) return;
    event.preventDefault();
    $("drop").hidden = false;
  });
  addEventListener("dragleave", (event) => (event.relatedTarget ? null : ($("drop").hidden = true)));
  addEventListener("drop", (event) => {
    $("drop").hidden = true;
    if (!hasFile(event)) return;
    event.preventDefault();
    choose(event.dataTransfer.files[0]);
  });
}

function startKeys() {
  document.addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, textarea, select") || $("detail").open) return;
    event.preventDefault();
    if ($("search").hidden) go({ view: "search" });
    $("text").focus();
    $("text").select();
  });
  // links within the page change the state as everything else does
  document.addEventListener("click", (event) => {
    const followed = event.target.closest("a[href^='#']");
    if (!followed || followed.id === "skip" || event.button || event.ctrlKey || event.metaKey || event.shiftKey || event.altKey) return;
    event.preventDefault();
    const to = followed.changes ? href(followed.changes) : followed.getAttribute("href");
    // within the dialog, nothing new is opened
    go(to, Boolean(read().open) && read(to).open === read().open);
    if (read().view === "search" && !read().open) scrollTo({ top: 0 });
  });
}

async function start() {
  startForm();
  startDrop();
  startKeys();
  startDetail();
  startLabels();
  startMap();
  addEventListener("popstate", render);
  say($("status"), "Opening the collection …");
  try {
    collections.push(...(await request("collections")).collections);
  } catch (error) {
    say($("status"), "");
    say($("error"), error.message);
    return;
  }
  say($("status"), "");
  if (!collections.length) say($("error"), "No collection is served. Start coalign serve with the folder of an index.");
  await render();
  if (matchMedia("(pointer: fine)").matches && !read().open && read().view === "search") $("text").focus();
}

start();
