// The diagram as SVG elements, the same for the page and for a file: links, boxes, numbers, title and legend.
// Knows boxes, links, places and a palette. Refuses to know circuit, state and what happens when something is pressed.

import { EMBEDDING, LOGIT } from "./data.js";
import { signed } from "./subgraph-sums.js";

/** Fonts that journals take, and their like on systems without. */
export const FONTS = "Arial, Helvetica, 'Liberation Sans', 'DejaVu Sans', sans-serif";
export const FONT_SIZE = 11;
const SPACE = "http://www.w3.org/2000/svg";
const THINNEST = 1;
const THICKEST = 7;
const SPOTS = 14; // of a way, looked at for boxes
const BEHIND = 4; // by which a group's second frame stands out
const GAP = 9; // between a way and a box that it passes
const NUMBERED = 60; // links with their number beside them, the strongest
const COLOURS = { paper: "paper", panel: "panel", ink: "ink", quiet: "quiet", line: "axis", group: "group" };
const SIGNED = { plus: "edge-plus", minus: "edge-minus" };

/** Colours as the page has them now, by variables, so that they follow its theme. */
export const LIVE = Object.fromEntries(
  Object.entries({ ...COLOURS, ...SIGNED }).map(([name, variable]) => [name, `var(--${variable})`]),
);

/** The colours of a theme, as values. */
export function paletteOf(theme) {
  const { dataset } = document.documentElement;
  const own = dataset.theme;
  dataset.theme = theme;
  const style = getComputedStyle(document.documentElement);
  const names = Object.entries({ ...COLOURS, ...SIGNED });
  const palette = Object.fromEntries(
    names.map(([name, variable]) => [name, style.getPropertyValue(`--${variable}`).trim()]),
  );
  dataset.theme = own;
  return palette;
}

/** An SVG element; numbers are rounded, what is undefined is left out. */
export function svg(name, attributes = {}, ...children) {
  const element = document.createElementNS(SPACE, name);
  for (const [key, value] of Object.entries(attributes))
    if (value !== undefined)
      element.setAttribute(key, typeof value === "number" ? String(+value.toFixed(1)) : value);
  element.append(...children);
  return element;
}

const context = document.createElement("canvas").getContext("2d");

/** How wide a text is in a box. */
export function measure(text, isBold) {
  context.font = `${isBold ? "bold " : ""}${FONT_SIZE}px ${FONTS}`;
  return context.measureText(text).width;
}

function write(x, y, text, attributes) {
  return svg("text", { x, y, "font-size": FONT_SIZE, "text-anchor": "middle", ...attributes }, text);
}

/** One box around its own middle; whoever places it moves the whole. */
export function boxElement(box, { width, height }, palette) {
  const [x, y] = [-width / 2, -height / 2];
  const tone = box.attribution < 0 ? palette.minus : palette.plus;
  const stroke = box.isGroup ? palette.group : Number.isFinite(box.attribution) ? tone : palette.line;
  const rx = box.isGroup ? 8 : box.kind === EMBEDDING ? 0 : box.kind === LOGIT ? height / 2 : 5;
  const frame = { x, y, width, height, rx, fill: palette.panel, stroke };
  const behind = box.isGroup
    ? [svg("rect", { ...frame, x: x + BEHIND, y: y - BEHIND, "fill-opacity": 0.6 })]
    : [];
  const dash = box.isAdded ? { "stroke-dasharray": "4 3" } : {};
  const top = y + 8 + FONT_SIZE;
  const lines = box.lines.map((line, i) => write(0, top + 14 * (i + 1), line, { fill: palette.quiet }));
  return svg(
    "g",
    { class: "box" },
    ...behind,
    svg("rect", { class: "frame", ...frame, "stroke-width": box.isGroup ? 2 : 1.5, ...dash }),
    write(0, top, box.name, { fill: palette.ink, "font-weight": "bold" }),
    ...lines,
  );
}

/** The way of a link as points of cubic curves: direct, or beside the boxes that lie between. */
export function wayOf(from, to, places) {
  const straight = direct(from, to);
  const between = places
    .filter((place) => place !== from && place !== to && isBetween(place, from, to) && isOn(straight, place))
    .sort((a, b) => b.y - a.y);
  if (!between.length) return straight;
  const stops = new Map(between.map((place) => [place.y, beside(place, straight, places)]));
  const points = [...stops.values()];
  return through([edgeOf(from, points[0]), ...points, edgeOf(to, points.at(-1))]);
}

