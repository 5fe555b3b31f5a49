"""The circuit of a whole dataset: mean attributions over its prompts, and whether what they rank holds on others.

Knows how the shards' sums become means, aligned or position-free, and which test follows. Refuses to know how sums
come about (runs/units/shards.py), ablation (evaluation/curves.py), and who asks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import torch
from jaxtyping import Float
from torch import Tensor

from tracer.attribution.attribute import notes
from tracer.attribution.exact import Progress
from tracer.attribution.selection import select
from tracer.attribution.trace import trace_all
from tracer.circuit.circuit import Traced
from tracer.circuit.from_run import circuit_of, most_frequent
from tracer.errors import JobError, option, quoted, say
from tracer.evaluation import knockouts, statistics
from tracer.evaluation.curves import Evaluation, curves, ordered
from tracer.evaluation.edge_curves import EdgeCurves, measured, surviving
from tracer.evaluation.faithfulness import GRID, asked_alike
from tracer.evaluation.knockouts import Knockouts
from tracer.evaluation.quality import estimate_quality
from tracer.evaluation.testset import Fit, Job, Ranks, TestSet
from tracer.experts import Numbering
from tracer.model.model import Model
from tracer.prompts import Encoded, Prompt, encode, with_bos
from tracer.runs.jobs import DatasetJob
from tracer.runs.units.shards import as_prompt, options
from tracer.runs.units.tested import Tested, own_prompts, prompts_of, test_prompts
from tracer.settings import numbering_in, settings
from tracer.store.run_folder import Commit, RunFolder
from tracer.store.schemas import CIRCUIT


@dataclass(frozen=True)
class Mean:
    """Mean attributions of all nodes, with their signs.

    Attributes:
        values: in metric units; one position where positions are summed.
        length: tokens of the prompts; -1 where positions are summed.
        n_prompts: behind the means. n_left_out: prompts of other lengths.
    """

    values: Float[Tensor, "layer pos neuron"]
    length: int
    n_prompts: int
    n_left_out: int


def mean_of(folder: RunFolder, commits: Iterable[Commit]) -> Mean | None:
    """The means over all shards, added in their order; of an aligned circuit over the prompts of the length that is
    most frequent (the shorter of two that are equally so). None if no prompt has an attribution."""
    made = [commit for commit in commits if "means" in commit.files]
    counts = Counter[int]()
    for commit in made:
        shown = (
            folder.read_committed(commit, "means", ["length", "n_prompts"])
            .group_by("length")
            .aggregate([("n_prompts", "max")])
        )
        for row in shown.to_pylist():
            counts[row["length"]] += row["n_prompts_max"]
    if not counts:
        return None
    length = most_frequent(counts)
    total: Tensor | None = None
    for commit in made:
        part = folder.read_committed(commit, "means").filter(pc.field("length") == length)
        if part.num_rows:
            shape = (max(part["layer"].to_pylist()) + 1, max(1, length), -1)
            values = part["sums"].combine_chunks().values.to_numpy(zero_copy_only=False)
            tensor = torch.from_numpy(values.copy()).view(*shape)
            total = tensor if total is None else total + tensor
    assert total is not None
    return Mean((total / counts[length]).float(), length, counts[length], sum(counts.values()) - counts[length])


def circuit_table(job: DatasetJob, mean: Mean, metric: float, numbering: Numbering) -> pa.Table:
    """The nodes that the job's selection keeps of the means; the metric is the mean one, for `threshold`."""
    rules = job.selection()
    if mean.length < 0:
        rules["skip_first"] = False  # the sums leave the first position out already
    layer, position, neuron = select(mean.values, metric, **rules).unbind(-1)
    columns = {
        "node_id": list(range(len(layer))),
        "layer": layer.tolist(),
        "position": [-1] * len(layer) if mean.length < 0 else position.tolist(),
        "neuron": neuron.tolist(),
        "expert": numbering.experts_of(layer.tolist(), neuron.tolist()),
        "mean_attribution": mean.values[layer, position, neuron].double().tolist(),
        "n_prompts": [mean.n_prompts] * len(layer),
    }
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in CIRCUIT}, CIRCUIT)


