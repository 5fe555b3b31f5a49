// The axes beside the picture: layers, and positions with their tokens; those of the marked node stand out.
// Knows layout and state. Refuses to know what is drawn between them (scene.js).

import { tokenText } from "./format.js";
import { middle } from "./layout.js";

const FONT = 11;

export function paintLayerAxis(pen, { circuit, layout, state, palette, plot, at, height }) {
  pen.rect(0, 0, plot.x, height, { fill: palette.paper });
  pen.line(plot.x, 0, plot.x, plot.y + plot.height, { stroke: palette.axis, width: 1 });
  const marked = state.cursor >= 0 ? state.cursor : state.selected;
  const here = marked >= 0 ? circuit.nodes.layer[marked] + 1 : -1;
  let free = Infinity;
  layout.lines.forEach((line, i) => {
    const y = at.down(middle(line)) + 4;
    if (y > free || y < FONT || y > plot.height - 2) return;
    const text = i === 0 ? "input" : i === layout.lines.length - 1 ? "logits" : `L${i - 1}`;
    pen.text(plot.x - 8, y, text, axisStyle(palette, i === here, "end"));
    free = y - FONT - 3;
  });
}

export function paintTokenAxis(pen, { circuit, layout, state, palette, plot, at, width, height }) {
  const top = plot.y + plot.height;
  pen.rect(0, top, width, height - top, { fill: palette.paper });
  pen.line(plot.x, top, width, top, { stroke: palette.axis, width: 1 });
  const marked = state.cursor >= 0 ? state.cursor : state.selected;
  const here = marked >= 0 ? circuit.nodes.position[marked] : -1;
  const texts = circuit.tokens.map((token) => tokenText(token, 12));
  const flat = layout.columns.every((column, i) => pen.measure(texts[i], FONT) + 6 < column.size * at.k);
  let free = -Infinity;
  layout.columns.forEach((column, i) => {
    const x = at.across(middle(column));
    if (x < Math.max(free, plot.x) || x > width - 4) return;
    const style = axisStyle(palette, i === here, flat ? "middle" : "end");
    pen.text(x, top + 14, String(i), { ...axisStyle(palette, i === here, "middle"), size: 10 });
    const place = flat ? Math.min(x, width - pen.measure(texts[i], FONT) / 2 - 4) : x + 4;
    pen.text(place, top + (flat ? 31 : 27), texts[i], { ...style, angle: flat ? 0 : -42 });
    free = flat ? x : x + Math.max(17, pen.measure(String(i), 10) + 7);
  });
}

function axisStyle(palette, isHere, anchor) {
  return { fill: isHere ? palette.ink : palette.quiet, bold: isHere, size: FONT, anchor, name: "axis" };
}