function isBetween({ y }, from, to) {
  return y < from.y - from.height / 2 && y > to.y + to.height / 2;
}

function isOn(way, { x, y, width: w, height: h }) {
  const spots = Array.from({ length: SPOTS }, (_, i) => pointAt(way, (i + 1) / (SPOTS + 1)));
  return spots.some((spot) => overlaps({ ...spot, w: 4, h: 4 }, { x, y, w, h }));
}

/** The nearest point of a box's row where no box lies. */
function beside({ y }, way, places) {
  const row = places.filter((place) => Math.abs(place.y - y) < place.height / 2 + GAP);
  const isFree = (x) => row.every((place) => Math.abs(place.x - x) > place.width / 2 + GAP / 2);
  const wish = pointAt(way, (way[0].y - y) / (way[0].y - way.at(-1).y)).x;
  const sides = row.flatMap(({ x, width }) => [x - width / 2 - GAP, x + width / 2 + GAP]).filter(isFree);
  return {
    x: sides.reduce((best, x) => (Math.abs(x - wish) < Math.abs(best - wish) ? x : best), sides[0]),
    y,
  };
}

function direct(from, to) {
  const [up, down] = [from.y - from.height / 2, to.y + to.height / 2];
  if (up - down > 4) return rise(edgeOf(from, to), edgeOf(to, from));
  const [low, high] = [from.y + from.height / 2, to.y - to.height / 2 - BEHIND];
  if (high - low > 4) {
    const side = Math.max(60, Math.abs(from.x - to.x) / 2) * (from.x <= to.x ? -1 : 1);
    const [a, b] = [
      { x: from.x + side / 4, y: low },
      { x: to.x + side / 4, y: high },
    ];
    return [a, { x: a.x + side, y: a.y + 30 }, { x: b.x + side, y: b.y - 30 }, b];
  }
  const crown = Math.min(up, to.y - to.height / 2) - 40;
  return [
    { x: from.x, y: up },
    { x: from.x, y: crown },
    { x: to.x, y: crown },
    { x: to.x, y: to.y - to.height / 2 - BEHIND },
  ];
}

/** Where a link leaves a box: its upper or lower side, whichever is nearer to where it goes. */
function edgeOf(box, towards) {
  const above = towards.y < box.y;
  const reach = Math.max(0, box.width / 2 - 10);
  const x = Math.min(box.x + reach, Math.max(box.x - reach, towards.x));
  return { x, y: box.y + ((above ? -1 : 1) * box.height) / 2 };
}

function rise(a, b) {
  const bend = (a.y - b.y) * 0.45;
  return [a, { x: a.x, y: a.y - bend }, { x: b.x, y: b.y + bend }, b];
}

/** Curves that rise from point to point, upright at each. */
function through(points) {
  const way = [points[0]];
  for (let i = 1; i < points.length; i += 1) way.push(...rise(points[i - 1], points[i]).slice(1));
  return way;
}

/** A point of a way; `part` from 0 to 1, in equal parts of its curves. */
function pointAt(way, part) {
  const curves = (way.length - 1) / 3;
  const i = Math.min(curves - 1, Math.floor(part * curves));
  const t = part * curves - i;
  const [a, b, c, d] = way.slice(3 * i, 3 * i + 4);
  const mix = (axis) =>
    (1 - t) ** 3 * a[axis] +
    3 * (1 - t) ** 2 * t * b[axis] +
    3 * (1 - t) * t ** 2 * c[axis] +
    t ** 3 * d[axis];
  return { x: mix("x"), y: mix("y") };
}

function pathText(way) {
  const at = ({ x, y }) => `${x.toFixed(1)} ${y.toFixed(1)}`;
  const curves = [];
  for (let i = 1; i < way.length; i += 3) curves.push(`C${at(way[i])} ${at(way[i + 1])} ${at(way[i + 2])}`);
  return `M${at(way[0])}${curves.join("")}`;
}

export function widthOf(value, most) {
  return THINNEST + (THICKEST - THINNEST) * (Math.abs(value) / (most || 1));
}

