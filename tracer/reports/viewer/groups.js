// Pins and named groups of nodes ("supernodes"), and their file form.
// Knows the circuit's nodes by layer, position and neuron. Refuses to know elements of the page and drawing.

const FORMAT = "tracer-groups";
const VERSION = 1;
export const LONGEST_NAME = 60;

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

export function writeGroups(circuit, pins, groups) {
  const { layer, position, neuron } = circuit.nodes;
  const node = (row) => ({ layer: layer[row], position: position[row], neuron: neuron[row] });
  const content = {
    format: FORMAT,
    version: VERSION,
    title: circuit.header.title,
    pins: [...pins].map(node),
    groups: groups.map(({ name, rows }) => ({ name, nodes: rows.map(node) })),
  };
  return JSON.stringify(content, null, 1) + "\n";
}

/** Pins and groups out of a file's text; throws an Error with a message for people. */
export function readGroups(circuit, text) {
  const content = parse(text);
  need(isObject(content) && content.format === FORMAT, `it does not say "format": "${FORMAT}"`);
  need(
    content.version === VERSION,
    `its version is ${JSON.stringify(content.version)}, this page reads ${VERSION}`,
  );
  need(Array.isArray(content.pins), '"pins" is not a list');
  need(Array.isArray(content.groups), '"groups" is not a list');
  const find = finder(circuit);
  const pins = content.pins.map((node, i) => find(node, `pin ${i + 1}`));
  const groups = [];
  const owner = new Map();
  content.groups.forEach((group, i) => {
    const where = `group ${i + 1}`;
    need(isObject(group), `${where} is not an object`);
    const problem = nameProblem(group.name, groups);
    need(!problem, `${where}: ${problem}`);
    need(Array.isArray(group.nodes) && group.nodes.length > 0, `${where} has no list of nodes`);
    const rows = group.nodes.map((node, j) => find(node, `${where}, node ${j + 1}`));
    for (const row of rows) {
      need(!owner.has(row), `${where}: ${circuit.title(row)} is listed a second time`);
      owner.set(row, group);
    }
    groups.push({ name: group.name, rows });
  });
  return { pins: new Set(pins), groups };
}

function parse(text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`it is not JSON (${error.message})`, { cause: error });
  }
}

function finder(circuit) {
  const { layer, position, neuron } = circuit.nodes;
  const rowOf = new Map(circuit.rows.map((row) => [`${layer[row]}/${position[row]}/${neuron[row]}`, row]));
  return (node, where) => {
    const whole =
      isObject(node) && ["layer", "position", "neuron"].every((name) => Number.isInteger(node[name]));
    need(whole, `${where} needs whole numbers for layer, position and neuron`);
    const row = rowOf.get(`${node.layer}/${node.position}/${node.neuron}`);
    const name = `layer ${node.layer} neuron ${node.neuron} at position ${node.position}`;
    need(row !== undefined, `${where}: ${name} is not on this page`);
    return row;
  };
}

function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function need(holds, otherwise) {
  if (!holds) throw new Error(otherwise);
}
