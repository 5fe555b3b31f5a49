// The strip below the title: what the model says, whether the metric is conserved, how the graph was tested.
// Knows the header's facts and its own elements. Refuses to know how numbers were computed.

import { byId, make } from "./elements.js";
import { count, number, percent, plainText, tokenText } from "./format.js";

const REPORT = /^(\.\.\/)?[A-Za-z0-9_-]+\.html$/; // no address, nothing that runs

function pair(name, ...values) {
  return [make("dt", {}, name), make("dd", {}, ...values)];
}

function predictions(facts) {
  if (!facts.predictions.length) return [];
  const bars = facts.predictions.map(([token, chance]) =>
    make(
      "li",
      {},
      make("span", { class: "what" }, tokenText(token)),
      make("meter", { min: 0, max: 1, value: chance ?? 0, "aria-hidden": "true" }),
      make("span", { class: "value" }, number(chance ?? NaN)),
    ),
  );
  return pair("The model says", make("ul", { class: "chances" }, ...bars));
}

function evaluation(facts) {
  const none = "not tested: \u201ctracer evaluate\u201d on the run folder switches the rest of the model off";
  if (!facts.evaluation.length) return facts.tested || !facts.conservation ? [] : pair("Evaluation", none);
  const head = ["nodes", "faithfulness", "95 %", "random nodes"].map((name) =>
    make("th", { scope: "col" }, name),
  );
  const share = (value) => (value === null ? "\u2013" : percent(value));
  const rows = facts.evaluation.map(([size, kept, low, high, control]) => {
    const ends = low === null || high === null ? "\u2013" : `${percent(low)} to ${percent(high)}`;
    const cells = [count(size), share(kept), ends, share(control)];
    return make("tr", {}, ...cells.map((cell) => make("td", {}, cell)));
  });
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows));
  const about = make(
    "p",
    { class: "hint" },
    `Share of the behaviour that is left, on ${plainText(facts.tested)}.`,
  );
  return pair("Evaluation", about, make("div", { class: "scroll" }, table));
}

/** How it went, in the line that is seen while the strip is folded. */
function summary(facts) {
  const [token, chance] = facts.predictions[0] ?? [];
  const last = facts.evaluation.at(-1);
  return [
    token === undefined ? "" : `says ${tokenText(token)} (${number(chance ?? NaN)})`,
    facts.holds === true ? "conservation holds" : "",
    last && last[1] !== null ? `${percent(last[1])} faithful at ${count(last[0])} nodes` : "",
    facts.conservation && !last ? "not tested" : "",
  ].filter(Boolean);
}

/** Fill the strip, or hide it where nothing is known. */
export function renderStrip({ header }) {
  const { facts } = header;
  const texts = [
    ...(facts.asked.length
      ? pair("Asked", ...facts.asked.map((one) => make("div", {}, plainText(one))))
      : []),
    ...(facts.metric ? pair("Metric", plainText(facts.metric)) : []),
    ...(facts.conservation ? pair("Conservation", plainText(facts.conservation)) : []),
  ];
  const content = [...predictions(facts), ...texts, ...evaluation(facts)];
  const strip = byId("facts");
  const linked = typeof facts.report === "string" && REPORT.test(facts.report);
  strip.hidden = !content.length && !linked;
  byId("facts-summary").append(summary(facts).join(" \u00b7 "));
  byId("facts-list").append(...content);
  if (linked) {
    const served = /** @type {any} */ (globalThis).tracerServer;
    const href = served ? `${facts.report}?token=${encodeURIComponent(served.token)}` : facts.report;
    byId("facts-list").append(...pair("Report", make("a", { href }, facts.report)));
  }
}
