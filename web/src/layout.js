// Where every node lies: a column per position, a row per layer, and a packing without overlap in each cell.
// Knows the circuit's columns and which nodes are shown. Refuses to know the screen, zoom and what is selected.

import { EMBEDDING, LOGIT } from "./data.js";
import { tokenText } from "./format.js";

const SMALLEST = 4;
const LARGEST = 16;
const GAP = 3;
const LABEL_HEIGHT = 34; // under a logit, enough when zoomed out to one half
const SIGN_WIDTH = 11; // of a logit's label, again when zoomed out
const ROW_PAD = 22;
const COLUMN_PAD = 14;
const NARROW = 24; // a column that has nothing but its embedding
const EMPTY = 8; // a column or row that has nothing
const ASPECTS = [0.5, 0.8, 1.3, 2, 3, 5, 8, 12];
export const TONES = 11; // none; weak, middle, strong for; the same against; first, last, both, flipped
export const SIDES = 6; // a tone of a side of a comparison lies so far behind it

/**
 * `shape`: width by height that the picture should have, about that of the screen. `shown`: 1 for the nodes that take
 * up room; the others lie in the middle of their cells. Nodes keep their order.
 */
export function makeLayout(circuit, shape, shown) {
  const radius = radii(circuit);
  const cells = toCells(circuit, radius, shown);
  const filled = fillings(circuit, shown);
  const grids = ASPECTS.map((aspect) => makeGrid(filled, cells, aspect));
  const misfit = ({ width, height }) => Math.abs(Math.log(width / height / shape));
  const grid = stretch(
    grids.reduce((best, next) => (misfit(next) < misfit(best) ? next : best)),
    shape,
    filled,
  );
  const x = Float32Array.from(circuit.nodes.position, (column) => middle(grid.columns[column]));
  const y = Float32Array.from(circuit.nodes.layer, (layer) => middle(grid.lines[layer + 1]));
  for (const cell of cells) placeCell(cell, grid, x, y);
  return { x, y, radius, largest: LARGEST, tone: tones(circuit), ...grid };
}

/** What is shown in each column and line: 0 nothing, 1 nothing but embeddings, 2 more. */
function fillings({ nodes, tokens, layers, nNodes }, shown) {
  const columns = new Uint8Array(tokens.length);
  const lines = new Uint8Array(layers + 2);
  for (let row = 0; row < nNodes; row += 1) {
    if (!shown[row]) continue;
    const [column, line] = [nodes.position[row], nodes.layer[row] + 1];
    columns[column] = Math.max(columns[column], nodes.kind[row] === EMBEDDING ? 1 : 2);
    lines[line] = 2;
  }
  return { columns, lines };
}

function strongest(circuit) {
  return circuit.nNodes ? circuit.strength[circuit.byStrength[0]] || 1 : 1;
}

function radii(circuit) {
  const most = strongest(circuit);
  const grow = (value) => SMALLEST + (LARGEST - SMALLEST) * Math.sqrt(value / most);
  return Float32Array.from(circuit.strength, grow);
}

function tones(circuit) {
  const most = strongest(circuit);
  const { side } = circuit.nodes;
  return Uint8Array.from(circuit.nodes.attribution, (value, row) => {
    if (side) return SIDES + side[row];
    if (value === 0 || Number.isNaN(value)) return 0;
    const size = Math.abs(value) / most;
    return (value > 0 ? 1 : 4) + (size < 0.05 ? 0 : size < 0.3 ? 1 : 2);
  });
}

/** Shown nodes of one layer and position, largest first, each with the room it needs. */
function toCells(circuit, radius, shown) {
  const { layer, position, kind } = circuit.nodes;
  const cells = new Map();
  for (const row of circuit.byStrength) {
    if (!shown[row]) continue;
    const key = (layer[row] + 1) * circuit.tokens.length + position[row];
    if (!cells.has(key)) cells.set(key, { line: layer[row] + 1, column: position[row], slots: [] });
    const side = 2 * radius[row] + GAP;
    const isLogit = kind[row] === LOGIT;
    const label = isLogit ? tokenText(circuit.label(row), 16).length * SIGN_WIDTH + 8 : 0;
    cells
      .get(key)
      .slots.push({ row, side, w: Math.max(side, label), h: side + (isLogit ? LABEL_HEIGHT : 0) });
  }
  return [...cells.values()];
}

