// The reader's controls: search, filters, pins, groups, files and dialogs.
// Knows its elements and the state they change. Refuses to know drawing.

import { ERROR, known } from "./data.js";
import { count, number, percent, plainText } from "./format.js";
import { LONGEST_NAME, addGroup, nameProblem, readGroups, writeGroups } from "./groups.js";
import { make, refill } from "./panel.js";
import { search } from "./search.js";

const SIDE_LEGEND = ["legend-first", "legend-last", "legend-both", "legend-flipped"];
const FOUND = 40;
const MARKED = 400;
const STEPS = 1000;
const SPAN = 1e-5; // the lowest threshold but zero, as a part of the highest value
const LARGEST_FILE = 5e6;

const byId = (id) => document.getElementById(id);

/** A slider whose steps are even in the logarithm; at zero it lets everything pass. */
export function thresholdAt(step, highest) {
  return step <= 0 ? 0 : highest * SPAN ** (1 - step / STEPS);
}

function highestOf(values) {
  return values.reduce((most, value) => Math.max(most, Math.abs(value) || 0), 0);
}

export class Controls {
  #circuit;
  #state;
  #choose;
  #download;

  /** `choose(row)` goes to a node; `download(blob, name)` saves a file. */
  constructor(circuit, state, { choose, download }) {
    this.#circuit = circuit;
    this.#state = state;
    this.#choose = choose;
    this.#download = download;
    this.#bindSearch();
    this.#bindFilters();
    this.#bindGroups();
    this.#bindDialogs();
    this.#describe();
  }

  render(changed) {
    const has = (...names) => names.some((name) => changed.has(name));
    if (has("pins", "groups")) this.#renderGroups();
    if (has("measure")) this.#renderLegend();
    if (has("selected", "pins", "groups", "nodeThreshold", "expert", "edgeThreshold", "measure", "seen"))
      this.#renderCounts();
  }

