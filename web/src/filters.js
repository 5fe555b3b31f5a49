// The filters: which nodes and edges the reader wants to see, and how many that leaves.
// Knows its elements and the state they set and show. Refuses to know what a filter lets pass (state.js) and drawing.

import { EMBEDDING, ERROR, LOGIT, NEURON, known } from "./data.js";
import { byId, make, targetOf } from "./elements.js";
import { count, counted, number, percent, plainText } from "./format.js";
import { FILTERS } from "./state.js";

const STEPS = 1000;
const SPAN = 1e-5; // the lowest threshold but zero, as a part of the highest value
const KIND_BOXES = {
  "kind-neuron": NEURON,
  "kind-embedding": EMBEDDING,
  "kind-logit": LOGIT,
  "kind-error": ERROR,
};
const IN_VIEW = ["nodeThreshold", "edgeThreshold", "seen"]; // the others are folded away
const DRAWN_BOXES = { incoming: "incoming", outgoing: "outgoing", overall: "overall", "draw-all": "drawAll" };
const DECIDING = [
  ...FILTERS,
  ...Object.values(DRAWN_BOXES),
  "overallCount",
  "selected",
  "pins",
  "groups",
  "picked",
  "measure",
];

/** A slider whose steps are even in the logarithm; at zero it lets everything pass. */
export function thresholdAt(step, highest) {
  return step <= 0 ? 0 : highest * SPAN ** (1 - step / STEPS);
}

/** The step of the slider at which a threshold is. */
export function stepAt(threshold, highest) {
  if (!(threshold > 0) || !(highest > 0)) return 0;
  return Math.min(
    STEPS,
    Math.max(1, Math.round(STEPS * (1 - Math.log(threshold / highest) / Math.log(SPAN)))),
  );
}

function highestOf(values) {
  return values.reduce((most, value) => Math.max(most, Math.abs(value) || 0), 0);
}

export class Filters {
  #circuit;
  #state;
  #highestNode;
  #highestInfluence;

  constructor(circuit, state) {
    this.#circuit = circuit;
    this.#state = state;
    this.#highestNode = highestOf(circuit.strength);
    this.#highestInfluence = highestOf(circuit.nodes.influence);
    this.#offer();
    this.#bindThresholds();
    this.#bindChoices();
    this.#bindLayers();
    this.#bindDrawn();
    byId("reset-filters").addEventListener("click", () => state.resetFilters());
  }

  render(changed) {
    if (DECIDING.some((name) => changed.has(name))) this.renderAll();
  }

  renderAll() {
    this.#showValues();
    this.#showCounts();
  }

