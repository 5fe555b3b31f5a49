// Whether pins, groups, names and notes are saved, and saving them: to the server of the page, or to a file.
// Knows the header's mark and buttons, and what the server answers. Refuses to know what a file looks like (groups.js).

import { byId } from "./elements.js";
import { readGroups, writeGroups } from "./groups.js";
import { mergeMarks } from "./merge.js";
import { MARKS, givenMarks, marksOf, savedAs } from "./saved.js";

const FILE = "groups.json";
const CONFLICT = 409;

export class Keeper {
  #circuit;
  #state;
  #does;
  #base;
  #version;
  #server = /** @type {any} */ (globalThis).tracerServer;
  #saving = false;

  /** `does`: {tell(text, ...actions), download(blob, name), saved(marks)}. */
  constructor(circuit, state, does) {
    this.#circuit = circuit;
    this.#state = state;
    this.#does = does;
    this.#base = givenMarks(circuit.header);
    state.set({ savedAs: savedAs(this.#base) });
    this.#version = circuit.header.served ?? "";
    byId("save").addEventListener("click", () => this.save());
    byId("save").title = this.#server
      ? "Save to the run folder (Ctrl-S)"
      : `Save to a file, ${FILE} (Ctrl-S)`;
    window.addEventListener("beforeunload", (event) => {
      if (this.#unsaved().wrote && navigator.userActivation?.hasBeenActive !== false) event.preventDefault();
    });
    state.listen((names) => {
      if ([...MARKS, "savedAs"].some((name) => names.has(name))) this.render();
    });
    this.render();
  }

  /** Whether anything is marked otherwise than where it was last saved, and whether more than pins is. */
  #unsaved() {
    const [all, bare] = savedAs(marksOf(this.#state)).split(".");
    const [allThen, bareThen] = this.#state.savedAs.split(".");
    return { any: all !== allThen, wrote: bare !== bareThen };
  }

  render() {
    const { any, wrote } = this.#unsaved();
    const pins = any ? "Unsaved pins" : "";
    byId("unsaved").textContent = wrote ? "You have unsaved notes" : pins;
    byId("save").classList.toggle("wanted", any);
  }

  /** These marks are in a file now; `held`: in that which the page is made of. */
  #keep(marks, held) {
    if (held) {
      this.#base = marksOf(marks);
      this.#does.saved(this.#base);
    }
    this.#state.set({ savedAs: savedAs(marks) });
    this.render();
  }

  async save() {
    const marks = marksOf(this.#state);
    if (!this.#server) this.saveFile();
    else if (!this.#saving) {
      this.#saving = true;
      await this.#put(writeGroups(this.#circuit, marks), marks);
      this.#saving = false;
    }
  }

  /** Save to a file that the browser downloads; where there is a server, its file still lacks these marks. */
  saveFile() {
    const marks = marksOf(this.#state);
    const text = writeGroups(this.#circuit, marks);
    this.#does.download(new Blob([text], { type: "application/json" }), FILE);
    if (!this.#server) this.#keep(marks, false);
  }

  /** These marks were read from a file of the reader's. */
  loaded(marks) {
    if (!this.#server) this.#keep(marks, false);
  }

  async #put(text, marks) {
    let answer;
    try {
      answer = await this.#server.write(text, this.#version);
    } catch {
      this.#does.tell(
        "Not saved: the server does not answer. Start it again, or save to a file.",
        this.#toFile(),
      );
      return;
    }
    if (answer.status === 200) {
      this.#version = answer.version;
      this.#keep(marks, true);
      this.#does.tell("Saved to the run folder.");
    } else if (answer.status === CONFLICT) this.#conflict(answer);
    else
      this.#does.tell(`Not saved: ${answer.text || `the server answers ${answer.status}`}`, this.#toFile());
  }

  #toFile() {
    return { name: "Save to a file", run: () => this.saveFile() };
  }

  #conflict(answer) {
    const theirs = this.#read(answer.text);
    if (!theirs) return;
    const take = (marks) => {
      this.#version = answer.version;
      this.#keep(theirs, true);
      this.#state.set(marks);
    };
    this.#does.tell(
      "Not saved: the file was changed since this page read it, by another tab or program.",
      { name: "Load theirs", run: () => take(theirs) },
      { name: "Merge both", run: () => take(mergeMarks(this.#base, marksOf(this.#state), theirs)) },
    );
  }

  #read(text) {
    try {
      return text ? readGroups(this.#circuit, text) : givenMarks({ groups: [] });
    } catch (error) {
      this.#does.tell(
        `Not saved: the file was changed, and cannot be read here (${error.message}).`,
        this.#toFile(),
      );
      return null;
    }
  }
}
