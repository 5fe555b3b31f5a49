// The state of the page as text and back: for a link, and for the browser's storage.
// Knows what a state may hold; what it reads may come from anyone, and is checked. Refuses to know where text is kept.

import { KINDS, known } from "./data.js";
import { LONGEST_NOTE, LONGEST_TITLE, nameProblem } from "./groups.js";

const VERSION = 1;
export const MARKS = ["pins", "groups", "names", "notes"];
const MEASURES = ["attribution", "weight", "share"];
const SWITCHES = ["incoming", "outgoing", "overall", "drawAll", "positionZero", "alwaysOn", "subgraphOpen"];
const MOST_GROUPS = 1000;
const MOST_BOXES = 10000;
const LONGEST_KEY = 200;
const FAR = 1e7; // of coordinates

/**
 * What the reader marked and wrote, of the state or of a file.
 * @returns {any}
 */
export const marksOf = (held) => Object.fromEntries(MARKS.map((name) => [name, held[name]]));

/** What the page itself started with. */
export function givenMarks(header) {
  return {
    pins: new Set(header.pins ?? []),
    groups: header.groups.map(([name, rows]) => ({ name, rows })),
    names: new Map(header.called ?? []),
    notes: new Map(header.remarks ?? []),
  };
}

const byRow = (written) => [...written].sort(([a], [b]) => a - b);

function plainMarks({ pins, groups, names, notes }) {
  return {
    pins: [...pins].sort((a, b) => a - b),
    groups: groups.map(({ name, description = "", rows }) => [name, description, rows]),
    names: byRow(names),
    notes: byRow(notes),
  };
}

/** A short text that two sets of marks share only if they are the same. */
export function digest(marks) {
  let [high, low] = [0x811c9dc5, 0x01000193];
  for (const sign of JSON.stringify(plainMarks(marks))) {
    const code = sign.codePointAt(0);
    high = Math.imul(high ^ code, 0x01000193) >>> 0;
    low = Math.imul(low + code, 0x85ebca6b) >>> 0;
    low = (low ^ (low >>> 13)) >>> 0;
  }
  return high.toString(36) + low.toString(36);
}

/** A short text of marks as they were saved: all of them, and without pins. */
export const savedAs = (marks) => `${digest(marks)}.${digest({ ...marks, pins: new Set() })}`;

/** The filters that a page can have, with what each may be; those that are not known here are not kept. */
function filters(circuit) {
  const measures = MEASURES.filter((name) => circuit.nEdges === 0 || known(circuit.edges[name]));
  const experts = new Set(["", ...circuit.experts().map(([name]) => name)]);
  const size = (value) => Number.isFinite(value) && value >= 0;
  const sign = (value) => ["both", "for", "against"].includes(value);
  const layer = (value) => Number.isInteger(value) && value >= 0 && value < circuit.layers;
  const flag = (value) => typeof value === "boolean";
  return {
    nodeThreshold: size,
    influenceThreshold: size,
    edgeThreshold: size,
    nodeSign: sign,
    edgeSign: sign,
    lowestLayer: layer,
    highestLayer: layer,
    kinds: (value) => Number.isInteger(value) && value >= 0 && value < 2 ** KINDS,
    expert: (value) => experts.has(value),
    measure: (value) => measures.includes(value),
    seen: (value) => value === 0 || (Boolean(circuit.header.sides) && [1, 2].includes(value)),
    overallCount: (value) => Number.isInteger(value) && value >= 1 && value <= 5000,
    ...Object.fromEntries(SWITCHES.map((name) => [name, flag])),
  };
}

export const filterNames = (circuit) => Object.keys(filters(circuit));

/**
 * What the state holds, as a plain object: only what is not as the page was made.
 * `first`: the state's values as the page was made. `base`: digest of the marks that it was made with or saved.
 */
export function plainState(circuit, state, { first, base, look }) {
  const kept = { v: VERSION, of: circuit.header.key.slice(0, 16), n: circuit.nNodes, base };
  const chosen = filterNames(circuit).filter((name) => state[name] !== first[name]);
  if (chosen.length) kept.filters = Object.fromEntries(chosen.map((name) => [name, state[name]]));
  if (state.selected >= 0) kept.selected = state.selected;
  if (state.theme) kept.theme = state.theme;
  if (look) kept.look = look.map((value) => Number(value.toPrecision(6)));
  if (state.subgraph?.size)
    kept.boxes = [...state.subgraph].map(([key, { x, y }]) => [key, Math.round(x), Math.round(y)]);
  if (digest(marksOf(state)) !== base) {
    kept.marks = plainMarks(state);
    kept.saved = state.savedAs;
  }
  return kept;
}

