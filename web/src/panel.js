// What is said about nodes in words: the chosen node's panel, the tooltip, the live region.
// Knows circuit, state and its own elements. Refuses to know drawing and where numbers come from.

import { doing, polarity, texts } from "./doing.js";
import { byId, make, refill } from "./elements.js";
import { number, percent, plainText, tokenText } from "./format.js";
import { Links } from "./links.js";

const STRONGEST = 25;
const ELSEWHERE = 40; // other positions of a neuron that are listed

export { make, refill };

/** A node's numbers as pairs of name and value. */
export function facts(circuit, row) {
  const { activation, attribution, explained, influence } = circuit.nodes;
  const { sides } = circuit.header;
  const compared = sides
    ? [
        ["graph", circuit.sideOf(row)],
        [`in ${plainText(sides[0])}`, number(circuit.nodes.first[row])],
        [`in ${plainText(sides[1])}`, number(circuit.nodes.last[row])],
      ]
    : [];
  const flow = circuit.hasInfluence ? [["influence", number(influence[row])]] : [];
  return [
    ["activation", number(activation[row])],
    ["attribution", number(attribution[row])],
    ["share of metric", percent(circuit.metricShare(row))],
    ["explained", percent(explained[row])],
    ...flow,
    ...compared,
  ];
}

function factList(pairs) {
  return make("dl", {}, ...pairs.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));
}

export class Panel {
  #circuit;
  #state;
  #choose;
  #written;
  #links;
  #element = byId("chosen");
  #tooltip = byId("tooltip");
  #live = byId("live");