  renderAll() {
    this.#renderLegend();
    this.#renderGroups();
    this.#renderCounts();
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
      ...pairs.flatMap((pair) => [
        make("dt", {}, plainText(pair[0])),
        make("dd", {}, plainText(pair[1])),
      ]),
    );
  }

  /** What colours and marks mean here: nodes by attribution if any has one, edges by the chosen measure. */
  #renderLegend() {
    const { measure } = this.#state;
    const { hasAttributions, nodes } = this.#circuit;
    const { sides } = this.#circuit.header;
    for (const name of ["legend-plus", "legend-minus"]) byId(name).hidden = !hasAttributions || Boolean(sides);
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
      (buttons[buttons.indexOf(document.activeElement) + step] ?? box).focus();
    });
  }

  #search(query) {
    const rows = search(this.#circuit, query);
    const entries = rows.slice(0, FOUND).map((row) => {
      const hidden = this.#state.shown[row] ? "" : ", filtered out";
      const name = make("span", { class: "what" }, this.#circuit.title(row));
      const place = make("span", { class: "where" }, this.#circuit.place(row) + hidden);
      const button = { type: "button", "data-row": row, onclick: () => this.#choose(row) };
      return make("li", {}, make("button", button, name, place));
    });
    const rest = rows.length > FOUND ? `, first ${FOUND} listed` : "";
    byId("found").textContent = query ? `${count(rows.length)} found${rest}` : "";
    byId("results").replaceChildren(...entries);
    this.#state.set({ matches: rows.slice(0, MARKED) });
  }

  #bindFilters() {
    const state = this.#state;
    const { edges, nEdges, nodes, strength, strengthName } = this.#circuit;
    const mostNode = highestOf(strength);
    const filtered = nodes.kind.includes(ERROR) ? "Neurons and errors" : "Neurons";
    byId("node-threshold-label").textContent =
      `${filtered} by ${strengthName === "influence" ? strengthName : "|attribution|"}`;
    byId("node-threshold").addEventListener("input", (event) => {
      state.set({ nodeThreshold: thresholdAt(event.target.valueAsNumber, mostNode) });
    });
    this.#bindExperts();
    const { sides } = this.#circuit.header;
    byId("seen-line").hidden = !sides;
    for (const [at, name] of (sides ?? []).entries()) {
      byId("seen").options[at + 1].textContent = plainText(name);
      byId(`legend-side-${at + 1}`).textContent = `only in ${plainText(name)}`;
    }
    byId("seen").addEventListener("change", (event) => state.set({ seen: Number(event.target.value) }));
    byId("measure").value = state.measure;
    for (const option of byId("measure").options) option.disabled = nEdges > 0 && !known(edges[option.value]);
    const setEdge = () => {
      const measure = byId("measure").value;
      const highest = highestOf(edges[measure]);
      state.set({ measure, edgeThreshold: thresholdAt(byId("edge-threshold").valueAsNumber, highest) });
    };
    byId("edge-threshold").addEventListener("input", setEdge);
    byId("measure").addEventListener("change", setEdge);
    for (const name of ["incoming", "outgoing", "overall"]) {
      byId(name).addEventListener("change", (event) => state.set({ [name]: event.target.checked }));
    }
    byId("overall-count").addEventListener("input", (event) => {
      const wanted = event.target.valueAsNumber;
      if (event.target.validity.valid && Number.isInteger(wanted)) state.set({ overallCount: wanted });
    });
  }

  /** Which expert's neurons alone are shown; nothing to choose where no neuron belongs to one. */
  #bindExperts() {
    const experts = this.#circuit.experts();
    byId("expert-line").hidden = experts.length === 0;
    const options = experts.map(([name, nodes]) => make("option", { value: name }, `${name} (${count(nodes)})`));
    byId("expert").append(...options);
    byId("expert").addEventListener("change", (event) => this.#state.set({ expert: event.target.value }));
  }

  #renderCounts() {
    const { nodeThreshold, edgeThreshold, measure } = this.#state;
    const edge = measure === "share" ? percent(edgeThreshold) : number(edgeThreshold);
    const nodes = `${count(this.#state.shownNodes())} of ${count(this.#circuit.nNodes)} nodes`;
    const edges = `${count(this.#state.shownEdges())} of ${count(this.#circuit.nEdges)} edges`;
    byId("node-threshold-value").textContent = `\u2265 ${number(nodeThreshold)} \u00b7 ${nodes}`;
    byId("edge-threshold-value").textContent = `\u2265 ${edge} \u00b7 ${edges}`;
  }

  #bindGroups() {
    byId("group-form").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#group(byId("group-name").value.trim());
    });
    byId("unpin-all").addEventListener("click", () => this.#state.set({ pins: new Set() }));
    byId("save-groups").addEventListener("click", () => {
      const text = writeGroups(this.#circuit, this.#state.pins, this.#state.groups);
      this.#download(new Blob([text], { type: "application/json" }), "groups.json");
    });
    byId("load-groups").addEventListener("click", () => byId("groups-file").click());
    byId("groups-file").addEventListener("change", async (event) => {
      const [file] = event.target.files;
      if (file) await this.#load(file);
      event.target.value = "";
    });
  }

  async #load(file) {
    try {
      if (file.size > LARGEST_FILE) throw new Error(`it is larger than ${LARGEST_FILE / 1e6} MB`);
      const { pins, groups } = readGroups(this.#circuit, await file.text());
      this.#state.set({ pins, groups });
      this.#tell(`Loaded ${count(groups.length)} groups and ${count(pins.size)} pins.`);
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
    const title = this.#circuit.title(row);
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
    else
      this.#state.set({
        groups: groups.map((other) => (other === group ? { ...group, name: wanted } : other)),
      });
    this.#tell(problem ? `The group keeps its name: ${problem}.` : "", Boolean(problem));
  }

  #bindDialogs() {
    for (const name of ["about", "help"]) {
      const dialog = byId(`${name}-dialog`);
      byId(name).addEventListener("click", () => dialog.showModal());
      dialog.addEventListener("click", (event) => {
        if (event.target === dialog) dialog.close();
      });
    }
  }
}
