// Nodes picked with a lasso or Shift+Enter, and what can be done with all of them at once.
// Knows its bar and the state. Refuses to know how nodes come to be picked and drawing.

import { byId } from "./elements.js";
import { counted } from "./format.js";
import { LONGEST_NAME, addGroup, nameProblem } from "./groups.js";

export class Picks {
  #state;
  #say;

  /** `say(text)` tells readers of the screen. */
  constructor(state, say) {
    this.#state = state;
    this.#say = say;
    byId("picked-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#group();
    });
    byId("picked-pin").addEventListener("click", () => this.#pin());
    byId("picked-call").addEventListener("click", () => this.#call());
    byId("picked-clear").addEventListener("click", () => this.clear());
    byId("picked-name").maxLength = LONGEST_NAME;
    byId("picked-name").addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.clear();
    });
  }

  /** Add rows to those picked, or take one that is picked already out again. */
  add(rows) {
    const picked = new Set(this.#state.picked);
    const out = rows.length === 1 && picked.delete(rows[0]);
    if (!out) for (const row of rows) picked.add(row);
    this.#state.set({ picked });
    this.#say(`${out ? "Taken out" : `${nodes(rows.length)} added`}; ${nodes(picked.size)} picked`);
  }

  clear() {
    this.#done("Nothing picked");
  }

  /** To the field for their name. */
  focus() {
    if (this.#state.picked.size) byId("picked-name").focus();
    else this.#say("Pick nodes first: draw around them with Shift, or press Shift and Enter");
  }

  render() {
    const { size } = this.#state.picked;
    byId("picked").hidden = size === 0;
    byId("picked-count").textContent = `${nodes(size)} picked`;
  }

  #group() {
    const { picked, groups } = this.#state;
    const name = byId("picked-name").value.trim();
    const problem = nameProblem(name, groups);
    if (problem) {
      this.#refuse(`No group was made: ${problem}.`);
      return;
    }
    this.#state.set({ groups: addGroup(groups, name, picked) });
    this.#done(`Group of ${nodes(picked.size)} made`);
  }

  #pin() {
    const { picked, pins } = this.#state;
    this.#state.set({ pins: new Set([...pins, ...picked]) });
    this.#done(`${nodes(picked.size)} pinned`);
  }

  /** Every one of them is called the same. */
  #call() {
    const { picked, names } = this.#state;
    const name = byId("picked-name").value.trim();
    if (!name) {
      this.#refuse("Type the name first.");
      return;
    }
    this.#state.set({ names: new Map([...names, ...[...picked].map((row) => [row, name])]) });
    this.#done(`${nodes(picked.size)} named`);
  }

  #refuse(text) {
    byId("picked-problem").textContent = text;
    byId("picked-name").focus();
  }

  #done(text) {
    byId("picked-problem").textContent = "";
    byId("picked-name").value = "";
    if (byId("picked").contains(document.activeElement)) byId("canvas").focus();
    this.#state.set({ picked: new Set() });
    this.#say(text);
  }
}

const nodes = (size) => counted(size, "node");
