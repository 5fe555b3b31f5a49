"""120 hostile graph files: each is refused in a line, or comes in as the graph that it says, and leaves no mark.

What comes in is shown, drawn, exported and saved: no script of it runs on the page, no control character of it reaches
the terminal, no name of it is a path.
"""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import tracer
from edits import Content, drop, put
from tally import Attack, Tally
from tracer.circuit.circuit import Circuit, Graph, load_graph
from tracer.circuit.exchange import export, import_graph, to_neuronpedia
from tracer.cli.app import app
from tracer.errors import TracerError
from tracer.reports import tables

PROMPT = tracer.Prompt("The secretaries near the car", target=" are", foil=" is")


@pytest.fixture(scope="module")
def circuit() -> Circuit:
    return tracer.trace(tracer.load(), PROMPT, nodes=12)


@pytest.fixture(scope="module")
def ours(circuit: Circuit) -> Content:
    return to_neuronpedia(circuit)


def foreign(content: Content) -> Content:
    """The same as another tool would write it: nothing of tracer's in it."""
    content = copy.deepcopy(content)
    for node in content["nodes"]:
        node.pop("tracer")
    content["metadata"].pop("tracer")
    return content


MARKUP = "</script><script>document.title='MARK'</script><img src=x onerror=\"document.title='MARK'\">"
CONTROL = "a\x1b]0;MARK\x07b\x1b[2Jc\x9bd\u202ee\u2028f\x00g"
TEXTS = [
    MARKUP,
    CONTROL,
    "../../../victim",
    "x" * 200_000,
    "",
    "\ud800",
    "<!--",
    "\\u003c",
    "'\"`${1}",
    "[bold red]MARK[/]",
]
NUMBERS = [10**30, -(10**30), 1e300, -1, 2**31, 2**63, 0.5, True, None, "7", [], {}, 1e-320]
BRACKETS = json.loads("[" * 90 + "]" * 90)


def changes() -> dict[str, Callable[[Content], None]]:
    """What is done to the content of a graph file."""
    found: dict[str, Callable[[Content], None]] = {}
    places: list[tuple[Any, ...]] = [
        *((("metadata", name)) for name in ("prompt", "scan", "slug", "prompt_tokens", "schema_version", "n_layers")),
        ("metadata", "prompt_tokens", 1),
        *(
            ("nodes", 0, name)
            for name in ("node_id", "clerp", "layer", "ctx_idx", "feature", "feature_type", "activation")
        ),
        *(("nodes", -1, name) for name in ("clerp", "token_prob", "influence", "feature")),
        *(("links", 0, name) for name in ("source", "target", "weight")),
        ("qParams", "pinnedIds"),
        ("qParams", "supernodes"),
    ]
    chance = random.Random(5)
    for place in places:
        for value in chance.sample(TEXTS, 3) + chance.sample(NUMBERS, 3) + [BRACKETS]:
            found[f"{'.'.join(map(str, place))}={str(value)[:20]!r}"] = put(value, *place)
        found[f"without {'.'.join(map(str, place))}"] = drop(*place)
    for number, value in enumerate(([[MARKUP, "nowhere"]], [["a"] * 2], [[]], [[7, 8]], [[CONTROL]])):
        found[f"supernodes {number}"] = put(value, "qParams", "supernodes")
    found |= {
        "a node twice": lambda content: content["nodes"].append(dict(content["nodes"][0])),
        "a link twice": lambda content: content["links"].append(dict(content["links"][0])),
        "no nodes": lambda content: content.update(nodes=[], links=[]),
        "no links": lambda content: content.update(links=[]),
        "a loop": lambda content: content["links"].append(
            {**content["links"][0], "target": content["links"][0]["source"]}
        ),
        "keys of its own": lambda content: content.update({MARKUP: MARKUP, "../x": BRACKETS}),
        "a key of ours": put({"digest": "0", "metric": 3}, "metadata", "tracer"),
        "a node's key of ours": put({"attribution": "x"}, "nodes", 0, "tracer"),
        "a node's list of ours": put([1], "nodes", 0, "tracer"),
        "a node's number of ours": put({"attribution": 10**30, "gradient": 1e300}, "nodes", 0, "tracer"),
    }
    return found


