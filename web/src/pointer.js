// What a pointer does on the picture: hover, choose, pin, and draw a lasso around nodes.
// Knows pointer events and where nodes are. Refuses to know drawing and what becomes of nodes that were hit.

import { polygonContains } from "d3-polygon";

const STEP = 3; // pixels between the points of a lasso
const CLICK = 5; // pixels within which a lasso is a click

/** Whether a gesture is the lasso's, and so no panning. */
export function isLasso(event, state) {
  return (event.shiftKey || state.lassoing) && !event.button && event.type !== "wheel";
}

/** `actions`: choose(row), pin(row), pick(rows). */
export function bindPointer(canvas, view, stage, actions) {
  const { state } = view;
  let swallow = false; // the click that ends a lasso

  canvas.addEventListener("pointerdown", (event) => {
    swallow = false;
    if (!isLasso(event, state)) return;
    view.lasso = [[event.offsetX, event.offsetY]];
    canvas.setPointerCapture(event.pointerId);
    state.set({ cursor: -1 });
  });
  canvas.addEventListener("pointermove", (event) => {
    if (view.lasso) {
      const [x, y] = view.lasso.at(-1);
      if (Math.hypot(event.offsetX - x, event.offsetY - y) >= STEP)
        view.lasso.push([event.offsetX, event.offsetY]);
      stage.request();
      return;
    }
    const cursor = event.buttons ? -1 : stage.hit(event.offsetX, event.offsetY);
    canvas.classList.toggle("over", cursor >= 0);
    state.set({ cursor });
  });
  canvas.addEventListener("pointerup", () => {
    if (!view.lasso) return;
    const path = view.lasso;
    view.lasso = null;
    stage.request();
    const [x, y] = path[0];
    const isClick = path.every(([px, py]) => Math.hypot(px - x, py - y) < CLICK);
    swallow = true;
    if (!isClick) {
      actions.pick(inside(path, view, stage));
      return;
    }
    const row = stage.hit(x, y);
    if (row >= 0) actions.pick([row]);
  });
  canvas.addEventListener("pointercancel", () => {
    view.lasso = null;
    stage.request();
  });
  canvas.addEventListener("pointerleave", () => state.set({ cursor: -1 }));
  canvas.addEventListener("click", (event) => {
    if (swallow) {
      swallow = false;
      return;
    }
    const row = stage.hit(event.offsetX, event.offsetY);
    if (event.ctrlKey || event.metaKey) {
      if (row >= 0) actions.pin(row);
    } else actions.choose(row);
  });
  canvas.addEventListener("dblclick", (event) => {
    if (event.shiftKey || state.lassoing || event.ctrlKey || event.metaKey) return;
    const row = stage.hit(event.offsetX, event.offsetY);
    if (row >= 0) actions.pin(row);
  });
}

/** The shown nodes whose middle lies in an outline of the screen. */
function inside(path, { circuit, state }, stage) {
  return circuit.rows.filter((row) => {
    if (!state.shown[row]) return false;
    const { x, y } = stage.position(row);
    return polygonContains(path, [x, y]);
  });
}
