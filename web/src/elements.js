// The page's elements: those there are by their ids, and new ones. Knows page.html's ids only as names. Refuses to know
// what any of them is for.

/**
 * The element of this id; of any kind, since the checker cannot read page.html.
 * @param {string} id
 * @returns {any}
 */
export function byId(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`the page has no element ${id}`);
  return found;
}

/**
 * What an event happened to.
 * @param {Event} event
 * @returns {any}
 */
export const targetOf = (event) => event.target;

/** An element with text and attributes; text is never read as markup. */
export function make(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children);
  return element;
}

/** New content; the focus stays on the element of the same data-key, or goes to the whole. */
export function refill(element, ...children) {
  const focused = element.contains(document.activeElement) ? document.activeElement : null;
  element.replaceChildren(...children);
  if (!focused) return;
  const { key } = /** @type {HTMLElement} */ (focused).dataset;
  const keyed = /** @type {HTMLElement[]} */ ([...element.querySelectorAll("[data-key]")]);
  const same = keyed.find((other) => other.dataset.key === key);
  (same ?? element).focus();
}