  /** What this circuit has nothing of is not offered. */
  #offer() {
    const { nodes, edges, nEdges, hasAttributions, hasInfluence, strengthName, header, layers } =
      this.#circuit;
    const filtered = nodes.kind.includes(ERROR) ? "Neurons and errors" : "Neurons";
    byId("node-threshold-label").textContent =
      `${filtered} by ${strengthName === "influence" ? strengthName : "|attribution|"}`;
    byId("influence-line").hidden = !hasInfluence || strengthName === "influence";
    byId("node-sign-line").hidden = !hasAttributions;
    byId("always-on-line").hidden = this.#circuit.nAlwaysOn === 0;
    byId("always-on-text").textContent = `always-on neurons (${count(this.#circuit.nAlwaysOn)})`;
    for (const [id, kind] of Object.entries(KIND_BOXES))
      byId(id).parentElement.hidden = !nodes.kind.includes(kind);
    for (const name of ["lowest-layer", "highest-layer"]) byId(name).max = String(layers - 1);
    const experts = this.#circuit.experts();
    byId("expert-line").hidden = experts.length === 0;
    byId("expert").append(
      ...experts.map(([name, n]) => make("option", { value: name }, `${name} (${count(n)})`)),
    );
    byId("seen-line").hidden = !header.sides;
    for (const [at, name] of (header.sides ?? []).entries()) {
      byId("seen").options[at + 1].textContent = plainText(name);
      byId(`legend-side-${at + 1}`).textContent = `only in ${plainText(name)}`;
    }
    for (const option of byId("measure").options) option.disabled = nEdges > 0 && !known(edges[option.value]);
  }

  #bindThresholds() {
    const state = this.#state;
    byId("node-threshold").addEventListener("input", (event) =>
      state.set({ nodeThreshold: thresholdAt(targetOf(event).valueAsNumber, this.#highestNode) }),
    );
    byId("influence-threshold").addEventListener("input", (event) =>
      state.set({ influenceThreshold: thresholdAt(targetOf(event).valueAsNumber, this.#highestInfluence) }),
    );
    const setEdge = () => {
      const measure = byId("measure").value;
      const step = byId("edge-threshold").valueAsNumber;
      state.set({ measure, edgeThreshold: thresholdAt(step, this.#highestEdge(measure)) });
    };
    byId("edge-threshold").addEventListener("input", setEdge);
    byId("measure").addEventListener("change", setEdge);
  }

  #highestEdge(measure) {
    const { order, size } = this.#circuit.ranked(measure);
    return order.length ? size[order[0]] : 0;
  }

  #bindChoices() {
    const state = this.#state;
    const onChange = (id, read) =>
      byId(id).addEventListener("change", (event) => state.set(read(targetOf(event))));
    onChange("node-sign", (one) => ({ nodeSign: one.value }));
    onChange("edge-sign", (one) => ({ edgeSign: one.value }));
    onChange("position-zero", (one) => ({ positionZero: one.checked }));
    onChange("always-on", (one) => ({ alwaysOn: one.checked }));
    onChange("groups-stay", (one) => ({ groupsStay: one.checked }));
    onChange("expert", (one) => ({ expert: one.value }));
    onChange("seen", (one) => ({ seen: Number(one.value) }));
    for (const [id, kind] of Object.entries(KIND_BOXES))
      onChange(id, (one) => ({
        kinds: one.checked ? state.kinds | (1 << kind) : state.kinds & ~(1 << kind),
      }));
  }

  /** The end that is moved takes the other along where they would cross. */
  #bindLayers() {
    const state = this.#state;
    const read = (event) => {
      const { valueAsNumber: layer, validity } = targetOf(event);
      return validity.valid && Number.isInteger(layer) ? layer : null;
    };
    byId("lowest-layer").addEventListener("change", (event) => {
      const layer = read(event);
      if (layer === null) this.#showValues();
      else state.set({ lowestLayer: layer, highestLayer: Math.max(layer, state.highestLayer) });
    });
    byId("highest-layer").addEventListener("change", (event) => {
      const layer = read(event);
      if (layer === null) this.#showValues();
      else state.set({ highestLayer: layer, lowestLayer: Math.min(layer, state.lowestLayer) });
    });
  }

  #bindDrawn() {
    const state = this.#state;
    for (const [id, name] of Object.entries(DRAWN_BOXES))
      byId(id).addEventListener("change", (event) => state.set({ [name]: targetOf(event).checked }));
    byId("overall-count").addEventListener("input", (event) => {
      const wanted = targetOf(event).valueAsNumber;
      if (targetOf(event).validity.valid && Number.isInteger(wanted)) state.set({ overallCount: wanted });
    });
  }

  /** The elements show what the state has, whoever set it; a slider that stands for its value already stays. */
  #showValues() {
    const state = this.#state;
    const slide = (id, threshold, highest) => {
      const one = byId(id);
      if (thresholdAt(one.valueAsNumber, highest) !== threshold)
        one.value = String(stepAt(threshold, highest));
    };
    byId("measure").value = state.measure;
    slide("node-threshold", state.nodeThreshold, this.#highestNode);
    slide("influence-threshold", state.influenceThreshold, this.#highestInfluence);
    slide("edge-threshold", state.edgeThreshold, this.#highestEdge(state.measure));
    byId("node-sign").value = state.nodeSign;
    byId("edge-sign").value = state.edgeSign;
    byId("lowest-layer").value = String(state.lowestLayer);
    byId("highest-layer").value = String(state.highestLayer);
    byId("position-zero").checked = state.positionZero;
    byId("always-on").checked = state.alwaysOn;
    byId("groups-stay").checked = state.groupsStay;
    byId("groups-stay").parentElement.hidden = state.groups.length === 0;
    byId("expert").value = state.expert;
    byId("seen").value = String(state.seen);
    for (const [id, name] of Object.entries(DRAWN_BOXES)) byId(id).checked = state[name];
    if (byId("overall-count").validity.valid) byId("overall-count").value = String(state.overallCount);
    for (const [id, kind] of Object.entries(KIND_BOXES))
      byId(id).checked = Boolean((state.kinds >> kind) & 1);
    this.#showDrawn();
  }

  #showDrawn() {
    for (const [id, name] of Object.entries(DRAWN_BOXES)) byId(id).checked = this.#state[name];
    const field = byId("overall-count");
    if (field !== document.activeElement) field.value = String(this.#state.overallCount);
  }

  #showCounts() {
    const { nodeThreshold, influenceThreshold, edgeThreshold, measure, changedFilters } = this.#state;
    const { nNodes, nEdges } = this.#circuit;
    const [nodes, edges] = [this.#state.shownNodes(), this.#state.shownEdges()];
    const edge = measure === "share" ? percent(edgeThreshold) : number(edgeThreshold);
    byId("node-threshold-value").textContent =
      `\u2265 ${number(nodeThreshold)} \u00b7 ${count(nodes)} of ${count(nNodes)} nodes`;
    byId("influence-threshold-value").textContent = `\u2265 ${number(influenceThreshold)}`;
    byId("edge-threshold-value").textContent =
      `\u2265 ${edge} \u00b7 ${count(edges)} of ${count(nEdges)} edges`;
    const folded = changedFilters.filter((name) => !IN_VIEW.includes(name)).length;
    byId("more-filters-summary").textContent = folded ? `More filters (${folded} in use)` : "More filters";
    byId("hidden-count").textContent = changedFilters.length
      ? `${counted(nNodes - nodes, "node")} and ${counted(nEdges - edges, "edge")} hidden by filters.${this.#kept()}`
      : "Nothing is hidden by filters.";
  }

  #kept() {
    const { nKept } = this.#state;
    return nKept
      ? ` ${counted(nKept, "more stays", "more stay")}: chosen, pinned, picked or in a group.`
      : "";
  }
}