def circuit_of_units(job: DatasetJob, folder: RunFolder, commits: Sequence[Commit]) -> pa.Table | None:
    """What circuit.parquet holds of what is committed; None where the job asks for no circuit, or no prompt has an
    attribution."""
    if job.circuit == "none" or (mean := mean_of(folder, commits)) is None:
        return None
    metric = mean_metric((folder.read_committed(commit, "prompts") for commit in commits), mean.length)
    return circuit_table(job, mean, metric, numbering_in(folder.record() or {}, job.basis))


def tested_on(model: Model, job: DatasetJob, folder: RunFolder) -> Tested | None:
    """The prompts that the run's circuit is tested on; None where the job asks for no test.

    Raises:
        JobError: none that fits.
    """
    asked = job.evaluate
    return None if asked is None else test_prompts(model, job, asked.test, _mean(folder).length)


def evaluated(
    model: Model, job: DatasetJob, folder: RunFolder, tested: Tested, ablated: Progress, alone: Progress
) -> dict[str, Any]:
    """The curves of the run's circuit on other prompts, as JSON holds them.

    Args:
        ablated: is told of the circuits ablated. alone: of those without one node.

    Raises:
        JobError: test prompts that do not fit, or are among the prompts of the run.
    """
    asked, mean, prompts = job.evaluate, _mean(folder), tested.prompts
    assert asked is not None
    _check_lengths(mean, prompts, "evaluate.test")
    n_shared = _check_apart(folder, prompts, asked.allow_overlap, "evaluate.allow_overlap: true in the job")
    reference = None if asked.reference is None else list(prompts_of(job, asked.reference))
    how = settings(basis=job.basis, metric=job.asks, top_k=job.top_k, share=job.share, of=job.of)
    test = TestSet.of(model, prompts, asked.ablation, how, asked.seed, reference).with_known_ends()
    ranks = _ranks(job, mean, prompts)
    made = curves(test, ranks, asked.sizes, asked.seed, ablated)
    linked = _edge_curves(folder, test, asked.seed) if asked.edges else {}
    changes, free = None, mean.length < 0
    if asked.minimality is not None:
        changes = _minimality(test, ranks, asked.minimality, free, alone)
    return {
        "curves": made.record(),
        **linked,
        "minimality": changes,
        "ablation": asked.ablation,
        "circuit": job.circuit,
        "n_prompts": mean.n_prompts,
        "n_left_out": mean.n_left_out,
        "n_test": len(prompts),
        "tested": tested.record(),
        "n_shared": n_shared,
        "whole": float(made.whole.double().mean()),
        "empty": float(made.empty.double().mean()),
        "seed": asked.seed,
        "warnings": [*filter(None, [tested.summary]), *made.warnings],
    }


def _edge_curves(folder: RunFolder, test: TestSet, seed: int) -> dict[str, Any]:
    """What the circuit's strongest edges alone hold, or why there is nothing to measure."""
    graph = circuit_of(folder.place.local or folder.place.address)
    try:
        left = surviving(graph)
    except JobError as error:  # found out at the end of a run, which is no reason to lose it
        return {"edge_curves": None, "no_edge_curves": f"{error.value}: {error.rule}"}
    return {"edge_curves": measured(test, graph, left, seed).record()}


@dataclass(frozen=True)
class Again:
    """What the circuit of a finished run is tested on once more.

    Attributes:
        prompts: of the length of an aligned circuit's; for a free one of one length. The first `count` prompts of the
            run itself if None: what suffices there, and nothing of others.
        ablation: as in `tracer.evaluate`. If None, ``mean`` on test prompts; on the run's own ``mean`` if there is a
            reference, else ``counterfactual`` if all have one, else ``mean`` over them (of one alone ``zero``).
        sizes: of the circuits; a grid up to the run's own if None. MIB's shares of all are added.
        reference, allow_overlap, seed: as in `tracer.evaluate`.
        edges: the circuit, where the curves of its strongest edges are wanted too. groups: the circuit with its groups,
            where it is wanted what each of those is worth.
    """

    prompts: Sequence[Prompt] | None = None
    ablation: str | None = None
    sizes: Sequence[int] | None = None
    count: int = 40
    reference: Sequence[Prompt] | None = None
    allow_overlap: bool = False
    seed: int = 0
    edges: Traced | None = None
    groups: Traced | None = None


