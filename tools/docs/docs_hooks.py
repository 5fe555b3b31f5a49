"""What mkdocs calls while it builds: pages that are generated, their places in the navigation, links that are mended.

Knows mkdocs' events. Refuses to know how a page is written: docs_python, docs_cli, docs_jobs, docs_tables and
docs_messages do.
"""

from __future__ import annotations

from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

import docs_cli
import docs_jobs
import docs_links
import docs_messages
import docs_python
import docs_tables

GENERATED = {"python": docs_python.pages, "cli": docs_cli.pages, "jobs": docs_jobs.pages}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the generated pages where the navigation says ``generated: NAME``."""
    config.nav = [_placed(entry) for entry in config.nav or []]
    return config


def _placed(entry: Any) -> Any:
    if isinstance(entry, dict):
        return {name: _placed(inner) for name, inner in entry.items()}
    if isinstance(entry, list):
        return [_placed(inner) for inner in entry]
    if isinstance(entry, str) and entry.startswith("generated: "):
        pages = GENERATED[entry.removeprefix("generated: ")]()
        return [{title: path} for path, (title, _) in pages.items()]
    return entry


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for make in GENERATED.values():
        for path, (_, text) in make().items():
            files.append(File.generated(config, path, content=text))
    files.append(File.generated(config, "reference/tables.md", content=docs_tables.page()))
    files.append(File.generated(config, "reference/messages.md", content=docs_messages.page()))
    for source, path in docs_links.PAGES.items():
        text = (docs_jobs.ROOT / source).read_text(encoding="utf-8")
        text = docs_links.mended(text, path, source.rpartition("/")[0])
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Fill in the tables that a page asks for, and lead its links to pages."""
    for name, table in (("python", docs_python.index), ("cli", docs_cli.index)):
        mark = f"<!-- generated: {name} -->"
        if mark in markdown:
            markdown = markdown.replace(mark, table())
    return docs_links.mended(markdown, page.file.src_uri)
