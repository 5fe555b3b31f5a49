// Reading and writing the notes of a page that `tracer view --serve` serves; only such a page has this script.
// Knows the server's two answers and the token in the page's address. Refuses to know what notes hold.

{
  const token = new URLSearchParams(location.search).get("token") ?? "";

  const ask = async (options) => {
    const headers = { Authorization: `Bearer ${token}`, ...options.headers };
    const answer = await fetch("notes", { ...options, headers, cache: "no-store", credentials: "omit" });
    const text = await answer.text();
    return { status: answer.status, version: answer.headers.get("ETag") ?? "", text };
  };

  /** @type {any} */ (globalThis).tracerServer = {
    token,
    read: () => ask({ method: "GET" }),
    write: (text, version) =>
      ask({
        method: "PUT",
        body: text,
        headers: { "Content-Type": "application/json", "If-Match": version },
      }),
  };
}