class Evaluated(NamedTuple):
    """What `evaluate_again` measured; None where it was not asked for."""

    curves: Evaluation
    edges: EdgeCurves | None
    groups: Knockouts | None


def evaluate_again(
    model: Model, job: DatasetJob, folder: RunFolder, again: Again, progress: Progress | None = None
) -> Evaluated:
    """The curves of a finished run's circuit on other test prompts than its job's, or on its own; and those of its
    edges and what its groups are worth, if they are wanted.

    Raises:
        JobError: prompts or sizes that do not fit, or prompts of the run among the test prompts.
    """
    rows = folder.read_output("circuit.parquet").num_rows
    mean, said, ablation = _mean(folder), list[str](), again.ablation
    if again.prompts is None:
        asked = _own_prompts(model, job, folder, mean, again.count)
        said.append(f"tested on {len(asked)} prompts that it was found on: that shows what suffices there, no more")
        if ablation is None and again.reference is None:
            paired = all(one.counterfactual_ids is not None for one in asked)
            ablation = "counterfactual" if paired else "mean" if len(asked) > 1 else "zero"
        n_shared = len(asked)
    else:
        asked, unused = asked_alike([encode(prompt, model) for prompt in again.prompts], _metric(job, folder))
        said += unused
        n_shared = _check_apart(folder, asked, again.allow_overlap, option("allow_overlap", True))
    _check_lengths(mean, asked, "test prompts")
    said += notes(asked, model)
    say(said)
    how = settings(basis=job.basis, metric=_metric(job, folder), top_k=job.top_k, share=job.share, of=job.of)
    test = TestSet.of(
        model, asked, ablation or "mean", how, again.seed, again.reference, Fit(least=1)
    ).with_known_ends()
    wanted = again.sizes or [size for size in GRID if size < rows] + [rows]
    made = curves(test, _ranks(job, mean, asked), wanted, again.seed, progress)
    linked = again.edges and measured(test, again.edges, surviving(again.edges), again.seed, progress)
    grouped = again.groups and knockouts.measured(test, again.groups, again.seed, progress)
    return Evaluated(replace(made, n_shared=n_shared, warnings=(*said, *made.warnings)), linked, grouped)


def n_ranked(circuit: Traced) -> int:
    """How many nodes (of a free circuit neurons) the prompts of a dataset's circuit have; it has a token for each of
    their positions, or one for any."""
    width = circuit.model.d_mlp if circuit.settings.basis == "activation" else circuit.model.d_model
    return circuit.model.n_layers * width * len(circuit.tokens)


def _mean(folder: RunFolder) -> Mean:
    mean = mean_of(folder, folder.commits())
    if mean is None:
        raise JobError("evaluate", "no prompt has an attribution to test", "see failed.parquet")
    return mean


def _ranks(job: DatasetJob, mean: Mean, prompts: Sequence[Encoded]) -> Ranks:
    return ordered(_eligible(job, mean), "absolute").expand(-1, len(prompts[0].token_ids), -1)


def _check_lengths(mean: Mean, prompts: Sequence[Encoded], what: str) -> None:
    lengths = sorted({len(one.token_ids) for one in prompts})
    if lengths != [mean.length] and (mean.length >= 0 or len(lengths) > 1):
        wanted = f"the circuit's {mean.length}" if mean.length >= 0 else "one length for all"
        raise JobError(f"{what} with prompts of {lengths} tokens", f"need {wanted}", "choose other test prompts")


def _metric(job: DatasetJob, folder: RunFolder) -> str:
    """What the prompts of a run were asked: ``auto`` is the difference where any has a foil."""
    if job.asks != "auto":
        return job.asks
    tables = (folder.read_committed(commit, "prompts", ["foil_ids"]) for commit in folder.commits())
    return "difference" if any(ids for table in tables for ids in table["foil_ids"].to_pylist()) else "logit"


