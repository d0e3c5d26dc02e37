// What the page shows is the fragment of its address, so that back, forward, reload and a copied link work.
// Chosen pictures cannot be in an address: they are kept in memory, by a name that only this page knows.

import { el } from "./dom.js";

const DEFAULTS = {
  view: "search", text: "", not: "", like: "", image: "", tag: [], folder: "", in: "0", beside: "", top: "60",
  open: "", where: "", label: [], prompt: [],
};

export const collections = [];
export const pictures = new Map(); // name -> File

export function read(hash = location.hash) {
  const parameters = new URLSearchParams(hash.slice(1));
  const state = {};
  for (const [name, value] of Object.entries(DEFAULTS)) {
    state[name] = Array.isArray(value) ? parameters.getAll(name) : (parameters.get(name) ?? value);
  }
  const known = (id) => collections.some((collection) => String(collection.id) === id);
  if (!known(state.in)) state.in = String(collections[0]?.id ?? 0);
  if (!known(state.beside) || state.beside === state.in) state.beside = "";
  if (!["search", "labels", "map"].includes(state.view)) state.view = "search";
  return state;
}

/** The address of the current state with changes. */
export function href(changes, from = read()) {
  const parameters = new URLSearchParams();
  for (const [name, value] of Object.entries({ ...from, ...changes })) {
    if (Array.isArray(value)) value.forEach((each) => parameters.append(name, each));
    else if (value !== DEFAULTS[name]) parameters.append(name, value);
  }
  return `#${parameters}`;
}

/** Goes to another state; `replace` makes no new entry in the history. */
export function go(changes, replace = false) {
  const address = typeof changes === "string" ? changes : href(changes);
  const here = address === (location.hash || "#");
  // closing the dialog goes back if it was opened from this page
  const opened = replace ? history.state?.opened : Boolean(read(address).open);
  history[replace || here ? "replaceState" : "pushState"]({ opened }, "", address);
  dispatchEvent(new PopStateEvent("popstate"));
}

/** A link to the current state with changes, whatever it is when the link is followed. It opens no image unless it says so. */
export function link(changes, properties, ...children) {
  const all = { open: "", where: "", ...changes };
  return el("a", { href: href(all), changes: all, ...properties }, ...children);
}

export function keepPicture(file) {
  const name = Date.now().toString(36) + Math.random().toString(36).slice(2, 6);
  pictures.set(name, file);
  return name;
}

export const chosen = (state) => collections.find((collection) => String(collection.id) === state.in);
export const shown = (state) => [state.in, state.beside].filter(Boolean).map((id) => chosen({ in: id }));
export const isQuery = (state) => Boolean(state.text || state.image || state.like);
