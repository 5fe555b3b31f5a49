// The page put together: reads the data, makes every part, and passes changes between them.
// Knows every other file. Refuses to know how any of them does its work.

import { Stage } from "./canvas.js";
import { Controls } from "./controls.js";
import { readCircuit } from "./data.js";
import { renderDifferences } from "./differences.js";
import { byId } from "./elements.js";
import { download, toPng, toSvg } from "./export.js";
import { bindFolds } from "./folds.js";
import { History } from "./history.js";
import { Keeper } from "./keeper.js";
import { bindKeys } from "./keys.js";
import { makeLayout } from "./layout.js";
import { Memory } from "./memory.js";
import { Panel } from "./panel.js";
import { Picks } from "./picks.js";
import { bindPointer } from "./pointer.js";
import { remark } from "./remarks.js";
import { plotArea } from "./scene.js";
import { bindShortcuts } from "./shortcuts.js";
import { FILTERS, State } from "./state.js";
import { renderStrip } from "./strip.js";
import { Subgraph } from "./subgraph.js";
import { Written } from "./written.js";

const TONE_NAMES = [
  ...["zero", "plus-weak", "plus-middle", "plus", "minus-weak", "minus-middle", "minus"],
  ...["only-first", "only-last", "both", "flipped"],
];
const COLOURS = ["paper", "band", "grid", "axis", "ink", "quiet", "accent", "match", "group"];
const MEASURES = ["attribution", "weight", "share"];
const PAUSE = 50; // ms between two pieces of what is made ready
const PANEL_KEYS = [...FILTERS, "selected", "pins", "groups", "measure", "drawAll", "incoming", "outgoing"];

const stats = { firstPaintMs: NaN, lastInteractionMs: NaN, lastDrawMs: NaN };
const canvas = byId("canvas");
const dark = matchMedia("(prefers-color-scheme: dark)");

setTheme(systemTheme());
bindFolds();
const circuit = readCircuit(byId("header").textContent, byId("block").textContent);
renderStrip(circuit); // before the picture is measured
const state = new State(circuit);
const shape = plotShape();
const view = { circuit, state, layout: makeLayout(circuit, shape, state.placed), palette: readPalette() };
let asked = 0; // when the event came that the next frame answers
let { placed } = state; // the nodes that the layout has room for
const written = new Written(circuit, state, choose);
const panel = new Panel(circuit, state, choose, written);
const picks = new Picks(state, (text) => panel.say(text));
const stage = new Stage(canvas, view, afterFrame);
const steps = new History(state, renderSteps);
const keeper = new Keeper(circuit, state, {
  tell: remark,
  download,
  saved: (marks) => memory.saved(marks),
});
const controls = new Controls(circuit, state, {
  choose,
  saveFile: () => keeper.saveFile(),
  loaded: (marks) => keeper.loaded(marks),
});
const subgraph = new Subgraph(circuit, state, { choose, download });
const actions = {
  move,
  choose,
  pin: (row) => {
    state.togglePin(row);
    panel.say(`${state.pins.has(row) ? "Pinned" : "Unpinned"}: ${state.title(row)}`);
  },
  pick: (rows) => picks.add(rows),
  group: () => picks.focus(),
  write: (row, field) => {
    if (row !== state.selected) choose(row);
    byId(field).focus();
  },
  clear: () => {
    if (state.picked.size) {
      picks.clear();
      return;
    }
    state.set({ cursor: -1, selected: -1 });
    panel.say("Nothing chosen");
  },
  help: () => byId("help").click(),
  undo: () => steps.undo(),
  redo: () => steps.redo(),
  save: () => {
    /** @type {HTMLElement} */ (document.activeElement).blur(); // what is typed counts
    keeper.save();
  },
  fit: () => stage.fit(),
  zoomBy: (factor) => stage.zoomBy(factor),
  panBy: (dx, dy) => stage.panBy(dx, dy),
};

