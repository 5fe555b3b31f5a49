// What the picture is made of, from back to front, told to a pen.
// Knows circuit, layout and state. Refuses to know whether the pen draws on a canvas or writes SVG.

/* global d3 */
import { EMBEDDING, ERROR, KINDS, LOGIT, NEURON } from "./data.js";
import { count, tokenText } from "./format.js";
import { SIDES, TONES, middle } from "./layout.js";

export const LEFT = 58;
export const BOTTOM = 78;
const MOST_DRAWN = 250; // of the chosen node, in each direction
const FEW = 140; // nodes in view; so few are all named where there is room, of more only the strongest
const STRONGEST_NAMED = 24;
const NAMED_NEIGHBOURS = 8;
const SHAPES = { [NEURON]: "circle", [EMBEDDING]: "square", [LOGIT]: "diamond", [ERROR]: "cross" };
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
  paintEdges(pen, frame, edges);
  const visible = inView(frame);
  paintNodes(pen, frame, visible, neighbours(frame, edges));
  paintRings(pen, frame);
  for (const { x, y, text, style } of groupNames) pen.text(x, y, text, style);
  paintNames(pen, frame, visible, edges);
  pen.unclip();
  paintLayerAxis(pen, frame);
  paintTokenAxis(pen, frame);
}

function projection({ layout, transform: { x, y, k } }) {
  return {
    k,
    x: (row) => x + k * layout.x[row],
    y: (row) => y + k * layout.y[row],
    r: (row) => Math.max(1.3, k * layout.radius[row]),
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

function neighbours({ circuit, state }, { incoming, outgoing }) {
  const near = new Set([state.selected]);
  for (const edge of incoming) near.add(circuit.edges.source[edge]);
  for (const edge of outgoing) near.add(circuit.edges.target[edge]);
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

function paintEdges(pen, frame, { incoming, outgoing }) {
  const { state } = frame;
  if (state.overall && state.selected < 0) stroke(pen, frame, state.strongestEdges());
  stroke(pen, frame, incoming.slice(0, MOST_DRAWN));
  stroke(pen, frame, outgoing.slice(0, MOST_DRAWN));
}

/** Edges given strongest first, drawn weakest first; the widest is the strongest of them, the colour its sign. */
function stroke(pen, { circuit, state, palette, plot, at }, edges) {
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
      alpha: 0.4 + 0.5 * part,
      name: "edge",
    });
  }
}

function paintRings(pen, { state, palette, at }) {
  const ring = (row, stroke, width, gap, name) =>
    pen.ring(at.x(row), at.y(row), at.r(row) + gap, { stroke, width, name });
  for (const row of state.matches) if (state.shown[row]) ring(row, palette.match, 1.5, 2, "match");
  for (const { rows } of state.groups) for (const row of rows) ring(row, palette.group, 1.5, 3, "member");
  for (const row of state.pins) ring(row, palette.ink, 2, 3, "pin");
  if (state.selected >= 0) ring(state.selected, palette.accent, 3, 4, "chosen");
  if (state.cursor >= 0 && state.cursor !== state.selected)
    ring(state.cursor, palette.accent, 1.5, 3, "cursor");
}

/** Outlines under everything else; their names are returned, to be written over the nodes. */
function paintGroups(pen, { state, palette, at }) {
  const style = { fill: palette.ink, halo: palette.paper, size: FONT + 1, bold: true };
  return state.groups.map(({ name, rows }) => {
    const outline = d3.polygonHull(rows.flatMap((row) => circleAround(at.x(row), at.y(row), at.r(row) + 9)));
    pen.outline(outline, { colour: palette.group, alpha: 0.09, name: "group" });
    const top = outline.reduce((best, point) => (point[1] < best[1] ? point : best));
    const text = `${tokenText(name)} (${count(rows.length)})`;
    return { x: top[0], y: top[1] - 5, text, style };
  });
}

function circleAround(x, y, r) {
  return Array.from({ length: 16 }, (_, i) => [
    x + r * Math.cos((i * Math.PI) / 8),
    y + r * Math.sin((i * Math.PI) / 8),
  ]);
}

/** Names that do not cover one another: the marked nodes first, then others where no node is chosen. */
function paintNames(pen, frame, visible, { incoming, outgoing }) {
  const { circuit, state, palette, plot, at } = frame;
  const { source, target } = circuit.edges;
  const isVisible = new Set(visible);
  const marked = [
    state.selected,
    state.cursor,
    ...visible.filter((row) => circuit.nodes.kind[row] === LOGIT),
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
    if (seen.has(row) || circuit.nodes.kind[row] === EMBEDDING) continue;
    seen.add(row);
    const text = shortName(circuit, row);
    const below = at.y(row) + at.r(row) + FONT + 1;
    const y = below < plot.height - 2 ? below : at.y(row) - at.r(row) - 4;
    const box = { x: at.x(row), y, w: pen.measure(text, FONT) + 4, h: FONT + 2 };
    if (taken.some((other) => overlaps(box, other))) continue;
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

function paintLayerAxis(pen, { circuit, layout, state, palette, plot, at, height }) {
  pen.rect(0, 0, plot.x, height, { fill: palette.paper });
  pen.line(plot.x, 0, plot.x, plot.y + plot.height, { stroke: palette.axis, width: 1 });
  const marked = state.cursor >= 0 ? state.cursor : state.selected;
  const here = marked >= 0 ? circuit.nodes.layer[marked] + 1 : -1;
  let free = Infinity;
  layout.lines.forEach((line, i) => {
    const y = at.down(middle(line)) + 4;
    if (y > free || y < FONT || y > plot.height - 2) return;
    const text = i === 0 ? "input" : i === layout.lines.length - 1 ? "logits" : `L${i - 1}`;
    pen.text(plot.x - 8, y, text, axisStyle(palette, i === here, "end"));
    free = y - FONT - 3;
  });
}

function paintTokenAxis(pen, { circuit, layout, state, palette, plot, at, width, height }) {
  const top = plot.y + plot.height;
  pen.rect(0, top, width, height - top, { fill: palette.paper });
  pen.line(plot.x, top, width, top, { stroke: palette.axis, width: 1 });
  const marked = state.cursor >= 0 ? state.cursor : state.selected;
  const here = marked >= 0 ? circuit.nodes.position[marked] : -1;
  const texts = circuit.tokens.map((token) => tokenText(token, 12));
  const flat = layout.columns.every((column, i) => pen.measure(texts[i], FONT) + 6 < column.size * at.k);
  let free = -Infinity;
  layout.columns.forEach((column, i) => {
    const x = at.across(middle(column));
    if (x < Math.max(free, plot.x) || x > width - 4) return;
    const style = axisStyle(palette, i === here, flat ? "middle" : "end");
    pen.text(x, top + 14, String(i), { ...axisStyle(palette, i === here, "middle"), size: 10 });
    pen.text(flat ? x : x + 4, top + (flat ? 31 : 27), texts[i], { ...style, angle: flat ? 0 : -42 });
    free = flat ? x : x + Math.max(17, pen.measure(String(i), 10) + 7);
  });
}

function axisStyle(palette, isHere, anchor) {
  return { fill: isHere ? palette.ink : palette.quiet, bold: isHere, size: FONT, anchor, name: "axis" };
}
