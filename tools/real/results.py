"""Write docs/results.md and its pictures from the runs of `make real`: what the paper says beside what was measured.

python tools/real/results.py runs/real [docs]

Every number comes from the run folders below the first argument: benchmarks of agreement (also unfinished ones),
datasets of behaviours, and what was steered and swapped with their circuits (behaviours.json). No model is asked.
What lies outside the two marks in results.md is left as it is.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tracer.errors import TracerError
from tracer.evaluation.curves import Curves
from tracer.evaluation.statistics import Interval, Size
from tracer.reports import figures
from tracer.reports.verdict import point
from tracer.runs.pages.claim import LEVEL
from tracer.runs.units.benchmark_report import Outcome
from tracer.store.run_folder import RunFolder

BEGIN, END = "<!-- real -->", "<!-- /real -->"
STRUCTURES = ("simple", "nounpp", "rc", "within_rc")
BASES = ("activation", "output")
PAIRED = ("relp", "counterfactual", "all")
"""What the paper's claim is about: method, baseline and rules."""


@dataclass(frozen=True)
class Found:
    """A benchmark's combinations.

    Attributes:
        record: of the run whose paired RelP it is. outcomes: by structure, basis, and method with baseline and rules.
    """

    record: dict[str, Any]
    outcomes: dict[tuple[str, str, tuple[str, str, str]], Outcome]

    @property
    def ways(self) -> list[tuple[str, str, str]]:
        """Methods with their baselines and rules, the paper's first."""
        return sorted({way for _, _, way in self.outcomes}, key=lambda way: (way != PAIRED, way[0] == "random", way))

    @property
    def structures(self) -> list[str]:
        """Those of which paired RelP was measured in both bases."""
        return [one for one in STRUCTURES if all((one, basis, PAIRED) in self.outcomes for basis in BASES)]

    def curves(self, structure: str, basis: str, way: tuple[str, str, str] = PAIRED) -> Curves | None:
        """Of the ranking by absolute attribution."""
        one = self.outcomes.get((structure, basis, way))
        return None if one is None else one.rankings["absolute"]


# -------------------------------------------------------------------------------------------------------- reading


def benchmarks(runs: Path) -> Found:
    """All combinations below a folder."""
    records, outcomes = list[dict[str, Any]](), {}
    for record, folder in _folders(runs, "benchmark"):
        for commit in folder.commits():
            one = Outcome.model_validate(commit.outcome)
            outcomes[one.structure, one.basis, (one.method, one.baseline, one.rules)] = one
            if (one.method, one.baseline, one.rules) == PAIRED:
                records.append(record)
    if not records:
        raise SystemExit(f"{runs}: no run of agreement with paired RelP; run make real")
    return Found(records[0], outcomes)


def _folders(runs: Path, kind: str) -> Iterator[tuple[dict[str, Any], RunFolder]]:
    for path in sorted(runs.glob("*/run.json")):
        folder = RunFolder(str(path.parent))
        record = folder.record() or {}
        if record.get("kind") == kind:
            yield record, folder


# -------------------------------------------------------------------------------------------------------- numbers


def _size(size: Size | None) -> str:
    """The smallest measured size, and its interval."""
    if size is None:
        return ""
    if size.low is None and size.high is None:
        return _estimate(size)
    low, high = ("none" if one is None else f"{one:,}" for one in (size.low, size.high))
    return f"{_estimate(size)} [{low}, {high}]"


def _estimate(size: Size) -> str:
    return "none" if size.estimate is None else f"{size.estimate:,}"


def _share(curve: Interval, index: int) -> str:
    estimate, low, high = point(curve, index)
    return f"{estimate:.2f} [{low:.2f}, {high:.2f}]"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def mean(found: Found, basis: str, way: tuple[str, str, str], name: str) -> tuple[list[int], Interval] | None:
    """A curve's mean over all structures at the sizes that each was measured at.

    Its interval takes the structures' as independent: half widths are added in squares.
    """
    every = [found.curves(structure, basis, way) for structure in found.structures]
    curves = [one for one in every if one is not None]
    if len(curves) < len(every):
        return None
    sizes = sorted(set.intersection(*(set(one.sizes) for one in curves)))
    at = [[one.sizes.index(size) for size in sizes] for one in curves]
    parts = [getattr(one, name) for one in curves]
    ends = {
        end: torch.stack([getattr(part, end)[index] for part, index in zip(parts, at, strict=True)])
        for end in ("estimate", "low", "high")
    }
    middle = ends["estimate"].mean(0)
    half = {end: ((ends[end] - ends["estimate"]) ** 2).sum(0).sqrt() / len(curves) for end in ("low", "high")}
    return sizes, Interval(low=middle - half["low"], high=middle + half["high"], estimate=middle)


