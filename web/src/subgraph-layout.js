// Where the boxes lie: a row for each layer, lower layers at the bottom, token positions from left to right.
// Knows boxes and their links. Refuses to know circuit, state, drawing and what the reader moved.

import { Graph, layout } from "@dagrejs/dagre";

import { EMBEDDING, LOGIT } from "./data.js";

const LINE = 14; // height of a line of text
const PAD = 8;
const NARROWEST = 44;
const WIDEST = 232;
const IN_ROW = 12; // boxes, at least so many; a fuller row becomes two
const GAPS = { nodesep: 22, ranksep: 64, edgesep: 6 };
const LINKS = 1.2; // for each box, the strongest, that decide where boxes lie
const BETWEEN = 2; // links for each box, the strongest, whose ends never share a row
const MOST_BENDS = 700; // of long links that are laid out

/**
 * @typedef {import("./subgraph-sums.js").Box} Box
 * @typedef {import("./subgraph-sums.js").Link} Link
 * @typedef {{ x: number, y: number, width: number, height: number }} Place of a box; x, y: its middle
 */

/** How large a box must be for its text. `measure(text, isBold)`: width in pixels. */
export function sizeOf(box, measure) {
  const widths = [measure(box.name, true), ...box.lines.map((line) => measure(line, false))];
  const width = Math.min(WIDEST, Math.max(NARROWEST, Math.max(...widths) + 2 * PAD));
  const isPill = box.kind === LOGIT && !box.isGroup;
  return { width: Math.ceil(width + (isPill ? 10 : 0)), height: LINE * (1 + box.lines.length) + 2 * PAD };
}

/** Places of all boxes. @returns {Place[]} */
export function arrange(boxes, links, sizes) {
  const rows = toRows(boxes, links);
  const rank = new Map(rows.flatMap((row, i) => row.map((box) => [box, i])));
  const graph = new Graph();
  // The rows are ours; the order in them and all places are dagre's, which wants a rank free between any two.
  const ranker = (g) => {
    for (const name of g.nodes()) g.node(name).rank = 2 * (rank.get(Number(name)) ?? -1);
  };
  graph.setGraph(/** @type {any} */ ({ ...GAPS, rankdir: "BT", ranker }));
  graph.setDefaultEdgeLabel(() => ({}));
  boxes.forEach((_, i) => graph.setNode(String(i), { ...sizes[i] }));
  for (const { source, target, weight } of rising(links, rank))
    graph.setEdge(String(source), String(target), { weight });
  const customOrder = (ranked, order) => {
    order(ranked);
    byPosition(ranked, boxes);
  };
  layout(graph, { customOrder });
  return boxes.map((_, i) => {
    const { x, y, width, height } = graph.node(String(i));
    return { x, y, width, height };
  });
}

/** Boxes by layer, upward. Linked boxes never share a row, and a row is not endless. */
function toRows(boxes, links) {
  const most = Math.max(IN_ROW, Math.ceil(Math.sqrt(3 * boxes.length)));
  const near = boxes.map(() => new Set());
  for (const { source, target } of links.slice(0, BETWEEN * boxes.length)) {
    near[source].add(target);
    near[target].add(source);
  }
  const order = boxes.map((_, i) => i);
  order.sort((a, b) => boxes[a].layer - boxes[b].layer || boxes[a].position - boxes[b].position);
  const rows = [];
  for (const i of order) {
    const row = rows.at(-1);
    const same = row && level(boxes[row[0]]) === level(boxes[i]);
    if (same && row.length < most && !row.some((other) => near[i].has(other))) row.push(i);
    else rows.push([i]);
  }
  return rows;
}

/** Ends apart, and the rest by layer. */
function level({ kind, isGroup, layer }) {
  if (!isGroup && kind === EMBEDDING) return -1;
  return !isGroup && kind === LOGIT ? Infinity : Math.round(layer);
}

/** The strongest links as edges that rise, each pair once, as many as can be laid out quickly. */
function rising(links, rank) {
  const edges = new Map();
  let bends = 0;
  const most = Math.abs(links[0]?.value) || 1;
  for (const { source, target, value } of links) {
    const [low, high] = rank.get(source) < rank.get(target) ? [source, target] : [target, source];
    const span = rank.get(high) - rank.get(low);
    if (edges.size >= LINKS * rank.size) break;
    if (span === 0 || edges.has(`${low},${high}`) || bends + 2 * span - 1 > MOST_BENDS) continue;
    bends += 2 * span - 1;
    edges.set(`${low},${high}`, { source: low, target: high, weight: 1 + (4 * Math.abs(value)) / most });
  }
  return edges.values();
}

/** Dagre's order of each rank, but for its boxes, which stand by position and only then as dagre has them. */
function byPosition(graph, boxes) {
  const ranks = new Map();
  for (const name of graph.nodes()) {
    const { dummy, rank } = graph.node(name);
    if (!dummy) ranks.set(rank, [...(ranks.get(rank) ?? []), name]);
  }
  const place = (name) => graph.node(name).order;
  const position = (name) => Math.round(boxes[Number(name)].position);
  for (const names of ranks.values()) {
    const orders = names.map(place).sort((a, b) => a - b);
    names.sort((a, b) => position(a) - position(b) || place(a) - place(b));
    names.forEach((name, i) => (graph.node(name).order = orders[i]));
  }
}
