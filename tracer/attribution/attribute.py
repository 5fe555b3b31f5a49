"""Every node of many prompts: settings checked, prompts batched to a memory bound, results checked.

Knows which settings go together and how batches are split and joined. Refuses to know nnsight (model/passes.py), what a
method computes (attribution/methods.py), and which nodes matter (attribution/selection.py).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tracer.attribution import methods
from tracer.attribution.methods import Progress, Work
from tracer.attribution.result import Attribution, check_conservation
from tracer.batching import batches
from tracer.errors import JobError, quoted, say
from tracer.metrics import Metric, entries
from tracer.model import passes
from tracer.model.model import Model
from tracer.model.state import undisturbed
from tracer.prompts import Batch, Encoded, Prompt, encode
from tracer.settings import Settings, settings
from tracer.shapes import MeanValues
from tracer.system.forks import after_fork


class Reference:
    """Prompts behind the baseline ``mean``; their means on a model are computed once and kept.

    Args:
        prompts: at least one of them must reach every position that is asked for.
    """

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.prompts = tuple(prompts)
        self._kept: dict[tuple[int, str], MeanValues] = {}
        self._hashes: dict[int, str] = {}
        self._renew()
        after_fork(self, Reference._renew)

    def means(self, model: Model, longest: int, basis: str, memory: int | None) -> MeanValues:
        """Mean value of every node per position, up to `longest` positions.

        Raises:
            JobError: no prompt is that long.
        """
        key = id(model), basis
        with self._computing:
            if key not in self._kept:
                ids = self._ids(model)
                self._kept[key] = mean_values(model, ids, max(map(len, ids), default=0), basis, memory)
        reach = self._kept[key].shape[1]
        if reach < longest:
            raise _too_short(reach, longest)
        return self._kept[key][:, :longest]

    def _renew(self) -> None:
        self._computing = threading.Lock()  # prompts of a remote model are traced in several threads

    def hash(self, model: Model) -> str:
        """A hash of the prompts' tokens."""
        key = id(model)
        if key not in self._hashes:
            self._hashes[key] = hashlib.sha256(repr(self._ids(model)).encode()).hexdigest()
        return self._hashes[key]

    def _ids(self, model: Model) -> list[tuple[int, ...]]:
        return [encode(prompt, model).token_ids for prompt in self.prompts]


@undisturbed()
def attribute(
    model: Model,
    prompts: Sequence[Prompt],
    method: str = "relp",
    baseline: str | None = None,
    basis: str = "activation",
    rules: Iterable[str] | None = None,
    steps: int = 10,
    *,
    metric: str = "auto",
    top_k: int = 5,
    seed: int = 0,
    reference: Sequence[Prompt] | Reference | None = None,
    memory: int | None = None,
    progress: Progress | None = None,
) -> Attribution:
    """Attribute each prompt's metric to every node: (value - baseline) times a gradient.

    A prompt's result does not depend on the others in the call, nor on its padding (method.md section 8, 8).

    Args:
        model: from `tracer.load`.
        prompts: the questions; without a target, the model's own top token is asked about.
        method: ``relp``, ``grad``, ``ig``, ``conductance``, ``ig-activation``, ``exact`` (every node ablated, the
            oracle), or the controls ``delta`` and ``random``.
        baseline: ``zero``, ``mean`` (per position over `reference`) or ``counterfactual``; if None, ``counterfactual``
            where every prompt has one, ``zero`` where none has.
        basis: ``activation`` (d_mlp nodes per layer and position) or ``output`` (d_model).
        rules: which RelP rules are on: any of ``norm``, ``attention``, ``activation``, ``product``; all if None.
        steps: of the path methods.
        metric: ``logit``, ``difference``, ``topk``, ``logprob``, ``centred``; ``auto`` takes the difference where a
            foil is given, else the target's logit.
        top_k: tokens that ``topk`` sums: the model's own at the position read.
        seed: of ``random``.
        reference: prompts whose mean activations are the baseline ``mean``; `prompts` themselves if None.
        memory: bytes one batch may use; by default a GiB, or a quarter of a GPU.
        progress: called with (done, total) steps of the current method.

    Returns:
        Attributions, activations, embeddings, metric and unexplained, float32 on the CPU.

    Raises:
        JobError: a prompt or setting is wrong.
        ModelError: a number is not finite, or conservation fails where it must hold.
        RemoteError: a server fails, or does not permit it for this key.

    Source: Arora et al. 2026, section 3; method.md sections 2 and 3.
    """
    chosen = settings(
        method=method,
        baseline=settled(baseline, prompts, method),
        basis=basis,
        rules=rules,
        steps=steps,
        metric=metric,
        top_k=top_k,
        seed=seed,
    )
    chosen, encoded = prepared(model, prompts, chosen, reference)
    say(notes(encoded, model))
    others = reference if isinstance(reference, Reference) else Reference(prompts if reference is None else reference)
    return attributed(model, encoded, chosen, others, memory, progress)


