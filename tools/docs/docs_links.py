"""Links of the pages to what is no page: job files, the demo's card, other files of the repository.

In the repository they lead to files; on the site job files, examples and the demo's card are pages, and other files are
named without a link. Knows Markdown links. Refuses to know what is behind one.
"""

from __future__ import annotations

import posixpath
import re

import docs_jobs

CARD = "tracer/demo/model/README.md"
EXAMPLES = "examples/README.md"
PAGES = {CARD: "reference/demo-model.md", EXAMPLES: "examples.md"}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
_FENCE = re.compile(r"^(```|~~~).*?^\1[ \t]*$", re.MULTILINE | re.DOTALL)


def mended(markdown: str, page: str, root: str = "docs") -> str:
    """A page's Markdown with its links out of the docs folder led to pages of the site; code blocks as they are.

    Args:
        page: the page's path on the site, ``howto/lab.md``. root: where its links start from in the repository.
    """
    kept: list[str] = []
    at = 0
    for fence in _FENCE.finditer(markdown):
        kept += [_links(markdown[at : fence.start()], page, root), fence[0]]
        at = fence.end()
    return "".join([*kept, _links(markdown[at:], page, root)])


def _links(text: str, page: str, root: str) -> str:
    here = posixpath.dirname(page)

    def link(found: re.Match[str]) -> str:
        image, shown, address, anchor = found.groups()
        if image or "://" in address or address.startswith("mailto:"):
            return found[0]
        path = posixpath.normpath(posixpath.join(root, "" if root != "docs" else here, address))
        if path.startswith("docs/") and root == "docs":
            return found[0]
        target = site_path(path)
        if target is None:
            return shown
        goal, _, inner = target.partition("#")
        end = f"#{inner}" if inner else anchor or ""
        return f"[{shown}]({posixpath.relpath(goal, here or '.')}{end})"

    return _LINK.sub(link, text)


def site_path(path: str) -> str | None:
    """The page of a file of the repository; None where it has none."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/") and path.endswith(".md"):
        return path.removeprefix("docs/")
    for file in docs_jobs.files():
        name = file.relative_to(docs_jobs.ROOT).as_posix()
        if path == name:
            return f"reference/job-files.md#{docs_jobs.anchor(file)}"
    if path == "jobs" or path.startswith("jobs/"):
        return "reference/job-files.md"
    return None
