// What the picture is made of, from back to front, told to a pen.
// Knows circuit, layout and state. Refuses to know whether the pen draws on a canvas or writes SVG.

import { polygonHull } from "d3-polygon";

import { paintLayerAxis, paintTokenAxis } from "./axes.js";
import { EMBEDDING, ERROR, KINDS, LOGIT, NEURON } from "./data.js";
import { count, tokenText } from "./format.js";
import { SIDES, TONES } from "./layout.js";

export const LEFT = 58;
export const BOTTOM = 78;
const FEW = 140; // nodes in view; so few are all named where there is room, of more only the strongest
const STRONGEST_NAMED = 24;
const NAMED_NEIGHBOURS = 8;
const SHAPES = { [NEURON]: "circle", [EMBEDDING]: "square", [LOGIT]: "diamond", [ERROR]: "cross" };
const SMALLEST = { [NEURON]: 1.3, [EMBEDDING]: 2.4, [LOGIT]: 2.4, [ERROR]: 2 }; // pixels, so that shapes differ
const LONGEST_NAME = 24; // signs of a name that the reader gave
const FONT = 11;

/** The part of the screen in which nodes are drawn; axes lie left of it and below. */
export function plotArea(width, height) {
  return { x: LEFT, y: 0, width: Math.max(10, width - LEFT), height: Math.max(10, height - BOTTOM) };
}

/** `view`: circuit, layout, state, palette, width, height, transform {x, y, k}. */
export function paint(pen, view) {
  const frame = { ...view, plot: plotArea(view.width, view.height), at: projection(view) };
  pen.rect(0, 0, view.width, view.height, { fill: view.palette.paper, name: "paper" });
  pen.clip(frame.plot);
  paintBands(pen, frame);
  const groupNames = paintGroups(pen, frame);
  const edges = view.state.chosenEdges();
  const pointed = pointedEdges(view.state);
  const drawn = paintEdges(pen, frame, edges, pointed);
  const visible = inView(frame);
  paintNodes(pen, frame, visible, neighbours(frame, edges, pointed));
  paintNotes(pen, frame);
  paintRings(pen, frame);
  for (const { x, y, text, style } of groupNames) pen.text(x, y, text, style);
  paintNames(pen, frame, visible, edges, groupNames);
  paintCount(pen, frame, drawn);
  if (view.lasso?.length > 1)
    pen.outline(view.lasso, { colour: view.palette.accent, alpha: 0.12, name: "lasso" });
  pen.unclip();
  paintLayerAxis(pen, frame);
  paintTokenAxis(pen, frame);
}

function projection({ circuit, layout, transform: { x, y, k } }) {
  const { kind } = circuit.nodes;
  return {
    k,
    x: (row) => x + k * layout.x[row],
    y: (row) => y + k * layout.y[row],
    r: (row) => Math.max(SMALLEST[kind[row]], k * layout.radius[row]),
    across: (value) => x + k * value,
    down: (value) => y + k * value,
  };
}

function paintBands(pen, { layout, palette, plot, at }) {
  layout.lines.forEach((line, i) => {
    if (i % 2)
      pen.rect(plot.x, at.down(line.start), plot.width, line.size * at.k, {
        fill: palette.band,
        name: "band",
      });
  });
  if (layout.columns[0] && layout.columns.length * 9 > plot.width) return;
  for (const { start } of layout.columns) {
    const x = at.across(start);
    pen.line(x, plot.y, x, plot.y + plot.height, { stroke: palette.grid, width: 1 });
  }
}

/** Shown nodes that touch the plot. */
function inView({ circuit, state, plot, at }) {
  return circuit.rows.filter((row) => {
    if (!state.shown[row]) return false;
    const [x, y, r] = [at.x(row), at.y(row), at.r(row)];
    return (
      x + r >= plot.x && x - r <= plot.x + plot.width && y + r >= plot.y && y - r <= plot.y + plot.height
    );
  });
}