# --------------------------------------------------------------------------------------------------------- claims


def claims(found: Found) -> Iterator[tuple[str, str, bool]]:
    """What the paper says of agreement, what was measured, and whether that agrees."""
    reached = {
        (structure, basis): curves.sizes_for[LEVEL]
        for structure in found.structures
        for basis in BASES
        if (curves := found.curves(structure, basis)) is not None
    }
    yield _few_suffice(found, reached)
    yield _outputs_need_more(found, reached)
    yield _at_two_hundred(found)
    yield _random_fails(found, reached)
    yield from _others(found, reached)
    yield _stays(found)


def _few_suffice(found: Found, reached: dict[tuple[str, str], Size]) -> tuple[str, str, bool]:
    told, good = [], True
    for structure in found.structures:
        size, curves = reached[structure, "activation"], found.curves(structure, "activation")
        assert curves is not None
        if size.estimate is None:
            told.append(f"{structure} none")
            good = False
            continue
        index = curves.sizes.index(size.estimate)
        good &= size.estimate <= 100 and float(curves.faithfulness.low[index]) > 0.5
        told.append(f"{structure} {_size(size)}, where it is {_share(curves.faithfulness, index)}")
    return "About 100 activations keep .9 of the behaviour", "; ".join(told), good


def _outputs_need_more(found: Found, reached: dict[tuple[str, str], Size]) -> tuple[str, str, bool]:
    told, good = [], True
    for structure in found.structures:
        few, many = (reached[structure, basis].estimate for basis in BASES)
        if few is None or many is None:
            told.append(f"{structure}: not reached in {'outputs' if few else 'activations'}")
            good &= few is not None
            continue
        good &= many >= 20 * few
        told.append(f"{structure} {_size(reached[structure, 'output'])}, {many / few:.0f} times as many")
    return "MLP outputs need about 100 times more (here: at least 20)", "; ".join(told), good


def _at_two_hundred(found: Found) -> tuple[str, str, bool]:
    told, values = [], []
    for name in ("faithfulness", "completeness"):
        sizes, curve = mean(found, "activation", PAIRED, name) or ([], None)
        assert curve is not None
        values.append(float(curve.estimate[sizes.index(200)]))
        told.append(f"{name} {_share(curve, sizes.index(200))}")
    good = abs(values[0] - 1) <= 0.1 and abs(values[1]) <= 0.1
    claim = (
        "Near 200 activations faithfulness is near 1 and completeness near 0 (here: within .1; mean over structures)"
    )
    return claim, "; ".join(told), good


def _random_fails(found: Found, reached: dict[tuple[str, str], Size]) -> tuple[str, str, bool]:
    told, good = [], True
    for structure in found.structures:
        size, curves = reached[structure, "activation"].estimate, found.curves(structure, "activation")
        if size is None or curves is None:
            continue
        index = curves.sizes.index(size)
        good &= float(curves.control_faithfulness.estimate[index]) < 0.1
        told.append(f"{structure} {_share(curves.control_faithfulness, index)}")
    return "As many random activations do not (here: below .1)", "; ".join(told), good


def _others(found: Found, reached: dict[tuple[str, str], Size]) -> Iterator[tuple[str, str, bool]]:
    """RelP beside every other way: nowhere may it need more nodes for .9, in either basis."""
    for way in found.ways:
        if way == PAIRED:
            continue
        worse, better, equal, told = 0, 0, 0, []
        for (structure, basis), mine in reached.items():
            curves = found.curves(structure, basis, way)
            if curves is None:
                continue
            other = curves.sizes_for[LEVEL]
            a, b = (float("inf") if one.estimate is None else one.estimate for one in (mine, other))
            worse, better, equal = worse + (a > b), better + (a < b), equal + (a == b)
            told.append(f"{structure} {basis} {_estimate(other)}")
        if not told:
            continue
        text = f"RelP needs fewer in {better}, as many in {equal}, more in {worse} of {len(told)}: {', '.join(told)}"
        yield f"Paired RelP needs no more nodes for .9 than {named(way)}", text, worse == 0