def attributed(
    model: Model,
    encoded: Sequence[Encoded],
    chosen: Settings,
    reference: Reference,
    memory: int | None,
    progress: Progress | None,
    gradients: bool = False,
) -> Attribution:
    """`attribute`, of prompts and settings that are `prepared`.

    Args:
        gradients: keep the gradients and baselines of all nodes; methods without gradients find RelP's.
    """
    lengths = [len(prompt.token_ids) for prompt in encoded]
    means = None
    if chosen.baseline == "mean":
        means = reference.means(model, max(lengths), chosen.basis, memory)

    def batch(part: range) -> Attribution:
        some = [encoded[i] for i in part]
        return _attribute_batch(model, some, chosen, means, memory or model.budget(), progress, gradients)

    result = _joined(model.each(batch, list(split(model, lengths, memory))), chosen)
    result.check_finite()
    if chosen.conserves and model.conserves:
        check_conservation(result.metric, result.embeddings)
    return result


def settled(baseline: str | None, prompts: Sequence[Prompt], method: str) -> str:
    """The baseline that is asked for; by default the counterfactual, where every prompt has one.

    Raises:
        JobError: some prompts have a counterfactual and some have none.
    """
    if baseline is not None or method == "random":
        return "zero" if baseline is None else baseline
    paired = {prompt.counterfactual is not None for prompt in prompts if isinstance(prompt, Prompt)}
    if len(paired) > 1:
        raise JobError(
            "baseline=None",
            "some prompts have a counterfactual and some have none",
            "say baseline='zero', or give all a counterfactual",
        )
    return "counterfactual" if paired == {True} else "zero"


def prepared(
    model: Model, prompts: Sequence[Prompt], chosen: Settings, reference: Sequence[Prompt] | Reference | None = None
) -> tuple[Settings, list[Encoded]]:
    """The settings with ``auto`` resolved, and the prompts as tokens.

    Raises:
        JobError, RemoteError: what `attribute` refuses before it computes.
    """
    if isinstance(prompts, Prompt | str) or not all(isinstance(prompt, Prompt) for prompt in prompts):
        raise JobError(f"prompts={quoted(prompts)}", "must be a list of tracer.Prompt", "write [tracer.Prompt(...)]")
    encoded = [encode(prompt, model) for prompt in prompts]
    chosen = with_metric(chosen, encoded)
    _check_pairs(chosen, encoded, reference)
    methods.check_permitted(model, chosen)
    return chosen, encoded


def check_question(prompt: Prompt, chosen: Settings, reference: Sequence[Prompt] | Reference | None) -> None:
    """Refuse, before a model is there, a prompt whose parts do not go with the settings.

    Raises:
        JobError: what `prepared` refuses and no token decides.
    """
    known = Encoded(  # which tokens they are is not known yet, and does not matter
        token_ids=(),
        target_ids=() if prompt.target is None else (0,),
        foil_ids=() if prompt.foil is None else (1,),
        counterfactual_ids=None if prompt.counterfactual is None else (0,),
        positions=(),
        text=prompt.text or "of token ids",
        id=prompt.id,
    )
    _check_pairs(with_metric(chosen, [known]), [known], reference)


def with_metric(chosen: Settings, prompts: Sequence[Encoded]) -> Settings:
    """Resolve ``auto`` and refuse targets, foils and metrics that do not go together."""
    if not prompts:
        raise JobError("prompts []", "there is nothing to attribute", "give at least one prompt")
    kinds = {"difference" if prompt.foil_ids else "logit" for prompt in prompts}
    if chosen.metric == "auto":
        if len(kinds) > 1:
            raise JobError(
                "metric='auto'",
                "some prompts have a foil and some have none",
                "choose a metric, or give all a foil",
            )
        return chosen.model_copy(update={"metric": kinds.pop()})
    for prompt in prompts:
        if chosen.metric == "difference" and not prompt.foil_ids:
            raise JobError(f"prompt {quoted(prompt.text)}", "the metric 'difference' needs a foil", "give it a foil")
        if chosen.metric != "difference" and prompt.foil_ids:
            raise JobError(
                f"prompt {quoted(prompt.text)}",
                f"a foil has no effect with metric {chosen.metric!r}",
                "leave out the foil",
            )
        if chosen.metric == "topk" and prompt.target_ids:
            raise JobError(
                f"prompt {quoted(prompt.text)}", "a target has no effect with metric 'topk'", "leave out the target"
            )
    return chosen


