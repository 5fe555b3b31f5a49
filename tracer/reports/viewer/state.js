// What the reader chose: node, pins, groups, thresholds; and which nodes and edges that leaves.
// Knows the circuit. Refuses to know elements of the page and drawing; whoever wants to know of changes listens.

import { EMBEDDING, LOGIT, known } from "./data.js";

/** Attribution if any edge has one; else weight, if shares would miss edges into logits; else share. */
function bestMeasure({ nodes, edges }) {
  if (known(edges.attribution)) return "attribution";
  const misses = edges.share.some((share, i) => Number.isNaN(share) && nodes.kind[edges.target[i]] === LOGIT);
  return misses || !known(edges.share) ? "weight" : "share";
}

export class State {
  #circuit;
  #listeners = [];

  constructor(circuit) {
    this.#circuit = circuit;
    this.selected = -1; // the chosen node
    this.cursor = -1; // the node under the pointer or reached with arrow keys
    this.matches = []; // of the search
    this.pins = new Set();
    this.groups = circuit.header.groups.map(([name, rows]) => ({ name, rows }));
    this.nodeThreshold = 0;
    this.expert = ""; // whose neurons alone are shown, as `Circuit.expertName` has it; all of them if empty
    this.edgeThreshold = 0;
    this.measure = bestMeasure(circuit);
    this.seen = 0; // of a comparison: 0 both graphs, 1 the first alone, 2 the last
    this.incoming = true;
    this.outgoing = true;
    this.overall = true;
    this.overallCount = 100;
    this.shown = new Uint8Array(circuit.nNodes).fill(1);
  }

  listen(listener) {
    this.#listeners.push(listener);
  }

  /** Take over new values and tell every listener the names of those that changed. */
  set(changes) {
    const names = Object.keys(changes).filter((name) => this[name] !== changes[name]);
    if (!names.length) return;
    Object.assign(this, changes);
    const shown = ["selected", "pins", "groups", "nodeThreshold", "expert", "seen"];
    if (shown.some((name) => names.includes(name))) this.#refresh();
    for (const listener of this.#listeners) listener(new Set(names));
  }

  togglePin(row) {
    const pins = new Set(this.pins);
    if (!pins.delete(row)) pins.add(row);
    this.set({ pins });
  }

  /** Nodes below the threshold or of other experts go, except those the reader marked; embeddings and logits always
      stay. */
  #refresh() {
    const { strength } = this.#circuit;
    const { kind } = this.#circuit.nodes;
    for (let row = 0; row < this.shown.length; row += 1) {
      const stays = kind[row] === EMBEDDING || kind[row] === LOGIT;
      const ofExpert = !this.expert || this.#circuit.expertName(row) === this.expert;
      this.shown[row] = stays || (strength[row] >= this.nodeThreshold && ofExpert) ? 1 : 0;
    }
    for (const row of this.pins) this.shown[row] = 1;
    for (const group of this.groups) for (const row of group.rows) this.shown[row] = 1;
    if (this.selected >= 0) this.shown[this.selected] = 1;
    const { side } = this.#circuit.nodes;
    for (let row = 0; side && row < this.shown.length; row += 1) {
      if (!this.#isSeen(side[row])) this.shown[row] = 0;
    }
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
    return (
      size[edge] >= this.edgeThreshold && this.shown[source[edge]] === 1 && this.shown[target[edge]] === 1
    );
  }

  shownEdges() {
    const { size } = this.#circuit.ranked(this.measure);
    let sum = 0;
    for (let edge = 0; edge < size.length; edge += 1) if (this.#passes(edge, size)) sum += 1;
    return sum;
  }

  /** Edges of a node that pass the filters, strongest first. */
  edgesOf(row, direction) {
    const ranked = this.#circuit.ranked(this.measure);
    return ranked[direction].of(row).filter((edge) => this.#passes(edge, ranked.size));
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
    if (this.selected < 0) return { incoming: [], outgoing: [] };
    return {
      incoming: this.incoming ? this.edgesOf(this.selected, "incoming") : [],
      outgoing: this.outgoing ? this.edgesOf(this.selected, "outgoing") : [],
    };
  }
}