def _stays(found: Found) -> tuple[str, str, bool]:
    told, good = [], True
    for structure in found.structures:
        curves = found.curves(structure, "activation")
        assert curves is not None
        peak = int(curves.faithfulness.estimate.nan_to_num(0).argmax())
        good &= curves.settles.estimate is not None and curves.settles.estimate <= 1000
        told.append(
            f"{structure} from {_size(curves.settles)} on; largest {_share(curves.faithfulness, peak)} at "
            f"{curves.sizes[peak]:,}"
        )
    return "Faithfulness stays within .1 of 1 from there on (here: from 1,000 on at most)", "; ".join(told), good


def named(way: tuple[str, str, str]) -> str:
    """A method as a reader calls it."""
    method, baseline, rules = way
    told = method if baseline in ("none", "-") or method == "random" else f"{method}, baseline {baseline}"
    return told if rules == "all" or method != "relp" else f"{told}, rules {rules}"


# -------------------------------------------------------------------------------------------------------- the page


def agreement(found: Found) -> Iterator[str]:
    """The part on agreement, as Markdown."""
    model, job = found.record["model"], found.record["job"]
    every = [(name, found.outcomes[name, "activation", PAIRED]) for name in found.structures]
    pairs = ", ".join(f"{name} {each.n_train} + {each.n_test}" for name, each in every)
    yield (
        f"Model: {_about(model)}. Pairs of train + test: {pairs} (of {job['train']} + {job['test']}; the "
        f"others have answers of more than one token, or another length). Circuits are found on the train pairs, "
        f"ranked by |attribution|, and tested on the others by {job['ablation']} ablation of everything else "
        f"(completeness: of the circuit). In brackets 95 % bootstrap intervals over test pairs. "
        f"{'BOS is put first. ' if job.get('bos') else ''}A size is the smallest measured.\n"
    )
    yield "#### What the paper says, and what was measured\n"
    yield _table(
        ("the paper", "measured", "agrees"),
        ((claim, told, "yes" if good else "**no**") for claim, told, good in claims(found)),
    )
    yield "![Faithfulness of activations and of MLP outputs](real-sva.png)\n"
    yield "#### Paired RelP, by structure\n"
    heads = ("structure", "basis", "all nodes", "for .9", "stays within .1 from", "F at 100", "C at 100", "CMD")
    yield _table(heads, _rows(found))
    yield "#### Every method: nodes for .9, activations against MLP outputs\n"
    yield _table(("method", *found.structures), _methods(found))
    yield "#### Mean over the structures\n"
    yield "![Mean over the structures, by method](real-methods.png)\n"
    yield _table(("method", "basis", *(f"F, C at {size:,}" for size in (20, 50, 100, 200, 500))), _means(found))
    seconds = sum(each.attribution_seconds + each.evaluation_seconds for each in found.outcomes.values())
    yield f"{len(found.outcomes)} combinations in {seconds / 60:.0f} minutes of one thread.\n"


def _about(model: dict[str, Any]) -> str:
    parts = [Path(model["name"]).name, f"{model['n_layers']} layers, d_mlp {model['d_mlp']:,}, {model['dtype']}"]
    return ", ".join(parts)


def _rows(found: Found) -> Iterator[list[str]]:
    for structure in found.structures:
        for basis in BASES:
            one, curves = found.outcomes[structure, basis, PAIRED], found.curves(structure, basis)
            assert curves is not None
            at = curves.up_to(100)
            yield [
                structure,
                basis,
                f"{one.n_total:,}",
                _size(curves.sizes_for[LEVEL]),
                _size(curves.settles),
                _share(curves.faithfulness, at),
                _share(curves.completeness, at),
                f"{float(curves.cmd.estimate):.3f}",
            ]


def _methods(found: Found) -> Iterator[list[str]]:
    for way in found.ways:
        cells = []
        for structure in found.structures:
            every = [found.curves(structure, basis, way) for basis in BASES]
            cells.append(" : ".join("" if one is None else _estimate(one.sizes_for[LEVEL]) for one in every))
        yield [named(way), *cells]


