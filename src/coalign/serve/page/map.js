// The view "Map": each image is a dot, or, close enough, itself. The results of the current query are marked.

import { remembered } from "./api.js";
import { $, caption, count, el, picture, say } from "./dom.js";
import { chosen, go, isQuery } from "./state.js";
import { find, inWords } from "./search.js";
import { item } from "./tiles.js";

const MARGIN = 28;
const FEW = 60; // as many visible points are drawn as images
const SIDE = 56; // pixels of such an image
const NEAR = 14; // pixels between the pointer and a point under it
const FARTHEST = 40; // zoom

const canvas = $("canvas");
const tip = $("tip");
let collection = null;
let points = []; // [row, x, y]
let extent = [0, 1, 0, 1]; // of x, then of y
let marked = new Set();
let camera = { scale: 1, x: 0, y: 0 }; // of the screen, in pixels
let hovered = null;
let scheduled = false;
const thumbnails = new Map();
const pointers = new Map();
let dragged = 0;

const width = () => canvas.clientWidth;
const height = () => canvas.clientHeight;

/** A point's pixels on the canvas. Each axis is stretched to fit. */
function place([, x, y]) {
  const across = (x - extent[0]) / (extent[1] - extent[0] || 1);
  const down = (extent[3] - y) / (extent[3] - extent[2] || 1);
  return [
    (MARGIN + across * (width() - 2 * MARGIN)) * camera.scale + camera.x,
    (MARGIN + down * (height() - 2 * MARGIN)) * camera.scale + camera.y,
  ];
}

let latest = "";

export async function showMap(state) {
  collection = chosen(state);
  const name = JSON.stringify([state.in, state.text, state.image, state.like, state.not, state.tag, state.folder, state.top]);
  draw();
  if (name === latest) return;
  latest = name;
  say($("error"), "");
  say($("status"), "Computing the map …");
  try {
    const [answer, found] = await Promise.all([remembered(`map ${collection.id}`, `map/${collection.id}`), isQuery(state) ? find(state, collection) : null]);
    if (name !== latest) return;
    points = answer.points;
    const range = (axis) => points.reduce(([low, high], point) => [Math.min(low, point[axis]), Math.max(high, point[axis])], [Infinity, -Infinity]);
    extent = [...range(1), ...range(2)];
    marked = new Set(found?.hits.map((hit) => hit.row));
    const drawn = points.length < collection.size ? `${count(points.length)} of ${count(collection.size)} images` : `${count(points.length)} images`;
    const onMap = points.filter(([row]) => marked.has(row)).length;
    say($("status"), found ? `${drawn}; ${count(onMap)} of the ${count(marked.size)} nearest to ${inWords(state)} are marked.` : `${drawn}. Search first to see the results marked here.`);
    canvas.setAttribute("aria-label", `Map of ${drawn} of ${collection.name}`);
    camera = { scale: 1, x: 0, y: 0 };
    hover(null);
  } catch (error) {
    if (name !== latest) return;
    latest = "";
    points = [];
    draw();
    say($("status"), "");
    say($("error"), error.message);
  }
}

/** Redraws before the next frame. */
function draw() {
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => {
    scheduled = false;
    if (width()) paint();
  });
}

function paint() {
  const style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name).trim();
  const context = canvas.getContext("2d");
  canvas.width = width() * devicePixelRatio;
  canvas.height = height() * devicePixelRatio;
  context.scale(devicePixelRatio, devicePixelRatio);
  const visible = points.filter((point) => {
    const [x, y] = place(point);
    return x > -SIDE && y > -SIDE && x < width() + SIDE && y < height() + SIDE;
  });
  const order = [...visible].sort((a, b) => marked.has(a[0]) - marked.has(b[0])); // marked ones on top
  for (const point of order) {
    const isMarked = marked.has(point[0]);
    const ink = color(isMarked ? "--mark" : "--dot");
    if (visible.length <= FEW) drawImage(context, point, ink, isMarked);
    else drawDot(context, point, ink, isMarked);
  }
  if (hovered) ring(context, place(hovered), color("--ink"));
}

function drawDot(context, point, ink, isMarked) {
  const [x, y] = place(point);
  context.globalAlpha = isMarked || !marked.size ? 0.9 : 0.45;
  context.fillStyle = ink;
  context.beginPath();
  context.arc(x, y, isMarked ? 5.5 : points.length > 1500 ? 2 : 3, 0, 2 * Math.PI);
  context.fill();
  context.globalAlpha = 1;
}

function drawImage(context, point, ink, isMarked) {
  const [x, y] = place(point);
  const thumbnail = load(point[0]);
  if (!thumbnail.complete || !thumbnail.naturalWidth) return drawDot(context, point, ink, isMarked);
  const scale = SIDE / Math.max(thumbnail.naturalWidth, thumbnail.naturalHeight);
  const [w, h] = [thumbnail.naturalWidth * scale, thumbnail.naturalHeight * scale];
  context.drawImage(thumbnail, x - w / 2, y - h / 2, w, h);
  context.strokeStyle = ink;
  context.lineWidth = isMarked ? 3 : 1;
  context.strokeRect(x - w / 2, y - h / 2, w, h);
}

