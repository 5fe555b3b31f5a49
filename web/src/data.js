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
const DIGIT = 11; // bits that are sorted by at a time
const DIGITS = 2 ** DIGIT - 1;
const LARGEST_BITS = 0x7f800000; // of infinity

const isKnown = new WeakMap();

/** Whether any value is there; columns do not change, so that each is looked through once. */
export function known(values) {
  if (!isKnown.has(values)) isKnown.set(values, values.some(Number.isFinite));
  return isKnown.get(values);
}

/** The circuit out of the page's header and its base64 block (little-endian, as every browser's arrays are). */
export function readCircuit(headerText, blockText) {
  const header = JSON.parse(headerText);
  const { buffer } = toBytes(blockText.trim());
  const read = (columns) =>
    Object.fromEntries(
      Object.entries(columns).map(([name, [code, offset, length]]) => [
        name,
        new ARRAYS[code](buffer, offset, length),
      ]),
    );
  return new Circuit(header, read(header.columns.nodes), read(header.columns.edges));
}

/** The bytes that base64 stands for; a plain loop where the browser does not do it, since `Uint8Array.from` is slower. */
function toBytes(base64) {
  const decode = /** @type {any} */ (Uint8Array).fromBase64;
  if (decode) return decode.call(Uint8Array, base64);
  const text = atob(base64);
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
  #alwaysOn = new Map();
  #sameNeuron = new Map();

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
    this.#saysOf = new Map(header.saysOf.map(([row, at]) => [row, header.says[at]]));
    this.#alwaysOn = new Map((header.alwaysOn ?? []).map(([row, ...evidence]) => [row, evidence]));
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

  /** The number of nodes of neurons that are always on. */
  get nAlwaysOn() {
    return this.#alwaysOn.size;
  }

  isAlwaysOn = (row) => this.#alwaysOn.has(row);

  /** Of a neuron that is always on: [share of unrelated prompts on which it is strong, its mean |attribution| there,
      the mean |change| of the metric when it is ablated to its mean]. */
  alwaysOn(row) {
    return this.#alwaysOn.get(row);
  }

  /** The other rows of a node's neuron, by position. */
  elsewhere(row) {
    if (!this.#sameNeuron.size) this.#findSame();
    return (this.#sameNeuron.get(this.#neuronKey(row)) ?? []).filter((other) => other !== row);
  }

  #neuronKey(row) {
    const { kind, layer, neuron } = this.nodes;
    return kind[row] === NEURON ? layer[row] * 2 ** 31 + neuron[row] : -1;
  }

  #findSame() {
    const rows = this.rows.filter((row) => this.nodes.kind[row] === NEURON && !this.#nameOf.has(row));
    for (const row of rows.sort((a, b) => this.nodes.position[a] - this.nodes.position[b])) {
      const key = this.#neuronKey(row);
      if (this.#sameNeuron.has(key)) this.#sameNeuron.get(key).push(row);
      else this.#sameNeuron.set(key, [row]);
    }
  }

  /** What a neuron does, where that is known: in a few words (`label`), by which `sign` of its value, a `description`
      with `score` and `source`, `lists` of tokens with numbers, `exemplars` and how many `more` of them there are. */
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
    const size = sizes(this.edges[measure]);
    const order = fallingOrder(size);
    const { source, target } = this.edges;
    const ends = (of) => once(() => adjacency(of, order, this.nNodes));
    const [incoming, outgoing] = [ends(target), ends(source)];
    return {
      size,
      order,
      incoming: { of: (row) => incoming()(row) },
      outgoing: { of: (row) => outgoing()(row) },
    };
  }
}

/** `make()` when it is first asked for. */
function once(make) {
  let made;
  return () => (made ??= make());
}

/** How large each value is, 0 where it is not known; a plain loop, since `Float32Array.from` is much slower. */
function sizes(values) {
  const size = new Float32Array(values.length);
  for (let i = 0; i < size.length; i += 1) size[i] = Math.abs(values[i]) || 0;
  return size;
}

/** Indices by falling size, of equal ones the first first. The bits of a float of no sign rise with it, so that they are
    sorted by digits, the lowest first; they move along with the indices, so that memory is read from end to end. */
function fallingOrder(size) {
  const { length } = size;
  if (length > MOST_EDGES) throw new Error(`${length} edges, at most ${MOST_EDGES} can be shown`);
  const bits = new Uint32Array(size.buffer);
  let [keys, order] = [new Uint32Array(length), new Uint32Array(length)];
  let [nextKeys, nextOrder] = [new Uint32Array(length), new Uint32Array(length)];
  for (let i = 0; i < length; i += 1) keys[i] = LARGEST_BITS - bits[i];
  for (let i = 0; i < length; i += 1) order[i] = i;
  for (let shift = 0; shift < 32; shift += DIGIT) {
    const place = digitPlaces(keys, shift);
    for (let i = 0; i < length; i += 1) {
      const to = place[(keys[i] >>> shift) & DIGITS]++;
      nextKeys[to] = keys[i];
      nextOrder[to] = order[i];
    }
    [keys, nextKeys, order, nextOrder] = [nextKeys, keys, nextOrder, order];
  }
  return order;
}

/** Where the first key of each digit goes. */
function digitPlaces(keys, shift) {
  const place = new Uint32Array(DIGITS + 2);
  for (let i = 0; i < keys.length; i += 1) place[((keys[i] >>> shift) & DIGITS) + 1] += 1;
  for (let i = 0; i <= DIGITS; i += 1) place[i + 1] += place[i];
  return place;
}

/** Compressed rows: the edges at one end of each node, in the order they are given. */
function adjacency(ends, order, nNodes) {
  const start = new Uint32Array(nNodes + 1);
  for (let edge = 0; edge < ends.length; edge += 1) start[ends[edge] + 1] += 1;
  for (let row = 0; row < nNodes; row += 1) start[row + 1] += start[row];
  const next = start.slice();
  const list = new Uint32Array(ends.length);
  for (let i = 0; i < order.length; i += 1) list[next[ends[order[i]]]++] = order[i];
  return (row) => list.subarray(start[row], start[row + 1]);
}
