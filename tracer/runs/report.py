"""What a person reads of a run: progress in a line, its state, its strongest neurons, the curves of its circuit.

Knows a `Status` and the tables of a finished run. Refuses to know how they came about.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tracer.experts import Numbering
from tracer.reports import figures
from tracer.reports.folded import Folded, folded
from tracer.reports.parts import Column, Facts, Sheet
from tracer.runs.status import Condition, Status
from tracer.settings import WeightsFile
from tracer.store.aggregation import in_most_circuits
from tracer.text import Rows, kept_of, printable

if TYPE_CHECKING:
    from tracer.evaluation.curves import Curves
    from tracer.store.storage import Storage


def line(status: Status) -> str:
    """How far a run is, for a job's log."""
    what = status.what
    parts = [f"{status.state}: {status.done + status.in_flight:,} of {status.n_prompts:,} {what}", *status.at]
    if rows := status.rows.get("nodes", 0) + status.rows.get("edges", 0):
        parts.append(f"{rows:,} rows")
    if status.rate:
        parts.append(rate(status.rate, what))
    if status.eta is not None:
        parts.append(f"{duration(status.eta)} to go")
    if status.failed:
        parts.append(f"{status.failed:,} failed")
    if status.deaths:
        parts.append(f"{status.deaths:,} workers died")
    if status.waiting:
        parts.append(f"waiting for {status.waiting}")
    return printable(", ".join(parts))


def rate(per_second: float, what: str) -> str:
    """A speed as people say it: 12.5 prompts/s, 42.0 prompts a minute, or how long each takes: 14 s each."""
    if per_second >= 1:
        return f"{per_second:,.1f} {what}/s"
    if per_second >= 1 / 6:
        return f"{60 * per_second:.1f} {what} a minute"
    return f"{duration(1 / per_second)} each"


def always_on_note(found: Mapping[str, Any], left_out: bool, numbering: Numbering) -> str:
    """Which neurons are always on, and whether the run leaves them out."""
    names = ", ".join(numbering.name(one["layer"], one["neuron"]) for one in found["neurons"][:10])
    more = ", ..." if len(found["neurons"]) > 10 else ""
    told = "left out" if left_out else "not left out"
    return f"{len(found['neurons']):,} always-on neurons on {found['prompts']:,} {found['of']}" + (
        f", {told}: {names}{more}; run.json has their shares, attributions and effects" if names else ""
    )


def duration(seconds: float) -> str:
    """A time span as people say it: 42 s, 3 min 20 s, 2 h 5 min."""
    whole = round(min(seconds, 1e9))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def condition_table(found: Condition) -> Folded:
    """A run seen from outside, for a terminal."""
    return folded([Facts.of(condition_facts(found))])


def condition_facts(found: Condition) -> list[tuple[str, str]]:
    """A run seen from outside: what is known of it, by name."""
    status, record = found.status, found.record
    model = record.get("model") or {}
    name = model.get("name") or record.get("job", {}).get("model")
    rows = [
        ("state", _state(found)),
        ("job", f"{record.get('kind')} on {name}" + (f", {model['dtype']}" if model else "")),
    ]
    if model.get("gguf"):
        rows.append(("weights", WeightsFile.model_validate(model["gguf"]).shown))
    what = status.what
    share = status.done / status.n_prompts if status.n_prompts else 0.0
    rows.append((what, f"{status.done:,} of {status.n_prompts:,} committed ({share:.1%})"))
    units = f"{status.committed:,} of {status.n_units:,}"
    rows.append(("units", units + (f", {status.in_flight:,} prompts in flight" if status.in_flight else "")))
    rows += _outcomes(found)
    if status.rows:
        counts = ", ".join(f"{count:,} {name}" for name, count in status.rows.items() if name != "means")
        rows.append(("rows", counts))
    places = status.at if status.state in ("running", "finishing") else ()
    rows += [("" if number else "at", place) for number, place in enumerate(places)]
    more = {
        "speed": _speed(status, what),
        "time": _taken(status) if status.total_seconds else "",
        "waiting for": status.waiting,
        "workers died": f"{status.deaths:,}" if status.deaths else "",
        "committed files": _files(found),
    }
    return rows + [(name, value) for name, value in more.items() if value]


def condition_rows(found: Condition) -> Rows:
    """The same for a program, a row for each value, with the name that it has or that stands above it."""
    rows, named = list[dict[str, str]](), ""
    for name, value in condition_facts(found):
        named = name or named
        rows.append({"name": named, "value": value})
    return Rows.of(rows)


def _outcomes(found: Condition) -> list[tuple[str, str]]:
    """What became of the prompts, and why some failed or were left out."""
    status = found.status
    says = [left_out(status)] if status.left_out else []
    says += [f"{count:,} {name}" for name, count in sorted(status.errors.items(), key=lambda item: -item[1])]
    says += map(str, found.reasons)
    counts = ", ".join(f"{count:,} {name}" for name, count in status.statuses.items())
    return ([("status", counts)] if counts else []) + [("", text) for text in says]


def _speed(status: Status, what: str) -> str:
    """How fast it goes and how long it will take; empty where that is not known."""
    if status.state == "running" and status.rate:
        workers = f"{status.workers} worker{'s' * (status.workers != 1)}"
        return f"{rate(status.rate, what)} with {workers}{_to_go(status)}"
    return _to_go(status).removeprefix(", ") if status.state == "finishing" else ""


def _to_go(status: Status) -> str:
    return "" if status.eta is None else f", {duration(status.eta)} to go"


