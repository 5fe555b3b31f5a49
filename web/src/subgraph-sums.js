// The pinned nodes and groups as boxes, and what all kept edges between the members of two boxes add up to.
// Knows circuit and state. Refuses to know elements of the page, where a box lies and what paths carry.

import { EMBEDDING, LOGIT, NEURON, known } from "./data.js";
import { count, number, tokenText } from "./format.js";

export const MOST_NODES = 200;
export const MOST_GROUPS = 50;
export const MOST_ENDS = 20; // of embeddings, and of logits, that nobody pinned
const COMMON = 3; // tokens that a group is said to promote
const NAME = 26; // signs of a line in a box

/**
 * @typedef {{
 *   key: string, isGroup: boolean, isAdded: boolean, kind: number, rows: number[], name: string, lines: string[],
 *   attribution: number, layer: number, position: number
 * }} Box
 * isAdded: an embedding or logit that nobody pinned; layer, position: means over its rows.
 * @typedef {{ source: number, target: number, value: number, edges: number }} Link between boxes by their numbers
 */

/** What sums are of: shares are of one target each, so that they have no sum over several. */
export function summedMeasure(circuit, state) {
  if (state.measure !== "share") return state.measure;
  return known(circuit.edges.attribution) ? "attribution" : "weight";
}

/** Whether the graph that is looked at has what is of this side of a comparison. */
function sees(state, side) {
  return side === undefined || state.seen === 0 || side > 2 || side === state.seen;
}

/** Boxes, and how many of what was marked are left out: the weakest.
    @returns {{ boxes: Box[], left: { nodes: number, groups: number, embeddings: number, logits: number } }} */
export function makeBoxes(circuit, state, { embeddings, logits }) {
  const { side } = circuit.nodes;
  const isSeen = (row) => sees(state, side?.[row]);
  const grouped = new Set(state.groups.flatMap(({ rows }) => rows));
  const pins = [...state.pins].filter((row) => !grouped.has(row) && isSeen(row));
  const groups = state.groups
    .map((group) => ({ ...group, rows: group.rows.filter(isSeen) }))
    .filter(({ rows }) => rows.length);
  const nodes = strongest(pins, MOST_NODES, (row) => circuit.strength[row]);
  const sets = strongest(groups, MOST_GROUPS, ({ rows }) => Math.abs(sumOf(circuit, rows)));
  const boxes = [
    ...sets.map((group) => groupBox(circuit, group)),
    ...nodes.map((row) => nodeBox(circuit, state, row)),
  ];
  const ends = boxes.length ? openEnds(circuit, state, boxes) : { [EMBEDDING]: [], [LOGIT]: [] };
  const added = { [EMBEDDING]: embeddings ? ends[EMBEDDING] : [], [LOGIT]: logits ? ends[LOGIT] : [] };
  for (const rows of Object.values(added))
    for (const row of rows.slice(0, MOST_ENDS))
      boxes.push({ ...nodeBox(circuit, state, row), isAdded: true });
  const left = {
    nodes: pins.length - nodes.length,
    groups: groups.length - sets.length,
    embeddings: Math.max(0, added[EMBEDDING].length - MOST_ENDS),
    logits: Math.max(0, added[LOGIT].length - MOST_ENDS),
  };
  return { boxes, left };
}

/** The `most` of the largest size, in the order that all have. */
function strongest(all, most, size) {
  if (all.length <= most) return all;
  const kept = new Set([...all].sort((a, b) => size(b) - size(a)).slice(0, most));
  return all.filter((one) => kept.has(one));
}

function sumOf(circuit, rows) {
  const { attribution } = circuit.nodes;
  return rows.reduce((sum, row) => sum + (attribution[row] || 0), 0);
}

function mean(values) {
  return values.reduce((sum, value) => sum + value, 0) / values.length;
}

/** @returns {Box} */
function nodeBox(circuit, state, row) {
  const { kind, layer, position, attribution } = circuit.nodes;
  const own = state.names?.get(row);
  const isEnd = kind[row] === EMBEDDING || kind[row] === LOGIT;
  const title = isEnd ? `\u201c${tokenText(circuit.label(row), 20)}\u201d` : circuit.title(row);
  const doing = circuit.doing(row);
  const what = [own ? title : "", doing].filter(Boolean).join(" \u00b7 ");
  const where = isEnd ? (kind[row] === LOGIT ? "logit" : `pos ${position[row]}`) : circuit.place(row);
  return {
    key: `node ${row}`,
    isGroup: false,
    isAdded: false,
    kind: kind[row],
    rows: [row],
    name: own ? tokenText(own, NAME) : tokenText(title, NAME),
    lines: [tokenText(what || " ", NAME), `${tokenText(where, 18)} ${signed(attribution[row])}`]
      .map((line) => line.replace(/^\u2423+|\u2423+$/g, "").trim())
      .filter(Boolean),
    attribution: attribution[row],
    layer: layer[row],
    position: position[row],
  };
}

