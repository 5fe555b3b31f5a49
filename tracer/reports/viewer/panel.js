// What is said about nodes in words: the chosen node's panel, the tooltip, the live region.
// Knows circuit, state and its own elements. Refuses to know drawing and where numbers come from.

import { count, number, percent, plainText, tokenText } from "./format.js";

const LISTED = 60;

/** An element with text and attributes; text is never read as markup. */
export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

/** New content; the focus stays on the element of the same data-key, or goes to the whole. */
export function refill(element, ...children) {
  const focused = element.contains(document.activeElement) ? document.activeElement : null;
  element.replaceChildren(...children);
  if (!focused) return;
  const { key } = focused.dataset;
  const same = [...element.querySelectorAll("[data-key]")].find((other) => other.dataset.key === key);
  (same ?? element).focus();
}

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

function factList(circuit, row) {
  return make(
    "dl",
    {},
    ...facts(circuit, row).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]),
  );
}

/** What a neuron does, in words and as lists of tokens with their numbers; nothing where it is not known. */
function says(circuit, row) {
  const known = circuit.says(row);
  if (!known) return [];
  const lists = known.lists.map(([heading, tokens]) => {
    const text = tokens.map(([token, value]) => `${tokenText(token)} ${number(value)}`).join(", ");
    return make("p", { class: "says" }, make("strong", {}, `${heading}: `), text);
  });
  return [make("p", { class: "says" }, tokenText(known.label, 300)), ...lists];
}

/** Where a node is and what it does, for a list. */
function placeText(circuit, row) {
  const doing = circuit.doing(row);
  return circuit.place(row) + (doing ? ` \u00b7 ${tokenText(doing, 30)}` : "");
}

export class Panel {
  #circuit;
  #state;
  #choose;
  #element = document.getElementById("chosen");
  #tooltip = document.getElementById("tooltip");
  #live = document.getElementById("live");

  /** `choose(row)` is called when the reader picks a node from a list. */
  constructor(circuit, state, choose) {
    this.#circuit = circuit;
    this.#state = state;
    this.#choose = choose;
  }

  render() {
    const { selected } = this.#state;
    refill(this.#element, ...(selected < 0 ? this.#overview() : this.#node(selected)));
  }

  #overview() {
    const { strengthName, byStrength, nodes } = this.#circuit;
    const strongest = byStrength.slice(0, 25);
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
    const group = this.#state.groups.find(({ rows }) => rows.includes(row));
    const pin = { type: "button", "data-key": "pin", onclick: () => this.#state.togglePin(row) };
    const clear = { type: "button", onclick: () => this.#state.set({ selected: -1 }) };
    const place = this.#circuit.place(row) + (group ? `, in group \u201c${tokenText(group.name)}\u201d` : "");
    return [
      make("h3", { class: "name" }, this.#circuit.title(row)),
      make("p", { class: "place" }, place),
      ...says(this.#circuit, row),
      factList(this.#circuit, row),
      make(
        "p",
        { class: "buttons" },
        make("button", pin, isPinned ? "Unpin" : "Pin"),
        make("button", clear, "Clear"),
      ),
      ...this.#edges(row, "incoming", "source"),
      ...this.#edges(row, "outgoing", "target"),
    ];
  }

  #edges(row, direction, end) {
    const { edges } = this.#circuit;
    const { measure } = this.#state;
    const passing = this.#state.edgesOf(row, direction);
    const value = measure === "share" ? percent : number;
    const entries = [...passing.slice(0, LISTED)].map((edge) =>
      this.#entry(
        edges[end][edge],
        measure === "weight" ? "" : number(edges.weight[edge]),
        value(edges[measure][edge]),
      ),
    );
    const name = direction === "incoming" ? "From" : "To";
    const heading = make(
      "h3",
      {},
      `${name} (${count(passing.length)})`,
      make("span", { class: "unit" }, measure === "weight" ? "" : "weight"),
      make("span", { class: "unit" }, measure),
    );
    const rest = passing.length - entries.length;
    const list = make("ol", { class: "entries", "data-direction": direction }, ...entries);
    return [heading, list, make("p", { class: "hint" }, listEnd(passing.length, rest))];
  }

  #entry(row, first, second) {
    const attribution = this.#circuit.nodes.attribution[row];
    const signed = attribution < 0 ? "minus" : "plus";
    const sign = Number.isNaN(attribution) ? "" : signed;
    const cells = [
      make("span", { class: `what ${sign}` }, this.#circuit.title(row)),
      make("span", { class: "where" }, placeText(this.#circuit, row)),
      make("span", { class: "value" }, first),
      make("span", { class: "value" }, second),
    ];
    const button = { type: "button", "data-row": row, onclick: () => this.#choose(row) };
    return make("li", {}, make("button", button, ...cells));
  }

  /** The tooltip beside a node, or none. `where` is {x, y, r} in pixels of the canvas. */
  tooltip(row, where) {
    this.#tooltip.hidden = row < 0;
    if (row < 0) return;
    const { clientWidth, clientHeight } = this.#tooltip.parentElement;
    const name = make("strong", {}, this.#circuit.title(row));
    const place = make("span", { class: "place" }, this.#circuit.place(row));
    const doing = this.#circuit.doing(row);
    const said = doing ? [make("span", { class: "place" }, doing)] : [];
    this.#tooltip.replaceChildren(name, place, ...said, factList(this.#circuit, row));
    const { offsetWidth, offsetHeight } = this.#tooltip;
    const gap = where.r + 12;
    const left = where.x + gap + offsetWidth < clientWidth ? where.x + gap : where.x - gap - offsetWidth;
    const top = Math.min(where.y - 12, clientHeight - offsetHeight - 4);
    this.#tooltip.style.left = `${Math.max(4, left)}px`;
    this.#tooltip.style.top = `${Math.max(4, top)}px`;
  }

  /** Tell readers of the screen about a node. */
  announce(row, before = "") {
    const values = facts(this.#circuit, row).map(([name, value]) => `${name} ${value}`);
    const doing = this.#circuit.doing(row);
    const said = doing ? [doing] : [];
    this.say([before + this.#circuit.title(row), this.#circuit.place(row), ...said, ...values].join(", "));
  }

  say(text) {
    this.#live.textContent = text;
  }
}

function listEnd(all, rest) {
  if (all === 0) return "None passes the filters.";
  return rest > 0 ? `and ${count(rest)} weaker` : "";
}
