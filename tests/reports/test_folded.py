"""Tables in so many columns: nothing is wider, nothing is cut, no number is broken, whatever stands in them."""

from __future__ import annotations

import io
import unicodedata
from collections import Counter
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as some
from rich.console import Console

from tracer.evaluation.responses import GroupResponse, Response
from tracer.evaluation.statistics import Interval
from tracer.meaning.grouping import Row
from tracer.meaning.known import Known
from tracer.meaning.tokens import NeuronTokens, Token
from tracer.reports import concepts, neurons, supernodes, sweeps
from tracer.reports.folded import Folded, fold, layout
from tracer.reports.parts import Column, Facts, Mark, Part, Sheet
from tracer.runs import report
from tracer.runs.status import Condition, Status
from tracer.text import printable

WIDTHS = (40, 52, 60, 79, 80, 100, 120, 200)
LONG = "漢字" * 40 + " ␣a very-long\tname\x1b[2J " + "x" * 90 + " 🙂"
"""Wide characters, a word wider than a terminal, and what a terminal would obey."""


def wide(text: str) -> int:
    """Columns that a text takes, by Unicode's own table."""
    return sum(
        0 if unicodedata.combining(one) else 2 if unicodedata.east_asian_width(one) in "WF" else 1 for one in text
    )


def said(part: Part) -> list[str]:
    """Every text that a part has to show."""
    if isinstance(part, Sheet):
        return [part.title, part.more, *(str(cell) for row in part.on("terminal").rows for cell in row)]
    return [text for row in part.rows for text in row] if isinstance(part, Facts) else [part]


def missing(shown: Folded, text: str) -> Counter[str]:
    """Characters that are to be shown, and are not."""
    wanted = Counter("".join(printable(one) for part in shown.parts for one in said(part)))
    return Counter({one: count for one, count in (wanted - Counter(text)).items() if one not in " \n"})


def check(shown: Folded) -> None:
    """A table holds at every width."""
    for width in WIDTHS:
        lines = [line.plain for line in shown.lines(width)]
        assert max(map(wide, lines)) <= width, width
        assert missing(shown, "\n".join(lines)) == Counter()
        for sheet in [part.on("terminal") for part in shown.parts if isinstance(part, Sheet)]:
            numbers = [at for at, column in enumerate(sheet.columns) if not column.left]
            for number in (str(row[at]).partition(" ")[0] for row in sheet.rows for at in numbers):
                assert wide(number) > width - 4 or any(number in line for line in lines)


TEXTS = some.text("ab ␣漢é-,@>\t\\", max_size=60) | some.sampled_from([LONG, "", " ", "-> a @5", "漢" * 99])
NUMBERS = some.floats(allow_nan=True).map(str) | some.integers(-(10**30), 10**30).map("{:,}".format)
COLUMNS = some.lists(
    some.tuples(some.sampled_from(["position", "share of metric", "漢字", "", LONG]), some.booleans(), some.booleans()),
    min_size=1,
    max_size=12,
)


@given(COLUMNS, some.integers(40, 200), some.data())
def test_any_table_is_no_wider_and_nothing_is_cut(
    columns: list[tuple[str, bool, bool]], width: int, drawn: some.DataObject
) -> None:
    made = [Column(head, left, joined=joined, short=head[:3]) for head, left, joined in columns]
    rows = [
        [drawn.draw(TEXTS if one.left else NUMBERS) for one in made] for _ in range(drawn.draw(some.integers(0, 3)))
    ]
    shown = Folded.of(Sheet.of("x", LONG, made, rows), Facts.of([("a", LONG), ("", "b")], "t"), LONG)
    lines = [line.plain for line in shown.lines(width)]
    assert max(map(wide, lines)) <= width
    assert missing(shown, "\n".join(lines)) == Counter()
    for row in rows:
        for one, cell in zip(made, row, strict=True):
            assert one.left or wide(cell) > width - 4 or any(cell in line for line in lines), cell
    placed = layout(Sheet.of("x", "", made, rows), width)
    assert sorted([*placed.widths, *placed.below]) == list(range(len(made)))


@given(TEXTS, some.integers(2, 60))
def test_a_folded_text_is_the_text_but_for_spaces(text: str, width: int) -> None:
    lines = fold(printable(text), width)
    assert "".join("".join(lines).split()) == "".join(printable(text).split())
    assert all(wide(line) <= width for line in lines)


def test_columns_go_below_in_the_order_that_is_said() -> None:
    heads = ["<name", "value", "&95 %", "<what it is", "last"]
    sheet = Sheet.of("x", "", heads, [("a", "1.234", "[1.000, 2.000]", "a long text of several words " * 4, "7")])
    assert Folded.of(sheet).text(200).count("\n") == 1
    folded = Folded.of(sheet).text(80).splitlines()
    assert folded[0].split() == "name value 95 % what it is last".split()
    assert [line.split()[-1] for line in folded[1:2]] == ["7"]
    narrow = Folded.of(sheet).text(40).splitlines()
    assert narrow[0].split() == "name value 95 % last".split()
    assert narrow[2].startswith("    what it is: a long text")
    assert Folded.of(sheet).text(14).splitlines()[:6] == [
        "name",
        "a",
        " value: 1.234,",
        " 95 % [1.000,",
        " 2.000]",
        " what it is: a",
    ]


