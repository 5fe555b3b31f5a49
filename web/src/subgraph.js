// The subgraph pane: pinned nodes and groups as a diagram beside the picture, and what they hold of the metric.
// Knows its elements, the state and the diagram. Refuses to know how sums, places and paths are computed.

import { byId, targetOf } from "./elements.js";
import { Diagram } from "./subgraph-diagram.js";
import { FONTS, LIVE } from "./subgraph-draw.js";
import { bindExport } from "./subgraph-export.js";
import { Flows } from "./subgraph-flow.js";
import { Moves, bindSplit } from "./subgraph-moves.js";
import {
  boxDetails,
  boxLabel,
  linkDetails,
  linksText,
  noteText,
  shareRows,
  shareSentence,
} from "./subgraph-words.js";

const STRUCTURE = ["pins", "groups", "names", "measure", "seen"];
const ZOOMS = { "+": 1.3, "=": 1.3, "-": 1 / 1.3 };

export class Subgraph {
  #circuit;
  #state;
  #choose;
  #diagram = null;
  #flows;
  #flow = null;
  #moves;
  #asked = new Set();
  #elements = [];
  #opener = null; // what had the focus when the pane opened

  /** `choose(row)` goes to a node in the main picture; `download(blob, name)` saves a file. */
  constructor(circuit, state, { choose, download }) {
    this.#circuit = circuit;
    this.#state = state;
    this.#choose = choose;
    this.#flows = new Flows(circuit);
    this.#moves = new Moves(byId("diagram"), byId("diagram-plane"));
    byId("diagram").setAttribute("font-family", FONTS);
    this.#bindButtons();
    this.#bindTip();
    this.#bindPane();
    bindExport(circuit, () => this.#diagram, download);
    state.listen((changed) => this.render(changed));
  }

  /** Follow what changed in the state; the work waits for the next frame. */
  render(changed) {
    if (changed.has("subgraphOpen")) this.#show();
    if (!this.#state.subgraphOpen) return;
    const names = [...STRUCTURE, "subgraph", "subgraphOpen", "selected"].filter((name) => changed.has(name));
    if (!names.length) return;
    if (!this.#asked.size) requestAnimationFrame(() => this.#work());
    names.forEach((name) => this.#asked.add(name));
  }

  #work() {
    const asked = this.#asked;
    this.#asked = new Set();
    if (!this.#state.subgraphOpen) return;
    if (asked.has("subgraphOpen") || STRUCTURE.some((name) => asked.has(name))) this.#redraw();
    else if (asked.has("subgraph")) this.#settle();
    this.#mark();
  }

  #show() {
    const { subgraphOpen } = this.#state;
    byId("subgraph").hidden = byId("split").hidden = !subgraphOpen;
    byId("subgraph-toggle").setAttribute("aria-expanded", String(subgraphOpen));
  }

  /** Everything anew. */
  #redraw() {
    if (this.#diagram) this.#diagram.update();
    else this.#diagram = new Diagram(this.#circuit, this.#state);
    const { boxes } = this.#diagram;
    byId("subgraph-empty").hidden = boxes.length > 0;
    byId("subgraph-body").hidden = boxes.length === 0;
    this.#drawBoxes();
    this.#drawLinks();
    this.#sayShare();
    this.#moves.fit(this.#diagram.bounds);
  }

  /** Boxes where they were moved. */
  #settle() {
    this.#diagram.settle();
    this.#drawBoxes();
    this.#drawLinks();
  }

  #sayShare() {
    const marked = [...this.#state.pins, ...this.#state.groups.flatMap(({ rows }) => rows)];
    this.#flow = this.#flows.isKnown && marked.length ? this.#flows.of(marked) : null;
    byId("subgraph-share").textContent = marked.length ? shareSentence(this.#circuit, this.#flow) : "";
    byId("subgraph-parts").hidden = !this.#flow;
    byId("subgraph-rows").replaceChildren(...(this.#flow ? shareRows(this.#circuit, this.#flow) : []));
  }

  #drawBoxes() {
    const diagram = this.#diagram;
    const focused = /** @type {HTMLElement} */ (document.activeElement)?.dataset?.box;
    this.#elements = diagram.boxElements(LIVE);
    this.#elements.forEach((element, i) => {
      element.dataset.box = diagram.boxes[i].key;
      element.setAttribute("tabindex", "0");
      element.setAttribute("role", "button");
      element.setAttribute("aria-label", boxLabel(diagram, i));
    });
    // In the order of Tab: from the bottom up, and from left to right.
    const { places } = diagram;
    const order = places
      .map((_, i) => i)
      .sort((a, b) => places[b].y - places[a].y || places[a].x - places[b].x);
    byId("diagram-boxes").replaceChildren(...order.map((i) => this.#elements[i]));
    this.#elements.find(({ dataset }) => dataset.box === focused)?.focus({ preventScroll: true });
    this.#moves.bind(this.#elements, {
      at: (i) => diagram.places[i],
      move: (i, x, y) => this.#move(i, x, y),
      done: (i) => this.#keep(i),
      choose: (i) => this.#pick(i),
    });
  }

  /** The links and what is said about them. */
  #drawLinks() {
    const diagram = this.#diagram;
    this.#hide();
    byId("diagram-links").replaceChildren(...diagram.linkElements(LIVE));
    byId("diagram-numbers").replaceChildren(...diagram.numberElements(LIVE));
    byId("subgraph-threshold").value = diagram.sliderStep;
    byId("subgraph-threshold-value").textContent = linksText(diagram);
    byId("subgraph-note").textContent = noteText(diagram, this.#state);
    byId("subgraph-measure").textContent = `Links by |sum of ${diagram.measure}|`;
  }

  #move(i, x, y) {
    const { places } = this.#diagram;
    places[i] = { ...places[i], x, y };
    this.#diagram.place(this.#elements[i], i);
    this.#diagram.route();
    this.#drawLinks();
  }

  /** A box stays where it was moved. */
  #keep(i) {
    const { boxes, places } = this.#diagram;
    const { x, y } = places[i];
    const at = { x: Math.round(x), y: Math.round(y) };
    this.#state.set({ subgraph: new Map(this.#state.subgraph).set(boxes[i].key, at) });
  }