/** An object as text for a link: base64 of UTF-8, in signs that a link may hold. */
export function toLink(content) {
  const bytes = new TextEncoder().encode(JSON.stringify(content));
  let text = "";
  for (const byte of bytes) text += String.fromCharCode(byte);
  return btoa(text).replaceAll("+", "-").replaceAll("/", "_").replace(/=+$/, "");
}

/** The text that a link holds; throws if it is none. */
export function fromLink(text) {
  const signs = atob(text.replaceAll("-", "+").replaceAll("_", "/"));
  return new TextDecoder("utf-8", { fatal: true }).decode(
    Uint8Array.from(signs, (sign) => sign.charCodeAt(0)),
  );
}

/**
 * What a text says of the state: {changes, marks, base, look}; throws an Error with a message for people.
 * `changes` are values of the state, `marks` is null where they are the page's own.
 */
export function readState(circuit, text) {
  const held = JSON.parse(text);
  need(isObject(held) && held.v === VERSION, "it is of another version of this page");
  need(held.of === circuit.header.key.slice(0, 16) && held.n === circuit.nNodes, "it is of another graph");
  const row = (value) => Number.isInteger(value) && value >= 0 && value < circuit.nNodes;
  const changes = readFilters(circuit, held.filters ?? {});
  if (held.selected !== undefined) {
    need(row(held.selected), "its node is not here");
    changes.selected = held.selected;
  }
  if (held.theme !== undefined) {
    need(["light", "dark"].includes(held.theme), "its theme is unknown");
    changes.theme = held.theme;
  }
  if (held.boxes !== undefined) changes.subgraph = readBoxes(held.boxes);
  const { look, base, marks } = held;
  need(
    look === undefined || (isList(look, 3) && look.length === 3 && look.every(near)),
    "its zoom is no place",
  );
  return {
    changes,
    look: look ?? null,
    base: typeof base === "string" ? base : "",
    marks: marks === undefined ? null : readMarks(marks, row),
    saved: typeof held.saved === "string" && held.saved.length <= LONGEST_KEY ? held.saved : "",
  };
}

function readFilters(circuit, held) {
  need(isObject(held), "its filters are no list");
  const found = {};
  for (const [name, allows] of Object.entries(filters(circuit))) {
    if (!Object.hasOwn(held, name)) continue;
    need(allows(held[name]), `its filter ${name} cannot be so`);
    found[name] = held[name];
  }
  return found;
}

function readBoxes(held) {
  const isBox = (box) =>
    isList(box, 3) &&
    box.length === 3 &&
    typeof box[0] === "string" &&
    box[0].length <= LONGEST_KEY &&
    box.slice(1).every(near);
  need(isList(held, MOST_BOXES) && held.every(isBox), "its places in the subgraph are no places");
  return new Map(held.map(([key, x, y]) => [key, { x, y }]));
}

function readMarks(held, row) {
  need(isObject(held), "its marks are no marks");
  need(isList(held.pins, Infinity) && held.pins.every(row), "its pins are not on this page");
  const groups = [];
  const taken = new Set();
  need(isList(held.groups, MOST_GROUPS), "its groups are no list");
  for (const group of held.groups) {
    need(isList(group, 3), "a group is none");
    const [name, description, rows] = group;
    need(!nameProblem(name, groups), `a group's name: ${nameProblem(name, groups)}`);
    need(typeof description === "string" && description.length <= LONGEST_NOTE, "a group's text is too long");
    need(
      isList(rows, Infinity) && rows.length > 0 && rows.every(row),
      "a group's nodes are not on this page",
    );
    for (const one of rows) {
      need(!taken.has(one), "a node is in two groups");
      taken.add(one);
    }
    groups.push(description ? { name, description, rows } : { name, rows });
  }
  return {
    pins: new Set(held.pins),
    groups,
    names: readTexts(held.names, row, LONGEST_TITLE),
    notes: readTexts(held.notes, row, LONGEST_NOTE),
  };
}

function readTexts(held, row, longest) {
  const isText = (text) => typeof text === "string" && text.trim() && text.length <= longest;
  const fits = (pair) => isList(pair, 2) && row(pair[0]) && isText(pair[1]);
  need(isList(held, Infinity) && held.every(fits), "a name or a note cannot be so");
  return new Map(held);
}

const near = (value) => Number.isFinite(value) && Math.abs(value) <= FAR;

const isList = (value, most) => Array.isArray(value) && value.length <= most;

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function need(holds, otherwise) {
  if (!holds) throw new Error(otherwise);
}
