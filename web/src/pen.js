// A pen that draws on a canvas: lines, marks, texts, in pixels.
// Knows a 2D context. Refuses to know what it draws (scene.js).

const FONT_FAMILY = "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif";

const MOST_WIDTHS = 20000;
const widths = new Map(); // of texts that were measured, since every frame asks for the same ones

/** Marks with corners, in units of their radius. */
export const CORNERS = {
  diamond: [
    [0, -1],
    [1, 0],
    [0, 1],
    [-1, 0],
  ],
  cross: [
    [0, -0.4],
    [0.4, -0.8],
    [0.8, -0.4],
    [0.4, 0],
    [0.8, 0.4],
    [0.4, 0.8],
    [0, 0.4],
    [-0.4, 0.8],
    [-0.8, 0.4],
    [-0.4, 0],
    [-0.8, -0.4],
    [-0.4, -0.8],
  ],
};

/** A pen that draws on a 2D context. */
export class CanvasPen {
  constructor(context) {
    this.context = context;
  }

  rect(x, y, width, height, { fill }) {
    this.context.fillStyle = fill;
    this.context.fillRect(x, y, width, height);
  }

  line(x0, y0, x1, y1, { stroke, width }) {
    this.#path({ stroke, width }, (path) => {
      path.moveTo(x0, y0);
      path.lineTo(x1, y1);
    });
  }

  curve(x0, y0, x1, y1, style) {
    const bend = (y0 - y1) * 0.45;
    this.#path(style, (path) => {
      path.moveTo(x0, y0);
      path.bezierCurveTo(x0, y0 - bend, x1, y1 + bend, x1, y1);
    });
  }

  outline(points, { colour, alpha }) {
    const { context } = this;
    this.#path({ stroke: colour, width: 1.5, dash: [5, 4] }, (path) => {
      points.forEach(([x, y]) => path.lineTo(x, y));
      path.closePath();
    });
    context.globalAlpha = alpha;
    context.fillStyle = colour;
    context.fill();
    context.globalAlpha = 1;
  }

  ring(x, y, r, style) {
    this.#path(style, (path) => path.arc(x, y, r, 0, 2 * Math.PI));
  }

  marks(shape, flat, { fill, alpha }) {
    const { context } = this;
    context.fillStyle = fill;
    context.globalAlpha = alpha;
    for (let i = 0; i < flat.length; i += 3) this.#mark(shape, flat[i], flat[i + 1], flat[i + 2]);
    context.globalAlpha = 1;
  }

  #mark(shape, x, y, r) {
    const { context } = this;
    if (shape === "square") {
      context.fillRect(x - 0.9 * r, y - 0.9 * r, 1.8 * r, 1.8 * r);
      return;
    }
    context.beginPath();
    if (shape === "circle") context.arc(x, y, r, 0, 2 * Math.PI);
    else for (const [dx, dy] of CORNERS[shape]) context.lineTo(x + dx * r, y + dy * r);
    context.fill();
  }

  #path({ stroke, width, alpha = 1, dash = [] }, draw) {
    const { context } = this;
    context.globalAlpha = alpha;
    context.beginPath();
    draw(context);
    context.setLineDash(dash);
    context.strokeStyle = stroke;
    context.lineWidth = width;
    context.stroke();
    context.globalAlpha = 1;
  }

  text(x, y, text, { fill, halo, size, bold = false, anchor = "middle", angle = 0 }) {
    const { context } = this;
    context.save();
    context.translate(x, y);
    context.rotate((angle * Math.PI) / 180);
    context.font = `${bold ? "600 " : ""}${size}px ${FONT_FAMILY}`;
    context.textAlign = anchor === "middle" ? "center" : anchor;
    if (halo) {
      context.setLineDash([]);
      context.lineJoin = "round";
      context.lineWidth = 3;
      context.strokeStyle = halo;
      context.strokeText(text, 0, 0);
    }
    context.fillStyle = fill;
    context.fillText(text, 0, 0);
    context.restore();
  }

  measure(text, size, bold = false) {
    const font = `${bold ? "600 " : ""}${size}px ${FONT_FAMILY}`;
    const key = `${font}\n${text}`;
    if (!widths.has(key)) {
      if (widths.size >= MOST_WIDTHS) widths.clear();
      this.context.font = font;
      widths.set(key, this.context.measureText(text).width);
    }
    return widths.get(key);
  }

  clip({ x, y, width, height }) {
    this.context.save();
    this.context.beginPath();
    this.context.rect(x, y, width, height);
    this.context.clip();
  }

  unclip() {
    this.context.restore();
  }
}
