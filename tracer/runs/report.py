"""What a person reads of a run: progress in a line, its state, its strongest neurons, the curves of its circuit.

Knows a `Status` and the tables of a finished run. Refuses to know how they came about.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.table import Table

from tracer.experts import Numbering
from tracer.reports import figures
from tracer.reports.tables import cell
from tracer.runs.status import Condition, Status
from tracer.settings import WeightsFile
from tracer.store.aggregation import in_most_circuits
from tracer.text import frame_csv, kept_of, printable

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


def condition_table(found: Condition) -> RenderableType:
    """A run seen from outside, for a terminal."""
    status, record = found.status, found.record
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    model = record.get("model") or {}
    table.add_row("state", cell(_state(found)))
    name = model.get("name") or record.get("job", {}).get("model")
    table.add_row("job", cell(f"{record.get('kind')} on {name}" + (f", {model['dtype']}" if model else "")))
    if model.get("gguf"):
        table.add_row("weights", cell(WeightsFile.model_validate(model["gguf"]).shown))
    what = status.what
    share = status.done / status.n_prompts if status.n_prompts else 0.0
    table.add_row(what, f"{status.done:,} of {status.n_prompts:,} committed ({share:.1%})")
    units = f"{status.committed:,} of {status.n_units:,}"
    table.add_row("units", units + (f", {status.in_flight:,} prompts in flight" if status.in_flight else ""))
    if status.statuses:
        table.add_row("status", ", ".join(f"{count:,} {name}" for name, count in status.statuses.items()))
    if status.left_out:
        table.add_row("", left_out(status))
    for name, count in sorted(status.errors.items(), key=lambda item: -item[1]):
        table.add_row("", cell(f"{count:,} {name}"))
    for reason in found.reasons:
        table.add_row("", cell(str(reason)))
    if status.rows:
        table.add_row("rows", ", ".join(f"{count:,} {name}" for name, count in status.rows.items() if name != "means"))
    for number, place in enumerate(status.at if status.state in ("running", "finishing") else ()):
        table.add_row("" if number else "at", cell(place))
    if speed := _speed(status, what):
        table.add_row("speed", speed)
    if status.total_seconds:
        table.add_row("time", _taken(status))
    if status.waiting:
        table.add_row("waiting for", cell(status.waiting))
    if status.deaths:
        table.add_row("workers died", f"{status.deaths:,}")
    table.add_row("committed files", cell(_files(found)))
    return table


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


def neurons_table(neurons: Any, numbering: Numbering, rows: int = 15) -> RenderableType:
    """The neurons that most prompts' circuits share (an Arrow table of aggregation.NEURONS)."""
    table = Table(title="Neurons in most circuits", title_justify="left", box=None, padding=(0, 2, 0, 0))
    heads = ("layer", "neuron", "prompts", "mean attribution per prompt", "mean |attribution|", "mean activation")
    for name in heads:
        table.add_column(name, justify="right", no_wrap=True)
    for row in in_most_circuits(neurons, rows).to_pylist():
        table.add_row(
            str(row["layer"]),
            numbering.short(row["layer"], row["neuron"]),
            f"{row['n_prompts']:,}",
            f"{row['prompt_mean_attribution']:+.4f}",
            f"{row['prompt_mean_abs']:.4f}",
            f"{row['mean_activation']:+.4f}",
        )
    return Group(table)


def exemplars_table(rows: Sequence[tuple[str, ...]], heads: Sequence[str], most: int = 15) -> RenderableType:
    """Neurons' values over a corpus (rows and heads of runs/pages/exemplars.py)."""
    table = Table(title="Where neurons are strong", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for name in heads:
        left = name.startswith("<")
        table.add_column(name.removeprefix("<"), justify="left" if left else "right", overflow="fold")
    for row in rows[:most]:
        table.add_row(*map(cell, row))
    return Group(table, f"... and {len(rows) - most:,} more") if len(rows) > most else Group(table)


def rows_table(found: Any, rows: int = 1000) -> RenderableType:
    """Any Arrow table for a terminal; floats to six digits."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for field in found.schema:
        number = str(field.type).startswith(("int", "uint", "float", "double", "half", "decimal"))
        table.add_column(cell(field.name), justify="right" if number else "left", overflow="fold")
    for row in found.slice(0, rows).to_pylist():
        table.add_row(*(cell(_cell(value)) for value in row.values()))
    left = found.num_rows - rows
    return Group(table, f"... and {left:,} more rows") if left > 0 else table


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def rows_text(found: Any, style: str) -> str:
    """Any Arrow table as CSV, or as JSON lines."""
    if style == "csv":
        return frame_csv(found.to_pandas())
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
