// What the page has to say for a while: a line with buttons, until it is put away.
// Knows its own element. Refuses to know what is said and what the buttons do.

import { byId, make } from "./elements.js";

const MOST = 4;

/** Say something above the picture; each action is {name, run}, a button that also puts the line away. */
export function remark(text, ...actions) {
  const place = byId("remarks");
  for (const same of [...place.children].filter((line) => line.firstChild?.textContent === text))
    same.remove();
  while (place.children.length >= MOST) place.firstChild.remove();
  const line = make("p", {}, make("span", {}, text));
  const button = (name, run) => make("button", { type: "button", class: "small", onclick: run }, name);
  for (const { name, run } of actions.filter(Boolean))
    line.append(
      button(name, () => {
        line.remove();
        run();
      }),
    );
  const close = button("\u2715", () => line.remove());
  close.setAttribute("aria-label", "Put this away");
  line.append(close);
  place.append(line);
}
