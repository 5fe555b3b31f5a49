// What the reader chose and wrote: node, pins, groups, names, notes, filters; and which nodes and edges that leaves.
// Knows the circuit. Refuses to know elements of the page and drawing; whoever wants to know of changes listens.

import { ERROR, KINDS, LOGIT, NEURON, known } from "./data.js";
import { tokenText } from "./format.js";

export const BOTH_SIGNS = "both"; // or "for", "against"
const MOST_DRAWN = 250; // of the chosen node, in each direction, unless all are asked for
const MARKED = ["selected", "pins", "groups", "picked"];

/** Attribution if any edge has one; else weight, if shares would miss edges into logits; else share. */
function bestMeasure({ nodes, edges }) {
  if (known(edges.attribution)) return "attribution";
  const misses = edges.share.some((share, i) => Number.isNaN(share) && nodes.kind[edges.target[i]] === LOGIT);
  return misses || !known(edges.share) ? "weight" : "share";
}

/** The names of the filters in the state; each holds a plain value, to be saved. */
export const FILTERS = [
  ...["nodeThreshold", "influenceThreshold", "nodeSign", "edgeSign", "lowestLayer", "highestLayer"],
  ...["positionZero", "alwaysOn", "groupsStay", "kinds", "expert", "edgeThreshold", "seen"],
];

/** Whether a number is of a sign that is asked for; one that is not known or 0 is of neither. */
function hasSign(value, sign) {
  return sign === BOTH_SIGNS || (sign === "for" ? value > 0 : value < 0);
}

function same(a, b) {
  return a.every((one, row) => one === b[row]);
}

/** How many of the ranked edges are of this size or larger. */
function nAtLeast(order, size, threshold) {
  let [low, high] = [0, order.length];
  while (low < high) {
    const at = (low + high) >>> 1;
    if (size[order[at]] >= threshold) low = at + 1;
    else high = at;
  }
  return low;
}

export class State {
  #circuit;
  #listeners = [];
  #filtersAtStart;
  #nEdges = -1; // that are shown; -1 until it is asked for

  constructor(circuit) {
    this.#circuit = circuit;
    this.selected = -1; // the chosen node
    this.cursor = -1; // the node under the pointer or reached with arrow keys
    this.matches = []; // of the search
    this.lassoing = false; // a drag draws a lasso without Shift too
    this.pins = new Set(circuit.header.pins);
    /** @type {Set<number>} rows that a lasso or Shift+Enter took up; set as a new Set */
    this.picked = new Set();
    this.groups = circuit.header.groups.map(([name, rows]) => ({ name, rows }));
    /** @type {Map<number, string>} what the reader calls nodes, by row; set as a new Map */
    this.names = new Map(circuit.header.called);
    /** @type {Map<number, string>} what the reader wrote about nodes, by row; set as a new Map */
    this.notes = new Map(circuit.header.remarks);
    this.subgraphOpen = false; // whether the subgraph pane is
    /** @type {Map<string, { x: number, y: number }>} where the reader moved its boxes, by key; set as a new Map */
    this.subgraph = new Map();
    this.savedAs = ""; // what the marks were when they were last saved, as saved.js has it
    this.theme = ""; // "light" or "dark" once the reader chose; else as the system has it
    this.nodeThreshold = 0; // least |attribution|, or influence where no node has an attribution
    this.influenceThreshold = 0;
    this.nodeSign = BOTH_SIGNS;
    this.edgeSign = BOTH_SIGNS;
    this.lowestLayer = 0;
    this.highestLayer = circuit.layers - 1;
    this.positionZero = true;
    this.alwaysOn = true;
    this.groupsStay = true; // nodes in groups are shown whatever the other filters say
    this.kinds = 2 ** KINDS - 1; // a bit for each kind, as numbered in data.js
    this.expert = ""; // whose neurons alone are shown, as `Circuit.expertName` has it; all of them if empty
    this.edgeThreshold = 0;
    this.seen = 0; // of a comparison: 0 both graphs, 1 the first alone, 2 the last
    this.#filtersAtStart = Object.fromEntries(FILTERS.map((name) => [name, this[name]]));
    this.measure = bestMeasure(circuit);
    this.incoming = true;
    this.outgoing = true;
    this.overall = true;
    this.overallCount = 100;
    this.drawAll = false; // every edge of the chosen node, not the strongest ones alone
    this.placed = new Uint8Array(circuit.nNodes).fill(1); // 1 for nodes that take up room in the picture
    this.shown = this.placed; // 1 for nodes that are drawn
  }

  listen(listener) {
    this.#listeners.push(listener);
  }

