// The panels beside the picture and the strip above it, which fold; the browser remembers how.
// Knows these elements and their buttons. Refuses to know what is in them.

import { byId } from "./elements.js";
import { storage } from "./memory.js";

const NARROW = 560; // pixels of the window, below which panels are folded at first
const PANELS = ["controls", "details"];

export function bindFolds() {
  const narrow = window.innerWidth < NARROW;
  const key = `tracer-page:panels${narrow ? ":narrow" : ""}`;
  const place = storage();
  const open = { controls: !narrow, details: !narrow, facts: false, ...read(place?.getItem(key)) };
  const keep = () => {
    try {
      place?.setItem(key, JSON.stringify(open));
    } catch {
      // full: the panels are as they were at the next opening
    }
  };
  const show = (name) => {
    byId(name).hidden = !open[name];
    byId(`fold-${name}`).setAttribute("aria-expanded", String(open[name]));
  };
  for (const name of PANELS) {
    show(name);
    byId(`fold-${name}`).addEventListener("click", () => {
      open[name] = !open[name];
      show(name);
      keep();
      if (open[name] && window.innerWidth < NARROW) byId(name).scrollIntoView({ block: "nearest" });
    });
  }
  const facts = byId("facts");
  facts.open = open.facts;
  facts.addEventListener("toggle", () => {
    open.facts = facts.open;
    keep();
  });
}

/** What was kept, as far as it is yes or no. */
function read(text) {
  try {
    const held = Object(JSON.parse(text ?? "{}"));
    const known = [...PANELS, "facts"].filter((name) => typeof held[name] === "boolean");
    return Object.fromEntries(known.map((name) => [name, held[name]]));
  } catch {
    return {};
  }
}
