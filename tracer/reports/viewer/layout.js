// Where every node lies: a column per position, a row per layer, and a packing without overlap in each cell.
// Knows the circuit's columns. Refuses to know the screen, zoom and what is selected.

import { LOGIT } from "./data.js";
import { tokenText } from "./format.js";

const SMALLEST = 4;
const LARGEST = 16;
const GAP = 3;
const LABEL_HEIGHT = 34; // under a logit, enough when zoomed out to one half
const SIGN_WIDTH = 11; // of a logit's label, again when zoomed out
const ROW_PAD = 22;
const COLUMN_PAD = 14;
const ASPECTS = [0.5, 0.8, 1.3, 2, 3, 5, 8, 12];
export const TONES = 11; // none; weak, middle, strong for; the same against; first, last, both, flipped
export const SIDES = 6; // a tone of a side of a comparison lies so far behind it

/** `shape`: width by height that the picture should have, about that of the screen. */
export function makeLayout(circuit, shape) {
  const radius = radii(circuit);
  const cells = toCells(circuit, radius);
  const grids = ASPECTS.map((aspect) => makeGrid(circuit, cells, aspect));
  const misfit = ({ width, height }) => Math.abs(Math.log(width / height / shape));
  const grid = stretch(
    grids.reduce((best, next) => (misfit(next) < misfit(best) ? next : best)),
    shape,
  );
  const x = new Float32Array(circuit.nNodes);
  const y = new Float32Array(circuit.nNodes);
  for (const cell of cells) placeCell(cell, grid, x, y);
  return { x, y, radius, largest: LARGEST, tone: tones(circuit), ...grid };
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

/** Nodes of one layer and position, largest first, each with the room it needs. */
function toCells(circuit, radius) {
  const { layer, position, kind } = circuit.nodes;
  const cells = new Map();
  for (const row of circuit.byStrength) {
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
function makeGrid(circuit, cells, aspect) {
  const widths = new Float32Array(circuit.tokens.length).fill(24);
  const heights = new Float32Array(circuit.layers + 2).fill(6);
  for (const { column, slots } of cells) {
    const area = slots.reduce((sum, slot) => sum + slot.w * slot.h, 0);
    const { w } = pack(slots, Math.max(Math.sqrt(area * aspect), slots[0].w));
    widths[column] = Math.max(widths[column], w);
  }
  for (const { line, column, slots } of cells) {
    heights[line] = Math.max(heights[line], pack(slots, widths[column] + 0.01).h);
  }
  const columns = spans(widths, COLUMN_PAD);
  const lines = spans(heights.toReversed(), ROW_PAD).toReversed();
  return { columns, lines, width: end(columns.at(-1)), height: end(lines[0]) };
}

/** The grid with air between its columns or lines until it has the shape. */
function stretch({ columns, lines, width, height }, shape) {
  const perColumn = Math.max(0, height * shape - width) / columns.length;
  const perLine = Math.max(0, width / shape - height) / lines.length;
  const wider = spans(
    columns.map(({ size }) => size),
    perColumn,
  );
  const higher = spans(lines.map(({ size }) => size).toReversed(), perLine).toReversed();
  return { columns: wider, lines: higher, width: end(wider.at(-1)), height: end(higher[0]) };
}

function spans(sizes, pad) {
  let at = 0;
  return Array.from(sizes, (size) => {
    const span = { start: at, size: size + pad };
    at += size + pad;
    return span;
  });
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
