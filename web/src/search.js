// What a search text means and which nodes it finds.
// Knows the circuit. Refuses to know elements of the page, drawing and what is selected.

import { ERROR, NEURON } from "./data.js";

/** @type {[RegExp, (m: RegExpExecArray) => object][]} */
const TERMS = [
  [
    /(?:^|\s)(\d+)\/(\d+)\/(\d+)(?=\s|$)/,
    (m) => ({ layer: Number(m[1]), expert: Number(m[2]), neuron: Number(m[3]) }),
  ],
  [
    /(?:^|\s)l(\d+)\s*e(\d+)\s*n(\d+)(?=\s|$)/i,
    (m) => ({ layer: Number(m[1]), expert: Number(m[2]), neuron: Number(m[3]) }),
  ],
  [/(?:^|\s)e(\d+)\s*n(\d+)(?=\s|$)/i, (m) => ({ expert: Number(m[1]), neuron: Number(m[2]) })],
  [/(?:^|\s)(\d+)\/(\d+)(?=\s|$)/, (m) => ({ layer: Number(m[1]), neuron: Number(m[2]) })],
  [/(?:^|\s)l(\d+)\s*n(\d+)(?=\s|$)/i, (m) => ({ layer: Number(m[1]), neuron: Number(m[2]) })],
  [/(?:^|\s)l(?:ayer\s*)?(\d+)(?=\s|$)/i, (m) => ({ layer: Number(m[1]) })],
  [/(?:^|\s)e(?:xpert\s*)?(\d+)(?=\s|$)/i, (m) => ({ expert: Number(m[1]) })],
  [/(?:^|\s)n(?:euron\s*)?(\d+)(?=\s|$)/i, (m) => ({ neuron: Number(m[1]) })],
  [/(?:^|\s)(?:p(?:os(?:ition)?)?\s*|@)(\d+)(?=\s|$)/i, (m) => ({ position: Number(m[1]) })],
];

/** Terms such as "L3", "N120", "3/120", "E17", "L3 E17 N45", "pos 4"; the rest is a piece of a token, with its spaces if it is all.
    "\u2423" is a space, as tokens are shown. */
export function parseQuery(query) {
  /** @type {any} */
  const wanted = {};
  let rest = query;
  for (const [pattern, read] of TERMS) {
    const found = pattern.exec(rest);
    if (!found) continue;
    Object.assign(wanted, read(found));
    rest = rest.slice(0, found.index) + rest.slice(found.index + found[0].length);
  }
  if (rest.trim()) wanted.text = (rest === query ? rest : rest.trim()).toLowerCase();
  return wanted;
}

/** Rows that fit a query: nodes that carry the text first, then those at a token that has it, strongest first. */
export function search(circuit, query) {
  const { layer, position, neuron, kind } = circuit.nodes;
  const wanted = parseQuery(query);
  if (Object.keys(wanted).length === 0) return [];
  // A number is that in the expert where one is named; else either.
  const isNeuron = (row, id) =>
    kind[row] === NEURON &&
    ((wanted.expert === undefined && neuron[row] === id) || circuit.expert(row)?.neuron === id);
  const fits = (row) =>
    (wanted.expert === undefined || circuit.expert(row)?.expert === wanted.expert) &&
    (wanted.layer === undefined || layer[row] === wanted.layer) &&
    (wanted.neuron === undefined || isNeuron(row, wanted.neuron)) &&
    (wanted.position === undefined || position[row] === wanted.position);
  const rows = circuit.byStrength.filter(fits);
  if (wanted.text === undefined) return rows;
  const asId = /^\d+$/.test(wanted.text) ? Number(wanted.text) : -1;
  const pieces = [wanted.text, wanted.text.replaceAll("\u2423", " ")];
  const has = (token) => token !== undefined && pieces.some((piece) => token.toLowerCase().includes(piece));
  const nameOf = (row) => (kind[row] === ERROR ? "error" : circuit.label(row));
  const own = rows.filter((row) => has(nameOf(row)) || has(circuit.says(row)?.label) || isNeuron(row, asId));
  const taken = new Set(own);
  const there = circuit.tokens.map(has);
  return own.concat(rows.filter((row) => there[position[row]] && !taken.has(row)));
}
