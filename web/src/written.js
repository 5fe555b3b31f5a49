// What the reader writes about nodes: a name, which the picture shows, and a note; and the list of both.
// Knows its elements and the state they change. Refuses to know drawing and how any of it is kept.

import { byId, make, refill, targetOf } from "./elements.js";
import { count, runningText } from "./format.js";

const LONGEST = { names: 60, notes: 2000 };
const PAUSE = 400; // ms without a key after which what was typed counts

export class Written {
  #circuit;
  #state;
  #choose;
  #waiting = 0;
  #write = () => {};

  constructor(circuit, state, choose) {
    this.#circuit = circuit;
    this.#state = state;
    this.#choose = choose;
  }

  /** The fields for a node's name and note. */
  fields(row) {
    const name = this.#field("input", "names", row, { type: "text", id: "node-name" });
    const note = this.#field("textarea", "notes", row, { rows: 2, id: "node-note" });
    return make(
      "div",
      { class: "written" },
      make("label", { for: "node-name" }, "Name"),
      name,
      make("label", { for: "node-note" }, "Note"),
      note,
    );
  }

  #field(element, which, row, attributes) {
    const field = make(element, {
      ...attributes,
      maxlength: LONGEST[which],
      "data-key": which,
      autocomplete: "off",
      placeholder: which === "names" ? this.#circuit.title(row) : "what you found out",
      oninput: (event) => this.#later(() => this.#state.write(which, row, targetOf(event).value)),
      onchange: () => this.#now(),
    });
    field.value = this.#state[which].get(row) ?? "";
    return field;
  }

  #later(write) {
    clearTimeout(this.#waiting);
    this.#write = write;
    this.#waiting = setTimeout(() => this.#now(), PAUSE);
  }

  #now() {
    clearTimeout(this.#waiting);
    const write = this.#write;
    this.#write = () => {};
    write();
  }

  /** What somebody else changed shows in the fields, but not in one that is being typed in. */
  refresh(row) {
    for (const [id, which] of [
      ["node-name", "names"],
      ["node-note", "notes"],
    ]) {
      const field = document.getElementById(id);
      if (field && field !== document.activeElement)
        /** @type {HTMLInputElement} */ (field).value = this.#state[which].get(row) ?? "";
    }
  }

  /** The list of nodes that have a name or a note. */
  render() {
    const { names, notes } = this.#state;
    const rows = [...new Set([...names.keys(), ...notes.keys()])].sort((a, b) => a - b);
    byId("written-count").textContent = `Names and notes (${count(rows.length)})`;
    refill(byId("written"), ...rows.map((row) => this.#entry(row)));
  }

  #entry(row) {
    const own = this.#state.names.has(row) ? `${this.#circuit.title(row)}, ` : "";
    const go = { type: "button", "data-key": `written ${row}`, onclick: () => this.#choose(row) };
    const name = make("span", { class: "what" }, this.#state.title(row));
    const where = make("span", { class: "where" }, own + this.#circuit.place(row));
    const note = this.#state.notes.get(row);
    const said = note ? [make("p", { class: "where note" }, runningText(note))] : [];
    return make("li", {}, make("button", go, name, where), ...said);
  }
}