  /** `choose(row)` is called when the reader picks a node from a list; `written` has the fields for what is written. */
  constructor(circuit, state, choose, written) {
    this.#circuit = circuit;
    this.#state = state;
    this.#choose = choose;
    this.#written = written;
    this.#links = new Links(circuit, state, {
      entry: (row, edge) => this.#edgeEntry(row, edge),
      again: () => this.render(),
    });
  }

  render() {
    const { selected } = this.#state;
    refill(this.#element, ...(selected < 0 ? this.#overview() : this.#node(selected)));
  }

  /** Names changed: they change where they stand, so that a field that is typed in stays. */
  rename() {
    const { selected } = this.#state;
    for (const button of this.#element.querySelectorAll("[data-row] > .what"))
      button.textContent = this.#state.title(Number(button.parentElement.dataset.row));
    if (selected < 0) return;
    this.#element.querySelector("h3.name").textContent = this.#state.title(selected);
    this.#element.querySelector("p.place").textContent = this.#place(selected);
    this.#written.refresh(selected);
  }

  #overview() {
    const { strengthName, byStrength, nodes } = this.#circuit;
    const strongest = byStrength.slice(0, STRONGEST);
    const hint = "Choose a node in the picture or in a list to see its edges. Press ? for keys.";
    const rows = strongest.map((row) => this.#entry(row, "", number(nodes[strengthName][row])));
    return [
      make("p", { class: "hint" }, hint),
      make("h3", {}, "Strongest nodes", make("span", { class: "unit" }, strengthName)),
      make("ol", { class: "entries" }, ...rows),
    ];
  }

  #node(row) {
    const isPinned = this.#state.pins.has(row);
    const pin = { type: "button", "data-key": "pin", onclick: () => this.#state.togglePin(row) };
    const clear = { type: "button", onclick: () => this.#state.set({ selected: -1 }) };
    const sign = polarity(this.#circuit, row);
    const numbers = [...(sign ? [["polarity", sign]] : []), ...facts(this.#circuit, row)];
    return [
      make("h3", { class: "name" }, this.#state.title(row)),
      make("p", { class: "place" }, this.#place(row)),
      make(
        "p",
        { class: "buttons" },
        make("button", pin, isPinned ? "Unpin" : "Pin"),
        make("button", clear, "Clear"),
      ),
      ...doing(this.#circuit, row),
      factList(numbers),
      ...this.#elsewhere(row),
      this.#written.fields(row),
      ...texts(this.#circuit, row),
      ...this.#links.of(row),
    ];
  }

  /** Where a node is; what it is where the reader calls it otherwise; and the group that it is in. */
  #place(row) {
    const own = this.#state.names.has(row) ? `${this.#circuit.title(row)}, ` : "";
    const group = this.#state.groups.find(({ rows }) => rows.includes(row));
    const inGroup = group ? `, in group \u201c${tokenText(group.name)}\u201d` : "";
    return own + this.#circuit.place(row) + inGroup;
  }

  /** Buttons to the same neuron at other positions. */
  #elsewhere(row) {
    const others = this.#circuit.elsewhere(row);
    if (!others.length) return [];
    const buttons = others.slice(0, ELSEWHERE).map((other) => {
      const position = this.#circuit.nodes.position[other];
      const token = tokenText(this.#circuit.tokens[position], 16);
      const go = { type: "button", class: "small", "data-row": other, onclick: () => this.#choose(other) };
      return make("button", go, `pos ${position} ${token}`);
    });
    const rest = others.length > ELSEWHERE ? ` and ${others.length - ELSEWHERE} more` : "";
    return [make("p", { class: "buttons elsewhere" }, "Same neuron at ", ...buttons, rest)];
  }

  #edgeEntry(row, edge) {
    const { edges } = this.#circuit;
    const { measure } = this.#state;
    const value = measure === "share" ? percent : number;
    return this.#entry(
      row,
      measure === "weight" ? "" : number(edges.weight[edge]),
      value(edges[measure][edge]),
    );
  }

  #entry(row, first, second) {
    const attribution = this.#circuit.nodes.attribution[row];
    const signed = attribution < 0 ? "minus" : "plus";
    const sign = Number.isNaN(attribution) ? "" : signed;
    const cells = [
      make("span", { class: `what ${sign}` }, this.#state.title(row)),
      make("span", { class: "where" }, this.#placeAndDoing(row)),
      make("span", { class: "value" }, first),
      make("span", { class: "value" }, second),
    ];
    const button = { type: "button", "data-row": row, onclick: () => this.#choose(row) };
    return make("li", {}, make("button", button, ...cells));
  }

  #placeAndDoing(row) {
    const does = this.#circuit.doing(row);
    return this.#circuit.place(row) + (does ? ` \u00b7 ${tokenText(does, 30)}` : "");
  }

  /** The tooltip beside a node, or none. `where` is {x, y, r} in pixels of the canvas. */
  tooltip(row, where) {
    this.#tooltip.hidden = row < 0;
    if (row < 0) return;
    const { clientWidth, clientHeight } = this.#tooltip.parentElement;
    const line = (text) => make("span", { class: "place" }, text);
    this.#tooltip.replaceChildren(
      make("strong", {}, this.#state.title(row)),
      ...this.#aside(row).map(line),
      factList(facts(this.#circuit, row)),
    );
    const { offsetWidth, offsetHeight } = this.#tooltip;
    const gap = where.r + 12;
    const left = where.x + gap + offsetWidth < clientWidth ? where.x + gap : where.x - gap - offsetWidth;
    const top = Math.min(where.y - 12, clientHeight - offsetHeight - 4);
    this.#tooltip.style.left = `${Math.max(4, left)}px`;
    this.#tooltip.style.top = `${Math.max(4, top)}px`;
  }

  /** What is said of a node beside its name and its numbers, a line each. */
  #aside(row) {
    const others = this.#circuit.elsewhere(row).map((other) => this.#circuit.nodes.position[other]);
    const note = this.#state.notes.get(row);
    return [
      this.#place(row),
      this.#circuit.doing(row),
      this.#circuit.isAlwaysOn(row) ? "always on" : "",
      others.length
        ? `same neuron at pos ${others.slice(0, 8).join(", ")}${others.length > 8 ? ", \u2026" : ""}`
        : "",
      note ? `note: ${tokenText(note, 80)}` : "",
    ].filter(Boolean);
  }

  /** Tell readers of the screen about a node. */
  announce(row, before = "") {
    const values = facts(this.#circuit, row).map(([name, value]) => `${name} ${value}`);
    this.say([before + this.#state.title(row), ...this.#aside(row), ...values].join(", "));
  }

  say(text) {
    this.#live.textContent = text;
  }
}
