"""What the graph page says of a graph as a whole: the model's answer, the metric, conservation, and how it was tested.

Knows a circuit's own words (reports/sheet.py) and the evaluation.json of a run folder, which is checked as any file
that others may have written. Refuses to know how the page shows them, and computes no number.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from tracer.circuit.circuit import Circuit, Graph
from tracer.errors import say
from tracer.reports import sheet, viewer
from tracer.reports.viewer import Facts, Held
from tracer.store.storage import Storage
from tracer.system import jsontext

EVALUATION, REPORT = "evaluation.json", "report.html"
MOST_BYTES, MOST_SIZES = 64 * 2**20, 1000

_Values = list[float | None]


class _Curve(BaseModel):
    """A curve over sizes, as `Interval.record` writes it; of one size plain numbers."""

    estimate: _Values | float | None = None
    low: _Values | float | None = None
    high: _Values | float | None = None


class _Evaluation(BaseModel):
    """What is read of an evaluation.json; the rest of it is not looked at."""

    sizes: list[int] = Field(max_length=MOST_SIZES)
    faithfulness: _Curve
    control_faithfulness: _Curve = _Curve()
    n_test: int = 0
    n_shared: int = 0
    ablation: str = ""


def facts(graph: Graph, run: Any = None, page: Path | None = None) -> Facts:
    """What is known of a graph as a whole.

    Args:
        run: the folder of its run, where its evaluation and its report are, if they are; of a prompt of a run over many
            they are of another graph. page: where the page will lie; in that folder if None.
    """
    found = viewer.NO_FACTS
    if isinstance(graph, Circuit):
        found = Facts(
            predictions=tuple((one.token, one.probability) for one in graph.predictions),
            asked=tuple(text for text in sheet.chances_text(graph).split("  ") if text),
            metric=f"{sheet.metric_text(graph)} = {graph.metric:+.4f} {sheet.unit(graph)}",
            conservation=sheet.conservation_text(graph),
            holds=True if graph.conserves else None,
        )
    if run is None or "prompt_id" in graph.notes:
        return found
    place = Storage(run)
    tested, held = evaluation(place)
    beside = page is None or (place.local is not None and page.resolve().parent == place.local.resolve())
    report = REPORT if beside and place.exists(REPORT) else None
    return Facts(**vars(found) | {"tested": tested, "evaluation": held, "report": report})


def evaluation(place: Storage) -> tuple[str, tuple[Held, ...]]:
    """How a run's graph was tested, in words, and what was found by size; nothing where it was not.

    A file that is damaged is left out, which is said.
    """
    size = place.size(EVALUATION)
    if size is None:
        return "", ()
    try:
        if size > MOST_BYTES:
            raise ValueError(f"it is larger than {MOST_BYTES >> 20} MiB")
        read = _Evaluation.model_validate(_plain(jsontext.parse(place.read(EVALUATION), constants=False)))
    except (OSError, jsontext.JsonError, ValidationError, ValueError) as error:
        problem = "it is not what 'tracer evaluate' writes" if isinstance(error, ValidationError) else str(error)
        say([f"{EVALUATION} is not shown: {problem}"])
        return "", ()
    curves = (read.faithfulness.estimate, read.faithfulness.low, read.faithfulness.high)
    columns = [_listed(values) for values in (*curves, read.control_faithfulness.estimate)]
    rows = itertools.zip_longest(*columns)
    held = (Held(size, *row) for size, row in zip(read.sizes, rows, strict=False))
    return _tested(read), tuple(sorted(held, key=lambda one: one.size))


def _plain(content: Any) -> Any:
    """What `tracer evaluate` wrote with its test prompts counted; what a job wrote, whose curves stand apart and whose
    control has another name, in the same words."""
    if not isinstance(content, dict):
        return content
    curves = content.get("curves")
    if isinstance(curves, dict):
        return {**content, **curves, "control_faithfulness": curves.get("control", {})}
    whole = content.get("whole")
    return {**content, "n_test": len(whole) if isinstance(whole, list) else 0}


def _listed(values: _Values | float | None) -> _Values:
    return values if isinstance(values, list) else [values]


def _tested(read: _Evaluation) -> str:
    count = read.n_test
    prompts = "the prompt that the circuit was found on" if read.n_shared else "1 test prompt"
    if count != 1:
        prompts = f"{count:,} test prompts"
    return f"{prompts}, {read.ablation} ablation" if read.ablation else prompts