  /** Take over new values and tell every listener the names of those that changed. */
  set(changes) {
    const names = Object.keys(changes).filter((name) => this[name] !== changes[name]);
    if (!names.length) return;
    Object.assign(this, changes);
    const before = this.shown;
    if ([...MARKED, ...FILTERS].some((name) => names.includes(name))) this.#refresh();
    const counted = this.shown === before && !["measure", ...FILTERS].some((name) => names.includes(name));
    if (!counted) this.#nEdges = -1;
    for (const listener of this.#listeners) listener(new Set(names));
  }

  /** Call a node `text`, or nothing more if it is blank; `which` is "names" or "notes". */
  write(which, row, text) {
    const written = new Map(this[which]);
    if (text.trim() === (written.get(row) ?? "")) return;
    if (text.trim()) written.set(row, text.trim());
    else written.delete(row);
    this.set({ [which]: written });
  }

  togglePin(row) {
    const pins = new Set(this.pins);
    if (!pins.delete(row)) pins.add(row);
    this.set({ pins });
  }

  /** What the reader calls a node, or what it is. */
  title(row) {
    return this.names.has(row) ? tokenText(this.names.get(row), 60) : this.#circuit.title(row);
  }

  /** The number of nodes that a filter is against and that are shown, since the reader marked them. */
  get nKept() {
    const passes = this.#filter();
    return [...this.#marked()].filter((row) => row >= 0 && this.shown[row] && !passes(row)).length;
  }

  /** The filters that are not as they were at the start. */
  get changedFilters() {
    return FILTERS.filter((name) => this[name] !== this.#filtersAtStart[name]);
  }

  resetFilters() {
    this.set(this.#filtersAtStart);
  }

  #marked() {
    const grouped = this.groupsStay ? this.groups.flatMap(({ rows }) => rows) : [];
    return new Set([this.selected, ...this.pins, ...this.picked, ...grouped]);
  }

  /** Nodes that a filter is against go, except those the reader marked; a new array where that changed something. Of a
      comparison the graph that is not looked at goes too, but keeps its place. */
  #refresh() {
    const passes = this.#filter();
    const placed = new Uint8Array(this.#circuit.nNodes);
    for (let row = 0; row < placed.length; row += 1) placed[row] = passes(row) ? 1 : 0;
    for (const row of this.#marked()) if (row >= 0) placed[row] = 1;
    const { side } = this.#circuit.nodes;
    const shown = side ? placed.map((one, row) => (this.#isSeen(side[row]) ? one : 0)) : placed;
    if (!same(placed, this.placed)) this.placed = placed;
    if (!same(shown, this.shown)) this.shown = shown;
  }

  /** Whether the filters let a node pass. Embeddings and logits pass all but those of kinds and of position 0. */
  #filter() {
    const { strength, isAlwaysOn } = this.#circuit;
    const { kind, layer, position, attribution, influence } = this.#circuit.nodes;
    const { nodeThreshold, influenceThreshold, nodeSign, lowestLayer, highestLayer } = this;
    return (row) => {
      if (!((this.kinds >> kind[row]) & 1)) return false;
      if (!this.positionZero && position[row] === 0) return false;
      if (kind[row] !== NEURON && kind[row] !== ERROR) return true;
      return (
        strength[row] >= nodeThreshold &&
        !(influence[row] < influenceThreshold) &&
        hasSign(attribution[row], nodeSign) &&
        layer[row] >= lowestLayer &&
        layer[row] <= highestLayer &&
        (this.alwaysOn || !isAlwaysOn(row)) &&
        (!this.expert || this.#circuit.expertName(row) === this.expert)
      );
    };
  }

  /** Whether the graph that is looked at has what is of this side. */
  #isSeen(side) {
    return this.seen === 0 || side > 2 || side === this.seen;
  }

  shownNodes() {
    return this.shown.reduce((sum, one) => sum + one, 0);
  }

  #passes(edge, size) {
    const { source, target, side } = this.#circuit.edges;
    if (side && !this.#isSeen(side[edge])) return false;
    if (!hasSign(this.#circuit.edges[this.measure][edge], this.edgeSign)) return false;
    return (
      size[edge] >= this.edgeThreshold && this.shown[source[edge]] === 1 && this.shown[target[edge]] === 1
    );
  }

  shownEdges() {
    if (this.#nEdges < 0) this.#nEdges = this.#countEdges();
    return this.#nEdges;
  }

  /** The edges that pass: of those that are large enough, which are the first of the ranking, all where nothing else
      is asked; else one loop without calls, since it runs over every edge at each move of a slider. */
  #countEdges() {
    const { shown, edgeThreshold, edgeSign, seen } = this;
    const { source, target, side, [this.measure]: value } = this.#circuit.edges;
    const { size, order } = this.#circuit.ranked(this.measure);
    const seesAll = !side || seen === 0;
    if (edgeSign === BOTH_SIGNS && seesAll && !shown.includes(0)) return nAtLeast(order, size, edgeThreshold);
    const sign = { [BOTH_SIGNS]: 0, for: 1, against: -1 }[edgeSign];
    let sum = 0;
    for (let edge = 0; edge < size.length; edge += 1) {
      if (size[edge] < edgeThreshold || !shown[source[edge]] || !shown[target[edge]]) continue;
      if (sign && !(value[edge] * sign > 0)) continue;
      if (seesAll || side[edge] > 2 || side[edge] === seen) sum += 1;
    }
    return sum;
  }

  /** Edges of a node that pass the filters, strongest first. */
  edgesOf(row, direction) {
    const ranked = this.#circuit.ranked(this.measure);
    return ranked[direction].of(row).filter((edge) => this.#passes(edge, ranked.size));
  }

  /** Those of a node's edges, strongest first, that are drawn. */
  drawn(edges) {
    return this.drawAll ? edges : edges.slice(0, MOST_DRAWN);
  }

  /** The strongest edges overall that pass the filters, strongest first. */
  strongestEdges() {
    const { order, size } = this.#circuit.ranked(this.measure);
    const kept = [];
    for (const edge of order) {
      if (kept.length >= this.overallCount || size[edge] < this.edgeThreshold) break;
      if (this.#passes(edge, size)) kept.push(edge);
    }
    return kept;
  }

  /** The chosen node's edges in the directions that are switched on. */
  chosenEdges() {
    return this.linksOf(this.selected);
  }

  /** A node's edges in the directions that are switched on; none of -1. */
  linksOf(row) {
    return {
      incoming: row >= 0 && this.incoming ? this.edgesOf(row, "incoming") : new Uint32Array(),
      outgoing: row >= 0 && this.outgoing ? this.edgesOf(row, "outgoing") : new Uint32Array(),
    };
  }
}