TEXT: dict[str, Callable[[str], str | bytes]] = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "brackets": lambda text: "[" * 200_000,
    "braces": lambda text: '{"a":' * 100_000,
    "nested": lambda text: text.replace('"metadata": {', '"metadata": {"x": ' + "[" * 5000 + "]" * 5000 + ", ", 1),
    "a list": lambda text: "[]",
    "a number": lambda text: "7",
    "not UTF-8": lambda text: b"\xff\xfe" + text.encode("utf-16"),
    "half UTF-8": lambda text: text.encode()[:50] + b"\xff" + text.encode()[50:],
    "a long number": lambda text: re.sub(r'"weight": -?[\d.e-]+', '"weight": ' + "9" * 5000, text, count=1),
    "infinite": lambda text: re.sub(r'"weight": -?[\d.e-]+', '"weight": 1e999', text, count=1),
    "NaN": lambda text: re.sub(r'"weight": -?[\d.e-]+', '"weight": NaN', text, count=1),
    "a key twice": lambda text: text.replace('"prompt":', '"prompt": "another", "prompt":', 1),
    "a node's key twice": lambda text: text.replace('"activation":', '"activation": 1e3, "activation":', 1),
    "a pickle": lambda text: (
        b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94."
    ),
    "gzip": lambda text: b"\x1f\x8b\x08\x00" + bytes(100),
}
CHANGES = changes()
CASES = [
    *(("foreign", name) for name in CHANGES),
    *(("ours", name) for name in CHANGES),
    *(("text", name) for name in TEXT),
]


def invoked(tally: Tally, what: Any, *words: Any) -> str | None:
    """What a verb prints; None where it refuses in a line."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        tally.tracebacks += 1
        tally.worst = f"{what} {words[0]}: {type(result.exception).__name__}: {result.exception}"[:400]
        return None
    said = result.stdout + result.stderr
    if re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u202e]", said):
        tally.marks += 1
        tally.worst = f"{what} {words[0]}: a control character"
    if result.exit_code and len(result.stderr.splitlines()) != 1:
        tally.tracebacks += 1
        tally.worst = f"{what} {words[0]}: {result.stderr[:300]}"
    return None if result.exit_code else said


def attacked(case: tuple[str, str], ours: Content, circuit: Circuit, folder: Path, tally: Tally) -> None:
    kind, name = case
    content = foreign(ours) if kind != "ours" else copy.deepcopy(ours)
    path = folder / "graph.json"
    if kind == "text":
        found = TEXT[name](json.dumps(content))
        path.write_bytes(found if isinstance(found, bytes) else found.encode())
    else:
        CHANGES[name](content)
        path.write_bytes(json.dumps(content).encode())
    tally.tried += 1
    printed = invoked(tally, case, "import", path, "--out", folder / "run")
    if printed is None:
        tally.marks += (folder / "run").exists()
        return
    graph = import_graph(path)
    chosen = {"groups": circuit.groups, "pins": circuit.pins}  # which may be others: they are chosen on the page
    if isinstance(graph, Circuit) and graph.model_copy(update=chosen) != circuit:
        tally.silent += 1
        tally.worst = f"{case}: another circuit as ours"
    if kind == "text":
        tally.silent += 1
        tally.worst = f"{case}: taken"
    if load_graph(folder / "run") != graph:
        tally.silent += 1
        tally.worst = f"{case}: saved as another"
    drawn(case, graph, folder, tally)
    for form in ("neuronpedia", "graphml", "csv"):
        try:
            export(graph, folder / "out" / f"g.{form}", form)
        except TracerError as error:
            tally.tracebacks += "\n" in str(error)
        except Exception as error:  # noqa: BLE001  what must not be
            tally.tracebacks += 1
            tally.worst = f"{case} {form}: {type(error).__name__}: {error}"[:400]
    for verb in (["view", folder / "run"], ["show", folder / "run"], ["export", folder / "run"]):
        invoked(tally, case, *verb)


def drawn(case: Any, graph: Graph, folder: Path, tally: Tally) -> None:
    """The page has no more scripts than that of an honest graph, and nothing of the graph's as markup."""
    try:
        page = tables.view(graph, folder / "page.html").read_text(encoding="utf-8")
    except TracerError as error:
        tally.tracebacks += "\n" in str(error)
        return
    except Exception as error:  # noqa: BLE001  what must not be
        tally.tracebacks += 1
        tally.worst = f"{case} view: {type(error).__name__}: {error}"[:400]
        return
    if "<script>document" in page or "<img src=x" in page:
        tally.marks += 1
        tally.worst = f"{case}: markup on the page"


@pytest.mark.parametrize(
    "count", [40, pytest.param(len(CASES), marks=[pytest.mark.slow, pytest.mark.long])], ids=["some", "all"]
)
@pytest.mark.filterwarnings("ignore")
def test_a_hostile_graph_is_refused_or_the_graph_it_says(
    ours: Content, circuit: Circuit, tmp_path: Path, attack: Attack, count: int
) -> None:
    assert len(CASES) >= 120
    with attack("120 hostile graph files") as tally:
        for number, case in enumerate(random.Random(17).sample(CASES, count)):
            (folder := tmp_path / str(number) / "in").mkdir(parents=True)
            attacked(case, ours, circuit, folder, tally)
            there = {str(one.relative_to(tmp_path / str(number))).split("/")[0] for one in folder.parent.rglob("*")}
            tally.marks += there != {"in"}