/** The edges of the node under the pointer, where that is not the chosen one. */
function pointedEdges(state) {
  return state.linksOf(state.cursor === state.selected ? -1 : state.cursor);
}

/** Nodes that are not dimmed: the chosen one and the one under the pointer, and those at the other ends of their edges. */
function neighbours({ circuit, state }, ...both) {
  const near = new Set([state.selected, state.cursor]);
  for (const { incoming, outgoing } of both) {
    for (const edge of incoming) near.add(circuit.edges.source[edge]);
    for (const edge of outgoing) near.add(circuit.edges.target[edge]);
  }
  return near;
}

function paintNodes(pen, { circuit, layout, state, palette, at }, visible, near) {
  const batches = Array.from({ length: 2 * KINDS * TONES }, () => []);
  const focused = state.selected >= 0;
  for (const row of visible) {
    const back = focused && !near.has(row) ? 0 : 1;
    batches[(back * KINDS + circuit.nodes.kind[row]) * TONES + layout.tone[row]].push(
      at.x(row),
      at.y(row),
      at.r(row),
    );
  }
  batches.forEach((marks, i) => {
    if (!marks.length) return;
    const shape = SHAPES[Math.floor(i / TONES) % KINDS];
    const alpha = i < KINDS * TONES ? 0.3 : 1;
    pen.marks(shape, marks, { fill: palette.tones[i % TONES], alpha, name: "node" });
  });
}

/** Edges of the chosen node, or else the strongest of all, and over them those of the node under the pointer. How many
    are drawn of how many, in words; empty where that is all. */
function paintEdges(pen, frame, chosen, pointed) {
  const { state } = frame;
  const told = [];
  const each = ({ incoming, outgoing }, name) => {
    for (const [edges, way] of [
      [incoming, "in"],
      [outgoing, "out"],
    ]) {
      const drawn = state.drawn(edges);
      stroke(pen, frame, drawn, name);
      if (drawn.length < edges.length) told.push(`${count(drawn.length)} of ${count(edges.length)} ${way}`);
    }
  };
  if (state.overall && state.selected < 0) {
    const strongest = state.strongestEdges();
    const all = state.shownEdges();
    stroke(pen, frame, strongest, "edge", state.cursor >= 0 ? 0.35 : 1);
    if (strongest.length < all) told.push(`${count(strongest.length)} of ${count(all)}`);
  }
  each(chosen, "edge");
  each(pointed, "edge pointed");
  return told.length ? `edges drawn: ${told.join(", ")}` : "";
}

/** How much of what passes the filters is drawn. */
function paintCount(pen, { palette, plot }, text) {
  const style = { fill: palette.quiet, halo: palette.paper, size: FONT - 1, anchor: "end", name: "count" };
  if (text) pen.text(plot.x + plot.width - 6, plot.height - 6, text, style);
}

/** Edges given strongest first, drawn weakest first; the widest is the strongest of them, the colour its sign. */
function stroke(pen, { circuit, state, palette, plot, at }, edges, name = "edge", strength = 1) {
  const { source, target, side, [state.measure]: value } = circuit.edges;
  const { size } = circuit.ranked(state.measure);
  const most = edges.length ? size[edges[0]] || 1 : 1;
  for (let i = edges.length - 1; i >= 0; i -= 1) {
    const [from, to, part] = [source[edges[i]], target[edges[i]], size[edges[i]] / most];
    const [x0, y0, x1, y1] = [at.x(from), at.y(from) - at.r(from), at.x(to), at.y(to) + at.r(to)];
    const outside =
      Math.max(x0, x1) < plot.x ||
      Math.min(x0, x1) > plot.x + plot.width ||
      Math.max(y0, y1) < plot.y ||
      Math.min(y0, y1) > plot.y + plot.height;
    if (outside) continue;
    const signed = value[edges[i]] >= 0 ? palette.edgePlus : palette.edgeMinus;
    const plain = Number.isNaN(value[edges[i]]) ? palette.quiet : signed;
    const colour = side ? palette.tones[SIDES + side[edges[i]]] : plain;
    pen.curve(x0, y0, x1, y1, {
      stroke: colour,
      width: 0.8 + 3.7 * part,
      alpha: strength * (0.4 + 0.5 * part),
      name,
    });
  }
}

