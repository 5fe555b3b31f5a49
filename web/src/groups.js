// Pins, named groups of nodes ("supernodes"), names and notes of nodes, and their file form.
// Knows the circuit's nodes by layer, position and neuron. Refuses to know elements of the page and drawing.

import { NEURON } from "./data.js";

const FORMAT = "tracer-supernodes";
const OLD_FORMAT = "tracer-groups"; // of earlier pages, with "pins" in place of "pinned"
const VERSION = 2; // of files with notes; those without say 1, so that older versions read them
const ANYWHERE = -1; // the position of a neuron that counts wherever it is
const IN_EXPERT = /^(?:E?(\d+)\s*[:/]|E(\d+)\s*)N?(\d+)$/i; // "17:45", "E17 N45"
export const LONGEST_NAME = 60;
export const LONGEST_TITLE = 200; // of a node's own name, and of a note, as supernodes_file.py has them
export const LONGEST_NOTE = 10000;

/** The groups after `rows` became one more; a node is in one group at most, and empty groups go. */
export function addGroup(groups, name, rows) {
  const taken = new Set(rows);
  const others = groups.map((group) => ({ ...group, rows: group.rows.filter((row) => !taken.has(row)) }));
  return [...others.filter((group) => group.rows.length), { name, rows: [...rows] }];
}

/** Why `name` cannot be a group's name, or null. */
export function nameProblem(name, groups) {
  if (typeof name !== "string" || !name.trim()) return "a group needs a name";
  if (name.length > LONGEST_NAME) return `a group's name has at most ${LONGEST_NAME} characters`;
  if (groups.some((group) => group.name === name)) return `there is already a group \u201c${name}\u201d`;
  return null;
}

/** The file of `marks`: pins, groups, names and notes. */
export function writeGroups(circuit, { pins, groups, names, notes }) {
  const { layer, position, neuron } = circuit.nodes;
  const node = (row) => ({
    layer: layer[row],
    position: position[row],
    neuron: neuron[row],
    polarity: polarity(circuit, row),
  });
  const content = {
    format: FORMAT,
    version: names.size + notes.size ? VERSION : 1,
    circuit: circuit.header.circuit,
    groups: groups.map(({ name, description = "", rows }) => ({ name, description, nodes: rows.map(node) })),
    pinned: [...pins].map(node),
    ...(names.size + notes.size ? { notes: writeNotes(names, notes, node) } : {}),
    how: {},
  };
  return JSON.stringify(content, null, 1) + "\n";
}

function writeNotes(names, notes, node) {
  const rows = [...new Set([...names.keys(), ...notes.keys()])].sort((a, b) => a - b);
  return rows.map((row) => ({ ...node(row), name: names.get(row) ?? "", note: notes.get(row) ?? "" }));
}

/** Pins, groups, names and notes out of a file's text; throws an Error with a message for people. */
export function readGroups(circuit, text) {
  const content = parse(text);
  const known = isObject(content) && [FORMAT, OLD_FORMAT].includes(content.format);
  need(known, `it does not say "format": "${FORMAT}"`);
  need(
    [1, VERSION].includes(content.version),
    `its version is ${JSON.stringify(content.version)}, this page reads 1 to ${VERSION}`,
  );
  const listed = content.format === FORMAT ? "pinned" : "pins";
  need(Array.isArray(content[listed]), `"${listed}" is not a list`);
  need(Array.isArray(content.groups), '"groups" is not a list');
  const find = finder(circuit);
  const own = circuit.header.circuit;
  const same = !content.circuit || !own || content.circuit === own;
  need(same, "it is of another circuit");
  const pins = content[listed].flatMap((node, i) => find(node, `pin ${i + 1}`));
  const groups = [];
  const owner = new Map();
  content.groups.forEach((group, i) => {
    const where = `group ${i + 1}`;
    need(isObject(group), `${where} is not an object`);
    const problem = nameProblem(group.name, groups);
    need(!problem, `${where}: ${problem}`);
    need(Array.isArray(group.nodes) && group.nodes.length > 0, `${where} has no list of nodes`);
    const rows = group.nodes.flatMap((node, j) => find(node, `${where}, node ${j + 1}`));
    for (const row of rows) {
      need(!owner.has(row), `${where}: ${circuit.title(row)} is listed a second time`);
      owner.set(row, group);
    }
    const { name, description } = group;
    groups.push(
      typeof description === "string" && description ? { name, description, rows } : { name, rows },
    );
  });
  return { pins: new Set(pins), groups, ...readNotes(content.notes ?? [], find) };
}

function readNotes(listed, find) {
  need(Array.isArray(listed), '"notes" is not a list');
  const [names, notes] = [new Map(), new Map()];
  listed.forEach((one, i) => {
    const where = `note ${i + 1}`;
    const rows = find(one, where);
    const { name = "", note = "" } = one;
    need(typeof name === "string" && typeof note === "string", `${where} is no text`);
    need(name.length <= LONGEST_TITLE, `${where}: a name has at most ${LONGEST_TITLE} characters`);
    need(note.length <= LONGEST_NOTE, `${where} has more than ${LONGEST_NOTE} characters`);
    for (const row of rows) {
      if (name.trim()) names.set(row, name);
      if (note.trim()) notes.set(row, note);
    }
  });
  return { names, notes };
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`it is not JSON (${error.message})`, { cause: error });
  }
}

/** The sign of a neuron's value; null of what is not a neuron. */
function polarity(circuit, row) {
  const { kind, activation } = circuit.nodes;
  if (kind[row] !== NEURON) return null;
  return activation[row] < 0 ? -1 : 1;
}

/** The rows that a file's node names: one, or all of a neuron that counts wherever it is. */
function finder(circuit) {
  const { layer, position, neuron } = circuit.nodes;
  const rowsAt = new Map();
  for (const row of circuit.rows) {
    const own = circuit.expert(row);
    for (const at of [position[row], ANYWHERE])
      for (const name of [neuron[row], ...(own ? [`E${own.expert} N${own.neuron}`] : [])]) {
        const key = `${layer[row]}/${at}/${name}`;
        if (rowsAt.has(key)) rowsAt.get(key).push(row);
        else rowsAt.set(key, [row]);
      }
  }
  return (node, where) => {
    const inExpert = isObject(node) && IN_EXPERT.exec(node.neuron);
    const name = inExpert ? `E${Number(inExpert[1] ?? inExpert[2])} N${Number(inExpert[3])}` : node?.neuron;
    const whole =
      isObject(node) &&
      ["layer", "position"].every((part) => Number.isInteger(node[part])) &&
      (inExpert || Number.isInteger(name));
    need(whole, `${where} needs whole numbers for layer, position and neuron`);
    const sign = node.polarity ?? null;
    const rows = (rowsAt.get(`${node.layer}/${node.position}/${name}`) ?? []).filter(
      (row) => sign === null || [null, sign].includes(polarity(circuit, row)),
    );
    const place = node.position === ANYWHERE ? "anywhere" : `at position ${node.position}`;
    need(rows.length, `${where}: layer ${node.layer} neuron ${name} ${place} is not on this page`);
    return rows;
  };
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function need(holds, otherwise) {
  if (!holds) throw new Error(otherwise);
}