def _means(found: Found) -> Iterator[list[str]]:
    for way in found.ways:
        for basis in BASES:
            kept = [mean(found, basis, way, name) for name in ("faithfulness", "completeness")]
            if None in kept:
                continue
            cells = []
            for size in (20, 50, 100, 200, 500):
                two = [curve.estimate[sizes.index(size)] for sizes, curve in kept if size in sizes]  # type: ignore[misc]
                cells.append(", ".join(f"{float(one):.2f}" for one in two))
            yield [named(way), basis, *cells]


# -------------------------------------------------------------------------------------------------------- pictures


def picture(found: Found) -> bytes:
    """Faithfulness by size in both bases beside random activations, a panel for each structure."""
    figure = figures.new(3.2 * len(found.structures) + 0.4, 3.5)
    panels = figure.subplots(1, len(found.structures), sharey=True, squeeze=False)[0]
    for axes, structure in zip(panels, found.structures, strict=True):
        few, many = (found.curves(structure, basis) for basis in BASES)
        assert few is not None
        assert many is not None
        lines = [
            figures.Line("activations", few.sizes, few.faithfulness, 0),
            figures.Line("MLP outputs", many.sizes, many.faithfulness, 1),
            figures.Line("random activations", few.sizes, few.control_faithfulness, figures.CONTROL),
        ]
        told = " against ".join(_estimate(one.sizes_for[LEVEL]) for one in (few, many))
        figures.draw_curves(axes, lines, ylim=(-0.2, 1.5), xlabel="nodes kept")
        axes.axhline(LEVEL, color="#bbbbbb", linewidth=0.8, linestyle=":", zorder=0)
        axes.set_title(f"{structure}: {told} for {LEVEL}", fontsize=10)
    panels[0].set_ylabel("faithfulness on held-out pairs")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figures.png(figure)


def methods_picture(found: Found) -> bytes:
    """Mean over the structures: faithfulness above completeness, a column for each basis, a line for each method."""
    figure = figures.new(11, 7)
    grid = figure.subplots(2, len(BASES), sharex="col", sharey="row", squeeze=False)
    ways = found.ways[:7]
    for column, basis in enumerate(BASES):
        for axes, name in zip(grid[:, column], ("faithfulness", "completeness"), strict=True):
            lines = []
            for look, way in enumerate(ways):
                if (made := mean(found, basis, way, name)) is not None:
                    lines.append(figures.Line(named(way), *made, figures.CONTROL if way[0] == "random" else look))
            figures.draw_curves(axes, lines, ylim=figures.VIEW)
        grid[0, column].set_title(f"basis: {basis}", fontsize=10)
        grid[1, column].set_xlabel("nodes in the circuit")
    for axes, name in zip(grid[:, 0], ("faithfulness", "completeness"), strict=True):
        axes.set_ylabel(f"{name}, mean over structures")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figures.png(figure)


# ------------------------------------------------------------------------------------------------------ behaviours


def behaviours(runs: Path) -> Iterator[str]:
    """The datasets' circuits, and what steering and swapping by them did, as Markdown."""
    rows, hold = [], 0
    for record, folder in _folders(runs, "dataset"):
        path = Path(str(folder.place)) / "evaluation.json"
        if path.exists():
            found = json.loads(path.read_text())
            rows.append(_behaviour(path.parent.name, _kept(folder, record), found))
            curves = Curves.of(found["curves"])
            hold += float(curves.faithfulness.estimate[curves.up_to(100)]) >= LEVEL
    if not rows:
        return
    yield (
        "The circuit of a dataset: the strongest nodes of the mean attribution over its train prompts (paired RelP), "
        "tested on other prompts by mean ablation over their counterfactuals. Prompts are kept whose greedy next token "
        "is the answer (others: filtered); skipped are those that the tokenizer cannot ask. "
        f"**{hold} of {len(rows)} circuits of 100 nodes hold {LEVEL} of their behaviour.**\n"
    )
    heads = (
        "behaviour",
        "train prompts kept",
        "tested",
        "for .9",
        "F at 100",
        "C at 100",
        "random at 100",
        "F at 1,000",
    )
    yield _table(heads, rows)
    path = runs / "behaviours.json"
    if path.exists():
        yield from _handled(json.loads(path.read_text()))


