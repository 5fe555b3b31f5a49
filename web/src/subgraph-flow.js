// How much of the metric a set of neurons holds together: sums over paths of kept edges.
// Knows the circuit's attributions. Refuses to know pins, groups and elements of the page.
//
// In the linearised model, where x is a node's distance from its baseline, g the metric's gradient at it and J the direct
// derivative between two nodes, attribution(i) = x_i g_i and the attribution of an edge i -> j is a_ij = x_i J_ij g_j. So
// f_ij = a_ij / attribution(i) is the part of i's gradient that comes by j, and a path e, i, .., k, logit carries
// a_ei f_i. .. f_k(logit).

import { EMBEDDING, LOGIT } from "./data.js";

/**
 * @typedef {{
 *   n: number, metric: number | null, sum: number, together: number, through: number, around: number, tokens: number,
 *   direct: number
 * }} Flow
 * All in the metric's units. n: neurons counted. sum: their attributions. together: the same, less what passes through
 * two of them. through, around: what paths of kept edges from embeddings to logits carry that meet one of them, or none.
 * tokens: what all paths carry, kept or not; NaN where the page lacks a token's embedding. direct: by kept edges straight
 * into logits.
 */

export class Flows {
  #circuit;
  #order;
  #kept;

  constructor(circuit) {
    this.#circuit = circuit;
  }

  /** Whether path sums follow from this page's attributions. */
  get isKnown() {
    return this.#circuit.header.flows === true && this.#circuit.nEdges > 0;
  }

  /** Of a set of rows; embeddings and logits among them, where every path begins or ends, are not counted.
      @returns {Flow} */
  of(rows) {
    const { header, nodes, named } = this.#circuit;
    const isEnd = (row) => nodes.kind[row] === EMBEDDING || nodes.kind[row] === LOGIT;
    const set = new Set([...rows].filter((row) => !isEnd(row)));
    this.#kept ??= this.#walk(new Set()).around;
    const { around, twice, direct } = this.#walk(set);
    const sum = [...set].reduce((all, row) => all + nodes.attribution[row], 0);
    const embeddings = named.filter((row) => nodes.kind[row] === EMBEDDING);
    const isWhole = embeddings.length === this.#circuit.tokens.length;
    const tokens = isWhole ? embeddings.reduce((all, row) => all + nodes.attribution[row], 0) : NaN;
    const through = this.#kept - around;
    return {
      n: set.size,
      metric: header.metric,
      sum,
      together: sum - twice,
      through,
      around,
      tokens,
      direct,
    };
  }

  /** One pass over the edges from the logits down. `free`: the part of a node's gradient that reaches a logit without
      meeting the set; `met`: the part that meets it. */
  #walk(set) {
    const { nodes, edges, nNodes } = this.#circuit;
    const { kind, attribution } = nodes;
    const { source, target, attribution: carried } = edges;
    const free = new Float64Array(nNodes);
    const met = new Float64Array(nNodes);
    const isIn = new Uint8Array(nNodes);
    for (const row of set) isIn[row] = met[row] = 1;
    for (let row = 0; row < nNodes; row += 1) if (kind[row] === LOGIT) free[row] = 1;
    let [around, twice, direct] = [0, 0, 0];
    this.#order ??= fromAbove(this.#circuit);
    for (const edge of this.#order) {
      const [from, to, value] = [source[edge], target[edge], carried[edge]];
      if (Number.isNaN(value)) continue;
      if (kind[from] === EMBEDDING) around += value * free[to];
      else if (isIn[from]) {
        twice += value * met[to];
        if (kind[to] === LOGIT) direct += value;
      } else if (attribution[from]) {
        const part = value / attribution[from];
        free[from] += part * free[to];
        met[from] += part * met[to];
      }
    }
    return { around, twice, direct };
  }
}

/** Edges by falling layer of their source, so that everything above a node is done before it. */
function fromAbove({ nodes, edges, nEdges, layers }) {
  const { source } = edges;
  const place = (edge) => layers - nodes.layer[source[edge]];
  const start = new Uint32Array(layers + 3);
  for (let edge = 0; edge < nEdges; edge += 1) start[place(edge) + 1] += 1;
  for (let i = 0; i < layers + 2; i += 1) start[i + 1] += start[i];
  const order = new Uint32Array(nEdges);
  for (let edge = 0; edge < nEdges; edge += 1) order[start[place(edge)]++] = edge;
  return order;
}
