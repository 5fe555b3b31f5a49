// The reader's controls: search, pins, groups, files and dialogs; the filters are in filters.js.
// Knows its elements and the state they change. Refuses to know drawing.

import { ERROR } from "./data.js";
import { byId, make, refill, targetOf } from "./elements.js";
import { Filters } from "./filters.js";
import { count, number, plainText } from "./format.js";
import { LONGEST_NAME, addGroup, nameProblem, readGroups } from "./groups.js";
import { search } from "./search.js";
import { groupKey } from "./subgraph-sums.js";

const SIDE_LEGEND = ["legend-first", "legend-last", "legend-both", "legend-flipped"];
const FOUND = 40;
const MARKED = 400;
const LARGEST_FILE = 5e6;

export class Controls {
  #circuit;
  #state;
  #choose;
  #saveFile;
  #loaded;
  #filters;

  /** `choose(row)` goes to a node; `saveFile()` saves the marks; `loaded(marks)` hears of those of a file. */
  constructor(circuit, state, { choose, saveFile, loaded }) {
    this.#circuit = circuit;
    this.#state = state;
    this.#choose = choose;
    this.#saveFile = saveFile;
    this.#loaded = loaded;
    this.#filters = new Filters(circuit, state);
    this.#bindSearch();
    this.#bindGroups();
    this.#bindDialogs();
    this.#describe();
  }

  render(changed) {
    const has = (...names) => names.some((name) => changed.has(name));
    if (has("pins", "groups", "names")) this.#renderGroups();
    if (has("measure")) this.#renderLegend();
    this.#filters.render(changed);
  }

  renderAll() {
    this.#renderLegend();
    this.#renderGroups();
    this.#filters.renderAll();
  }

