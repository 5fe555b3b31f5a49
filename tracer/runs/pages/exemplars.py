"""The report of an exemplars run: where each neuron is strong, token by token, and how its values are spread.

Knows wording and order. Refuses to know how tables come about (meaning), and how a page looks (reports/page.py). Texts
of the corpus are data: they are shown, and escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tracer.experts import Numbering
from tracer.meaning.exemplars import TOP, Exemplar, of_neuron
from tracer.reports import page as pages
from tracer.reports.page import Block, Page, Section, Shaded, shade
from tracer.reports.sheet import Sheet
from tracer.reports.verdict import Verdict
from tracer.runs.jobs import ExemplarsJob
from tracer.runs.pages import made
from tracer.runs.status import Reason
from tracer.settings import numbering_in
from tracer.text import printable

NEURONS = 40
"""Neurons whose exemplars are on the page, the first ones of the job or of the run that they are from."""
SHOWN, SHOWN_EACH, PROMPTS = 8, 2, 5
"""Of each neuron and sign: the strongest exemplars, those of a quantile, and prompts of its run."""
_LONG = 400  # characters of a prompt
_LIMITS = (
    "An exemplar is a document at its peak: the token where the neuron's value of that sign is largest. A document "
    "counts once for each neuron and sign.",
    "A neuron with clear strongest exemplars may do something else at smaller values: look at the quantiles too.",
    "Documents are read in windows, so that the first tokens of a window have little before them.",
    "Nothing here says what a neuron causes: that is shown by ablations and by steering.",
)


@dataclass(frozen=True)
class Collected:
    """What a run's folder holds.

    Attributes:
        record: of run.json. statuses: how many documents came to what. reasons: why some failed.
        exemplars, densities: the tables, None while the run goes on. top: the prompts of the run that neurons are of.
    """

    job: ExemplarsJob
    record: Mapping[str, Any]
    statuses: Mapping[str, int]
    reasons: Sequence[Reason]
    exemplars: pa.Table | None
    densities: pa.Table | None
    top: pa.Table | None

    @property
    def neurons(self) -> list[tuple[int, int]]:
        """(Layer, neuron)s, in the order of the job, or the strongest of its run first."""
        return list(dict.fromkeys(map(self.numbering.of_parts, self.record["neurons"])))

    @property
    def numbering(self) -> Numbering:
        """How the neurons of its model are numbered."""
        return numbering_in(self.record)


def page_of(found: Collected) -> Page:
    """The report of an exemplars run, whole or not."""
    n_ok, planned = found.statuses.get("ok", 0), int(found.record["n_prompts"])
    model = (found.record.get("model") or {}).get("name", found.job.model)
    sections = [
        Section("exemplars", "Exemplars", tuple(_exemplars(found))),
        Section("densities", "How often they are strong", tuple(_densities(found))),
        Section("failures", "Failures", tuple(_failures(found))),
        Section("limits", "Limits", (pages.points(_LIMITS),)),
        made.section(found.record, found.job),
    ]
    return Page(
        kind="Exemplars",
        title=f"Where {len(found.neurons):,} neurons of {printable(str(model), 120)} are strong",
        summary=_summary(found, n_ok, planned),
        verdict=_verdict(found, n_ok, planned),
        findings=(),
        cards=(),
        sections=tuple(sections),
    )


def _summary(found: Collected, n_ok: int, planned: int) -> str:
    tokens = max(found.densities["n_tokens"].to_pylist(), default=0) if found.densities is not None else 0
    read = f"{n_ok:,} of {planned:,} documents were read"
    return f"{read}, {tokens:,} tokens that count. {first_token(found.job)}" if tokens else f"{read}."


def first_token(job: ExemplarsJob) -> str:
    """What becomes of the first token of a window, in a sentence."""
    if job.skip_first is False:
        return "All tokens count, a beginning-of-sequence token too."
    if job.skip_first:
        return "The first token of each window does not count (skip_first)."
    return (
        "A beginning-of-sequence token does not count: many neurons are as strong there as nowhere else "
        "(skip_first: false counts it)."
    )


def _verdict(found: Collected, n_ok: int, planned: int) -> Verdict:
    if found.exemplars is None:
        return Verdict("Not finished", "Exemplars are chosen when all documents are read.", "open")
    if not n_ok:
        return Verdict("Nothing was found", "No document could be read; the reasons are below.", "bad")
    text = f"{found.exemplars.num_rows:,} exemplars. What they have in common is for a reader to say."
    return Verdict("Collected" if n_ok == planned else "Collected, but for some documents", text, "open")


def _exemplars(found: Collected) -> Iterator[Block]:
    if found.exemplars is None:
        yield pages.missing("They are not there yet.", "The run makes them when it ends: repeat its command.")
        return
    yield pages.text(
        "Tokens are shaded by the neuron's value, orange where it is positive and blue where it is negative, relative "
        "to its largest exemplar; the peak is outlined. Control characters are spelt out."
    )
    for layer, neuron in found.neurons[:NEURONS]:
        name = found.numbering.short(layer, neuron)
        yield from blocks_of(found.exemplars, found.top, layer, neuron, name)
    if (left := len(found.neurons) - NEURONS) > 0:
        yield pages.note(f"{left:,} more neurons are in exemplars.parquet.")


def blocks_of(exemplars: pa.Table, top: pa.Table | None, layer: int, neuron: int, called: str) -> Iterator[Block]:
    """What a page shows of a neuron: its exemplars of either sign, and prompts where its attribution is largest.

    Args:
        called: its name in its layer.
    """
    for polarity, name in ((1, "positive"), (-1, "negative")):
        rows = of_neuron(exemplars, layer, neuron, polarity)
        if rows:
            yield pages.shaded(f"Layer {layer} neuron {called}, {name}", list(lines_of(rows)))
    if top is not None:
        mine = top.filter((pc.field("layer") == layer) & (pc.field("neuron") == neuron)).slice(0, PROMPTS).to_pylist()
        if mine:
            yield pages.note("Prompts of its run where its attribution is largest:")
            yield pages.points([_prompt(row) for row in mine])


def lines_of(rows: Sequence[Exemplar]) -> Iterator[Shaded]:
    """Exemplars of one neuron and sign as lines of tokens, the strongest first."""
    largest = max(abs(one.value) for one in rows)
    for one in rows:
        if one.rank >= (SHOWN if one.kind == TOP else SHOWN_EACH):
            continue
        tokens = []
        for at, (token, value) in enumerate(zip(one.tokens, one.values, strict=True)):
            look = shade(value, largest)
            look = f"{look} peak".strip() if at == one.peak else look
            tokens.append((printable(token, 60), look, f"{value:+.3g}"))
        yield Shaded(f"{one.kind} {one.value:+.3g}, document {one.document}:", tuple(tokens))


def _prompt(row: Mapping[str, Any]) -> str:
    token = printable(row["token"] or "", 60)
    return (
        f"prompt {row['prompt_id']}, attribution {row['attribution']:+.4f}, strongest at “{token}”: "
        f"{printable(row['text'] or '', _LONG)}"
    )


def rows_of(densities: pa.Table, exemplars: pa.Table, numbering: Numbering) -> list[tuple[str, ...]]:
    """Each neuron's values in a row of text: layer, neuron, density and largest value of either sign with the token of
    its strongest exemplar, mean, and standard deviation."""
    top = exemplars.filter((pc.field("kind") == TOP) & (pc.field("rank") == 0)).to_pylist()
    tokens = {(one["layer"], one["neuron"], one["polarity"]): _peak(one) for one in top}
    return [
        (
            str(one["layer"]),
            numbering.short(one["layer"], one["neuron"]),
            f"{one['density_positive']:.2%}",
            f"{one['largest']:+.3f}",
            tokens.get((one["layer"], one["neuron"], 1), ""),
            f"{one['density_negative']:.2%}",
            f"{one['smallest']:+.3f}",
            tokens.get((one["layer"], one["neuron"], -1), ""),
            f"{one['mean']:+.4f}",
            f"{one['std']:.4f}",
        )
        for one in densities.to_pylist()
    ]


HEADS = ("layer", "neuron", "dense +", "largest", "<at", "dense -", "smallest", "<at", "mean", "std")
"""The columns of `rows_of`; those of text begin with ``<``."""


def _peak(one: Mapping[str, Any]) -> str:
    return printable(one["tokens"][one["position"] - one["start"]], 40)


def _densities(found: Collected) -> Iterator[Block]:
    if found.densities is None or found.exemplars is None:
        yield pages.missing("They are not there yet.", "The run makes them when it ends: repeat its command.")
        return
    job = found.job
    from_where = (
        f"its size is at least {job.active_above:g}"
        if job.active_above is not None
        else f"its size is at least the first edge of the histogram at {job.active_share:.0%} of the neuron's largest "
        "or above (threshold in densities.parquet)"
    )
    yield pages.text(f"Dense: the share of tokens where a value of that sign is strong, that is where {from_where}.")
    rows = rows_of(found.densities, found.exemplars, found.numbering)
    yield pages.table(Sheet.of("densities", "Values over all tokens that count", HEADS, rows[: 5 * NEURONS]))
    if len(rows) > 5 * NEURONS:
        yield pages.note(f"{len(rows) - 5 * NEURONS:,} more are in densities.parquet, with histograms.")


def _failures(found: Collected) -> Iterator[Block]:
    if found.reasons:
        yield pages.points([printable(str(one), 1000) for one in found.reasons])
    else:
        yield pages.text("None.")