/** The key of a group's box, by which its place is kept. */
export function groupKey(name) {
  return `group ${name}`;
}

/** @returns {Box} */
function groupBox(circuit, { name, rows }) {
  const { layer, position, attribution } = circuit.nodes;
  const sum = sumOf(circuit, rows);
  const tokens = promoted(circuit, rows);
  const isKnown = rows.some((row) => Number.isFinite(attribution[row]));
  return {
    key: groupKey(name),
    isGroup: true,
    isAdded: false,
    kind: NEURON,
    rows,
    name: tokenText(name, NAME),
    lines: [
      ...(tokens.length ? [tokenText(`promotes ${tokens.join(", ")}`, NAME + 6)] : []),
      `${count(rows.length)} node${rows.length === 1 ? "" : "s"}${isKnown ? `, sum ${signed(sum)}` : ""}`,
    ],
    attribution: isKnown ? sum : NaN,
    layer: mean(rows.map((row) => layer[row])),
    position: mean(rows.map((row) => position[row])),
  };
}

/** A number with its sign; nothing where there is none. */
export function signed(value) {
  if (!Number.isFinite(value)) return "";
  return (value > 0 ? "+" : "") + number(value);
}

/** Tokens that most members promote, at least two of them where there are so many; of equally many those most promoted. */
export function promoted(circuit, rows) {
  const found = new Map();
  for (const row of rows) {
    const lists = circuit.says(row)?.lists ?? [];
    for (const [token, value] of lists.find(([heading]) => heading === "promotes")?.[1] ?? []) {
      const [members, sum] = found.get(token) ?? [0, 0];
      found.set(token, [members + 1, sum + value]);
    }
  }
  const needed = Math.min(2, rows.length);
  return [...found]
    .filter(([, [members]]) => members >= needed)
    .sort(([, a], [, b]) => b[0] - a[0] || b[1] - a[1])
    .slice(0, COMMON)
    .map(([token]) => tokenText(token.trim() || token, 12));
}

/** Embeddings and logits in no box that an edge links to one, by kind, the most linked first. */
function openEnds(circuit, state, boxes) {
  const { kind } = circuit.nodes;
  const { source, target, side } = circuit.edges;
  const { size } = circuit.ranked(summedMeasure(circuit, state));
  const owner = owners(circuit, boxes);
  const linked = new Float64Array(circuit.nNodes);
  for (let edge = 0; edge < size.length; edge += 1) {
    if (!sees(state, side?.[edge])) continue;
    const [from, to] = [source[edge], target[edge]];
    if (owner[from] < 0 && owner[to] >= 0) linked[from] += size[edge];
    if (owner[to] < 0 && owner[from] >= 0) linked[to] += size[edge];
  }
  const open = (of) =>
    circuit.named
      .filter((row) => kind[row] === of && linked[row] > 0)
      .sort((a, b) => linked[b] - linked[a] || a - b);
  return { [EMBEDDING]: open(EMBEDDING), [LOGIT]: open(LOGIT) };
}

/** The number of every node's box, -1 of those in none. */
function owners(circuit, boxes) {
  const owner = new Int32Array(circuit.nNodes).fill(-1);
  boxes.forEach(({ rows }, i) => rows.forEach((row) => (owner[row] = i)));
  return owner;
}

/** Sums over every edge of the page, filtered or not: between two boxes, largest first, and within each.
    @returns {{ links: Link[], within: { value: number, edges: number }[] }} */
export function sumLinks(circuit, state, boxes) {
  const n = boxes.length;
  const owner = owners(circuit, boxes);
  const sums = new Float64Array(n * n);
  const edges = new Uint32Array(n * n);
  const { source, target, side } = circuit.edges;
  const values = circuit.edges[summedMeasure(circuit, state)];
  for (let edge = 0; edge < values.length; edge += 1) {
    const [from, to] = [owner[source[edge]], owner[target[edge]]];
    if (from < 0 || to < 0 || Number.isNaN(values[edge]) || !sees(state, side?.[edge])) continue;
    sums[from * n + to] += values[edge];
    edges[from * n + to] += 1;
  }
  const links = [];
  for (let i = 0; i < n * n; i += 1) {
    const [from, to] = [Math.floor(i / n), i % n];
    if (from !== to && edges[i]) links.push({ source: from, target: to, value: sums[i], edges: edges[i] });
  }
  links.sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
  const within = boxes.map((_, i) => ({ value: sums[i * n + i], edges: edges[i * n + i] }));
  return { links, within };
}
