// The view "Labels": the whole collection, each image at its most probable label.

import { remembered } from "./api.js";
import { $, el, images, lines, percent, say } from "./dom.js";
import { chosen, go, link } from "./state.js";
import { grid, learn, tile } from "./tiles.js";

const TOP = 12; // images shown per label
export const TOO_FEW = "Type at least two labels, one per line.";
let latest = "";

export async function showLabels(state) {
  const collection = chosen(state);
  const examples = collection.tags.slice(0, 6).map(([tag]) => tag);
  const use = link({ label: examples }, {}, "Use the collection’s most frequent tags");
  $("sort-examples").replaceChildren(...(examples.length > 1 && !state.label.length ? [use] : []));
  const name = JSON.stringify([collection.id, state.label, state.prompt]);
  if (name === latest) return;
  latest = name;
  $("sort-labels").value = state.label.join("\n");
  $("sort-prompts").value = state.prompt.join("\n");
  const sorted = $("sorted");
  sorted.replaceChildren();
  say($("sort-error"), "");
  say($("sort-status"), "");
  if (!state.label.length) return;
  sorted.setAttribute("aria-busy", "true");
  say($("sort-status"), `Comparing ${images(collection.size)} with ${state.label.length} labels …`);
  try {
    const body = { collection: collection.id, labels: state.label, top: TOP };
    if (state.prompt.length) body.prompts = state.prompt;
    const answer = await remembered(`labels ${name}`, "classify-collection", body);
    if (name !== latest) return;
    const total = answer.labels.reduce((sum, { count }) => sum + count, 0);
    sorted.replaceChildren(...answer.labels.map((label) => group(collection, label, total)));
    say($("sort-status"), `${images(total)} sorted by ${state.label.length} labels.`);
  } catch (error) {
    if (name !== latest) return;
    latest = "";
    say($("sort-status"), "");
    say($("sort-error"), error.message);
  } finally {
    sorted.removeAttribute("aria-busy");
  }
}

function group(collection, { label, count, hits }, total) {
  learn(collection.id, hits);
  const share = total ? count / total : 0;
  const bar = el("span", { className: "bar-fill" });
  bar.style.width = `${100 * share}%`;
  const elements = [
    el("h3", { dir: "auto" }, label),
    el("p", { className: "note" }, `${images(count)}, ${percent(share)} · `, link({ view: "search", text: label, like: "", image: "", top: "60" }, {}, "search for it")),
    el("span", { className: "bar-track", "aria-hidden": "true" }, bar),
  ];
  const tiles = hits.map((hit) => tile(collection.id, hit, { score: false }));
  if (count) elements.push(grid(tiles, `Images with the label ${label}`));
  if (count > hits.length) elements.push(el("p", { className: "quiet" }, `The ${hits.length} most probable of ${images(count)}.`));
  return el("section", { "aria-label": label, className: "group" }, ...elements);
}

export function startLabels() {
  $("sort").addEventListener("submit", (event) => {
    event.preventDefault();
    const [label, prompt] = [lines($("sort-labels").value), lines($("sort-prompts").value)];
    if (label.length < 2) say($("sort-error"), TOO_FEW);
    else if (prompt.some((each) => each.split("{}").length !== 2)) say($("sort-error"), "Each prompt must have {} once, for the label.");
    else go({ label, prompt });
  });
}