def test_rich_prints_it_in_the_width_that_there_is() -> None:
    console = Console(width=50, record=True, file=io.StringIO())
    sheet = Sheet.of("x", "t", ["<a", "<b"], [(LONG, Mark("ok", "good"))])
    console.print(Folded.of(sheet))
    assert console.export_text().rstrip("\n") == Folded.of(sheet).text(50)


# ------------------------------------------------------------------------------------------------ tables of verbs


def interval(value: float) -> Any:
    import torch

    low, middle, high = (torch.tensor(value + one, dtype=torch.float64) for one in (-1.5, 0.0, 1.5))
    return Interval(low=low, high=high, estimate=middle)


def neuron() -> Folded:
    tokens = tuple(Token(text=LONG, token_id=1, value=1e12 * sign, gate=-1e-7, up=123456.789) for sign in (1, -1))
    lists: Any = dict.fromkeys(("promoted", "suppressed", "driven_by", "gate", "up"), tokens)
    known = Known(
        neurons=[{"n_prompts": 10**9, "mean_attribution": -1e9, "max_abs": 1e9, "mean_activation": 0.0}],
        top_prompts=[{"prompt_id": 7, "attribution": 1.0, "activation": 2.0, "token": LONG, "text": LONG}],
        descriptions=[{"polarity": 1, "score": 0.5, "source": LONG, "description": LONG}],
        exemplars=[{"polarity": 1, "kind": "top", "value": 1.0, "position": 1, "start": 0, "tokens": [LONG, LONG]}],
    )
    return neurons.neuron_table([NeuronTokens(layer=1, neuron=2, polarity=1, **lists)], known)


def sweep() -> Folded:
    how: Any = {"factor": -1.0, "n_prompts": 3, "control": interval(0.1)}
    one = Response(
        **how, group=LONG, token=LONG, role="target", n_nodes=5.0, before=0.5, after=0.1, change=interval(-0.4),
        logit_change=interval(-4.0), control_logit=None, changed=1.0, control_changed=0.0, kl=1.0, control_kl=0.0,
    )  # fmt: skip
    return sweeps.table([one, one], [GroupResponse(**how, group=LONG, other="other", kept=interval(-3.0))])


def scores() -> Folded:
    row = {"label": LONG, "value": LONG, "layer": 3, "neuron": 123456, "polarity": 1, "auroc": 0.9, "low": 0.8}
    row |= {"high": 1.0, "auroc_chosen_on": 0.95, "q": 1e-9, "n_positive": 10**7, "n_negative": 10**7}
    table = pa.Table.from_pylist([row, row])
    return Folded((concepts.summary(table), *concepts.neurons(table, 1)))


def state() -> Folded:
    status = Status(
        kind="dataset", state="stopped", n_units=3, committed=1, n_prompts=10**9, statuses={"ok": 5, "failed": 10**8},
        errors={LONG: 3}, rows={"nodes": 10**12}, started=0.0, updated=1.0, message=LONG, total_seconds=1e6,
    )  # fmt: skip
    record = {"kind": "dataset", "model": {"name": LONG, "dtype": "float32"}}
    return report.condition_table(Condition(status=status, problems=(LONG,), age=5.0, held=False, record=record))


def asked() -> Folded:
    names = [f"column {number}" for number in range(12)]
    row = {name: (LONG if at % 3 == 0 else 10**at if at % 3 == 1 else 1e-30 * at) for at, name in enumerate(names)}
    return report.rows_table(pa.Table.from_pylist([row, row, row]), 2)


def groups() -> Folded:
    row = Row(name=LONG, members=10**6, attribution=-1e9, share=12.0, promotes=(LONG, "b"), description=LONG,
              silhouette=None, stability=0.5)  # fmt: skip
    return Folded((supernodes.sheet([row, row]),))


@pytest.mark.parametrize("made", [neuron, sweep, scores, state, asked, groups])
def test_tables_of_verbs_hold_with_hostile_texts(made: Any) -> None:
    shown = made()
    check(shown)
    for width in WIDTHS:
        text = shown.text(width)
        assert Counter(text)["漢"] >= 40, "what is in the table is not cut before it is folded"
        assert "\x1b" not in text


def test_what_is_left_out_is_said() -> None:
    assert "1 more; rows=3 shows all 3" in asked().text(80)
    assert "more" not in report.rows_table(pa.table({"a": [1, 2]}), 2).text(80)
