// What is said about the subgraph in words: shares of the metric, what is left out, a box, a link.
// Knows circuit and diagram. Refuses to know where it is written.

import { make } from "./elements.js";
import { count, number, percent } from "./format.js";
import { signed } from "./subgraph-sums.js";

const MEMBERS = 8;
const ROUNDING = 1e-5; // of the metric: no more than roundings of float32

function plural(n, word) {
  return `${count(n)} ${word}${n === 1 ? "" : "s"}`;
}

function part(value, { metric }, { header }) {
  return metric && !header.cancels ? percent(value / metric) : "";
}

/** What the set holds of the metric, in one sentence. */
export function shareSentence(circuit, flow) {
  if (!flow)
    return "How much of the metric they hold is not known: that needs edges and attributions of one prompt by RelP.";
  const held = part(flow.together, flow, circuit);
  const of = flow.metric === null ? "" : ` of ${signed(flow.metric)}`;
  if (!flow.n) return "No neuron is pinned or in a group: embeddings and logits hold all of the metric.";
  return `${plural(flow.n, "neuron")} in pins and groups hold${flow.n === 1 ? "s" : ""} ${signed(flow.together) || "0"}${of}${held ? `: ${held} of the metric` : ""}`;
}

/** The parts of the metric as rows of a list; the last four add up to it. */
export function shareRows(circuit, flow) {
  const isWhole = Number.isFinite(flow.tokens);
  const rest =
    flow.metric === null ? [] : [["not from the tokens: biases, baseline", flow.metric - flow.tokens]];
  const lost = flow.metric === null ? NaN : flow.metric - flow.through - flow.around;
  const rows = [
    ["their attributions, summed", flow.sum],
    ["of that counted twice: it passes through two of them", flow.sum - flow.together],
    ["their kept edges straight into logits", flow.direct],
    ["paths of kept edges through them", flow.through],
    ["paths of kept edges around them", flow.around],
    ...(isWhole
      ? [["paths with an edge that is not kept", flow.tokens - flow.through - flow.around], ...rest]
      : [["on no path of kept edges", lost]]),
  ];
  return rows.flatMap(([name, value]) => {
    const held = part(value, flow, circuit);
    const text = `${signed(value) || "\u2013"}${held ? ` (${held})` : ""}`;
    const isNothing = Math.abs(value) < ROUNDING * Math.abs(flow.metric);
    return [make("dt", {}, name), make("dd", {}, isNothing ? "\u2248 0" : text)];
  });
}

/** What the links are, and what is not drawn. */
export function noteText(diagram, state) {
  const { left, measure, passing, drawn } = diagram;
  const weak = (n, what) =>
    n > 0 ? `${plural(n, what)} more ${n === 1 ? "is" : "are"} too weak to be drawn.` : "";
  const units = "Weights are in each target's own units: a sum over several targets mixes them.";
  return [
    state.measure === "share" ? `Shares have no sum over several targets: the links are of ${measure}.` : "",
    measure === "weight" ? units : "",
    weak(left.groups, "group"),
    weak(left.nodes, "pinned node"),
    weak(left.embeddings, "embedding"),
    weak(left.logits, "logit"),
    drawn.length < passing.length ? `Only the ${count(drawn.length)} strongest links are drawn.` : "",
  ]
    .filter(Boolean)
    .join(" ");
}

export function linksText({ links, passing, threshold }) {
  return `\u2265 ${number(threshold)} \u00b7 ${count(passing.length)} of ${plural(links.length, "link")}`;
}

/** The lines of a file's legend. */
export function legendLines(circuit, diagram) {
  const { measure, threshold, drawn, links, boxes } = diagram;
  const units = measure === "attribution" ? ", in units of the metric" : ", in units of the target";
  const least = threshold > 0 ? ` of at least ${number(threshold)}` : "";
  const added = boxes.some(({ isAdded }) => isAdded) ? "; dashed: not pinned" : "";
  return [
    `Links: ${measure} summed over all edges between the members${units}; width by size.`,
    `${count(drawn.length)} of ${plural(links.length, "link")}${least} drawn. Double frame: group${added}.`,
  ];
}

function linkWords(diagram, { source, target, value, edges }, isInto) {
  const other = diagram.boxes[isInto ? source : target].name;
  return `${isInto ? "from" : "to"} ${other} ${signed(value)} (${plural(edges, "edge")})`;
}

/** A box in one line, for readers of the screen. */
export function boxLabel(diagram, i) {
  const { name, isGroup, lines } = diagram.boxes[i];
  const words = strongestOf(diagram, i).map(([link, isInto]) => linkWords(diagram, link, isInto));
  return [isGroup ? `group ${name}` : name, ...lines, ...words].join(", ");
}

/** The strongest links of a box, into it and out of it. */
function strongestOf({ near }, i) {
  return [...near[i].into.map((link) => [link, true]), ...near[i].out.map((link) => [link, false])];
}

/** What the tooltip says of a box. */
export function boxDetails(circuit, state, diagram, i) {
  const { name, rows, isGroup } = diagram.boxes[i];
  const { value, edges } = diagram.within[i];
  const { attribution } = circuit.nodes;
  const line = (text) => make("span", { class: "place" }, text);
  const members = [...rows]
    .sort((a, b) => circuit.strength[b] - circuit.strength[a])
    .slice(0, isGroup ? MEMBERS : 1)
    .map((row) => line([state.title(row), circuit.place(row), signed(attribution[row])].join(" \u00b7 ")));
  const more = rows.length - members.length;
  return [
    make("strong", {}, name),
    ...members,
    ...(more > 0 ? [line(`and ${plural(more, "node")} more`)] : []),
    ...(edges ? [line(`within the group: ${signed(value)} over ${plural(edges, "edge")}`)] : []),
    ...strongestOf(diagram, i).map(([link, isInto]) => line(linkWords(diagram, link, isInto))),
  ];
}

/** What the tooltip says of a link. */
export function linkDetails(diagram, { source, target, value, edges }) {
  const { boxes, measure } = diagram;
  const text = `${measure} ${signed(value)}, summed over ${plural(edges, "edge")}`;
  return [
    make("strong", {}, `${boxes[source].name} \u2192 ${boxes[target].name}`),
    make("span", { class: "place" }, text),
  ];
}
