"""Every code block of the documentation runs, or says why it does not; what it prints is what the page shows."""

from __future__ import annotations

import itertools
from pathlib import Path

import docs_blocks
import pytest
from docs_blocks import Block, Reader

MARKS = ("", "not run", "slow", "real model")
REAL = Path.home() / ".cache" / "neuron-tracer" / "real" / "gemma-3-270m-q4_k_m.gguf"
NAMES = [str(page.relative_to(docs_blocks.DOCS)) for page in docs_blocks.pages()]


def followed(name: str, folder: Path, kinds: tuple[str, ...]) -> list[Block]:
    """Run the blocks of a page that are of these kinds; those that were run."""
    reader, done = Reader(folder), []
    for block in docs_blocks.blocks(docs_blocks.DOCS / name):
        if block.kind in kinds:
            said = reader.run(block)
            assert docs_blocks.missing(block, said) == [], f"{block} shows lines that are not printed:\n{said}"
            done.append(block)
    return done


def having(kind: str) -> list[str]:
    return [name for name in NAMES if any(one.kind == kind for one in docs_blocks.blocks(docs_blocks.DOCS / name))]


@pytest.mark.parametrize("name", NAMES)
def test_a_block_that_is_not_run_says_why(name: str) -> None:
    for block in docs_blocks.blocks(docs_blocks.DOCS / name):
        kind, _, reason = block.mark.partition(":")
        assert kind in MARKS, f"{block}: the mark {block.mark!r}"
        assert kind in ("", "real model") or len(reason.split()) > 1, f"{block}: {block.mark!r} gives no reason"


@pytest.mark.parametrize("name", NAMES)
def test_no_code_hides_in_an_indented_block(name: str) -> None:
    """Only fenced blocks are found here; an indented one would neither run nor say why."""
    text = docs_blocks._FENCE.sub("", (docs_blocks.DOCS / name).read_text(encoding="utf-8"))
    lines = ["", *text.splitlines()]
    bare = [line for before, line in itertools.pairwise(lines) if not before.strip() and line[:4] == "    "]
    assert [line for line in bare if not line.strip().startswith(("-", "|", "*")) and "tracer" in line] == []


@pytest.mark.model
@pytest.mark.parametrize("name", having(""))
def test_a_page_runs_as_it_stands(name: str, tmp_path: Path) -> None:
    assert followed(name, tmp_path, ("",))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", having("slow"))
def test_a_page_runs_with_what_takes_long(name: str, tmp_path: Path) -> None:
    assert followed(name, tmp_path, ("", "slow"))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.skipif(not REAL.is_file(), reason="the weights of make real are not here")
@pytest.mark.parametrize("name", having("real model"))
def test_the_tutorial_runs_on_the_real_model(name: str, tmp_path: Path) -> None:
    assert followed(name, tmp_path, ("", "real model"))


def test_what_a_page_shows_is_compared() -> None:
    block = Block(Path("x.md"), 1, "sh", "", "", ["␣are  target  0.5695  0.0582", "a ... of next tokens"])
    assert docs_blocks.missing(block, "␣are    target    0.5694  0.0583\na thing of next tokens\n") == []
    assert docs_blocks.missing(block, "␣are    target    0.5694  0.9\na thing of next tokens\n") == block.output[:1]
    assert docs_blocks.missing(block, "␣was    target    0.5695  0.0582\n") == block.output
