// Moving about in the diagram: zoom and pan, boxes dragged and moved by keys.
// Knows pointers, keys and the diagram's elements. Refuses to know what boxes are.

import { drag } from "d3-drag";
import { select } from "d3-selection";
import "d3-transition";
import { zoom, zoomIdentity } from "d3-zoom";

const STEP = 8; // pixels that an arrow key moves a box
const FAR = 40; // and with Shift
const MARGIN = 12;
const LARGEST = 1.4; // to which a small diagram is blown up

export class Moves {
  #svg;
  #plane;
  #zoom;

  /** `root`: the SVG element, `plane`: the group in it that moves. */
  constructor(root, plane) {
    this.#svg = root;
    this.#plane = plane;
    this.#zoom = zoom()
      .clickDistance(4)
      .scaleExtent([0.03, 4])
      .filter((event) => event.type === "wheel" || (!event.button && !event.target.closest(".box")))
      .on("zoom", ({ transform }) => plane.setAttribute("transform", transform.toString()));
    select(root).call(this.#zoom).on("dblclick.zoom", null);
  }

  fit({ x, y, width, height }) {
    const { clientWidth, clientHeight } = this.#svg;
    if (!clientWidth || !clientHeight) return;
    const across = (clientWidth - 2 * MARGIN) / width;
    const down = (clientHeight - 2 * MARGIN) / height;
    const k = Math.max(0.03, Math.min(LARGEST, across, down));
    const at = zoomIdentity.translate(
      (clientWidth - k * width) / 2 - k * x,
      (clientHeight - k * height) / 2 - k * y,
    );
    select(this.#svg).call(this.#zoom.transform, at.scale(k));
  }

  zoomBy(factor) {
    select(this.#svg).call(this.#zoom.scaleBy, factor);
  }

  /** Bring a point of the diagram into the picture if it lies outside. */
  reveal({ x, y }) {
    const { clientWidth, clientHeight } = this.#svg;
    const { a: k, e, f } = this.#plane.getCTM() ?? { a: 1, e: 0, f: 0 };
    const [px, py] = [k * x + e, k * y + f];
    const isIn = px > 0 && px < clientWidth && py > 0 && py < clientHeight;
    if (!isIn) select(this.#svg).call(this.#zoom.translateTo, x, y);
  }

  /** Boxes follow pointer and arrow keys. `at(i)`: where box i is, `move(i, x, y)`: it goes there, `done(i)`: it stays. */
  bind(elements, { at, move, done, choose }) {
    elements.forEach((element, i) => {
      let from = null;
      const dragging = drag()
        .container(this.#plane)
        .clickDistance(4)
        .subject(() => at(i))
        .on("start", () => (from = at(i)))
        .on("drag", ({ x, y }) => move(i, x, y))
        .on("end", () => {
          const { x, y } = at(i);
          if (from && (from.x !== x || from.y !== y)) done(i);
        });
      select(element).call(dragging);
      element.addEventListener("click", () => choose(i));
      element.addEventListener("keydown", (event) => {
        if (event.ctrlKey || event.metaKey || event.altKey) return;
        const step = event.shiftKey ? FAR : STEP;
        const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[
          event.key
        ] ?? [0, 0];
        if (dx || dy) {
          const { x, y } = at(i);
          move(i, x + step * dx, y + step * dy);
          done(i);
        } else if (event.key === "Enter" || event.key === " ") choose(i);
        else return;
        event.preventDefault();
      });
    });
  }
}

/** A handle between two panes: by pointer and arrow keys it sets what part of both the second one takes. */
export function bindSplit(handle, whole, { isBeside, set }) {
  const [least, most] = [15, 85];
  const take = (percent) => {
    const part = Math.round(Math.min(most, Math.max(least, percent)));
    handle.setAttribute("aria-valuenow", String(part));
    set(part);
  };
  const now = () => Number(handle.getAttribute("aria-valuenow"));
  handle.addEventListener("pointerdown", (event) => {
    handle.setPointerCapture(event.pointerId);
    event.preventDefault();
    handle.focus();
  });
  handle.addEventListener("pointermove", (event) => {
    if (!handle.hasPointerCapture(event.pointerId)) return;
    const { left, top, width, height } = whole.getBoundingClientRect();
    const before = isBeside() ? (event.clientX - left) / width : (event.clientY - top) / height;
    take(100 * (1 - before));
  });
  handle.addEventListener("keydown", (event) => {
    const by = { ArrowUp: 5, ArrowLeft: 5, ArrowDown: -5, ArrowRight: -5 }[event.key];
    if (!by) return;
    event.preventDefault();
    take(now() + by);
  });
}
