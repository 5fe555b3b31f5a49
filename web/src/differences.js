// Of two graphs that are compared: which nodes appeared, vanished, changed sign, and changed most.
// Knows the circuit's sides. Refuses to know drawing; choosing a node is handed to whoever made it.

import { NEURON } from "./data.js";
import { byId, make } from "./elements.js";
import { count, number, plainText } from "./format.js";

const LISTED = 12;
const [FIRST, LAST, BOTH, FLIPPED] = [1, 2, 3, 4];

/** Rows of neurons by kind of difference, the largest first. */
export function differences({ nodes, rows }) {
  const size = (row) => Math.abs((nodes.last[row] || 0) - (nodes.first[row] || 0));
  const of = (side) =>
    rows
      .filter((row) => nodes.kind[row] === NEURON && nodes.side[row] === side)
      .sort((a, b) => size(b) - size(a) || a - b);
  return { appeared: of(LAST), vanished: of(FIRST), flipped: of(FLIPPED), changed: of(BOTH) };
}

function table(circuit, rows, choose) {
  const { first, last } = circuit.nodes;
  const body = rows.slice(0, LISTED).map((row) => {
    const go = { type: "button", "data-row": row, onclick: () => choose(row) };
    const name = [make("span", { class: "what" }, circuit.title(row))];
    const cells = [first[row], last[row], (last[row] || 0) - (first[row] || 0)].map((value) =>
      make("td", {}, number(value)),
    );
    const place = make("span", { class: "where" }, circuit.place(row));
    return make("tr", {}, make("th", { scope: "row" }, make("button", go, ...name, place)), ...cells);
  });
  const heads = ["node", "first", "last", "change"].map((name) => make("th", { scope: "col" }, name));
  return make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...body));
}

/** Fill the list of differences, which only a comparison has. */
export function renderDifferences(circuit, choose) {
  const { sides } = circuit.header;
  const place = byId("differences");
  place.hidden = !sides;
  if (!sides) return;
  const [first, last] = sides.map(plainText);
  const names = {
    appeared: `Appeared: only in ${last}`,
    vanished: `Vanished: only in ${first}`,
    flipped: "Changed sign",
    changed: "In both, strongest change",
  };
  const said = `Attribution in ${first} (first) and in ${last} (last).`;
  const parts = Object.entries(differences(circuit)).map(([kind, rows]) =>
    make(
      "details",
      { "data-kind": kind, open: rows.length ? "" : undefined },
      make("summary", {}, `${names[kind]} (${count(rows.length)})`),
      ...(rows.length ? [make("div", { class: "scroll" }, table(circuit, rows, choose))] : []),
    ),
  );
  place.append(make("p", { class: "hint" }, said), ...parts);
}
