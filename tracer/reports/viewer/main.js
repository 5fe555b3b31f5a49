// The page put together: reads the data, makes every part, and passes changes between them.
// Knows every other file. Refuses to know how any of them does its work.

import { Stage } from "./canvas.js";
import { Controls } from "./controls.js";
import { readCircuit } from "./data.js";
import { download, toPng, toSvg } from "./export.js";
import { bindKeys } from "./keys.js";
import { makeLayout } from "./layout.js";
import { Panel } from "./panel.js";
import { plotArea } from "./scene.js";
import { State } from "./state.js";

const TONE_NAMES = [
  ...["zero", "plus-weak", "plus-middle", "plus", "minus-weak", "minus-middle", "minus"],
  ...["only-first", "only-last", "both", "flipped"],
];
const COLOURS = ["paper", "band", "grid", "axis", "ink", "quiet", "accent", "match", "group"];
const MEASURES = ["attribution", "weight", "share"];
const PANEL_KEYS = ["selected", "pins", "groups", "nodeThreshold", "expert", "edgeThreshold", "measure", "seen"];

const element = (id) => document.getElementById(id);
const stats = { firstPaintMs: NaN, lastInteractionMs: NaN, lastDrawMs: NaN };
const canvas = element("canvas");
const dark = matchMedia("(prefers-color-scheme: dark)");

setTheme(dark.matches ? "dark" : "light");
const circuit = readCircuit(element("header").textContent, element("block").textContent);
const state = new State(circuit);
const view = { circuit, state, layout: makeLayout(circuit, plotShape()), palette: readPalette() };
let asked = 0; // when the event came that the next frame answers
const panel = new Panel(circuit, state, choose);
const stage = new Stage(canvas, view, afterFrame);
const controls = new Controls(circuit, state, { choose, download });
const actions = {
  move,
  choose,
  pin: (row) => {
    state.togglePin(row);
    panel.say(`${state.pins.has(row) ? "Pinned" : "Unpinned"}: ${circuit.title(row)}`);
  },
  clear: () => {
    state.set({ cursor: -1, selected: -1 });
    panel.say("Nothing chosen");
  },
  help: () => element("help").click(),
  fit: () => stage.fit(),
  zoomBy: (factor) => stage.zoomBy(factor),
  panBy: (dx, dy) => stage.panBy(dx, dy),
};

state.listen((changed) => {
  if (PANEL_KEYS.some((name) => changed.has(name))) panel.render();
  controls.render(changed);
  stage.request();
});
bindPointer();
bindKeys(canvas, view, actions);
bindToolbar();
panel.render();
controls.renderAll();
for (const type of ["pointermove", "click", "input", "change", "keydown", "wheel"]) {
  window.addEventListener(type, (event) => (asked = event.timeStamp), { capture: true, passive: true });
}
// Rank edges by the measures that are not chosen yet, before the reader asks for it.
setTimeout(() => MEASURES.forEach((measure) => circuit.ranked(measure)), 500);
window.tracerPage = {
  stats,
  select: (row) => {
    asked = performance.now();
    choose(row);
  },
  state: () => ({
    ...state,
    shown: [...state.shown],
    pins: [...state.pins],
    shownNodes: state.shownNodes(),
    shownEdges: state.shownEdges(),
    theme: document.documentElement.dataset.theme,
    transform: view.transform,
  }),
  chosenEdges: () => state.chosenEdges(),
  position: (row) => stage.position(row),
  svg: () => toSvg(view),
};

function choose(row) {
  state.set({ selected: row, cursor: -1 });
  if (row < 0) return;
  stage.reveal(row);
  panel.announce(row, "Chosen: ");
}

function move(row) {
  if (row < 0) return;
  stage.reveal(row);
  state.set({ cursor: row });
  panel.announce(row);
}

function bindPointer() {
  canvas.addEventListener("pointermove", (event) => {
    const cursor = event.buttons ? -1 : stage.hit(event.offsetX, event.offsetY);
    canvas.classList.toggle("over", cursor >= 0);
    state.set({ cursor });
  });
  canvas.addEventListener("pointerleave", () => state.set({ cursor: -1 }));
  canvas.addEventListener("click", (event) => choose(stage.hit(event.offsetX, event.offsetY)));
  canvas.addEventListener("dblclick", (event) => {
    const row = stage.hit(event.offsetX, event.offsetY);
    if (row >= 0) state.togglePin(row);
  });
}

function bindToolbar() {
  element("fit").addEventListener("click", actions.fit);
  element("zoom-in").addEventListener("click", () => stage.zoomBy(1.4));
  element("zoom-out").addEventListener("click", () => stage.zoomBy(1 / 1.4));
  element("save-svg").addEventListener("click", () => {
    download(new Blob([toSvg(view)], { type: "image/svg+xml" }), "circuit.svg");
  });
  element("save-png").addEventListener("click", async () => download(await toPng(view), "circuit.png"));
  element("theme").addEventListener("click", () => {
    repaint(document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  });
  dark.addEventListener("change", () => repaint(dark.matches ? "dark" : "light"));
}

/** Width by height of the picture at the start; the layout keeps it, whatever the window does later. */
function plotShape() {
  const { clientWidth, clientHeight } = canvas.parentElement;
  const { width, height } = plotArea(clientWidth, clientHeight);
  return Math.min(2.4, Math.max(0.8, width / height));
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
}

function repaint(theme) {
  setTheme(theme);
  view.palette = readPalette();
  stage.request();
}

/** The colours of the picture, from the style sheet. */
function readPalette() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  const palette = Object.fromEntries(COLOURS.map((name) => [name, colour(name)]));
  return {
    ...palette,
    edgePlus: colour("edge-plus"),
    edgeMinus: colour("edge-minus"),
    tones: TONE_NAMES.map(colour),
  };
}

/** The tooltip follows the picture; times run until the next frame begins, so that the painting is in them. */
function afterFrame(started) {
  const since = asked;
  asked = 0;
  stats.lastDrawMs = performance.now() - started;
  requestAnimationFrame(() => {
    panel.tooltip(state.cursor, state.cursor < 0 ? null : stage.position(state.cursor));
    if (Number.isNaN(stats.firstPaintMs)) stats.firstPaintMs = performance.now();
    else if (since) stats.lastInteractionMs = performance.now() - since;
  });
}