state.listen((changed) => {
  if (PANEL_KEYS.some((name) => changed.has(name))) panel.render();
  if (changed.has("names") || changed.has("notes")) {
    panel.rename();
    written.render();
  }
  if (changed.has("picked")) picks.render();
  controls.render(changed);
  if (changed.has("theme")) repaint(state.theme || systemTheme());
  stage.request();
});
stage.beforeDrawing(() => {
  if (placed === state.placed) return;
  placed = state.placed;
  stage.place(makeLayout(circuit, shape, placed), state.selected);
});
const memory = new Memory(circuit, state, stage, remark);
bindPointer(canvas, view, stage, actions);
bindKeys(canvas, view, actions);
bindShortcuts(actions);
bindToolbar();
panel.render();
controls.renderAll();
renderSteps();
renderDifferences(circuit, choose);
if (state.theme) repaint(state.theme);
written.render();
picks.render();
for (const type of ["pointermove", "click", "input", "change", "keydown", "wheel"]) {
  window.addEventListener(type, (event) => (asked = event.timeStamp), { capture: true, passive: true });
}
prepare(MEASURES.toSorted((a, b) => Number(b === state.measure) - Number(a === state.measure)));
/** @type {any} */ (window).tracerPage = {
  stats,
  select: (row) => {
    asked = performance.now();
    choose(row);
  },
  state: () => ({
    ...state,
    placed: undefined,
    shown: [...state.shown],
    pins: [...state.pins],
    picked: [...state.picked],
    names: [...state.names],
    notes: [...state.notes],
    subgraph: [...state.subgraph],
    shownNodes: state.shownNodes(),
    shownEdges: state.shownEdges(),
    theme: document.documentElement.dataset.theme,
    transform: view.transform,
  }),
  chosenEdges: () => state.chosenEdges(),
  position: (row) => stage.position(row),
  svg: () => toSvg(view),
  look: () => stage.look(),
  write: (which, row, text) => state.write(which, row, text),
  plain: () => memory.plain(),
  flush: () => memory.flush(),
  subgraph: () => subgraph.report(),
};

/** What the reader's next moves need of the edges, the shown measure first: after the first picture, a piece at a time,
    so that no move waits for more than one. */
function prepare(measures) {
  const pieces = measures.flatMap((measure) => [
    () => circuit.ranked(measure),
    () => circuit.ranked(measure).incoming.of(0),
    () => circuit.ranked(measure).outgoing.of(0),
  ]);
  const next = () => {
    pieces.shift()?.();
    if (pieces.length) setTimeout(next, PAUSE);
  };
  requestAnimationFrame(() => setTimeout(next));
}

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

function bindToolbar() {
  byId("fit").addEventListener("click", actions.fit);
  byId("lasso").addEventListener("click", () => {
    state.set({ lassoing: !state.lassoing });
    byId("lasso").setAttribute("aria-pressed", String(state.lassoing));
    canvas.classList.toggle("lassoing", state.lassoing);
  });
  byId("zoom-in").addEventListener("click", () => stage.zoomBy(1.4));
  byId("zoom-out").addEventListener("click", () => stage.zoomBy(1 / 1.4));
  byId("save-svg").addEventListener("click", () => {
    download(new Blob([toSvg(view)], { type: "image/svg+xml" }), "circuit.svg");
  });
  byId("save-png").addEventListener("click", async () => download(await toPng(view), "circuit.png"));
  byId("theme").addEventListener("click", () => {
    state.set({ theme: document.documentElement.dataset.theme === "dark" ? "light" : "dark" });
  });
  byId("undo").addEventListener("click", actions.undo);
  byId("redo").addEventListener("click", actions.redo);
  dark.addEventListener("change", () => repaint(state.theme || systemTheme()));
}

/** Width by height of the picture at the start; the layout keeps it, whatever the window does later. */
function plotShape() {
  const { clientWidth, clientHeight } = canvas.parentElement;
  const { width, height } = plotArea(clientWidth, clientHeight);
  return Math.min(2.4, Math.max(0.8, width / height));
}

function systemTheme() {
  return dark.matches ? "dark" : "light";
}

function renderSteps() {
  byId("undo").disabled = !steps.canUndo;
  byId("redo").disabled = !steps.canRedo;
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
    memory.touch();
    panel.tooltip(state.cursor, state.cursor < 0 ? null : stage.position(state.cursor));
    if (Number.isNaN(stats.firstPaintMs)) stats.firstPaintMs = performance.now();
    else if (since) stats.lastInteractionMs = performance.now() - since;
  });
}
