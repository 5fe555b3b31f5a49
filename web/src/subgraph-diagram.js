// The diagram as it stands: boxes, links, places, and which links are drawn; and its elements.
// Knows circuit and state. Refuses to know elements of the page and what is pressed.

import { stepAt, thresholdAt } from "./filters.js";
import {
  bounds,
  boxElement,
  legendElement,
  legendHeight,
  linkElement,
  measure,
  numberElements,
  svg,
  wayOf,
} from "./subgraph-draw.js";
import { arrange, sizeOf } from "./subgraph-layout.js";
import { makeBoxes, sumLinks, summedMeasure } from "./subgraph-sums.js";

const MOST_LINKS = 400; // drawn
const FEW_LINKS = 12;
const NEAR = 5; // links of a box that are put in words, each way
const PER_BOX = 2; // links drawn for each box, until the reader moves the slider

export class Diagram {
  #circuit;
  #state;
  /** @type {number | null} the threshold's step on its slider; null until the reader moves it */
  #step = null;
  #laid = { key: "", places: [] };

  constructor(circuit, state) {
    this.#circuit = circuit;
    this.#state = state;
    this.options = { embeddings: true, logits: true, numbers: true };
    this.update();
  }

  /** Read circuit and state anew. */
  update() {
    const { boxes, left } = makeBoxes(this.#circuit, this.#state, this.options);
    this.boxes = boxes;
    this.left = left;
    this.measure = summedMeasure(this.#circuit, this.#state);
    Object.assign(this, sumLinks(this.#circuit, this.#state, boxes));
    this.near = boxes.map(() => ({ into: [], out: [] }));
    for (const link of this.links) {
      const [{ into }, { out }] = [this.near[link.target], this.near[link.source]];
      if (into.length < NEAR) into.push(link);
      if (out.length < NEAR) out.push(link);
    }
    this.most = Math.abs(this.links[0]?.value) || 0;
    this.#choose();
    this.settle();
  }

  /** Draw links from a step of the threshold's slider up. */
  from(step) {
    this.#step = step;
    this.#choose();
    this.route();
  }

  /** Boxes go where the state says that they were moved, the others where they were laid. */
  settle() {
    this.#lay();
    this.route();
  }

  /** @type {import("./subgraph-sums.js").Link[]} */
  links = [];
  /** @type {{ value: number, edges: number }[]} */
  within = [];

  /** Which links are drawn: those from the threshold up, and not more than a picture can hold. */
  #choose() {
    const few = Math.max(FEW_LINKS, PER_BOX * this.boxes.length);
    const start = this.links.length > few ? Math.abs(this.links[few - 1].value) : 0;
    this.sliderStep = this.#step ?? (start ? stepAt(start, this.most) : 0);
    this.threshold = thresholdAt(this.sliderStep, this.most);
    this.passing = this.links.filter(({ value }) => Math.abs(value) >= this.threshold);
    this.drawn = this.passing.slice(0, MOST_LINKS);
  }

  #lay() {
    const sizes = this.boxes.map((box) => sizeOf(box, measure));
    const ends = this.links
      .slice(0, 3 * this.boxes.length)
      .map(({ source, target }) => `${source},${target}`);
    const key = JSON.stringify([this.boxes.map((box) => box.key), sizes, ends]);
    if (this.#laid.key !== key) this.#laid = { key, places: arrange(this.boxes, this.links, sizes) };
    this.places = this.#laid.places.map((place, i) => ({
      ...place,
      ...this.#state.subgraph.get(this.boxes[i].key),
    }));
  }

  /** The ways of the drawn links between where the boxes are now. */
  route() {
    this.ways = this.drawn.map(({ source, target }) =>
      wayOf(this.places[source], this.places[target], this.places),
    );
  }

  linkElements(palette) {
    // The weakest first, so that the strongest lie on top.
    return this.drawn.map((link, i) => linkElement(link, this.ways[i], this.most, palette)).reverse();
  }

  numberElements(palette) {
    return this.options.numbers ? numberElements(this.drawn, this.ways, this.places, palette) : [];
  }

  boxElements(palette) {
    return this.boxes.map((box, i) => {
      const element = boxElement(box, this.places[i], palette);
      this.place(element, i);
      return element;
    });
  }

  place(element, i) {
    const { x, y } = this.places[i];
    element.setAttribute("transform", `translate(${+x.toFixed(1)} ${+y.toFixed(1)})`);
  }

  get bounds() {
    return bounds(this.places, this.ways);
  }

  /** The whole as one SVG element that stands alone; `says` are the legend's lines, none for no legend. */
  fileElement({ title, says, palette, font }) {
    const around = this.bounds;
    const [margin, head] = [16, title ? 30 : 0];
    const foot = says.length ? legendHeight(says) + 12 : 0;
    const widest = Math.max(
      around.width,
      measure(title, true) * 1.3,
      ...says.map((text) => measure(text, false)),
    );
    const [width, height] = [widest + 2 * margin, around.height + head + foot + 2 * margin];
    const [dx, dy] = [margin + (widest - around.width) / 2 - around.x, margin + head - around.y];
    const top = { x: width / 2, y: margin + 13, fill: palette.ink, "font-size": 14, "font-weight": "bold" };
    return svg(
      "svg",
      { width, height, viewBox: `0 0 ${width.toFixed(1)} ${height.toFixed(1)}`, "font-family": font },
      svg("title", {}, title || "Subgraph"),
      svg("rect", { class: "paper", width, height, fill: palette.paper }),
      ...(title ? [svg("text", { ...top, "text-anchor": "middle" }, title)] : []),
      svg(
        "g",
        { transform: `translate(${dx.toFixed(1)} ${dy.toFixed(1)})` },
        ...this.linkElements(palette),
        ...this.numberElements(palette),
        ...this.boxElements(palette),
      ),
      ...(foot ? [legendElement(margin, height - margin - foot + 12, this.most, says, palette)] : []),
    );
  }
}
