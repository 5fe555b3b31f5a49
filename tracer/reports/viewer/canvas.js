// The canvas: drawing when something changed, zoom and pan, and which node lies under the pointer.
// Knows pixels and pointers. Refuses to know what the picture means (scene.js) and who asked for it.

/* global d3 */
import { paint, plotArea } from "./scene.js";

const FONT_FAMILY = "system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif";
const REACH = 5; // pixels around a node that still hit it
const BLOCK = 1.6; // marks no larger than this are drawn as blocks, which is far quicker

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
    if (shape === "square" || r <= BLOCK) {
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

  measure(text, size) {
    this.context.font = `${size}px ${FONT_FAMILY}`;
    return this.context.measureText(text).width;
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

/** The canvas element with its zoom; `view` is what `paint` needs, `drawn(started)` is called after each frame. */
export class Stage {
  #canvas;
  #view;
  #drawn;
  #asked = false;
  #tree;
  #zoom;

  constructor(canvas, view, drawn) {
    this.#canvas = canvas;
    this.#view = Object.assign(view, { width: 1, height: 1, transform: d3.zoomIdentity });
    this.#drawn = drawn;
    const { x, y } = view.layout;
    this.#tree = d3.quadtree(
      view.circuit.rows,
      (row) => x[row],
      (row) => y[row],
    );
    this.#zoom = d3
      .zoom()
      .clickDistance(4)
      .on("zoom", ({ transform }) => {
        view.transform = transform;
        this.request();
      });
    d3.select(canvas).call(this.#zoom).on("dblclick.zoom", null);
    this.#size();
    this.fit();
    this.draw();
    new ResizeObserver(() => this.#resize()).observe(canvas.parentElement);
  }

  #size() {
    const { clientWidth, clientHeight } = this.#canvas.parentElement;
    const ratio = window.devicePixelRatio || 1;
    this.#view.width = Math.max(200, clientWidth);
    this.#view.height = Math.max(160, clientHeight);
    this.#canvas.width = Math.round(this.#view.width * ratio);
    this.#canvas.height = Math.round(this.#view.height * ratio);
    this.#limit();
  }

  #resize() {
    const { clientWidth, clientHeight } = this.#canvas.parentElement;
    if (clientWidth === this.#view.width && clientHeight === this.#view.height) return;
    const wasFitted = this.#isFitted;
    this.#size();
    if (wasFitted) this.fit();
    this.draw();
  }

  get #isFitted() {
    const { k, x, y } = this.#view.transform;
    const fitted = this.#fitted();
    return Math.abs(k - fitted.k) < 1e-6 && Math.abs(x - fitted.x) < 1 && Math.abs(y - fitted.y) < 1;
  }

  #limit() {
    const { layout, width, height } = this.#view;
    const { k } = this.#fitted();
    const plot = plotArea(width, height);
    this.#zoom
      .scaleExtent([k * 0.5, Math.max(12, k * 4)])
      .extent([
        [plot.x, plot.y],
        [plot.x + plot.width, plot.y + plot.height],
      ])
      .translateExtent([
        [-layout.width, -layout.height],
        [2 * layout.width, 2 * layout.height],
      ]);
  }

  #fitted() {
    const { layout, width, height } = this.#view;
    const plot = plotArea(width, height);
    const k = Math.min(2.2, (plot.width - 8) / layout.width, (plot.height - 8) / layout.height);
    const x = plot.x + (plot.width - k * layout.width) / 2;
    const y = plot.y + (plot.height - k * layout.height) / 2;
    return d3.zoomIdentity.translate(x, y).scale(k);
  }

  /** Ask for a frame; many askers, one frame. */
  request() {
    if (this.#asked) return;
    this.#asked = true;
    requestAnimationFrame(() => {
      if (this.#asked) this.draw();
    });
  }

  draw() {
    this.#asked = false;
    const started = performance.now();
    const context = this.#canvas.getContext("2d", { alpha: false });
    const ratio = window.devicePixelRatio || 1;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    paint(new CanvasPen(context), this.#view);
    this.#drawn(started);
  }

  fit() {
    d3.select(this.#canvas).call(this.#zoom.transform, this.#fitted());
  }

  zoomBy(factor) {
    d3.select(this.#canvas).call(this.#zoom.scaleBy, factor);
  }

  panBy(dx, dy) {
    const { k } = this.#view.transform;
    d3.select(this.#canvas).call(this.#zoom.translateBy, dx / k, dy / k);
  }

  /** Bring a node into the plot if it lies outside. */
  reveal(row) {
    const { layout, transform, width, height } = this.#view;
    const plot = plotArea(width, height);
    const [x, y] = transform.apply([layout.x[row], layout.y[row]]);
    const isIn = x > plot.x + 10 && x < plot.x + plot.width - 10 && y > 10 && y < plot.height - 10;
    if (!isIn) d3.select(this.#canvas).call(this.#zoom.translateTo, layout.x[row], layout.y[row]);
  }

  /** Where a node is on the canvas, in CSS pixels. */
  position(row) {
    const { layout, transform } = this.#view;
    const [x, y] = transform.apply([layout.x[row], layout.y[row]]);
    return { x, y, r: transform.k * layout.radius[row] };
  }

  /** The shown node nearest to a point of the canvas, or -1 if none is in reach. */
  hit(px, py) {
    const { layout, state, transform, width, height } = this.#view;
    const plot = plotArea(width, height);
    if (px < plot.x || py > plot.height) return -1;
    const [x, y] = transform.invert([px, py]);
    const slack = REACH / transform.k;
    const far = slack + layout.largest;
    let [best, nearest] = [-1, slack];
    this.#tree.visit((quad, x0, y0, x1, y1) => {
      if (x0 > x + far || x1 < x - far || y0 > y + far || y1 < y - far) return true;
      for (let leaf = quad.length ? null : quad; leaf; leaf = leaf.next) {
        const row = leaf.data;
        const gap = Math.hypot(layout.x[row] - x, layout.y[row] - y) - layout.radius[row];
        if (state.shown[row] && gap < nearest) [best, nearest] = [row, gap];
      }
      return false;
    });
    return best;
  }
}
