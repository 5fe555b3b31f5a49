"""A report as a browser sees it: parsed, with every element closed in order."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """Tables by id, ids, links, tags, and all text; every element must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.sections: dict[str, str] = {}
        self.section = self.table = ""
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        assert len(values) == len(attrs), f"an attribute is given twice: {attrs}"
        assert not any(name.startswith("on") or name == "src" for name in values)
        self.tags.add(tag)
        self.ids += [values["id"] or ""] if "id" in values else []
        self.links += [values["href"] or ""] if "href" in values else []
        if tag not in VOID:
            self.open.append(tag)
        if tag == "section":
            self.section = (values["id"] or "").removeprefix("s-")
        if tag == "table":
            self.table = values["id"] or ""
            self.tables[self.table] = []
        if tag == "tr" and "tbody" in self.open:
            self.tables[self.table].append([])
        if tag == "td":
            self.tables[self.table][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open:
            self.tables[self.table][-1][-1] += data
        name = self.section if "section" in self.open else "head"
        self.sections[name] = self.sections.get(name, "") + data

    @property
    def text(self) -> str:
        return " ".join(self.sections.values())
