// The circuit as typed arrays, with the adjacency of its edges.
// Knows how the page packs its columns. Refuses to know drawing, selection and elements of the page.

import { plainText, tokenText } from "./format.js";

export const NEURON = 0;
export const EMBEDDING = 1;
export const LOGIT = 2;
export const ERROR = 3; // what a replacement model fails to reconstruct
export const KINDS = 4;

const ARRAYS = { i4: Int32Array, f4: Float32Array, i2: Int16Array, u1: Uint8Array };
const MOST_EDGES = 2 ** 22;

/** Whether any value is there. */
export function known(values) {
  return values.some(Number.isFinite);
}

/** The circuit out of the page's header and its base64 block (little-endian, as every browser's arrays are). */
export function readCircuit(headerText, blockText) {
  const header = JSON.parse(headerText);
  const { buffer } = toBytes(atob(blockText.trim()));
  const read = (columns) =>
    Object.fromEntries(
      Object.entries(columns).map(([name, [code, offset, length]]) => [
        name,
        new ARRAYS[code](buffer, offset, length),
      ]),
    );
  return new Circuit(header, read(header.columns.nodes), read(header.columns.edges));
}

// A plain loop: `Uint8Array.from` is much slower over millions of signs.
function toBytes(text) {
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < bytes.length; i += 1) bytes[i] = text.charCodeAt(i);
  return bytes;
}

class Circuit {
  #ranked = new Map();
  #labelOf = new Map();
  #nameOf = new Map();
  #saysOf = new Map();
  #expertOf = new Map();

  constructor(header, nodes, edges) {
    this.header = header;
    this.nodes = nodes;
    this.edges = edges;
    this.nNodes = nodes.kind.length;
    this.nEdges = edges.source.length;
    this.tokens = header.tokens;
    this.layers = header.layers;
    this.rows = Array.from(nodes.kind, (_, row) => row);
    this.named = this.rows.filter((row) => nodes.kind[row] === EMBEDDING || nodes.kind[row] === LOGIT);
    this.named.forEach((row, i) => this.#labelOf.set(row, header.labels[i]));
    this.#nameOf = new Map(header.names);
    this.#saysOf = new Map(header.says.map(([row, label, lists]) => [row, { label, lists }]));
    this.#expertOf = new Map(header.experts.map(([row, expert, neuron]) => [row, { expert, neuron }]));
    nodes.influence ??= new Float32Array(this.nNodes).fill(NaN);
    this.hasAttributions = known(nodes.attribution);
    this.hasInfluence = known(nodes.influence);
    // What nodes are sized, ordered and filtered by.
    this.strengthName = this.hasAttributions || !this.hasInfluence ? "attribution" : "influence";
    const size = Float32Array.from(nodes[this.strengthName], (value) => Math.abs(value) || 0);
    this.strength = size;
    this.byStrength = this.rows.slice().sort((a, b) => size[b] - size[a] || a - b);
  }

  /** The raw token of an embedding or logit node. */
  label(row) {
    return this.#labelOf.get(row);
  }

  /** The expert and the number in it of a neuron that belongs to one. */
  expert(row) {
    return this.#expertOf.get(row);
  }

  /** The experts that have neurons here, in their order: as text, and how many nodes each has. */
  experts() {
    const counts = new Map();
    const rows = [...this.#expertOf.keys()];
    const order = (row) => this.nodes.layer[row] * 2 ** 31 + this.#expertOf.get(row).expert;
    for (const row of rows.sort((a, b) => order(a) - order(b))) {
      const name = this.expertName(row);
      counts.set(name, (counts.get(name) ?? 0) + 1);
    }
    return [...counts];
  }

  /** A neuron's expert as text: "L3 E17"; undefined where it has none. */
  expertName(row) {
    const own = this.#expertOf.get(row);
    return own && `L${this.nodes.layer[row]} E${own.expert}`;
  }

  /** What a node is, without where: "L3 N120", "L3 E17 N45", "embedding the", "logit are", "error L3". */
  title(row) {
    const { kind, layer } = this.nodes;
    if (this.#nameOf.has(row)) return tokenText(this.#nameOf.get(row), 80);
    if (kind[row] === NEURON) return `L${layer[row]} ${this.#number(row)}`;
    if (kind[row] === ERROR) return `error L${layer[row]}`;
    return `${kind[row] === EMBEDDING ? "embedding" : "logit"} \u201c${tokenText(this.label(row))}\u201d`;
  }

  /** What a neuron does, where that is known: in a few words (`label`), and its `lists` of tokens with numbers. */
  says(row) {
    return this.#saysOf.get(row);
  }

  /** What a neuron does on one line; empty where that is not known. */
  doing(row) {
    return this.#saysOf.has(row) ? tokenText(this.#saysOf.get(row).label, 80) : "";
  }

  /** A neuron's title without its layer: "N120", "E17 N45". */
  short(row) {
    return this.#nameOf.has(row) ? this.title(row).split(/[ :]/)[1] : this.#number(row);
  }

  #number(row) {
    const own = this.#expertOf.get(row);
    return own ? `E${own.expert} N${own.neuron}` : `N${this.nodes.neuron[row]}`;
  }

  /** Where a node is: its position and the token there. */
  place(row) {
    const position = this.nodes.position[row];
    return `pos ${position} \u201c${tokenText(this.tokens[position])}\u201d`;
  }

  /** Share of the metric that a node holds. */
  metricShare(row) {
    const { metric, cancels } = this.header;
    return metric === null || metric === 0 || cancels ? NaN : this.nodes.attribution[row] / metric;
  }

  /** Of a comparison: which graph has a node, in words. */
  sideOf(row) {
    const [first, last] = this.header.sides;
    const only = [`only in ${first}`, `only in ${last}`, "in both", "in both, sign changed"];
    return plainText(only[this.nodes.side[row] - 1]);
  }

  /** Edges by falling magnitude of `measure`, over all and per node; made once for each measure. */
  ranked(measure) {
    if (!this.#ranked.has(measure)) this.#ranked.set(measure, this.#rank(measure));
    return this.#ranked.get(measure);
  }

  #rank(measure) {
    const size = Float32Array.from(this.edges[measure], (value) => Math.abs(value) || 0);
    const order = fallingOrder(size);
    return {
      size,
      order,
      incoming: adjacency(this.edges.target, order, this.nNodes),
      outgoing: adjacency(this.edges.source, order, this.nNodes),
    };
  }
}

/** Indices by falling size. The bits of a float of no sign rise with it, so one plain sort of numbers will do. */
function fallingOrder(size) {
  if (size.length > MOST_EDGES) throw new Error(`${size.length} edges, at most ${MOST_EDGES} can be shown`);
  const bits = new Uint32Array(size.buffer);
  const keys = Float64Array.from(bits, (bit, i) => bit * MOST_EDGES + (MOST_EDGES - 1 - i)).sort();
  return Uint32Array.from(keys, (_, i) => MOST_EDGES - 1 - (keys[keys.length - 1 - i] % MOST_EDGES));
}

/** Compressed rows: the edges at one end of each node, in the order they are given. */
function adjacency(ends, order, nNodes) {
  const start = new Uint32Array(nNodes + 1);
  for (const end of ends) start[end + 1] += 1;
  for (let row = 0; row < nNodes; row += 1) start[row + 1] += start[row];
  const next = start.slice();
  const list = new Uint32Array(ends.length);
  for (const edge of order) list[next[ends[edge]]++] = edge;
  return { of: (row) => list.subarray(start[row], start[row + 1]) };
}