/** A corner of paper beside each node that has a note. */
function paintNotes(pen, { state, palette, at }) {
  for (const row of state.notes.keys()) {
    if (!state.shown[row]) continue;
    const [x, y, r] = [at.x(row), at.y(row), at.r(row)];
    pen.rect(x + 0.6 * r, y - 0.6 * r - 8, 8, 8, { fill: palette.paper });
    pen.rect(x + 0.6 * r + 1, y - 0.6 * r - 7, 6, 6, { fill: palette.match, name: "note" });
  }
}

function paintRings(pen, { circuit, state, palette, at }) {
  const ring = (row, stroke, width, gap, name, dash = []) =>
    pen.ring(at.x(row), at.y(row), at.r(row) + gap, { stroke, width, name, dash });
  const pointed = state.cursor >= 0 ? state.cursor : state.selected;
  const same = pointed >= 0 ? circuit.elsewhere(pointed) : [];
  for (const row of same) if (state.shown[row]) ring(row, palette.accent, 2, 4, "same", [3, 3]);
  for (const row of state.picked) if (state.shown[row]) ring(row, palette.accent, 3.5, 2, "picked");
  for (const row of state.matches) if (state.shown[row]) ring(row, palette.match, 1.5, 2, "match");
  for (const row of state.groups.flatMap(({ rows }) => rows))
    if (state.shown[row]) ring(row, palette.group, 1.5, 3, "member");
  for (const row of state.pins) if (state.shown[row]) ring(row, palette.ink, 2, 3, "pin");
  if (state.selected >= 0) ring(state.selected, palette.accent, 3, 4, "chosen");
  if (state.cursor >= 0 && state.cursor !== state.selected)
    ring(state.cursor, palette.accent, 1.5, 3, "cursor");
}

/** Outlines under everything else, around the members that are shown; their names are returned with the room they
    take, to be written over the nodes. */
function paintGroups(pen, frame) {
  const { state, palette, plot, at } = frame;
  const ends = logitNames(pen, frame);
  const style = { fill: palette.ink, halo: palette.paper, size: FONT + 1, bold: true, name: "group-name" };
  const taken = [];
  for (const { name, rows } of state.groups) {
    const shown = rows.filter((row) => state.shown[row]);
    if (!shown.length) continue;
    const outline = polygonHull(shown.flatMap((row) => circleAround(at.x(row), at.y(row), at.r(row) + 9)));
    pen.outline(outline, { colour: palette.group, alpha: 0.09, name: "group" });
    const text = `${tokenText(name, LONGEST_NAME)} (${count(rows.length)})`;
    const size = { w: pen.measure(text, style.size, true) + 8, h: FONT + 3 };
    taken.push({ ...roomFor(outline, size, plot, [...ends, ...taken]), text, style });
  }
  return taken;
}

/** The room of the names of logits, which are always written below their marks. */
function logitNames(pen, { circuit, state, at }) {
  const { kind } = circuit.nodes;
  const rows = circuit.named.filter((row) => kind[row] === LOGIT && state.shown[row]);
  return rows.map((row) => {
    const w = pen.measure(shortName(circuit, row), FONT) + 4;
    return { x: at.x(row), y: at.y(row) + at.r(row) + FONT + 1, w, h: FONT + 2 };
  });
}

/** Where an outline's name fits: above its highest corner that is free, else under its lowest, else some lines above or
    below its highest, else over another. */