function load(row) {
  const name = `${collection.id}/${row}`;
  if (!thumbnails.has(name)) {
    const image = new Image();
    image.addEventListener("load", draw);
    image.src = `api/image/${name}?side=128`;
    thumbnails.set(name, image);
  }
  return thumbnails.get(name);
}

function ring(context, [x, y], ink) {
  context.strokeStyle = ink;
  context.lineWidth = 2;
  context.beginPath();
  context.arc(x, y, 8, 0, 2 * Math.PI);
  context.stroke();
}

function nearest(x, y, within) {
  let best = null;
  let least = within ** 2;
  for (const point of points) {
    const [px, py] = place(point);
    const distance = (px - x) ** 2 + (py - y) ** 2;
    if (distance < least) [best, least] = [point, distance];
  }
  return best;
}

/** Shows the picture of a point beside it. */
async function hover(point) {
  if (point === hovered && point) return;
  hovered = point;
  draw();
  tip.hidden = !point;
  canvas.style.cursor = point ? "pointer" : "";
  if (!point) return;
  const [x, y] = place(point);
  tip.style.left = `${Math.max(4, Math.min(x + 14, width() - 190))}px`;
  tip.style.top = `${Math.max(4, Math.min(y + 14, height() - 230))}px`;
  const name = el("span", { className: "caption", dir: "auto" });
  tip.replaceChildren(picture(collection.id, point[0], 256, ""), name);
  const found = await item(`${collection.id}/${point[0]}`).catch(() => null);
  if (found) name.textContent = caption(found);
}

function zoom(factor, x = width() / 2, y = height() / 2) {
  const scale = Math.max(1, Math.min(FARTHEST, camera.scale * factor));
  const by = scale / camera.scale;
  camera = { scale, x: x - (x - camera.x) * by, y: y - (y - camera.y) * by };
  pan(0, 0);
}

/** Moves the map, of which some part stays on the canvas. */
function pan(dx, dy) {
  const limit = (value, length) => Math.max(length * (0.5 - camera.scale), Math.min(length * 0.5, value));
  camera.x = limit(camera.x + dx, width());
  camera.y = limit(camera.y + dy, height());
  hover(null);
}

function all() {
  camera = { scale: 1, x: 0, y: 0 };
  hover(null);
}

const openPoint = (point) => point && go({ open: `${collection.id}/${point[0]}`, where: "" });

function keydown(event) {
  const step = 60;
  const moves = { ArrowLeft: [step, 0], ArrowRight: [-step, 0], ArrowUp: [0, step], ArrowDown: [0, -step] };
  if (moves[event.key]) pan(...moves[event.key]);
  else if (event.key === "+" || event.key === "=") zoom(1.5);
  else if (event.key === "-") zoom(1 / 1.5);
  else if (event.key === "0") all();
  else if (event.key === "Enter") return openPoint(hovered ?? nearest(width() / 2, height() / 2, Infinity));
  else return;
  event.preventDefault();
  hover(nearest(width() / 2, height() / 2, Infinity));
}

function pointermove(event) {
  const before = pointers.get(event.pointerId);
  const { offsetX: x, offsetY: y } = event;
  if (!before) return hover(nearest(x, y, NEAR));
  const others = [...pointers.entries()].filter(([id]) => id !== event.pointerId).map(([, at]) => at);
  pointers.set(event.pointerId, [x, y]);
  dragged += Math.hypot(x - before[0], y - before[1]);
  if (others.length) {
    const distance = ([px, py]) => Math.hypot(px - others[0][0], py - others[0][1]);
    zoom(distance([x, y]) / Math.max(1, distance(before)), (x + others[0][0]) / 2, (y + others[0][1]) / 2);
  } else if (dragged > 4) pan(x - before[0], y - before[1]);
}

export function startMap() {
  canvas.addEventListener("pointermove", pointermove);
  canvas.addEventListener("pointerdown", (event) => {
    if (!pointers.size) dragged = 0;
    pointers.set(event.pointerId, [event.offsetX, event.offsetY]);
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointerup", (event) => {
    if (pointers.size === 1 && dragged <= 4) openPoint(nearest(event.offsetX, event.offsetY, event.pointerType === "touch" ? 2 * NEAR : NEAR));
    pointers.delete(event.pointerId);
  });
  canvas.addEventListener("pointercancel", (event) => pointers.delete(event.pointerId));
  canvas.addEventListener("pointerleave", () => hover(null));
  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(1.0015 ** -event.deltaY, event.offsetX, event.offsetY);
  }, { passive: false });
  canvas.addEventListener("keydown", keydown);
  document.querySelector(".zoom").addEventListener("click", ({ target }) => {
    ({ in: () => zoom(1.6), out: () => zoom(1 / 1.6), all })[target.dataset.zoom]?.();
  });
  new ResizeObserver(draw).observe(canvas);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
}
