// The state kept in the page's address and in the browser's storage, and read from there when the page opens.
// Knows both places and that either may be refused. Refuses to know what a state holds (saved.js).

import {
  digest,
  filterNames,
  fromLink,
  givenMarks,
  marksOf,
  plainState,
  readState,
  toLink,
} from "./saved.js";

const PREFIX = "#view=";
const LONGEST_LINK = 8000; // what mail and chats still carry
const LONGEST_READ = 100000;
const LONGEST_STORED = 2e6;
const LINKS = 8; // of this tab, the last ones
const WAIT = 400; // milliseconds from a change until it is kept

/** The browser's storage; null where it is refused, as in some private windows. */
export function storage(kind = "localStorage") {
  try {
    const place = window[kind];
    place.setItem("tracer-page:probe", "1");
    place.removeItem("tracer-page:probe");
    return place;
  } catch {
    return null;
  }
}

export class Memory {
  #circuit;
  #state;
  #stage;
  #tell;
  #first;
  #base;
  #place = storage();
  #tab = storage("sessionStorage"); // of this tab alone
  #key;
  #timer = 0;
  #link = "";
  #stored = "";
  #links = [];
  #warned = new Set();

  /** `tell(text, action)` says something on the page; `action` is {name, run} of a button beside it. */
  constructor(circuit, state, stage, tell) {
    this.#circuit = circuit;
    this.#state = state;
    this.#stage = stage;
    this.#tell = tell;
    this.#first = { ...state };
    this.#base = digest(givenMarks(circuit.header));
    this.#key = `tracer-page:${circuit.header.key}`;
    this.#restore();
    state.listen(() => this.touch());
    window.addEventListener("pagehide", () => this.flush());
    document.addEventListener("visibilitychange", () => document.hidden && this.flush());
    window.addEventListener("hashchange", () => {
      if (location.hash.startsWith(PREFIX) && location.hash !== this.#link)
        this.#take(this.#fromLink(), "link");
    });
  }

  /** Something changed that is to be kept, in a moment. */
  touch() {
    if (!this.#timer) this.#timer = setTimeout(() => this.flush(), WAIT);
  }

  /** What is marked now is what the file holds: a link or the storage need not hold it. */
  saved(marks) {
    this.#base = digest(marks);
    this.touch();
  }

  #restore() {
    if (!this.#place)
      this.#tell("This browser stores nothing for this page: its state is in the address alone.");
    const own = this.#fromTab();
    if (own) {
      this.#take(own, "browser");
      return;
    }
    const linked = this.#fromLink();
    const stored = this.#fromStorage();
    if (stored) this.#take(stored, "browser");
    if (linked) this.#take(linked, "link");
  }

  /** What this tab last held, where it is reloaded: its address may be a moment older. */
  #fromTab() {
    const text = this.#tab?.getItem(this.#key);
    const [links, held] = text ? this.#parsed(text) : [];
    if (!Array.isArray(links) || !links.includes(location.hash) || typeof held !== "string") return null;
    return this.#read("what this tab kept", LONGEST_STORED, () => held);
  }

  #parsed(text) {
    try {
      return [JSON.parse(text)].flat();
    } catch {
      return [];
    }
  }

  #fromLink() {
    if (!location.hash.startsWith(PREFIX)) return null;
    return this.#read("the link's view", LONGEST_READ, () => fromLink(location.hash.slice(PREFIX.length)));
  }

  #fromStorage() {
    const text = this.#place?.getItem(this.#key);
    return text ? this.#read("what this browser kept", LONGEST_STORED, () => text) : null;
  }

  #read(what, most, text) {
    try {
      if (location.hash.length > LONGEST_READ) throw new Error("it is too long");
      const found = text();
      if (found.length > most) throw new Error("it is too long");
      return readState(this.#circuit, found);
    } catch (error) {
      const said =
        error instanceof SyntaxError || error instanceof DOMException ? "it is damaged" : error.message;
      this.#tell(`Of ${what} nothing was taken: ${said}.`);
      return null;
    }
  }

  /** Take over a view at once; marks only where they were made on what this page was made with. */
  #take(found, from) {
    if (!found) return;
    const { marks, changes, look, base, saved } = found;
    const names = from === "link" ? ["selected", ...filterNames(this.#circuit)] : [];
    const fresh = Object.fromEntries(names.map((name) => [name, this.#first[name]]));
    this.#state.set({ ...fresh, ...changes });
    this.#stage.show(look);
    if (!marks || digest(marks) === digest(marksOf(this.#state))) return;
    const take = { name: "Take them", run: () => this.#state.set(marks) };
    const known = from === "browser" && saved ? { savedAs: saved } : {}; // a link is no word for what is saved here
    if (base === this.#base) this.#state.set({ ...marks, ...known });
    else if (from === "link")
      this.#tell(
        "The link's pins, groups and notes are of another state of the file, and were not taken.",
        take,
      );
    else this.#tell("This browser holds pins, groups or notes that were made before the file changed.", take);
  }

  /** The state as it is kept. */
  plain() {
    const about = { first: this.#first, base: this.#base, look: this.#stage.look() };
    return plainState(this.#circuit, this.#state, about);
  }

  /** Keep the state now. */
  flush() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    const whole = this.plain();
    const before = location.hash;
    this.#keepStored(whole);
    this.#keepLink(whole);
    this.#links = [...new Set([...this.#links, before, location.hash])].slice(-LINKS);
    this.#keepTab([this.#links, JSON.stringify(whole)]);
  }

  #keepLink(whole) {
    const bare = Object.keys(whole).length === 4; // nothing but what it is of
    let link = bare ? "" : PREFIX + toLink(whole);
    if (link.length > LONGEST_LINK) {
      const { marks, boxes, ...rest } = whole;
      link = PREFIX + toLink(rest);
      const what = marks || boxes ? "Pins, groups and notes" : "The view";
      this.#warn("long", `${what} are too long for a link: it has the view, this browser keeps the rest.`);
    }
    if (link === this.#link || (!link && !location.hash.startsWith(PREFIX))) return;
    this.#link = link;
    try {
      history.replaceState(history.state, "", link || location.pathname + location.search);
    } catch {
      this.#warn("address", "This browser refuses to keep the state in the page's address.");
    }
  }

  #keepStored(whole) {
    const text = JSON.stringify(whole);
    if (!this.#place || text === this.#stored) return;
    this.#stored = text;
    try {
      if (text.length > LONGEST_STORED) throw new Error("too long");
      this.#place.setItem(this.#key, text);
    } catch {
      this.#warn(
        "full",
        "This browser has no room to keep the state: save pins, groups and notes to a file.",
      );
    }
  }

  #keepTab(held) {
    try {
      this.#tab?.setItem(this.#key, JSON.stringify(held));
    } catch {
      // full: the address alone holds it
    }
  }

  #warn(kind, text) {
    if (this.#warned.has(kind)) return;
    this.#warned.add(kind);
    this.#tell(text);
  }
}
