// Bundles src/ into the three scripts that ship with the Python package. With --check: says whether those there are these.
// Knows file names. Refuses to know what the scripts do.

import { readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const shipped = join(here, "..", "tracer", "reports", "viewer");
const common = {
  absWorkingDir: here,
  bundle: true,
  minify: true,
  charset: "ascii", // the page is written in ASCII, so that no server's idea of an encoding matters
  legalComments: "none", // every licence stands in the banner, whole
  target: ["chrome111", "firefox128", "safari16.4"],
  write: false,
  metafile: true,
};

const about = (folder) => JSON.parse(readFileSync(join(here, folder, "package.json"), "utf8"));

/** The packages whose code is in a bundle, by their folders, and what they depend on, which some have inside. */
function packages({ inputs }) {
  const files = Object.keys(inputs).map((file) => /^(.*node_modules\/(?:@[^/]+\/)?[^/]+)\//.exec(file)?.[1]);
  const found = files.filter(Boolean);
  const needed = found.flatMap((folder) => Object.keys(about(folder).dependencies ?? {}));
  return [...new Set([...found, ...needed.map((name) => `node_modules/${name}`)])].sort();
}

function licence(folder) {
  const { name, version } = about(folder);
  const text = readFileSync(join(here, folder, "LICENSE"), "utf8").trim();
  return `${name} ${version}\n\n${text}`;
}

async function bundled(entry, format) {
  const made = await build({ ...common, entryPoints: [join("src", entry)], format });
  const licences = packages(made.metafile).map(licence);
  const banner = licences.length ? `/*\n${licences.join("\n\n---\n\n")}\n*/\n` : "";
  return banner + made.outputFiles[0].text;
}

const scripts = ["guard.js", "served.js"];
const alone = await Promise.all(scripts.map(async (name) => [name, await bundled(name, "iife")]));
const files = { ...Object.fromEntries(alone), "page.js": await bundled("main.js", "esm") };
const check = process.argv.includes("--check");
for (const [name, text] of Object.entries(files)) {
  const file = join(shipped, name);
  if (!check) writeFileSync(file, text);
  else if (readFileSync(file, "utf8") !== text) {
    console.error(`tracer/reports/viewer/${name} is not what web/src makes: run 'make page' and commit it`);
    process.exitCode = 1;
  }
}
