// The view "Search": a query, its results, and what to try if there is none.

import { remembered } from "./api.js";
import { $, count, el, images, say } from "./dom.js";
import { chosen, go, isQuery, link, pictures, shown } from "./state.js";
import { grid, item, learn, tile } from "./tiles.js";

const STEP = 60;
const MOST = 500;
const EXAMPLES = 18;

/** The results of the state's query in one collection. */
export async function find(state, collection) {
  const form = new FormData();
  form.set("collection", collection.id);
  for (const [field, value] of Object.entries({ text: state.text, like: state.like, exclude: state.not, folder: state.folder, top: state.top })) {
    if (value) form.set(field, value);
  }
  state.tag.forEach((tag) => form.append("tags", tag));
  if (state.image) {
    if (!pictures.has(state.image)) throw new Error("This address was made with a picture that is no longer on the page. Choose the picture again.");
    form.set("image", pictures.get(state.image));
  }
  const name = JSON.stringify([collection.id, state.text, state.image, state.like, state.not, state.tag, state.folder, state.top]);
  const found = await remembered(name, "search", form);
  learn(collection.id, found.hits);
  return found;
}

/** The query in words, for the title and for empty results. */
export function inWords(state) {
  const parts = [];
  if (state.text) parts.push(`“${state.text}”`);
  if (state.image) parts.push("a picture");
  if (state.like) parts.push(`more like ${state.like}`);
  return parts.join(" and ") + (state.not ? `, not “${state.not}”` : "");
}

let latest = "";

/** Shows the results; does nothing if they are on the page already. */
export async function showSearch(state) {
  const name = JSON.stringify({ ...state, view: "", open: "", where: "", label: [], prompt: [] });
  if (name === latest) return;
  latest = name;
  const section = $("view-search");
  section.setAttribute("aria-busy", "true");
  const slow = setTimeout(() => say($("status"), "Searching …"), 200);
  try {
    const parts = isQuery(state) ? await results(state) : await examples(state);
    if (name !== latest) return;
    section.replaceChildren(...parts.elements);
    say($("status"), parts.status);
    say($("error"), "");
  } catch (error) {
    if (name !== latest) return;
    latest = "";
    section.replaceChildren();
    say($("status"), "");
    say($("error"), error.message);
  } finally {
    clearTimeout(slow);
    if (name === latest || latest === "") section.removeAttribute("aria-busy");
  }
}

async function results(state) {
  const columns = shown(state);
  const answers = await Promise.allSettled(columns.map((collection) => find(state, collection)));
  if (answers.every((answer) => answer.reason)) throw answers[0].reason;
  if (columns.length === 1) {
    const found = answers[0].value;
    return { elements: ranked(state, columns[0], found), status: status(state, columns[0], found) };
  }
  const ranks = answers.map((answer) => new Map(answer.value?.hits.map((hit, rank) => [hit.key, rank + 1])));
  const both = [...ranks[0].keys()].filter((key) => ranks[1].has(key)).length;
  const elements = columns.map((collection, side) => {
    const heading = el("h2", {}, collection.name);
    const about = el("p", { className: "quiet" }, `${collection.model}, ${images(collection.size)}`);
    const answer = answers[side];
    const body = answer.reason ? [el("p", { className: "problem", role: "alert" }, answer.reason.message)] : ranked(state, collection, answer.value, ranks[1 - side]);
    return el("section", { "aria-label": collection.name }, heading, about, ...body);
  });
  const failed = answers.some((answer) => answer.reason);
  const sentence = failed ? "One of the two collections could not be searched." : `${images(both)} found in both, of ${count(ranks[0].size)} and ${count(ranks[1].size)} results.`;
  return { elements: [el("div", { className: "beside" }, ...elements)], status: sentence };
}

function status(state, collection, found) {
  const number = found.hits.length;
  if (!number) return "No image matches.";
  const filtered = state.tag.length || state.folder;
  const which = `${images(number)} ${filtered ? "that match the filters" : `of ${count(collection.size)}`}, nearest first`;
  const time = found.seconds < 1 ? `${Math.max(1, Math.round(1000 * found.seconds))} ms` : `${found.seconds.toFixed(1)} s`;
  const lost = found.missing ? `${images(found.missing)} could not be read` : "";
  return [which, found.query, lost, time].filter(Boolean).join(" · ");
}

function ranked(state, collection, found, others) {
  if (!found.hits.length) return [nothing(state)];
  const mark = (hit) => (others?.has(hit.key) ? `in both · rank ${others.get(hit.key)} there` : "");
  const tiles = found.hits.map((hit) => tile(collection.id, hit, { mark: mark(hit) }));
  const elements = [grid(tiles, `Results in ${collection.name}`)];
  const top = Number(state.top);
  if (found.hits.length >= top && top < MOST) {
    const more = el("button", { type: "button" }, "Show more");
    more.addEventListener("click", () => go({ top: String(Math.min(top + STEP, MOST)) }, true));
    elements.push(el("p", { className: "more" }, more));
  }
  return elements;
}

/** An empty result is due to the filters: offers to remove each. */
function nothing(state) {
  const ways = state.tag.map((tag) => link({ tag: state.tag.filter((each) => each !== tag) }, { className: "pill" }, `Remove the tag “${tag}”`));
  if (state.folder) ways.push(link({ folder: "" }, { className: "pill" }, `Search all folders, not only ${state.folder}`));
  const sentence = ways.length ? "No image has these tags and is in this folder." : "This collection has no images. Add images to its data, then run coalign index again.";
  return el("div", { className: "empty" }, el("p", {}, sentence), el("p", { className: "pills" }, ...ways));
}

/** Images and words of the collection to start from. */
async function examples(state) {
  const collection = chosen(state);
  const rows = Array.from({ length: Math.min(EXAMPLES, collection.size) }, (_, number) => Math.floor((number * collection.size) / Math.min(EXAMPLES, collection.size)));
  const answers = await Promise.allSettled(rows.map((row) => item(`${collection.id}/${row}`)));
  const found = answers.filter((answer) => answer.value).map((answer) => answer.value);
  const pill = (text) => link({ text, top: "60" }, { className: "pill", dir: "auto" }, text);
  const captions = [...new Set(found.map((each) => each.captions[0]).filter((text) => text && text.length <= 48))].slice(0, 6);
  const tags = collection.tags.slice(0, 8).map(([tag]) => tag);
  const elements = [];
  if (captions.length) elements.push(el("p", { className: "pills" }, "Search for ", ...captions.map(pill)));
  if (tags.length) elements.push(el("p", { className: "pills" }, "or for a tag ", ...tags.map(pill)));
  if (found.length) {
    elements.push(el("h2", {}, "From this collection"), grid(found.map((each) => tile(collection.id, each, { score: false })), `Images from ${collection.name}`));
  }
  const invitation = "Describe what you look for, or drop or paste a picture anywhere on this page. Both together are one query.";
  return { elements: [el("p", { className: "lead" }, invitation), ...elements], status: "" };
}