/** A link: its line and the head of the arrow. */
export function linkElement(link, way, most, palette) {
  const width = widthOf(link.value, most);
  const colour = link.value < 0 ? palette.minus : palette.plus;
  const [before, tip] = way.slice(-2);
  const length = Math.hypot(tip.x - before.x, tip.y - before.y) || 1;
  const [dx, dy] = [(tip.x - before.x) / length, (tip.y - before.y) / length];
  const size = 5 + width;
  const neck = { x: tip.x - size * dx, y: tip.y - size * dy };
  const half = 0.3 * size + width / 2;
  const head = [
    tip,
    { x: neck.x - half * dy, y: neck.y + half * dx },
    { x: neck.x + half * dy, y: neck.y - half * dx },
  ];
  const short = [...way.slice(0, -1), neck];
  return svg(
    "g",
    { class: "link", "data-link": `${link.source},${link.target}`, opacity: 0.5 + 0.4 * (width / THICKEST) },
    svg("path", { class: "line", d: pathText(short), fill: "none", stroke: colour, "stroke-width": width }),
    svg("polygon", {
      points: head.map(({ x, y }) => `${x.toFixed(1)},${y.toFixed(1)}`).join(" "),
      fill: colour,
    }),
  );
}

/** Numbers beside the strongest links, each where it covers no box and no other number, or nowhere. */
export function numberElements(drawn, ways, places, palette) {
  const taken = places.map(({ x, y, width, height }) => ({ x, y, w: width + 4, h: height + 4 }));
  const found = [];
  for (const [i, link] of drawn.slice(0, NUMBERED).entries()) {
    const text = signed(link.value);
    const [w, h] = [measure(text, false) + 4, FONT_SIZE + 2];
    const spot = [0.5, 0.38, 0.62, 0.27, 0.73, 0.18, 0.82]
      .map((part) => ({ ...pointAt(ways[i], part), w, h }))
      .find((one) => !taken.some((other) => overlaps(one, other)));
    if (!spot) continue;
    taken.push(spot);
    const halo = {
      stroke: palette.paper,
      "stroke-width": 3,
      "paint-order": "stroke",
      "stroke-linejoin": "round",
    };
    const fill = link.value < 0 ? palette.minus : palette.plus;
    const name = { class: "number", "data-link": `${link.source},${link.target}` };
    found.push(write(spot.x, spot.y + FONT_SIZE / 3, text, { ...name, fill, ...halo }));
  }
  return found;
}

function overlaps(a, b) {
  return Math.abs(a.x - b.x) * 2 < a.w + b.w && Math.abs(a.y - b.y) * 2 < a.h + b.h;
}

/** What surrounds all boxes and links. */
export function bounds(places, ways) {
  const x = ways.flatMap((way) => way.map((point) => point.x));
  const y = ways.flatMap((way) => way.map((point) => point.y));
  for (const place of places) {
    x.push(place.x - place.width / 2, place.x + place.width / 2 + 4);
    y.push(place.y - place.height / 2 - 4, place.y + place.height / 2);
  }
  const least = (values) => values.reduce((a, b) => Math.min(a, b), Infinity);
  const most = (values) => values.reduce((a, b) => Math.max(a, b), -Infinity);
  if (!x.length) return { x: 0, y: 0, width: 1, height: 1 };
  return { x: least(x), y: least(y), width: most(x) - least(x), height: most(y) - least(y) };
}

/** What colours and widths mean, below the diagram. `says`: lines of text. Its height is `legendHeight`. */
export function legendElement(x, y, most, says, palette) {
  const samples = [most, -most / 2].flatMap((value, i) => {
    const at = x + i * 150;
    const stroke = value < 0 ? palette.minus : palette.plus;
    const line = { x1: at, x2: at + 34, y1: y + 8, y2: y + 8, stroke, "stroke-width": widthOf(value, most) };
    const words = `${signed(value)} ${value < 0 ? "(against)" : "(for)"}`;
    return [svg("line", line), write(at + 42, y + 12, words, { fill: palette.ink, "text-anchor": "start" })];
  });
  const lines = says.map((text, i) =>
    write(x, y + 30 + 15 * i, text, { fill: palette.quiet, "text-anchor": "start" }),
  );
  return svg("g", { class: "legend" }, ...samples, ...lines);
}

export const legendHeight = (says) => 30 + 15 * says.length;