  /** Choose a box's node in the main picture, of a group its strongest. */
  #pick(i) {
    const { strength } = this.#circuit;
    const { rows } = this.#diagram.boxes[i];
    this.#choose(rows.reduce((best, row) => (strength[row] > strength[best] ? row : best)));
    this.#elements[i].focus({ preventScroll: true });
  }

  /** The box of the chosen node. */
  #mark() {
    const { boxes } = this.#diagram;
    this.#elements.forEach((element, i) =>
      element.classList.toggle("chosen", boxes[i].rows.includes(this.#state.selected)),
    );
  }

  #bindButtons() {
    byId("subgraph-toggle").addEventListener("click", () => this.#toggle());
    byId("subgraph-close").addEventListener("click", () => this.#toggle());
    byId("subgraph-layout").addEventListener("click", () => {
      this.#state.set({ subgraph: new Map() });
      this.#asked.add("subgraphOpen"); // to bring the whole into view
    });
    byId("subgraph-fit").addEventListener("click", () => this.#moves.fit(this.#diagram.bounds));
    byId("subgraph-in").addEventListener("click", () => this.#moves.zoomBy(1.3));
    byId("subgraph-out").addEventListener("click", () => this.#moves.zoomBy(1 / 1.3));
    byId("subgraph-threshold").addEventListener("input", (event) => {
      this.#diagram.from(targetOf(event).valueAsNumber);
      this.#drawLinks();
    });
    for (const name of ["embeddings", "logits", "numbers"])
      byId(`subgraph-${name}`).addEventListener("change", (event) => {
        this.#diagram.options[name] = targetOf(event).checked;
        this.#redraw();
      });
  }

  #toggle() {
    const opens = !this.#state.subgraphOpen;
    const hadFocus = byId("subgraph").contains(document.activeElement);
    if (opens) this.#opener = document.activeElement;
    this.#state.set({ subgraphOpen: opens });
    if (!opens && hadFocus) (this.#opener?.isConnected ? this.#opener : byId("canvas")).focus();
  }

  /** Keys: S opens and closes from anywhere but a field; in the pane + - 0 zoom, Escape leaves the diagram. */
  #bindPane() {
    window.addEventListener("keydown", (event) => {
      const isTyped = targetOf(event).matches?.("input:not([type=range], [type=checkbox]), textarea, select");
      const isPlain = !event.ctrlKey && !event.metaKey && !event.altKey && !event.defaultPrevented;
      if (event.key.toLowerCase() !== "s" || isTyped || !isPlain || document.querySelector("dialog[open]"))
        return;
      event.preventDefault();
      this.#toggle();
      if (this.#state.subgraphOpen) requestAnimationFrame(() => this.#enter());
    });
    byId("diagram").addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (ZOOMS[event.key]) this.#moves.zoomBy(ZOOMS[event.key]);
      else if (event.key === "0") this.#moves.fit(this.#diagram.bounds);
      else if (event.key === "Escape") byId("subgraph-layout").focus();
      else return;
      event.preventDefault();
    });
    const beside = matchMedia("(width >= 1800px)");
    const turn = () =>
      byId("split").setAttribute("aria-orientation", beside.matches ? "vertical" : "horizontal");
    beside.addEventListener("change", turn);
    turn();
    bindSplit(byId("split"), byId("pictures"), {
      isBeside: () => beside.matches,
      set: (part) => byId("pictures").style.setProperty("--pane", `${part}%`),
    });
  }

  /** The focus goes to the first box, or to the pane. */
  #enter() {
    const first = /** @type {SVGElement} */ (byId("diagram-boxes").firstElementChild);
    (first ?? byId("subgraph")).focus({ preventScroll: true });
  }

  #bindTip() {
    const root = byId("diagram");
    const over = (event) => {
      const element = targetOf(event).closest?.(".box, .link");
      if (element) this.#tell(element);
      else this.#hide();
    };
    root.addEventListener("pointerover", over);
    root.addEventListener("pointerleave", () => this.#hide());
    root.addEventListener("focusin", (event) => {
      const i = this.#elements.indexOf(targetOf(event));
      if (i >= 0) this.#moves.reveal(this.#diagram.places[i]);
      over(event);
    });
    root.addEventListener("focusout", () => this.#hide());
  }

  /** The tooltip of a box or link, and its links before the others. */
  #tell(element) {
    const diagram = this.#diagram;
    const i = this.#elements.indexOf(element);
    const link = diagram.drawn.find(({ source, target }) => `${source},${target}` === element.dataset.link);
    const isNear = ({ dataset }) =>
      dataset.link.split(",").includes(String(i)) || element.dataset.link === dataset.link;
    for (const other of byId("diagram-plane").querySelectorAll("[data-link]"))
      other.classList.toggle("near", isNear(/** @type {HTMLElement} */ (other)));
    byId("diagram").classList.add("lit");
    const tip = byId("subgraph-tip");
    const content = i >= 0 ? boxDetails(this.#circuit, this.#state, diagram, i) : linkDetails(diagram, link);
    tip.replaceChildren(...content);
    tip.hidden = false;
    const whole = tip.parentElement.getBoundingClientRect();
    const at = element.getBoundingClientRect();
    const right = at.right - whole.left + 10;
    const left = right + tip.offsetWidth < whole.width ? right : at.left - whole.left - 10 - tip.offsetWidth;
    const top = Math.min(at.top - whole.top, whole.height - tip.offsetHeight - 4);
    tip.style.left = `${Math.max(4, Math.min(left, whole.width - tip.offsetWidth - 4))}px`;
    tip.style.top = `${Math.max(4, top)}px`;
  }

  #hide() {
    byId("subgraph-tip").hidden = true;
    byId("diagram").classList.remove("lit");
  }

  /** What the pane shows, as numbers. */
  report() {
    const diagram = this.#diagram ?? new Diagram(this.#circuit, this.#state);
    const { boxes, places, links, within, drawn, left, measure, threshold } = diagram;
    return {
      ...{ links, within, drawn, left, measure, threshold },
      boxes: boxes.map((box, i) => ({ ...box, ...places[i] })),
      flow: this.#flow,
    };
  }
}