def _own_prompts(model: Model, job: DatasetJob, folder: RunFolder, mean: Mean, count: int) -> list[Encoded]:
    """The first prompts of a run that went well and are of its circuit's length (of a free one: as long as the first);
    asked what they were asked then."""
    found: list[Encoded] = []
    length = mean.length if mean.length >= 0 else None
    for _, one in own_prompts(model, job, folder, length):
        if not found or len(one.token_ids) == len(found[0].token_ids):
            found.append(one)
        if len(found) == count:
            break
    return found


def _minimality(test: TestSet, ranks: Ranks, size: int, free: bool, progress: Progress) -> list[dict[str, Any]]:
    """How much faithfulness falls when each of the circuit's nodes, strongest first, is left out of it alone."""
    assert test.known is not None
    (full, empty), rows = test.known, range(len(test.prompts))
    found = test.measure(
        [Job(row, ranks, size, True, without) for without in range(-1, size) for row in rows], progress
    )
    kept = statistics.faithfulness(found.view(size + 1, len(rows)).T.contiguous(), empty, full)
    places = [(ranks == index).nonzero()[0].tolist() for index in range(size)]
    return [
        {"layer": layer, "position": -1 if free else position, "neuron": neuron, "change": float(change)}
        for (layer, position, neuron), change in zip(places, kept[0] - kept[1:], strict=True)
    ]


def _eligible(job: DatasetJob, mean: Mean) -> Float[Tensor, "layer pos neuron"]:
    """The means with nothing where the job's selection takes no node: those come last in the ranking."""
    values = mean.values.clone()
    if job.skip_first and mean.length >= 0:
        values[:, 0] = 0
    for layer, *_, neuron in job.exclude:
        values[layer, :, neuron] = 0
    return values


def _check_apart(folder: RunFolder, test: Sequence[Encoded], allow_overlap: bool, allow: str) -> int:
    """A prompt that the circuit was found on says nothing of how it does on others: how many of the test prompts are
    such, where that is allowed. As text it was looked for when the run was planned (runs/split.py)."""
    asked, shared = {one.token_ids: one for one in test}, set[tuple[int, ...]]()
    for commit in folder.commits():
        for ids in folder.read_committed(commit, "prompts", ["token_ids"])["token_ids"].to_pylist():
            if ids is not None and tuple(ids) in asked:
                shared.add(tuple(ids))
    if shared and not allow_overlap:
        text = quoted(asked[min(shared)].text)
        raise JobError(
            f"{len(shared)} test prompts (one is {text})",
            "are both in the run and among its test prompts",
            f"hold them out of one, or allow it with {allow}",
        )
    return sum(one.token_ids in shared for one in test)


def qualities(model: Model, job: DatasetJob, folder: RunFolder, progress: Progress) -> Iterable[dict[str, Any]]:
    """How the estimates of each of the run's first prompts follow exact ablations, as JSON holds them."""
    chosen, left = options(job), job.quality
    reference = chosen.get("reference")
    for commit in folder.commits():
        good = {
            row["prompt_id"]
            for row in folder.read_committed(commit, "prompts", ["prompt_id", "status"]).to_pylist()
            if row["status"] == "ok"
        }
        for row in folder.read_input(commit.shard):
            if left and row["prompt_id"] in good:
                left -= 1
                prompt = with_bos(as_prompt(row, job.asks, paired=job.baseline == "counterfactual"), job.bos)
                (circuit,) = trace_all(model, [prompt], **chosen | {"edges": False, "profiles": False, "pruning": None})
                given = None if reference is None else list(reference.prompts)
                found = estimate_quality(model, circuit, prompt, reference=given).record()
                found.pop("sample")
                progress(job.quality - left, job.quality)
                yield {"prompt_id": row["prompt_id"], **found}
        if not left:
            return


def mean_metric(prompts: Iterable[pa.Table], length: int) -> float:
    """The mean metric over prompts that went well and are of that length (-1: of any), added in their order."""
    total, count = 0.0, 0
    for table in prompts:
        good = table.filter(pc.field("status") == "ok")
        for value, ids in zip(good["metric"].to_pylist(), good["token_ids"].to_pylist(), strict=True):
            if length in (-1, len(ids)):
                total, count = total + value, count + 1
    return total / count if count else 0.0