/** Shelves no wider than `width`, unless one slot alone is. */
function pack(slots, width) {
  const shelves = [];
  for (const slot of slots) {
    const last = shelves.at(-1);
    if (last && last.w + slot.w <= width) {
      last.slots.push(slot);
      last.w += slot.w;
      last.h = Math.max(last.h, slot.h);
    } else shelves.push({ slots: [slot], w: slot.w, h: slot.h });
  }
  return {
    shelves,
    w: Math.max(...shelves.map((shelf) => shelf.w)),
    h: shelves.reduce((sum, shelf) => sum + shelf.h, 0),
  };
}

/** Column widths from cells of about this aspect, then row heights from cells packed into those columns. */
function makeGrid(filled, cells, aspect) {
  const widths = Float32Array.from(filled.columns, (filling) => [EMPTY, NARROW, NARROW][filling]);
  const heights = new Float32Array(filled.lines.length).fill(6);
  for (const { column, slots } of cells) {
    const area = slots.reduce((sum, slot) => sum + slot.w * slot.h, 0);
    const { w } = pack(slots, Math.max(Math.sqrt(area * aspect), slots[0].w));
    widths[column] = Math.max(widths[column], w);
  }
  for (const { line, column, slots } of cells) {
    heights[line] = Math.max(heights[line], pack(slots, widths[column] + 0.01).h);
  }
  const columns = spans(widths, (column) => (filled.columns[column] ? COLUMN_PAD : 0));
  const lines = spans(heights, (line) => (filled.lines[line] ? ROW_PAD : 6), true);
  return { columns, lines, width: end(columns.at(-1)), height: end(lines[0]) };
}

/** The grid with air between the columns or lines that have something until it has the shape. */
function stretch({ columns, lines, width, height }, shape, filled) {
  const among = (fillings, least) => {
    const fitting = fillings.map((one) => (one >= least ? 1 : 0));
    return fitting.some(Boolean) ? fitting : fillings.map(() => 1);
  };
  const share = (fitting, air) => (at) =>
    fitting[at] * (Math.max(0, air) / fitting.reduce((a, b) => a + b, 0));
  const sizes = (all) => all.map(({ size }) => size);
  const wider = spans(sizes(columns), share(among(filled.columns, 2), height * shape - width));
  const higher = spans(sizes(lines), share(among(filled.lines, 2), width / shape - height), true);
  return { columns: wider, lines: higher, width: end(wider.at(-1)), height: end(higher[0]) };
}

/** One after the other, each as large as it is and `pad(at)` more; `upwards` the first one last. */
function spans(sizes, pad, upwards = false) {
  const all = Array.from(sizes, (size, at) => ({ start: 0, size: size + pad(at) }));
  let from = 0;
  for (const span of upwards ? all.toReversed() : all) {
    span.start = from;
    from += span.size;
  }
  return all;
}

function end(span) {
  return span.start + span.size;
}

export function middle(span) {
  return span.start + span.size / 2;
}

function placeCell(cell, grid, x, y) {
  const column = grid.columns[cell.column];
  const line = grid.lines[cell.line];
  const packed = pack(cell.slots, column.size - COLUMN_PAD + 0.01);
  let top = middle(line) - packed.h / 2;
  for (const shelf of packed.shelves) {
    let left = middle(column) - shelf.w / 2;
    for (const { row, side, w, h } of shelf.slots) {
      x[row] = left + w / 2;
      y[row] = top + shelf.h / 2 - (h - side) / 2;
      left += w;
    }
    top += shelf.h;
  }
}
