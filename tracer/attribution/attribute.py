"""Every node of many prompts: settings checked, prompts batched to a memory bound, results checked.

Knows which settings go together and how batches are split and joined. Refuses to know nnsight (model/passes.py), what a
method computes (attribution/methods.py), and which nodes matter (attribution/selection.py).
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tracer.attribution import backward, circuits, exact, request
from tracer.attribution.exact import FORWARD_ONLY, Progress
from tracer.attribution.request import metric_of
from tracer.attribution.result import Attribution, check_conservation, noises
from tracer.attribution.running import Running
from tracer.attribution.targets import Of
from tracer.attribution.targets import target as inside
from tracer.batching import batches
from tracer.choices import Baseline, Basis, Method, MetricKind, Rule, RulesName
from tracer.errors import JobError, first_line, option, quoted, say
from tracer.model import passes
from tracer.model.backend import Maybe
from tracer.model.backend import Of as Form
from tracer.model.model import Model
from tracer.model.named import AnyModel, model_of
from tracer.model.state import undisturbed
from tracer.prompts import Asked, Batch, Encoded, Prompt, Target, as_prompts, encode
from tracer.settings import (
    EDGE_BASES,
    OWN_METRICS,
    Settings,
    TargetDirection,
    TargetNeuron,
    settings,
)
from tracer.shapes import MeanValues
from tracer.system import bars
from tracer.system.forks import after_fork


class Reference:
    """Prompts behind the baseline ``mean``; their means on a model are computed once and kept.

    Args:
        prompts: at least one of them must reach every position that is asked for.
    """

    @staticmethod
    def of(given: Sequence[Asked] | Reference) -> Reference:
        """As it is given, or of prompts and texts."""
        return given if isinstance(given, Reference) else Reference(as_prompts(given))

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
    model: AnyModel,
    prompts: Asked | Sequence[Asked],
    method: Method | str = "relp",
    baseline: Baseline | str | None = None,
    basis: Basis | str = "activation",
    rules: RulesName | Iterable[Rule | str] | None = None,
    steps: int = 10,
    *,
    target: Target | None = None,
    foil: Target | None = None,
    metric: MetricKind | str = "auto",
    top_k: int = 5,
    share: float | None = None,
    of: Of = None,
    seed: int = 0,
    reference: Sequence[Asked] | Reference | None = None,
    memory: int | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | bool | None = None,
) -> Attribution:
    """Attribute each prompt's metric to every node: (value - baseline) times a gradient.

    A prompt's result does not depend on the others in the call, nor on its padding.

    Of a mixture of experts the arrays have every neuron by its number in its layer, 0 where its expert did not run:
    they are many times what ran, which is all that `tracer.trace` keeps.

    Args:
        model: from `tracer.load`, or the name of a model (``"demo"``, a folder, a Hugging Face id), which is loaded and
            kept until a call names another.
        prompts: the questions, each a `tracer.Prompt` or its text, or one alone; without a target, the model's own top
            token is asked about.
        method: ``relp``, ``grad``, ``ig``, ``conductance``, ``ig-activation``, ``relp-ig`` (``ig`` with the linearised
            model's gradient at every step), ``exact`` (every node ablated, the oracle), or the controls ``delta`` and
            ``random``.
        baseline: what a node's value is compared with: ``zero``, ``mean`` (per position over `reference`) or
            ``counterfactual``; if None, ``counterfactual`` where every prompt has one, ``zero`` where none has.
        basis: ``activation`` (d_mlp nodes per layer and position), or with d_model: ``output`` (of the MLP),
            ``residual`` (what a block leaves in the residual stream), ``attention`` (what its attention adds to it).
        rules: which RelP rules are on: any of ``norm``, ``attention``, ``activation``, and ``product`` (the half rule)
            or ``gate`` (the linear gate); all with ``product`` if None. Also a name: ``all``, ``no-half``,
            ``linear-gate``.
        steps: of the path methods.
        target, foil: of the prompts that are texts.
        metric: ``logit``, ``difference``, ``topk``, ``share``, ``logprob``, ``centred``; ``auto`` takes the difference
            where a foil is given, the log-probability of an answer, else the target's logit.
        top_k: tokens that ``topk`` sums: the model's own at the position read.
        share: of the next token's probability, between 0 and 1: the metric is the mean logit of the fewest of the
            model's own tokens that hold it, each weighed by its probability, which is a constant.
        of: instead of tokens, what is asked about inside the model: a neuron, ``"L12 N345"``, of an expert that runs
            there ``"L3 E17 N45"`` (with ``-`` behind it what drives it below 0), or what `tracer.direction` makes. The
            metric is its value where the logits would be read.
        seed: of ``random``.
        reference: prompts whose mean activations are the baseline ``mean``; `prompts` themselves if None.
        memory: bytes one batch may use; by default a GiB, or a quarter of a GPU.
        device: where the result is kept, such as ``cuda`` beside a model there.
        progress: a bar appears on a terminal and in a notebook after half a second; False for none, or a function
            that is called with (done, total): steps of the method; prompts, where they take more than one batch.

    Returns:
        Of every prompt and node its attribution in metric units and its activation, with the embeddings' attributions
        and the metric, float32.

    Raises:
        JobError: a prompt or setting is wrong.
        ModelError: a number is not finite, or conservation fails where it must hold.
        RemoteError: a server fails, or does not permit it for this key.

    Source: Arora et al. 2026 (arXiv 2601.22594), section 3.
    """
    model, prompts = model_of(model), as_prompts(prompts, target=target, foil=foil)
    chosen = settings(
        method=method,
        baseline=settled(baseline, prompts, method),
        basis=basis,
        rules=rules,
        steps=steps,
        metric=metric,
        top_k=top_k,
        share=share,
        of=inside(of),
        seed=seed,
    )
    reference = None if reference is None else Reference.of(reference)
    chosen, encoded = prepared(model, prompts, chosen, reference)
    say(notes(encoded, model))
    others = reference or Reference(prompts)
    with bars.shown(progress, f"attributing by {chosen.method}") as report:
        return attributed(model, encoded, chosen, others, memory, report, device=_device(device))


def _device(device: str | torch.device) -> torch.device:
    """A device that tensors can be put on."""
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise JobError(f"device={quoted(str(device))}", first_line(error), "leave it out, or use 'cpu'") from None


def attributed(
    model: Model,
    encoded: Sequence[Encoded],
    chosen: Settings,
    reference: Reference | None,
    memory: int | None,
    progress: Progress | None,
    gradients: bool = False,
    device: torch.device | None = None,
) -> Attribution:
    """`attribute`, of prompts and settings that are `prepared`.

    Args:
        gradients: keep the gradients and baselines of all nodes; methods without gradients find RelP's.
    """
    lengths = [len(prompt.token_ids) for prompt in encoded]
    means, device = means_of(model, encoded, chosen, reference, memory), device or torch.device("cpu")

    report = _over_batches(progress, len(encoded))

    def batch(part: range) -> Attribution:
        some, limit, mine = [encoded[i] for i in part], memory or model.budget(), report(part)
        found, some = _found(model, some, chosen, means, limit, mine, gradients, device)
        if mine is not None and not model.backend.near and chosen.method != "exact":  # which is asked in parts
            mine(1, 1)  # a server only says when it is done
        return _result(some, chosen, found, means, gradients)

    result = _joined(list(model.each(batch, list(split(model, lengths, memory)))), chosen)
    result.check_finite()
    if chosen.conserves and model.conserves:
        check_conservation(result.metric, result.embeddings)
    return result


def _over_batches(progress: Progress | None, n_prompts: int) -> Callable[[range], Progress | None]:
    """For each batch, what its method reports its steps to; batches of a server report from several threads."""
    reached, lock = dict[int, float](), threading.Lock()

    def of(part: range) -> Progress | None:
        tell = progress
        if tell is None or len(part) == n_prompts:
            return tell

        def report(done: int, total: int) -> None:
            with lock:
                reached[part.start] = len(part) * done / max(total, 1)
                tell(min(n_prompts, int(sum(reached.values()) + 1e-6)), n_prompts)

        return report

    return of


def means_of(
    model: Model, encoded: Sequence[Encoded], chosen: Settings, reference: Reference | None, memory: int | None
) -> MeanValues | None:
    """Of every node per position, where they are the baseline."""
    if chosen.baseline != "mean" or reference is None:
        return None
    return reference.means(model, max(len(prompt.token_ids) for prompt in encoded), chosen.basis, memory)


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
    chosen = chosen.numbered(model.numbering())
    _check_pairs(chosen, encoded, reference)
    check_inside(model, chosen)
    model.check_rules(chosen.rules)
    if chosen.method not in FORWARD_ONLY and not (
        chosen.method == "relp"
        and chosen.of is None
        and chosen.basis in EDGE_BASES
        and model.replays(frozenset(chosen.rules))
    ):
        passes.needs_gradients(model, f"method {chosen.method}")
    check_target_runs(model, encoded, chosen)
    return chosen, with_share(model, encoded, chosen)


def check_inside(model: Model, chosen: Settings) -> None:
    """Refuse a neuron or a direction that the model does not have, or before which there is nothing.

    Raises:
        JobError: that.
    """
    of = chosen.of
    if of is None:
        return
    name = option("of", of.name)
    if of.layer is not None and of.layer >= model.n_layers:
        raise JobError(name, f"the model has layers 0..{model.n_layers - 1}", "choose one of them")
    if isinstance(of, TargetDirection):
        if len(of.vector) != model.d_model:
            rule = f"has {len(of.vector)} coordinates, the residual stream {model.d_model}"
            raise JobError(name, rule, "give a direction of this model")
        return
    model.check_neuron(name, of.layer, of.number)
    if of.layer == 0 and (chosen.basis != "attention" or model.plan.layers[0].parallel):
        rule = "is in the first layer: nothing of the basis is before it"
        raise JobError(name, rule, "choose one of a later layer")


def check_target_runs(model: Model, encoded: Sequence[Encoded], chosen: Settings) -> None:
    """Refuse a neuron of an expert as what a circuit is of where that does not run at each position that is read. One
    more forward, of such a neuron.

    Raises:
        JobError: names the prompt, and the experts that did run.
    """
    of = chosen.of
    if not isinstance(of, TargetNeuron) or of.expert is None:
        return
    for prompt in encoded:
        there = Running.of(model, [prompt.token_ids])
        for position in prompt.positions:
            if not there.has(of.layer, position, of.number):
                raise there.lacking(of.layer, position, of.number, prompt.text)


MOST_LIKELY = 100
"""Tokens that the metric ``share`` takes at most: each is a node of its own, and a share that more tokens hold is of no
answer in particular."""


def with_share(model: Model, encoded: Sequence[Encoded], chosen: Settings, memory: int | None = None) -> list[Encoded]:
    """Prompts whose targets are the fewest tokens that hold a share of the next token's probability, each weighed by
    its own part of theirs, where the metric is of these and they are not known. One more forward.

    Raises:
        JobError: several positions, or more than `MOST_LIKELY` tokens.
    """
    if chosen.metric != "share" or all(prompt.weights for prompt in encoded):
        return list(encoded)
    for prompt in encoded:
        if len(prompt.positions) > 1:
            rule = "the model's likeliest tokens differ between positions"
            raise JobError(f"positions {list(prompt.positions)}", rule, "give one")

    def batch(part: range) -> list[Encoded]:
        some = [encoded[i] for i in part]
        columns = [prompt.positions[0] - len(prompt.token_ids) for prompt in some]
        logits = passes.logits(model, Batch(tuple(prompt.token_ids for prompt in some)), -min(columns))
        rows = (row[column] for row, column in zip(logits, columns, strict=True))
        return [_likeliest(prompt, row, chosen) for prompt, row in zip(some, rows, strict=True)]

    parts = list(split(model, [len(prompt.token_ids) for prompt in encoded], memory))
    return [prompt for some in model.each(batch, parts) for prompt in some]


def _likeliest(prompt: Encoded, logits: Tensor, chosen: Settings) -> Encoded:
    """A prompt with the fewest of the likeliest tokens that hold the share, of their logits [vocab]."""
    chances, tokens = logits.double().softmax(-1).sort(descending=True, stable=True)
    held = chances.cumsum(-1)
    count = int((held < (chosen.share or 0.0)).sum()) + 1
    if count > MOST_LIKELY:
        most = float(held[MOST_LIKELY - 1])
        rule = f"the likeliest {MOST_LIKELY} tokens behind {quoted(prompt.text)} hold {most:.3g}"
        raise JobError(option("share", chosen.share), rule, "give a smaller share, or ask for a target")
    weights = chances[:count] / chances[:count].sum()
    return replace(prompt, target_ids=tuple(tokens[:count].tolist()), weights=tuple(weights.tolist()))


def check_question(prompt: Prompt, chosen: Settings, reference: Sequence[Prompt] | Reference | None) -> None:
    """Refuse, before a model is there, a prompt whose parts do not go with the settings.

    Raises:
        JobError: what `prepared` refuses and no token decides.
    """
    known = Encoded(  # which tokens they are is not known yet, and does not matter
        token_ids=(),
        target_ids=() if prompt.target is None and prompt.answer is None else (0,),
        foil_ids=() if prompt.foil is None else (1,),
        counterfactual_ids=None if prompt.counterfactual is None else (0,),
        positions=(),
        text=str(prompt.shown) if prompt.token_ids is None else "of token ids",
        id=prompt.id,
        answer=prompt.answer is not None,
    )
    _check_pairs(with_metric(chosen, [known]), [known], reference)


def with_metric(chosen: Settings, prompts: Sequence[Encoded]) -> Settings:
    """Resolve ``auto`` and refuse targets, foils and metrics that do not go together."""
    if not prompts:
        raise JobError("prompts []", "there is nothing to attribute", "give at least one prompt")
    own = chosen.of.kind if chosen.of is not None else "share" if chosen.share is not None else None
    kinds = {own or expected(prompt) for prompt in prompts}
    if chosen.metric == "auto":
        if len(kinds) > 1 and "logprob" in kinds:
            rule = "some prompts have an answer of several tokens, whose metric is 'logprob', and some have none"
            raise JobError("metric='auto'", rule, "choose a metric, or give all an answer")
        if len(kinds) > 1:
            raise JobError(
                "metric='auto'",
                "some prompts have a foil and some have none",
                "choose a metric, or give all a foil",
            )
        chosen = chosen.model_copy(update={"metric": kinds.pop()})
    for prompt in prompts:
        if chosen.metric == "difference" and not prompt.foil_ids:
            raise JobError(f"prompt {quoted(prompt.text)}", "the metric 'difference' needs a foil", "give it a foil")
        if chosen.metric != "difference" and prompt.foil_ids:
            raise JobError(
                f"prompt {quoted(prompt.text)}",
                f"a foil has no effect with {_asked_by(chosen)}",
                "leave out the foil",
            )
        if chosen.metric in OWN_METRICS and prompt.target_ids:
            what = "an answer" if prompt.answer else "a target"
            rule = f"{what} has no effect with {_asked_by(chosen)}"
            raise JobError(f"prompt {quoted(prompt.text)}", rule, f"leave out the {what.partition(' ')[2]}")
    return chosen


def expected(prompt: Encoded | Prompt) -> str:
    """The metric that a prompt's targets, foils and answer ask for where no other is chosen."""
    foils = prompt.foil if isinstance(prompt, Prompt) else prompt.foil_ids
    return "logprob" if prompt.answer else "difference" if foils else "logit"


def _asked_by(chosen: Settings) -> str:
    """What a metric was chosen by."""
    if chosen.of is not None:
        return option("of", chosen.of.name)
    return option("share", chosen.share) if chosen.share is not None else f"metric {chosen.metric!r}"


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


def _found(
    model: Model,
    prompts: list[Encoded],
    chosen: Settings,
    means: Tensor | None,
    limit: int,
    report: Progress | None,
    gradients: bool,
    device: torch.device,
) -> tuple[dict[str, Any], list[Encoded]]:
    """Attributions of all nodes of one batch, as `circuits.everything` gives them, and its prompts with targets."""
    if chosen.method == "exact" or not (model.backend.gradients or (chosen.method in FORWARD_ONLY and not gradients)):
        batch = Batch(tuple(prompt.token_ids for prompt in prompts))
        prompts = with_targets(model, batch, prompts, chosen)
        if chosen.method != "exact":
            return _without_gradients(model, prompts, chosen, means), prompts
        baseline, paired = _baseline(model, batch, prompts, means, chosen)
        how: dict[str, Any] = {"paired": paired, "baseline": baseline, "max_bytes": limit, "progress": report}
        found = exact.by_ablation(model, batch, metric_of(prompts, chosen), chosen.basis, **how)
        if gradients:
            found["gradients"] = _linearised(model, batch, metric_of(prompts, chosen), chosen).gradients
        return found, prompts
    ask = request.question(model, prompts, chosen, means, report if model.backend.near else None)
    if gradients and chosen.method in FORWARD_ONLY:
        ask.edge_rules = chosen.edge_rules  # so that these methods find gradients too
    ask.device, ask.gradients, ask.factors = device, gradients, chosen.method in ("relp", "grad")
    ask.dtype = model.plan.transfer_dtype if ask.factors else torch.float32
    found = passes.session(model, circuits.everything, ask, _form(model, ask))
    rows = ask.metric.row
    return found, [request.settled(prompt, found["tokens"][rows == row], chosen) for row, prompt in enumerate(prompts)]


def _form(model: Model, ask: Any) -> dict[str, Any]:
    """What `circuits.everything` must send."""
    rows, width = len(ask.token_ids), max(len(ids) for ids in ask.token_ids)
    shape = (rows, model.n_layers, width, model.n_neurons(ask.basis))
    every, sent = Form(shape), Form(shape, ask.dtype)
    return {
        "nodes": None if ask.factors else every,
        "values": sent,
        "gradients": sent if ask.factors else Maybe(sent),
        "baselines": Maybe(sent),
        "embeddings": Form((rows, width)),
        "metric": Form((rows,)),
        "start": Maybe(Form((rows,))),
        "tokens": Form((len(ask.metric.row),), torch.int64, passes.n_logits(model)),
    }


def _linearised(model: Model, batch: Batch, metric: Any, chosen: Settings) -> passes.Gradients:
    """RelP's gradients; where a server takes none, they are found here if the weights are here."""
    rules = chosen.edge_rules
    if not model.backend.gradients and model.replays(rules):
        return backward.reading(model, batch, metric, basis=chosen.basis, rules=rules)
    return passes.gradients(model, batch, metric, rules=rules, basis=chosen.basis)


def _without_gradients(model: Model, prompts: list[Encoded], chosen: Settings, means: Tensor | None) -> dict[str, Any]:
    """relp, and the controls with RelP's gradients, where a server takes none."""
    batch = Batch(tuple(prompt.token_ids for prompt in prompts))
    found = _linearised(model, batch, metric_of(prompts, chosen), chosen)
    baseline, paired = _baseline(model, batch, prompts, means, chosen)
    nodes, embeddings = None, (found.embedding * found.embedding_gradient).sum(-1)
    if chosen.method == "random":
        nodes, embeddings = noises(batch.token_ids, found.values.shape, chosen.seed)
    elif chosen.method == "delta":
        start = 0.0 if paired is None else passes.values(model, paired, basis=chosen.basis)[1]
        nodes = (found.values - (0.0 if baseline is None else baseline)).abs()
        embeddings = (found.embedding - start).abs().sum(-1)
    return {
        "nodes": nodes,
        "values": found.values,
        "gradients": found.gradients,
        "baselines": baseline,
        "embeddings": embeddings,
        "metric": found.metric,
        "start": None,
    }


def _result(
    prompts: Sequence[Encoded], chosen: Settings, found: dict[str, Any], means: Tensor | None, gradients: bool
) -> Attribution:
    """One batch's attributions, aligned and cleared of padding."""
    batch, values, baseline = Batch(tuple(prompt.token_ids for prompt in prompts)), found["values"], found["baselines"]
    real, values = batch.real().to(values.device), values.float()
    baseline = None if baseline is None else baseline.float()
    if means is not None and baseline is None:
        baseline = _padded(batch, means).to(values.device)
    nodes, slopes = found["nodes"], found["gradients"]
    if nodes is None:
        nodes = (values if baseline is None else values - baseline) * slopes.float()

    def of_nodes(every: Tensor) -> Tensor:
        return batch.aligned(every, 2) * real[:, None, :, None] if bool(batch.padding.any()) else every

    return Attribution(
        nodes=of_nodes(nodes),
        activations=of_nodes(values),
        embeddings=batch.aligned(found["embeddings"], 1) * real,
        metric=found["metric"],
        token_ids=batch.token_ids,
        target_ids=tuple(prompt.target_ids for prompt in prompts),
        foil_ids=tuple(prompt.foil_ids for prompt in prompts),
        settings=chosen,
        start_metric=found["start"],
        gradients=of_nodes(slopes.float()) if gradients and slopes is not None else None,
        baselines=of_nodes(baseline) if gradients and baseline is not None else None,
    )


def with_targets(model: Model, batch: Batch, prompts: Sequence[Encoded], chosen: Settings) -> list[Encoded]:
    """Give prompts without a target the model's own top token(s), fixed for all passes."""
    request.opened(model, prompts, chosen)  # refuses what has no such tokens
    if chosen.of is not None or all(prompt.target_ids for prompt in prompts):
        return list(prompts)
    columns = [min(prompt.positions) - len(prompt.token_ids) for prompt in prompts]
    likeliest = passes.top_tokens(model, batch, columns, request.wanted(chosen))
    return [request.settled(prompt, tokens, chosen) for prompt, tokens in zip(prompts, likeliest, strict=True)]


def _baseline(
    model: Model, batch: Batch, prompts: Sequence[Encoded], means: Tensor | None, chosen: Settings
) -> tuple[Tensor | None, Batch | None]:
    """What nodes are compared with, padded: the counterfactual's values, the mean of their position, or None for zero;
    and the counterfactual batch."""
    if chosen.baseline == "counterfactual":
        paired = Batch(tuple(prompt.counterfactual_ids or () for prompt in prompts))
        return passes.values(model, paired, basis=chosen.basis)[0], paired
    return None if means is None else _padded(batch, means), None


def _padded(batch: Batch, means: Tensor) -> Tensor:
    """The mean values of each prompt's positions."""
    return batch.padded(means[None, :, : batch.width].expand(len(batch.token_ids), -1, -1, -1), 2)


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