function roomFor(outline, { w, h }, plot, taken) {
  const corners = outline.toSorted((a, b) => a[1] - b[1]);
  const boxAt = ([x, y], gap) => ({ x: within(x, w / 2 + 2, plot), y: Math.max(plot.y + h, y + gap), w, h });
  const places = [...corners.map((corner) => boxAt(corner, -5)), boxAt(corners.at(-1), h)];
  for (const lines of [1, -1, 2, -2, 3, -3, 4, -4]) places.push(boxAt(corners[0], lines * (h + 1) - 5));
  return places.find((box) => !taken.some((other) => overlaps(box, other))) ?? places[0];
}

/** Where a text of this half width is centred so that it lies in the plot, near `x` if that is in it. */
function within(x, half, plot) {
  if (x < plot.x || x > plot.x + plot.width) return x;
  return Math.max(plot.x + half, Math.min(plot.x + plot.width - half, x));
}

function circleAround(x, y, r) {
  return Array.from({ length: 16 }, (_, i) => [
    x + r * Math.cos((i * Math.PI) / 8),
    y + r * Math.sin((i * Math.PI) / 8),
  ]);
}

/** Names that do not cover one another, nor those of groups: the marked nodes first, then others where no node is chosen. */
function paintNames(pen, frame, visible, { incoming, outgoing }, groupNames) {
  const { circuit, state, palette, plot, at } = frame;
  const { source, target } = circuit.edges;
  const isVisible = new Set(visible);
  const marked = [
    state.selected,
    state.cursor,
    ...visible.filter((row) => circuit.nodes.kind[row] === LOGIT),
    ...state.names.keys(),
    ...state.pins,
    ...[...incoming.slice(0, NAMED_NEIGHBOURS)].map((edge) => source[edge]),
    ...[...outgoing.slice(0, NAMED_NEIGHBOURS)].map((edge) => target[edge]),
  ].filter((row) => isVisible.has(row));
  const plain = state.selected < 0 ? circuit.byStrength.filter((row) => isVisible.has(row)) : [];
  if (visible.length > FEW) plain.length = Math.min(plain.length, STRONGEST_NAMED);
  const taken = [];
  const discs = visible.map((row) => [at.x(row), at.y(row), at.r(row)]);
  const seen = new Set();
  for (const [rank, row] of [...marked, ...plain].entries()) {
    const isNamed = state.names.has(row);
    if (seen.has(row) || (circuit.nodes.kind[row] === EMBEDDING && !isNamed)) continue;
    seen.add(row);
    const text = isNamed ? tokenText(state.names.get(row), LONGEST_NAME) : shortName(circuit, row);
    const below = at.y(row) + at.r(row) + FONT + 1;
    const y = below < plot.height - 2 ? below : at.y(row) - at.r(row) - 4;
    const w = pen.measure(text, FONT) + 4;
    const box = { x: within(at.x(row), w / 2 + 2, plot), y, w, h: FONT + 2 };
    if (taken.some((other) => overlaps(box, other))) continue;
    if (rank >= marked.length && groupNames.some((other) => overlaps(box, other))) continue;
    if (rank >= marked.length && discs.some((disc) => covers(box, disc))) continue;
    taken.push(box);
    pen.text(box.x, box.y, text, { fill: palette.ink, halo: palette.paper, size: FONT, name: "name" });
  }
}

function shortName(circuit, row) {
  const { kind } = circuit.nodes;
  if (kind[row] === ERROR) return circuit.title(row);
  if (kind[row] !== NEURON) return tokenText(circuit.label(row), 16);
  const [first] = circuit.doing(row).split(", ");
  return first ? `${circuit.short(row)} ${tokenText(first, 12)}` : circuit.short(row);
}

function overlaps(a, b) {
  return Math.abs(a.x - b.x) * 2 < a.w + b.w && Math.abs(a.y - b.y) < (a.h + b.h) / 2;
}

/** Whether a name (its base line at y, centred at x) touches a disc. */
function covers({ x, y, w, h }, [cx, cy, r]) {
  const dx = Math.max(0, Math.abs(cx - x) - w / 2);
  const dy = Math.max(0, y - h + 3 - cy, cy - y - 2);
  return dx * dx + dy * dy < r * r;
}
