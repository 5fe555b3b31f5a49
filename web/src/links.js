// The chosen node's edges in words: in and out, for and against apart, strongest first.
// Knows circuit and state. Refuses to know how an entry looks (panel.js) and drawing.

import { make } from "./elements.js";
import { count } from "./format.js";

const FIRST = 30; // entries of a list at first, and added by each "more"
const ENDS = { incoming: "source", outgoing: "target" };
const SIGN_CLASS = { for: "plus", against: "minus", unknown: "" };
const NAMES = { incoming: "From", outgoing: "To" };

export class Links {
  #circuit;
  #state;
  #entry;
  #again;
  #row = -1;
  #lengths = new Map();

  /** `entry(row, edge)`: an edge's entry, by the node at its other end; `again()` shows the lists anew. */
  constructor(circuit, state, { entry, again }) {
    this.#circuit = circuit;
    this.#state = state;
    this.#entry = entry;
    this.#again = again;
  }

  /** Both directions of a node's edges. */
  of(row) {
    if (row !== this.#row) this.#lengths.clear();
    this.#row = row;
    return [...this.#direction(row, "incoming"), ...this.#direction(row, "outgoing")];
  }

  #direction(row, direction) {
    const { measure } = this.#state;
    const passing = this.#state.edgesOf(row, direction);
    const heading = make(
      "h3",
      {},
      `${NAMES[direction]} (${count(passing.length)})`,
      make("span", { class: "unit" }, measure === "weight" ? "" : "weight"),
      make("span", { class: "unit" }, measure),
    );
    if (!passing.length) return [heading, make("p", { class: "hint" }, "None passes the filters.")];
    return [heading, ...this.#drawn(direction, passing), ...this.#bySign(direction, passing)];
  }

  /** How many are drawn, where that is not all. */
  #drawn(direction, passing) {
    const drawn = this.#state[direction] ? this.#state.drawn(passing).length : passing.length;
    if (drawn === passing.length) return [];
    const text = `${count(drawn)} of ${count(passing.length)} drawn, the strongest. `;
    const all = { type: "button", class: "small", "data-key": `all ${direction}` };
    const button = make("button", { ...all, onclick: () => this.#state.set({ drawAll: true }) }, "Draw all");
    return [make("p", { class: "hint drawn" }, text, button)];
  }

  #bySign(direction, passing) {
    const { measure } = this.#state;
    const value = this.#circuit.edges[measure];
    const words = measure === "attribution" ? ["for", "against"] : ["positive", "negative"];
    const parts = [
      ["for", words[0], (edge) => value[edge] >= 0],
      ["against", words[1], (edge) => value[edge] < 0],
      ["unknown", `no ${measure}`, (edge) => Number.isNaN(value[edge])],
    ];
    return parts.flatMap(([sign, name, fits]) => {
      const edges = [...passing.filter(fits)];
      return edges.length ? this.#list(direction, sign, name, edges) : [];
    });
  }

  #list(direction, sign, name, edges) {
    const key = `more ${direction} ${sign}`;
    const length = this.#lengths.get(key) ?? FIRST;
    const ends = this.#circuit.edges[ENDS[direction]];
    const entries = edges.slice(0, length).map((edge) => this.#entry(ends[edge], edge));
    const title = make(
      "h4",
      {},
      make("span", { class: `what ${SIGN_CLASS[sign]}` }, `${name} (${count(edges.length)})`),
    );
    const list = make("ol", { class: "entries", "data-direction": direction, "data-sign": sign }, ...entries);
    const rest = edges.length - entries.length;
    if (rest <= 0) return [title, list];
    const longer = () => {
      this.#lengths.set(key, length + FIRST);
      this.#again();
    };
    const more = make(
      "button",
      { type: "button", class: "small", "data-key": key, onclick: longer },
      `${count(Math.min(rest, FIRST))} more`,
    );
    return [title, list, make("p", { class: "hint" }, `and ${count(rest)} weaker `, more)];
  }
}