  #describe() {
    const { header } = this.#circuit;
    byId("title").textContent = plainText(header.title);
    const value = header.metric === null ? "" : ` = ${number(header.metric)}`;
    const metric = header.metricText + value;
    byId("subtitle").replaceChildren(
      ...[header.model, header.method, metric].map((text) => make("span", {}, plainText(text))),
    );
    const pairs = [
      ["model", header.model],
      ["method", header.method],
      ["metric", metric],
      ["tokens", count(this.#circuit.tokens.length)],
      ["layers", count(this.#circuit.layers)],
      ["nodes", count(this.#circuit.nNodes)],
      ["edges", count(this.#circuit.nEdges)],
      ...header.settings,
    ];
    byId("settings").append(
      ...pairs.flatMap((pair) => [make("dt", {}, plainText(pair[0])), make("dd", {}, plainText(pair[1]))]),
    );
  }

  /** What colours and marks mean here: nodes by attribution if any has one, edges by the chosen measure. */
  #renderLegend() {
    const { measure } = this.#state;
    const { hasAttributions, nodes } = this.#circuit;
    const { sides } = this.#circuit.header;
    for (const name of ["legend-plus", "legend-minus"])
      byId(name).hidden = !hasAttributions || Boolean(sides);
    for (const name of SIDE_LEGEND) byId(name).hidden = !sides;
    for (const name of ["legend-line-plus", "legend-line-minus"]) byId(name).hidden = Boolean(sides);
    byId("legend-error").hidden = !nodes.kind.includes(ERROR);
    const isMetric = measure === "attribution";
    byId("legend-edge-plus").textContent = isMetric ? "edge for the metric" : `edge of positive ${measure}`;
    byId("legend-edge-minus").textContent = isMetric ? "edge against" : `of negative ${measure}`;
  }

  #bindSearch() {
    const box = byId("search");
    const results = byId("results");
    box.addEventListener("input", () => this.#search(box.value));
    box.addEventListener("keydown", (event) => {
      if (event.key === "Enter") results.querySelector("button")?.click();
      else if (event.key === "ArrowDown") results.querySelector("button")?.focus();
      else if (event.key === "Escape") {
        box.value = "";
        this.#search("");
      } else return;
      event.preventDefault();
    });
    results.addEventListener("keydown", (event) => {
      const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      if (!step) return;
      event.preventDefault();
      const buttons = [...results.querySelectorAll("button")];
      (buttons[buttons.findIndex((one) => one === document.activeElement) + step] ?? box).focus();
    });
  }

  #search(query) {
    const rows = search(this.#circuit, query);
    const entries = rows.slice(0, FOUND).map((row) => {
      const hidden = this.#state.shown[row] ? "" : ", filtered out";
      const name = make("span", { class: "what" }, this.#state.title(row));
      const place = make("span", { class: "where" }, this.#circuit.place(row) + hidden);
      const button = { type: "button", "data-row": row, onclick: () => this.#choose(row) };
      return make("li", {}, make("button", button, name, place));
    });
    const rest = rows.length > FOUND ? `, first ${FOUND} listed` : "";
    byId("found").textContent = query ? `${count(rows.length)} found${rest}` : "";
    byId("results").replaceChildren(...entries);
    this.#state.set({ matches: rows.slice(0, MARKED) });
  }

  #bindGroups() {
    byId("group-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#group(byId("group-name").value.trim());
    });
    byId("unpin-all").addEventListener("click", () => this.#state.set({ pins: new Set() }));
    byId("save-groups").addEventListener("click", () => this.#saveFile());
    byId("load-groups").addEventListener("click", () => byId("groups-file").click());
    byId("groups-file").addEventListener("change", async (event) => {
      const [file] = targetOf(event).files;
      if (file) await this.#load(file);
      targetOf(event).value = "";
    });
  }

  async #load(file) {
    try {
      if (file.size > LARGEST_FILE) throw new Error(`it is larger than ${LARGEST_FILE / 1e6} MB`);
      const marks = readGroups(this.#circuit, await file.text());
      this.#state.set(marks);
      this.#loaded(marks);
      const { pins, groups, names, notes } = marks;
      const written = new Set([...names.keys(), ...notes.keys()]).size;
      const more = written ? ` and ${count(written)} notes` : "";
      this.#tell(`Loaded ${count(groups.length)} groups and ${count(pins.size)} pins${more}.`);
    } catch (error) {
      this.#tell(`${file.name} was not loaded: ${error.message}. Nothing was changed.`, true);
    }
  }

  #group(name) {
    const { pins, groups } = this.#state;
    const problem = pins.size ? nameProblem(name, groups) : "pin some nodes first";
    if (problem) {
      this.#tell(`No group was made: ${problem}.`, true);
      return;
    }
    this.#state.set({ groups: addGroup(groups, name, pins), pins: new Set() });
    byId("group-name").value = "";
    this.#tell("");
  }

  #tell(text, isProblem = false) {
    const message = byId("message");
    message.textContent = text;
    message.classList.toggle("problem", isProblem);
  }

  #renderGroups() {
    const { pins, groups } = this.#state;
    refill(byId("pins"), ...[...pins].map((row) => this.#pinEntry(row)));
    byId("pin-count").textContent = `Pinned nodes (${count(pins.size)})`;
    byId("unpin-all").hidden = pins.size === 0;
    refill(byId("groups"), ...groups.map((group, i) => this.#groupEntry(group, i)));
    byId("group-count").textContent = `Groups (${count(groups.length)})`;
  }

  #pinEntry(row) {
    const title = this.#state.title(row);
    const go = { type: "button", "data-row": row, onclick: () => this.#choose(row) };
    const drop = {
      type: "button",
      class: "small",
      "aria-label": `Unpin ${title}`,
      onclick: () => this.#state.togglePin(row),
    };
    const name = make("span", { class: "what" }, title);
    const where = make("span", { class: "where" }, this.#circuit.place(row));
    return make("li", {}, make("button", go, name, where), make("button", drop, "\u2715"));
  }

  #groupEntry(group, i) {
    const { hasAttributions, nodes } = this.#circuit;
    const sum = group.rows.reduce((total, row) => total + (nodes.attribution[row] || 0), 0);
    const held = hasAttributions ? `, attribution ${number(sum)}` : "";
    const field = { type: "text", value: group.name, maxlength: LONGEST_NAME, "data-key": `name ${i}` };
    const name = make("input", { ...field, "aria-label": "Name of the group" });
    name.addEventListener("change", () => this.#rename(group, name));
    const drop = {
      type: "button",
      class: "small",
      "aria-label": `Delete group ${group.name}`,
      onclick: () => this.#state.set({ groups: this.#state.groups.filter((other) => other !== group) }),
    };
    const repin = {
      type: "button",
      "data-key": `pin ${i}`,
      class: "small",
      title: "Pin the members",
      "aria-label": `Pin the members of ${group.name}`,
      onclick: () => this.#state.set({ pins: new Set([...this.#state.pins, ...group.rows]) }),
    };
    const about = make("span", { class: "where" }, `${count(group.rows.length)} nodes${held}`);
    return make("li", {}, name, make("button", repin, "Pin"), make("button", drop, "\u2715"), about);
  }

  #rename(group, input) {
    const { groups } = this.#state;
    const wanted = input.value.trim();
    const problem = nameProblem(
      wanted,
      groups.filter((other) => other !== group),
    );
    if (problem) input.value = group.name;
    else {
      const named = groups.map((other) => (other === group ? { ...group, name: wanted } : other));
      this.#state.set({ groups: named, subgraph: this.#placesFor(group.name, wanted) });
    }
    this.#tell(problem ? `The group keeps its name: ${problem}.` : "", Boolean(problem));
  }

  /** Where boxes of the subgraph were moved, once a group is called otherwise. */
  #placesFor(name, wanted) {
    const { subgraph } = this.#state;
    if (!subgraph.has(groupKey(name))) return subgraph;
    return new Map([...subgraph].map(([key, at]) => [key === groupKey(name) ? groupKey(wanted) : key, at]));
  }

  #bindDialogs() {
    for (const name of ["about", "help"]) {
      const dialog = byId(`${name}-dialog`);
      byId(name).addEventListener("click", () => {
        dialog.showModal();
        dialog.querySelector("h2").focus({ preventScroll: true }); // and not the button at its end
        dialog.scrollTop = 0;
      });
      dialog.addEventListener("click", (event) => {
        if (event.target === dialog) dialog.close();
      });
    }
  }
}