def _check_pairs(chosen: Settings, prompts: Sequence[Encoded], reference: Sequence[Prompt] | Reference | None) -> None:
    for prompt in prompts if chosen.baseline == "counterfactual" else ():
        value = f"prompt {quoted(prompt.text)}"
        if prompt.counterfactual_ids is None:
            raise JobError(
                value, "the baseline 'counterfactual' needs a counterfactual", "give it one, or take another"
            )
        if prompt.counterfactual_ids == prompt.token_ids:
            raise JobError(value, "its counterfactual is the prompt itself", "give one that differs from it")
    if reference is not None and chosen.baseline != "mean":
        raise JobError("reference", f"has no effect with baseline {chosen.baseline!r}", "use baseline='mean'")
    if chosen.baseline == "mean" and reference is None and len(prompts) < 2:
        raise JobError(
            "baseline='mean'",
            "the mean of a single prompt is that prompt itself",
            "give reference= with more prompts",
        )


def notes(prompts: Iterable[Encoded], model: Model) -> tuple[str, ...]:
    """What whoever reads a result of these prompts should know, each sentence once."""
    ahead = ("attention looks at later tokens too: nodes and edges lead back from them",) if model.looks_ahead else ()
    return tuple(dict.fromkeys((*model.warnings, *ahead, *(text for one in prompts for text in one.warnings))))


def split(model: Model, lengths: Sequence[int], memory: int | None) -> Iterable[range]:
    """Batches of prompts of these lengths that may share one, by the bytes that one may use."""
    if memory is not None and memory < 1:
        raise JobError(f"memory={memory}", "must be a positive number of bytes", "leave it out for the default")
    each = model.bytes_per_token(length=max(lengths, default=1))
    return batches(lengths, each, memory or model.budget(), model.borders)


def mean_values(
    model: Model, token_ids: Sequence[tuple[int, ...]], longest: int, basis: str, memory: int | None = None
) -> MeanValues:
    """Mean value of every node over reference prompts, per position, up to `longest` positions.

    Raises:
        JobError: a position that no reference prompt reaches.
    """
    check_reach(token_ids, longest)
    total = torch.zeros(model.n_layers, longest, model.n_neurons(basis), dtype=torch.float64)
    count = torch.zeros(longest)

    def batch(part: range) -> tuple[Tensor, Tensor]:
        some = Batch(tuple(token_ids[i] for i in part))
        values = some.aligned(passes.values(model, some, basis=basis)[0], 2)
        return (values * some.real()[:, None, :, None]).double().sum(0), some.real().sum(0)

    for summed, counted in model.each(batch, list(split(model, [len(ids) for ids in token_ids], memory))):
        reach = min(longest, len(counted))
        total[:, :reach] += summed[:, :reach]
        count[:reach] += counted[:reach]
    return (total / count[None, :, None]).float()


def check_reach(token_ids: Sequence[tuple[int, ...]], longest: int) -> None:
    """Refuse reference prompts that all end before `longest` positions."""
    reach = max(map(len, token_ids), default=0)
    if reach < longest:
        raise _too_short(reach, longest)


def _too_short(reach: int, longest: int) -> JobError:
    return JobError(
        f"reference of at most {reach} tokens",
        f"a prompt has {longest}; every position needs a reference",
        "give longer reference prompts",
    )


