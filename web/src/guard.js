// What goes wrong in the page, said on the page: loaded before everything else.
// Knows one element of the page. Refuses to know what the other scripts do, and depends on nothing.

{
  const say = (what) => {
    const place = document.getElementById("failure");
    place.textContent = `This page cannot be shown whole: ${what}. Write it again with 'tracer view', or report it.`;
    place.hidden = false;
  };
  window.addEventListener("error", (event) => say(event.message.replace(/^Uncaught (Error: )?/, "")));
  window.addEventListener("unhandledrejection", (event) =>
    say(event.reason?.message ?? String(event.reason)),
  );
}
