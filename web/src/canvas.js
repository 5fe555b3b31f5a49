// The canvas: drawing when something changed, zoom and pan, and which node lies under the pointer.
// Knows pixels and pointers. Refuses to know what the picture means (scene.js) and who asked for it.

import { quadtree } from "d3-quadtree";
import { select } from "d3-selection";
import "d3-transition";
import { zoom, zoomIdentity } from "d3-zoom";

import { CanvasPen } from "./pen.js";
import { isLasso } from "./pointer.js";
import { paint, plotArea } from "./scene.js";

export { CORNERS, CanvasPen } from "./pen.js";

const REACH = 5; // pixels around a node that still hit it

/** The canvas element with its zoom; `view` is what `paint` needs, `drawn(started)` is called after each frame. */
export class Stage {
  #canvas;
  #view;
  #drawn;
  #asked = false;
  #tree;
  #zoom;
  #before = () => {};

  constructor(canvas, view, drawn) {
    this.#canvas = canvas;
    this.#view = Object.assign(view, { width: 1, height: 1, transform: zoomIdentity });
    this.#drawn = drawn;
    this.#plant();
    this.#zoom = zoom()
      .clickDistance(4)
      .filter(
        (event) => !isLasso(event, view.state) && (!event.ctrlKey || event.type === "wheel") && !event.button,
      )
      .on("zoom", ({ transform }) => {
        view.transform = transform;
        this.request();
      });
    select(canvas).call(this.#zoom).on("dblclick.zoom", null);
    this.#size();
    this.fit();
    this.draw();
    new ResizeObserver(() => this.#resize()).observe(canvas.parentElement);
  }

  /** `called()` is called at the beginning of every frame. */
  beforeDrawing(called) {
    this.#before = called;
  }

  #plant() {
    /** @type {{x: number[], y: number[]}} */
    const { x, y } = this.#view.layout;
    /** @type {number[]} */
    const rows = this.#view.circuit.rows;
    this.#tree = quadtree(
      rows,
      (row) => x[row],
      (row) => y[row],
    );
  }

  /** Another layout: the whole stays in view where it was; else node `anchor` stays where it is on the screen, or what
      is in the middle of it. */
  place(layout, anchor) {
    const view = this.#view;
    const wasFitted = this.#isFitted;
    const fixed = anchor >= 0 ? anchor : this.#nearestToMiddle();
    const before = fixed >= 0 ? this.position(fixed) : null;
    view.layout = layout;
    this.#plant();
    this.#limit();
    if (wasFitted || !before) this.fit();
    else {
      const { k } = view.transform;
      const moved = zoomIdentity
        .translate(before.x - k * layout.x[fixed], before.y - k * layout.y[fixed])
        .scale(k);
      select(this.#canvas).call(this.#zoom.transform, moved);
    }
  }

  #nearestToMiddle() {
    const { transform, width, height } = this.#view;
    const plot = plotArea(width, height);
    const [x, y] = transform.invert([plot.x + plot.width / 2, plot.y + plot.height / 2]);
    return this.#tree.find(x, y) ?? -1;
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
    return zoomIdentity.translate(x, y).scale(k);
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
    this.#before();
    this.#asked = false;
    const context = this.#canvas.getContext("2d", { alpha: false });
    const ratio = window.devicePixelRatio || 1;
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    paint(new CanvasPen(context), this.#view);
    this.#drawn(started);
  }

  /** What part of the picture is seen: how much nearer than when it fits, and the middle as shares of the layout's
      width and height; null where all of it fits. */
  look() {
    if (this.#isFitted) return null;
    const { layout, width, height, transform } = this.#view;
    const plot = plotArea(width, height);
    const [x, y] = transform.invert([plot.x + plot.width / 2, plot.y + plot.height / 2]);
    return [transform.k / this.#fitted().k, x / layout.width, y / layout.height];
  }

  /** See the part that `look` gave, in a window of whatever size; all of it if that is null. */
  show(look) {
    this.#before();
    this.#resize();
    if (!look) {
      this.fit();
      return;
    }
    const { layout, width, height } = this.#view;
    const plot = plotArea(width, height);
    const k = this.#fitted().k * Math.min(1000, Math.max(0.01, look[0]));
    const x = plot.x + plot.width / 2 - k * look[1] * layout.width;
    const y = plot.y + plot.height / 2 - k * look[2] * layout.height;
    select(this.#canvas).call(this.#zoom.transform, zoomIdentity.translate(x, y).scale(k));
  }

  fit() {
    select(this.#canvas).call(this.#zoom.transform, this.#fitted());
  }

  zoomBy(factor) {
    select(this.#canvas).call(this.#zoom.scaleBy, factor);
  }

  panBy(dx, dy) {
    const { k } = this.#view.transform;
    select(this.#canvas).call(this.#zoom.translateBy, dx / k, dy / k);
  }

  /** Bring a node into the plot if it lies outside. */
  reveal(row) {
    const { layout, transform, width, height } = this.#view;
    const plot = plotArea(width, height);
    const [x, y] = transform.apply([layout.x[row], layout.y[row]]);
    const isIn = x > plot.x + 10 && x < plot.x + plot.width - 10 && y > 10 && y < plot.height - 10;
    if (!isIn) select(this.#canvas).call(this.#zoom.translateTo, layout.x[row], layout.y[row]);
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
