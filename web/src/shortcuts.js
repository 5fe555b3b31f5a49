// Keys that work wherever the focus is: help, clear, undo, redo, save.
// Knows when the reader is typing or in a dialog. Refuses to know what the actions do; the picture's keys are in keys.js.

const TYPING = "input:not([type=checkbox], [type=range], [type=radio]), textarea, select, [contenteditable]";

/** `actions`: help(), clear(), undo(), redo(), save(). */
export function bindShortcuts(actions) {
  window.addEventListener("keydown", (event) => {
    if (event.defaultPrevented || event.altKey || document.querySelector("dialog[open]")) return;
    const typing = event.target instanceof Element && event.target.closest(TYPING) !== null;
    const act = event.ctrlKey || event.metaKey ? withCommand(event, typing) : plain(event, typing);
    if (!act) return;
    event.preventDefault();
    actions[act]();
  });
}

/** Undo in a field is the field's own. */
function withCommand(event, typing) {
  const key = event.key.toLowerCase();
  if (key === "s" && !event.shiftKey) return "save";
  if (typing) return null;
  if (key === "z") return event.shiftKey ? "redo" : "undo";
  return key === "y" && !event.shiftKey ? "redo" : null;
}

function plain(event, typing) {
  if (event.key === "Escape") return "clear";
  return event.key === "?" && !typing ? "help" : null;
}
