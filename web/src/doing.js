// What a neuron does, for its panel: description, tokens, texts where it is strong, always-on, the same neuron elsewhere.
// Knows the circuit's neurons. Refuses to know state, drawing and which node is chosen. Every text is text, never markup.

import { NEURON } from "./data.js";
import { make } from "./elements.js";
import { count, number, percent, plainText, runningText, tokenText } from "./format.js";

const LISTED = 8; // tokens of a list
const UNITS = { promotes: "logit", suppresses: "logit", "driven by": "value" };
const SHADES = 5;

/** What a node's neuron does, in words and as lists of tokens; nothing where nothing is known. */
export function doing(circuit, row) {
  const said = circuit.says(row);
  return [...alwaysOn(circuit, row), ...(said ? [...described(said), ...tokenLists(said.lists)] : [])];
}

/** The sign of a neuron's value, by which it promotes one thing or its opposite; empty where it is not known. */
export function polarity(circuit, row) {
  const { kind, activation } = circuit.nodes;
  if (kind[row] !== NEURON || !Number.isFinite(activation[row])) return "";
  return activation[row] < 0 ? "\u2212 (its value is negative)" : "+ (its value is positive)";
}

function alwaysOn(circuit, row) {
  const evidence = circuit.alwaysOn(row);
  if (!evidence) return [];
  const [share, attribution, exact] = evidence;
  const text =
    `strong on ${percent(share)} of unrelated prompts too (mean |attribution| ${number(attribution)}), ` +
    `where it does next to nothing (set to its mean, the metric moves by ${number(exact)}).`;
  return [make("p", { class: "says flag" }, make("strong", {}, "Always on: "), text)];
}

function described({ label, descriptions, lists }) {
  if (!descriptions.length) return lists.length ? [] : [make("p", { class: "says" }, tokenText(label, 300))];
  return descriptions.flatMap(([text, score, source]) => {
    const scored = score === null ? "no score" : `score ${number(score)}`;
    const by = source ? ` (${tokenText(source, 60)})` : "";
    const hint =
      "Correlation of what the description predicts with the neuron's values on texts that were held out.";
    return [
      make("p", { class: "says description" }, runningText(text)),
      make("p", { class: "hint", title: hint }, scored + by),
    ];
  });
}

function tokenLists(lists) {
  if (!lists.length) return [];
  const columns = lists.map(([heading, tokens]) => {
    const unit = UNITS[heading.replace(/ \(.\)$/, "")] ?? "";
    const entries = tokens
      .slice(0, LISTED)
      .map(([token, value]) =>
        make(
          "li",
          {},
          make("span", { class: "token" }, tokenText(token, 24)),
          " ",
          make("span", { class: "value" }, number(value)),
        ),
      );
    const title = make("h4", {}, plainText(heading), " ", make("span", { class: "unit" }, unit));
    return make("section", {}, title, make("ol", { class: "tokens" }, ...entries));
  });
  return [make("div", { class: "token-lists" }, ...columns)];
}

/** Texts where a node's neuron is strong; nothing where there are none. */
export function texts(circuit, row) {
  const { texts: all, more } = circuit.says(row) ?? { texts: [], more: 0 };
  if (!all.length) return [];
  const rest = more > 0 ? `, ${count(more)} more in the run of exemplars` : "";
  const summary = make("summary", {}, `On text (${count(all.length)}${rest})`);
  return [make("details", { class: "texts", open: "" }, summary, ...all.map(oneText))];
}

/** A text with its tokens shaded by the neuron's value there; the strongest in bold. */
function oneText([kind, document, peak, tokens, values]) {
  const most = Math.max(Math.abs(peak), Number.MIN_VALUE);
  const best = values.reduce((at, value, i) => (Math.abs(value) > Math.abs(values[at]) ? i : at), 0);
  const spans = tokens.map((token, i) => {
    const shade = Math.min(SHADES, Math.round((SHADES * Math.abs(values[i])) / most));
    const sign = values[i] < 0 ? "minus" : "plus";
    const name = i === best ? "strong" : "span";
    const shaded = shade ? { class: `${sign} shade${shade}`, title: number(values[i]) } : {};
    return make(name, shaded, runningText(token));
  });
  const where = `${kind === "top" ? "" : `${tokenText(kind, 8)}, `}${number(peak)}, text ${count(document)}`;
  return make("p", { class: "text" }, ...spans, make("span", { class: "where" }, where));
}
