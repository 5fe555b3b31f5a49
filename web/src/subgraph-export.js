// The diagram as a file for a paper: SVG with text as text, and PNG of the same.
// Knows its dialog and the diagram. Refuses to know what the diagram shows.

import { byId } from "./elements.js";
import { tokenText } from "./format.js";
import { FONTS, paletteOf } from "./subgraph-draw.js";
import { legendLines } from "./subgraph-words.js";

const LONGEST_TITLE = 200;
const SCALE = 300 / 96; // dots of print for each pixel of the screen
const LARGEST = 12000; // pixels of a side that browsers can still draw

/** `current()`: the diagram, which may not be there yet. */
export function bindExport(circuit, current, download) {
  const dialog = byId("subgraph-dialog");
  byId("subgraph-export").addEventListener("click", () => dialog.showModal());
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close();
  });
  const made = () => fileOf(circuit, current());
  byId("subgraph-svg").addEventListener("click", () => {
    download(new Blob([textOf(made())], { type: "image/svg+xml" }), "subgraph.svg");
  });
  byId("subgraph-png").addEventListener("click", async () => {
    const message = byId("subgraph-message");
    message.textContent = "";
    try {
      download(await pictureOf(made()), "subgraph.png");
    } catch (error) {
      message.textContent = `No PNG was made: ${error.message}. The SVG holds the same.`;
    }
  });
}

/** The diagram as the dialog asks for it. */
function fileOf(circuit, diagram) {
  const isWhite = byId("subgraph-white").checked;
  const written = byId("subgraph-title").value.trim();
  return diagram.fileElement({
    title: written ? tokenText(written, LONGEST_TITLE) : "",
    says: byId("subgraph-legend").checked ? legendLines(circuit, diagram) : [],
    palette: isWhite
      ? { ...paletteOf("light"), paper: "#ffffff", panel: "#ffffff" }
      : paletteOf(document.documentElement.dataset.theme),
    font: FONTS,
  });
}

function textOf(element) {
  return `<?xml version="1.0" encoding="UTF-8"?>\n${new XMLSerializer().serializeToString(element)}\n`;
}

/** The same as a PNG blob at the resolution of print, less where no browser could draw that. */
async function pictureOf(element) {
  const [width, height] = ["width", "height"].map((name) => Number(element.getAttribute(name)));
  const scale = Math.min(SCALE, LARGEST / width, LARGEST / height);
  const address = URL.createObjectURL(new Blob([textOf(element)], { type: "image/svg+xml" }));
  try {
    const image = new Image();
    image.src = address;
    await image.decode();
    const canvas = document.createElement("canvas");
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
    const blob = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
    if (!blob) throw new Error(`it would have ${canvas.width} by ${canvas.height} pixels`);
    return blob;
  } finally {
    URL.revokeObjectURL(address);
  }
}
