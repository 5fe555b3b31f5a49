// The current view as a file: SVG text, a PNG picture, and the saving of any blob.
// Knows how marks are written as SVG. Refuses to know which marks there are (scene.js).

import { plainText } from "./format.js";
import { CORNERS, CanvasPen } from "./pen.js";
import { paint } from "./scene.js";

const SPACE = "http://www.w3.org/2000/svg";
const FORBIDDEN = /[\u0000-\u0008\u000b\u000c\u000e-\u001f\ufffe\uffff]/g;
const PNG_SCALE = 2;

function escape(text) {
  return text
    .toWellFormed()
    .replace(FORBIDDEN, "\ufffd")
    .replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);
}

function tag(name, attributes, text) {
  const written = Object.entries(attributes)
    .filter(([, value]) => value !== undefined)
    .map(
      ([key, value]) => ` ${key}="${escape(typeof value === "number" ? String(+value.toFixed(2)) : value)}"`,
    );
  return `<${name}${written.join("")}${text === undefined ? "/>" : `>${escape(text)}</${name}>`}`;
}

function listed(points) {
  return points.map(([x, y]) => `${x.toFixed(2)},${y.toFixed(2)}`).join(" ");
}

/** A pen that writes SVG; `ruler` is a canvas pen, for the width of texts. */
class SvgPen {
  #lines = [];
  #clips = 0;

  constructor(ruler) {
    this.measure = (text, size, bold) => ruler.measure(text, size, bold);
  }

  #add(name, attributes, text) {
    this.#lines.push(tag(name, attributes, text));
  }

  rect(x, y, width, height, { fill, name }) {
    this.#add("rect", { class: name, x, y, width, height, fill });
  }

  line(x1, y1, x2, y2, { stroke, width }) {
    this.#add("line", { x1, y1, x2, y2, stroke, "stroke-width": width });
  }

  curve(x0, y0, x1, y1, { stroke, width, alpha, name }) {
    const bend = (y0 - y1) * 0.45;
    const d = [`M${x0} ${y0}C${x0}`, y0 - bend, x1, y1 + bend, x1, y1].join(" ");
    const rounded = d.replace(/-?\d+\.\d+/g, (value) => String(+Number(value).toFixed(2)));
    this.#add("path", {
      class: name,
      d: rounded,
      fill: "none",
      stroke,
      "stroke-width": width,
      opacity: alpha,
    });
  }

  outline(points, { colour, alpha, name }) {
    const line = { stroke: colour, "stroke-width": 1.5, "stroke-dasharray": "5 4" };
    this.#add("polygon", {
      class: name,
      points: listed(points),
      fill: colour,
      "fill-opacity": alpha,
      ...line,
    });
  }

  ring(cx, cy, r, { stroke, width, name, dash = [] }) {
    const dashes = dash.length ? { "stroke-dasharray": dash.join(" ") } : {};
    this.#add("circle", { class: name, cx, cy, r, fill: "none", stroke, "stroke-width": width, ...dashes });
  }

  marks(shape, flat, { fill, alpha, name }) {
    const opacity = alpha < 1 ? alpha : undefined;
    for (let i = 0; i < flat.length; i += 3) {
      const [x, y, r] = flat.slice(i, i + 3);
      const side = 1.8 * r;
      const common = { class: name, fill, opacity };
      if (shape === "circle") this.#add("circle", { ...common, cx: x, cy: y, r });
      else if (shape === "square") {
        this.#add("rect", { ...common, x: x - side / 2, y: y - side / 2, width: side, height: side });
      } else {
        const corners = CORNERS[shape].map(([dx, dy]) => [x + dx * r, y + dy * r]);
        this.#add("polygon", { ...common, points: listed(corners) });
      }
    }
  }

  text(x, y, text, { fill, halo, size, bold, anchor = "middle", angle = 0, name }) {
    const turned = angle ? { transform: `rotate(${angle} ${x.toFixed(2)} ${y.toFixed(2)})` } : {};
    const outlined = halo
      ? { stroke: halo, "stroke-width": 3, "paint-order": "stroke", "stroke-linejoin": "round" }
      : {};
    const weight = bold ? { "font-weight": "600" } : {};
    const common = { class: name, x, y, fill, "font-size": size, "text-anchor": anchor };
    this.#add("text", { ...common, ...turned, ...outlined, ...weight }, text);
  }

  clip({ x, y, width, height }) {
    this.#clips += 1;
    const id = `clip${this.#clips}`;
    this.#lines.push(`<clipPath id="${id}">${tag("rect", { x, y, width, height })}</clipPath>`);
    this.#lines.push(`<g clip-path="url(#${id})">`);
  }

  unclip() {
    this.#lines.push("</g>");
  }

  finish(width, height, title) {
    const frame = `xmlns="${SPACE}" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}"`;
    const font = `font-family="system-ui, 'DejaVu Sans', sans-serif"`;
    return `<svg ${frame} ${font}>\n${tag("title", {}, title)}\n${this.#lines.join("\n")}\n</svg>\n`;
  }
}

export function toSvg(view) {
  const pen = new SvgPen(new CanvasPen(document.createElement("canvas").getContext("2d")));
  paint(pen, view);
  return pen.finish(view.width, view.height, plainText(view.circuit.header.title));
}

/** The view as a PNG blob, at twice the size of the screen. */
export function toPng(view) {
  const canvas = document.createElement("canvas");
  canvas.width = view.width * PNG_SCALE;
  canvas.height = view.height * PNG_SCALE;
  const context = canvas.getContext("2d", { alpha: false });
  context.scale(PNG_SCALE, PNG_SCALE);
  paint(new CanvasPen(context), view);
  return new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
}

export function download(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}