def _attribute_batch(
    model: Model,
    prompts: Sequence[Encoded],
    chosen: Settings,
    means: Tensor | None,
    max_bytes: int,
    report: Progress | None,
    gradients: bool,
) -> Attribution:
    batch = Batch(tuple(prompt.token_ids for prompt in prompts))
    prompts = with_targets(model, batch, prompts, chosen)
    paired = None
    if chosen.baseline == "counterfactual":
        paired = Batch(tuple(prompt.counterfactual_ids or () for prompt in prompts))
    baseline = _baseline(model, batch, paired, means, chosen.basis)
    work = Work(model, batch, paired, metric_of(prompts, chosen), chosen, baseline, max_bytes, report, gradients)
    result = methods.run(work)
    real = batch.real()

    def of_nodes(values: Tensor | None) -> Tensor | None:
        return None if values is None else batch.aligned(values, 2) * real[:, None, :, None]

    return Attribution(
        nodes=batch.aligned(result.nodes, 2) * real[:, None, :, None],
        activations=batch.aligned(result.activations, 2) * real[:, None, :, None],
        embeddings=batch.aligned(result.embeddings, 1) * real,
        metric=result.metric,
        token_ids=batch.token_ids,
        target_ids=tuple(prompt.target_ids for prompt in prompts),
        foil_ids=tuple(prompt.foil_ids for prompt in prompts),
        settings=chosen,
        start_metric=result.start,
        gradients=of_nodes(result.gradients) if gradients else None,
        baselines=of_nodes(result.baselines) if gradients else None,
    )


def with_targets(model: Model, batch: Batch, prompts: Sequence[Encoded], chosen: Settings) -> list[Encoded]:
    """Give prompts without a target the model's own top token(s), fixed for all passes."""
    wanted = chosen.top_k if chosen.metric == "topk" else 1
    if wanted > model.vocab_size:
        raise JobError(f"top_k={wanted}", f"the vocabulary has {model.vocab_size} tokens", "use fewer")
    if all(prompt.target_ids for prompt in prompts):
        return list(prompts)
    columns = [min(prompt.positions) - len(prompt.token_ids) for prompt in prompts]
    likeliest = passes.top_tokens(model, batch, columns, wanted)
    settled = []
    for prompt, tokens in zip(prompts, likeliest.tolist(), strict=True):
        if prompt.target_ids:
            settled.append(prompt)
            continue
        if len(prompt.positions) > 1:
            raise JobError(
                f"positions {list(prompt.positions)}",
                "the model's top tokens differ between positions",
                "give a target",
            )
        settled.append(replace(prompt, target_ids=tuple(tokens)))
    return settled


def metric_of(prompts: Sequence[Encoded], chosen: Settings) -> Metric:
    """The metric of a batch of prompts whose targets are known."""
    terms = [
        (row, pos - len(prompt.token_ids), token, weight)
        for row, prompt in enumerate(prompts)
        for pos, token, weight in entries(prompt.positions, prompt.target_ids, prompt.foil_ids, chosen.metric)
    ]
    row, column, token, weight = (torch.tensor(part) for part in zip(*terms, strict=True))
    return Metric(chosen.metric, row, column, token, weight.float(), len(prompts))


def _baseline(model: Model, batch: Batch, paired: Batch | None, means: Tensor | None, basis: str) -> Tensor | float:
    """What nodes are compared with, padded: zero, the mean of their position, or the counterfactual's value."""
    if paired is not None:
        return passes.values(model, paired, basis=basis)[0]
    if means is None:
        return 0.0
    mine = means[None, :, : batch.width].expand(len(batch.token_ids), -1, -1, -1)
    return batch.padded(mine, 2)


def _joined(parts: Sequence[Attribution], chosen: Settings) -> Attribution:
    """Batches of different widths as one result, zeros after the end of shorter prompts."""
    width = max(part.nodes.shape[2] for part in parts)
    starts = [part.start_metric for part in parts if part.start_metric is not None]

    def wide(tensors: list[Tensor], dim: int) -> Tensor:
        grown = []
        for tensor in tensors:
            shape = list(tensor.shape)
            shape[dim] = width - shape[dim]
            grown.append(torch.cat([tensor, tensor.new_zeros(shape)], dim) if shape[dim] else tensor)
        return torch.cat(grown) if len(grown) > 1 else grown[0]

    def kept(tensors: list[Tensor | None]) -> Tensor | None:
        present = [tensor for tensor in tensors if tensor is not None]
        return wide(present, 2) if present else None

    return Attribution(
        nodes=wide([part.nodes for part in parts], 2),
        activations=wide([part.activations for part in parts], 2),
        embeddings=wide([part.embeddings for part in parts], 1),
        metric=torch.cat([part.metric for part in parts]),
        token_ids=tuple(ids for part in parts for ids in part.token_ids),
        target_ids=tuple(ids for part in parts for ids in part.target_ids),
        foil_ids=tuple(ids for part in parts for ids in part.foil_ids),
        settings=chosen,
        start_metric=None if not starts else torch.cat(starts),
        gradients=kept([part.gradients for part in parts]),
        baselines=kept([part.baselines for part in parts]),
    )