def _kept(folder: RunFolder, record: dict[str, Any]) -> str:
    counts = dict[str, int]()
    for commit in folder.commits():
        for name, count in commit.statuses.items():
            counts[name] = counts.get(name, 0) + count
    left = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()) if name != "ok")
    return f"{counts.get('ok', 0)} of {record['n_prompts']}" + (f" ({left})" if left else "")


def _behaviour(name: str, kept: str, found: dict[str, Any]) -> list[str]:
    curves = Curves.of(found["curves"])
    at, far = curves.up_to(100), curves.up_to(1000)
    parts = (curves.faithfulness, curves.completeness, curves.control_faithfulness)
    shown = [_share(part, at) for part in parts]
    tested = f"{found['n_test']}, on the circuit of {found['n_prompts']}"
    return [name, kept, tested, _size(curves.sizes_for[LEVEL]), *shown, _share(curves.faithfulness, far)]


def _handled(found: dict[str, Any]) -> Iterator[str]:
    """Steering, swaps, and prompts' own circuits."""
    yield "Steered by the dataset's circuit, at its nodes' own positions:\n"
    heads = (
        "behaviour",
        "nodes",
        "times",
        "p(answer) before",
        "after",
        "random nodes",
        "top token changes",
        "by random",
    )
    yield _table(heads, (row for name, one in found.items() for row in _steered(name, one["steering"])))
    yield (
        "Swapped: the strongest k neurons of a prompt and of its counterfactual (ranked by the difference between "
        "both) are set to the counterfactual's values. How often its answer is given then, and the own one still:\n"
    )
    heads = (
        "behaviour",
        "pairs",
        "k",
        "other answer",
        "own answer",
        "random nodes: other answer",
        "zeroed: other answer",
    )
    yield _table(heads, (row for name, one in found.items() for row in _swapped(name, one["swap"]["counterfactual"])))
    yield "Every prompt's own circuit, everything else as in its counterfactual:\n"
    sizes = [row["size"] for row in next(iter(found.values()))["own"]]
    heads = ("behaviour", "prompts", *(f"F, C at {size}" for size in sizes))
    yield _table(heads, (_own(name, one["own"]) for name, one in found.items()))


def _spread(value: dict[str, float]) -> str:
    return f"{value['estimate']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"


def _steered(name: str, rows: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    for row in rows:
        shown = [_spread(row[key]) for key in ("before", "after", "random", "changed", "random_changed")]
        yield [name, str(row["top"]), f"{row['factor']:g}", *shown]


def _swapped(name: str, swap: dict[str, Any]) -> Iterator[list[str]]:
    for k in sorted({row["k"] for row in swap["rows"]}):
        arms = {row["done"]: row for row in swap["rows"] if row["k"] == k}
        shown = [(arms["swapped"], "becomes"), (arms["swapped"], "stays")]
        shown += [(arms["random"], "becomes"), (arms["zeroed"], "becomes")]
        cells = [
            _spread({"estimate": row[key], "low": row[f"{key}_low"], "high": row[f"{key}_high"]}) for row, key in shown
        ]
        yield [name, f"{swap['n_pairs']}, of {swap['answered']:.0%} both right", str(k), *cells]


def _own(name: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    each = (f"{row['faithfulness']['estimate']:.2f}, {row['completeness']['estimate']:.2f}" for row in rows)
    return [name, str(rows[0]["n_prompts"]), *each]


def main() -> int:
    """Exit code 0 where the page is written."""
    runs = Path(sys.argv[1])
    docs = Path(sys.argv[2]) if len(sys.argv) > 2 else runs
    try:
        found = benchmarks(runs)
        text = "\n".join(("### Agreement\n", *agreement(found), "### Other behaviours\n", *behaviours(runs)))
    except TracerError as error:
        print(error, file=sys.stderr)
        return 2
    (docs / "real-sva.png").write_bytes(picture(found))
    (docs / "real-methods.png").write_bytes(methods_picture(found))
    page = docs / "results.md"
    before, _, rest = (page.read_text() if page.exists() else f"# Results\n\n{BEGIN}\n{END}\n").partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{rest.partition(END)[2]}")
    print(f"{page}: {len(found.outcomes)} combinations")
    return 0


if __name__ == "__main__":
    sys.exit(main())