def _taken(status: Status) -> str:
    """The time that a run took by the clock: its last call and, if there were others, all of them."""
    earlier = status.total_seconds - status.seconds
    mine = duration(min(status.seconds, status.total_seconds))
    return f"{duration(status.total_seconds)} in all, {mine} of them in the last call" if earlier > 0.5 else mine


def _state(found: Condition) -> str:
    status = found.status
    if status.state == "done":
        return "done"
    ago = f"{duration(found.age)} ago"
    if status.state in ("stopped", "failed"):
        return f"{status.state}, {ago}" + (f": {status.message}" if status.message else "")
    if found.held is False or (found.held is None and found.age > 60):
        return f"its driver last wrote {ago} ({status.state}) and is gone: repeat the run command to resume"
    return f"{status.state}, written {ago}"


def _files(found: Condition) -> str:
    if not found.problems:
        return "all there"
    some = "; ".join(found.problems[:5]) + ("; ..." if len(found.problems) > 5 else "")
    return f"{len(found.problems)} damaged: {some}; repeat the run command to make them again"


def run_summary(status: Status, address: str, seconds: float, resumed: int) -> str:
    """A run that ended, in a few words."""
    what = status.what
    told = ", ".join(f"{count:,} {name}" for name, count in status.statuses.items())
    before = f", {resumed:,} of {status.n_units:,} units were there already" if resumed else ""
    left = f"; {left_out(status)}" if status.left_out else ""
    took = duration(seconds)
    if status.total_seconds - seconds > 0.5:
        took += f", {duration(status.total_seconds)} over all calls"
    return printable(f"{status.done:,} {what} ({told}) in {took}{before}{left}; saved to {address}")


def tested(place: Storage) -> str:
    """How many of a run's test prompts were kept; empty where all were, or none are tested."""
    if not place.exists("evaluation.json"):
        return ""
    warnings = (place.read_json("evaluation.json") or {}).get("warnings", ())
    return printable("; ".join(text for text in warnings if text.startswith("test: ")))


def left_out(status: Status) -> str:
    """How many prompts a filter kept, and why the others were left out."""
    return kept_of(status.statuses.get("ok", 0), status.left_out | {"failed": status.failed})


def neurons_table(neurons: Any, numbering: Numbering, rows: int = 15) -> Folded:
    """The neurons that most prompts' circuits share (an Arrow table of aggregation.NEURONS)."""
    heads = ["layer", "neuron", "prompts", "mean attribution per prompt", "mean |attribution|", "mean activation"]
    cells = [
        (
            *(str(row["layer"]), numbering.short(row["layer"], row["neuron"]), f"{row['n_prompts']:,}"),
            *(f"{row['prompt_mean_attribution']:+.4f}", f"{row['prompt_mean_abs']:.4f}"),
            f"{row['mean_activation']:+.4f}",
        )
        for row in in_most_circuits(neurons, rows).to_pylist()
    ]
    found = Sheet.of("neurons", "Neurons in most circuits", heads, cells)
    return folded([found.of_all(len(neurons), "the table neurons")])


def exemplars_table(rows: Sequence[tuple[str, ...]], heads: Sequence[str], most: int = 15) -> Folded:
    """Neurons' values over a corpus (rows and heads of runs/pages/exemplars.py)."""
    found = Sheet.of("densities", "Where neurons are strong", heads, rows[:most])
    return folded([found.of_all(len(rows), "the table densities")])


def rows_table(found: Any, rows: int = 1000) -> Folded:
    """Any Arrow table for a terminal; floats to six digits."""
    numbers = ("int", "uint", "float", "double", "half", "decimal")
    heads = [Column(field.name, left=not str(field.type).startswith(numbers)) for field in found.schema]
    cells = [tuple(map(_cell, row.values())) for row in found.slice(0, rows).to_pylist()]
    return folded([Sheet.of("rows", "", heads, cells).of_all(found.num_rows)])


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def rows_of(found: Any, most: int | None = None) -> Rows:
    """Any Arrow table for a program."""
    shown = found.slice(0, most)
    columns = [_numbers(shown[name].to_pylist(), str(shown[name].type)) for name in shown.column_names]
    names = shown.column_names
    return Rows(names, [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)])


def _numbers(values: list[Any], kind: str) -> list[Any]:
    """A column's values, those of single precision with the fewest digits that tell them apart."""
    if kind != "float":
        return values
    return [None if one is None else float(str(np.float32(one))) for one in values]


def rows_json(found: Any) -> str:
    """Any Arrow table as JSON lines."""
    return "".join(json.dumps(row, default=str) + "\n" for row in found.to_pylist())


def evaluation_plot(made: Curves, about: Mapping[str, Any]) -> bytes:
    """Faithfulness, completeness and the random control against size as a PNG, 95 % intervals shaded."""
    lines = figures.three(made, ("faithfulness", "completeness", "random circuits"))
    unit, shared = "neurons" if about["circuit"] == "free" else "nodes", about.get("n_shared", 0)
    title = (
        f"{about['circuit']} circuit of {about['n_prompts']:,} prompts, tested on {about['n_test']:,} "
        f"{'prompts' if shared else 'others'} by {about['ablation']} ablation"
        + (f"\n{shared:,} of them are prompts that it was found on" if shared else "")
    )
    labels = {"xlabel": f"{unit} in the circuit", "ylabel": "share of the metric", "ylim": figures.VIEW}
    return figures.evaluation_png(lines, title, **labels)


def clock() -> str:
    """The time of day, for log lines."""
    return time.strftime("%H:%M:%S")
