// Undo and redo of what the reader marked and wrote.
// Knows the state's marks, each of which is set as a new value. Refuses to know elements of the page and what marks mean.

import { MARKS, marksOf } from "./saved.js";

const MOST = 300;

export class History {
  #state;
  #now;
  #before = [];
  #after = [];
  #going = false;
  #changed;

  /** `changed()` is called when there is more or less to undo. */
  constructor(state, changed) {
    this.#state = state;
    this.#now = marksOf(state);
    this.#changed = changed;
    state.listen((names) => {
      if (MARKS.some((name) => names.has(name))) this.#note();
    });
  }

  get canUndo() {
    return this.#before.length > 0;
  }

  get canRedo() {
    return this.#after.length > 0;
  }

  #note() {
    if (!this.#going) {
      this.#before.push(this.#now);
      if (this.#before.length > MOST) this.#before.shift();
      this.#after = [];
    }
    this.#now = marksOf(this.#state);
    this.#changed();
  }

  undo() {
    this.#go(this.#before, this.#after);
  }

  redo() {
    this.#go(this.#after, this.#before);
  }

  #go(from, to) {
    if (!from.length) return;
    to.push(this.#now);
    this.#going = true;
    this.#state.set(from.pop());
    this.#going = false;
    this.#changed();
  }
}
