// How values are written for people: numbers, shares, tokens.
// Knows no circuit, no drawing and no element of the page.

const ESCAPES = new Map([
  ["\n", "\u21b5"],
  ["\r", "\u240d"],
  ["\t", "\u21e5"],
]);
const HIDDEN =
  /[\u0000-\u001f\u007f-\u009f\u00ad\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff0-\uffff]/g;

const COUNTS = new Intl.NumberFormat("en-US");
const TURNING = /[\u202a-\u202e\u2066-\u2069]/g;

/** Longer text in which no character turns the order of others around. */
export function plainText(raw) {
  return raw.replace(TURNING, (sign) => `<${sign.charCodeAt(0).toString(16)}>`);
}

/** Text that runs on: spaces stay, what is invisible is shown, nothing turns the order of others around. */
export function runningText(raw) {
  return raw
    .toWellFormed()
    .replace(HIDDEN, (sign) => ESCAPES.get(sign) ?? `<${sign.charCodeAt(0).toString(16).padStart(2, "0")}>`);
}

/** A token on one line with nothing invisible in it: spaces at its ends become a low open box. */
export function tokenText(raw, limit = 40) {
  const shown = raw
    .toWellFormed()
    .replace(HIDDEN, (sign) => ESCAPES.get(sign) ?? `<${sign.charCodeAt(0).toString(16).padStart(2, "0")}>`)
    .replace(/^ +| +$/g, (spaces) => "\u2423".repeat(spaces.length));
  const signs = [...shown];
  return signs.length <= limit ? shown || "(empty)" : signs.slice(0, limit - 1).join("") + "\u2026";
}

/** Three significant digits with a true minus sign; an en dash where there is no value. */
export function number(value) {
  if (!Number.isFinite(value)) return "\u2013";
  if (value === 0) return "0";
  const size = Math.abs(value);
  const digits = size >= 1e5 || size < 1e-3 ? size.toExponential(2) : String(Number(size.toPrecision(3)));
  return (value < 0 ? "\u2212" : "") + digits;
}

export function percent(value) {
  return Number.isFinite(value) ? `${number(100 * value)} %` : "\u2013";
}

export function count(value) {
  return COUNTS.format(value);
}

/** A number of things: "1 node", "2,345 nodes". */
export function counted(value, one, many = `${one}s`) {
  return `${count(value)} ${value === 1 ? one : many}`;
}
