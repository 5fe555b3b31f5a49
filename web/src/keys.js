// Keys pressed on the canvas: moving the cursor between nodes, choosing, pinning, zooming.
// Knows layout and state. Refuses to know drawing and other elements of the page.

/** Shown nodes by layer, each from left to right. */
function shownByLine({ circuit, layout, state }) {
  const lines = layout.lines.map(() => []);
  for (const row of circuit.rows) if (state.shown[row]) lines[circuit.nodes.layer[row] + 1].push(row);
  for (const rows of lines) rows.sort((a, b) => layout.x[a] - layout.x[b] || layout.y[b] - layout.y[a]);
  return lines;
}

function nearest(rows, x, layout) {
  const gap = (row) => Math.abs(layout.x[row] - x);
  return rows.reduce((best, row) => (gap(row) < gap(best) ? row : best));
}

/** The node that an arrow key leads to: the next in the layer, or the nearest in the next layer that has any. */
export function neighbour(view, from, key) {
  const { circuit, layout } = view;
  const lines = shownByLine(view);
  const line = circuit.nodes.layer[from] + 1;
  if (key === "ArrowLeft" || key === "ArrowRight") {
    const step = key === "ArrowLeft" ? -1 : 1;
    return lines[line][lines[line].indexOf(from) + step] ?? from;
  }
  const step = key === "ArrowUp" ? 1 : -1;
  for (let next = line + step; next >= 0 && next < lines.length; next += step) {
    if (lines[next].length) return nearest(lines[next], layout.x[from], layout);
  }
  return from;
}

/** `actions`: move(row), choose(row), pin(row), pick(rows), write(row, field), group(), clear(), help(), and the stage's fit, zoomBy and panBy. */
export function bindKeys(canvas, view, actions) {
  const { circuit, state } = view;
  const here = () => (state.cursor >= 0 ? state.cursor : state.selected);
  const strongest = () => circuit.byStrength.find((row) => state.shown[row]) ?? -1;
  const byRank = (step) => {
    const rows = circuit.byStrength.filter((row) => state.shown[row]);
    return rows[rows.indexOf(here()) + step] ?? strongest();
  };
  const arrow = (event) => {
    const [dx, dy] = { ArrowLeft: [1, 0], ArrowRight: [-1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[
      event.key
    ];
    if (event.shiftKey) actions.panBy(60 * dx, 60 * dy);
    else actions.move(here() < 0 ? strongest() : neighbour(view, here(), event.key));
  };
  const keys = {
    ArrowLeft: arrow,
    ArrowRight: arrow,
    ArrowUp: arrow,
    ArrowDown: arrow,
    Home: () => actions.move(strongest()),
    "[": () => actions.move(byRank(-1)),
    "]": () => actions.move(byRank(1)),
    Enter: (event) => here() >= 0 && (event.shiftKey ? actions.pick([here()]) : actions.choose(here())),
    p: () => here() >= 0 && actions.pin(here()),
    n: () => here() >= 0 && actions.write(here(), "node-name"),
    m: () => here() >= 0 && actions.write(here(), "node-note"),
    g: () => actions.group(),
    Escape: actions.clear,
    "?": actions.help,
    "+": () => actions.zoomBy(1.3),
    "=": () => actions.zoomBy(1.3),
    "-": () => actions.zoomBy(1 / 1.3),
    0: actions.fit,
  };
  canvas.addEventListener("keydown", (event) => {
    const act = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!act || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    act(event);
  });
}
