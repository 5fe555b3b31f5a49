"""Job files: the records of dataset runs, benchmarks and searches for exemplars, from YAML, with every value checked.

Knows a job's keys, which of them go together, and which decide a run's numbers. A key that would have no effect is
refused. Refuses to know YAML and overrides (runs/yamlfile.py), models, prompts, and how a job is run; paths stay as
they are written.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag, ValidationError, model_validator

from tracer.attribution.pruning import Pruning
from tracer.attribution.selection import check_selection
from tracer.attribution.targets import direction, target
from tracer.choices import (
    Ablation,
    AttentionKernel,
    Baseline,
    Basis,
    Keep,
    Method,
    MetricKind,
    Ranking,
    Rule,
    Structure,
    Weights,
    Wire,
)
from tracer.data.source import ROW_FIELDS, TAKES, Source
from tracer.errors import JobError, meant, option, quoted
from tracer.experts import Numbering, parse
from tracer.meaning.supernodes import Asked
from tracer.records import LARGEST, Count, Name, Names, Natural, Record, as_list, is_list
from tracer.runs.yamlfile import check_keys, override, parsed
from tracer.settings import (
    DEFAULT_STEPS,
    DEFAULT_TOP_K,
    EDGE_BASES,
    IN_FLIGHT,
    OWN_METRICS,
    PATH_METHODS,
    RULED_METHODS,
    SUMS_OF_TARGETS,
    VARIANTS,
    Settings,
    TargetDirection,
    TargetNeuron,
    as_job_error,
    numbering_in,
    rules_name,
    rules_of,
    settings,
)

NO_BASELINE = "none"
"""The baseline of a method that has none (`random`); it runs once."""

EVERY_RULE = ("all",)
"""The variants of RelP that a benchmark measures by default."""

MOST_NEURONS = 4096
"""That one run collects exemplars of."""
WINDOW, TOP_NEURONS, ACTIVE_SHARE = 128, 100, 0.1
"""Tokens of a document that a model reads at a time, neurons of a run, and the share of a neuron's largest size from
which a token is strong, unless a job says otherwise."""

WITHOUT_EFFECT = frozenset({"prompt_timeout", "retries", "max_error_rate", "device", "host", "in_flight"})
"""Keys of a job that do not decide its numbers."""

# ------------------------------------------------------------------------------------------- kinds of values


def _not_a_switch(value: Any) -> Any:
    """YAML reads `on`, `yes` and `true` as a switch, which Python would take for 1."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _rules(value: Any) -> Any:
    """The name of a set of rules, where a list of rules is wanted: ``--set rules=linear-gate``."""
    return sorted(VARIANTS[value]) if isinstance(value, str) and value in VARIANTS else as_list(value)


def _variants(value: Any) -> Any:
    """Each variant of RelP by its name, as `rules_name` has it; a name alone is a list of one."""
    given = as_list(value)
    if not is_list(given):
        return value
    names = []
    for one in given:
        if not (isinstance(one, str) or (is_list(one) and all(isinstance(rule, str) for rule in one))):
            raise ValueError(f"rules must be a list of {', '.join(VARIANTS)} and of lists such as [norm, attention]")
        names.append(rules_name(rules_of(one if isinstance(one, str) else "+".join(one) or "none")))
    return names


def _neuron(value: Any) -> Any:
    if is_list(value) and len(value) in (2, 3):
        return value
    try:
        return tuple(part for part in parse(value) if part is not None)
    except JobError:
        raise ValueError("must be neurons as LAYER/NEURON or LAYER/EXPERT/NEURON, e.g. [3/120, 3/17/45]") from None


# Whole numbers are strict: "5", 5.0 and true are mistakes. Other numbers may be text, as YAML reads 1e-3.
Real = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_not_a_switch)]
Sizes = Annotated[tuple[Count, ...], BeforeValidator(as_list)]
Neuron = Annotated[tuple[Natural, Natural] | tuple[Natural, Natural, Natural], BeforeValidator(_neuron)]
"""(Layer, neuron), or (layer, expert, neuron) until the model is known."""


def _of(value: Any) -> Any:
    """What a job is of inside the model: a neuron as text, or the file of a direction, which is read."""
    if isinstance(value, str):
        return target(value)
    if isinstance(value, dict) and "file" in value and set(value) <= {"file", "layer", "name", "label"}:
        return direction(**{"given": value["file"]} | {name: one for name, one in value.items() if name != "file"})
    return value


def _check_sizes(sizes: tuple[int, ...]) -> None:
    if not sizes or list(sizes) != sorted(set(sizes)):
        raise ValueError("sizes must name at least one, each once, and rise")


class _ModelOptions(Record):
    """Which model, and how it is loaded: as in `tracer.load`. `host` of a remote one holds no key; keys are in the
    workers' environment. `in_flight`: requests that the run has at the service at a time, over all its workers. `bos`:
    texts begin with the beginning-of-sequence token where the tokenizer does not put it; token ids stay as they are."""

    NEW: ClassVar[tuple[str, ...]] = ("adapter", "gguf_file")
    """Keys that decide nothing while they are at their default, so that runs from before there were any go on."""

    model: Name = "demo"
    bos: bool = False
    revision: Name | None = None
    adapter: Name | None = None
    gguf_file: Name | None = None
    dtype: Name | None = None
    device: Name | None = None
    device_map: Name | None = None
    attention: AttentionKernel | None = None
    remote: bool = False
    host: Name | None = None
    weights: Weights | None = None
    wire: Wire | None = None
    in_flight: Count | None = None

    @model_validator(mode="after")
    def _placed_once(self) -> _ModelOptions:
        given = [name for name in ("host", "weights", "wire", "in_flight") if getattr(self, name) is not None]
        if given and not self.remote:
            raise ValueError(f"{given[0]} has no effect without remote: true")
        if self.remote and self.weights is None and (self.device or self.device_map):
            raise ValueError("device and device_map have no effect on a remote model without weights: local")
        if self.remote and self.adapter is not None:
            raise ValueError("adapter cannot be merged into weights on a server: leave it out, or remote")
        if self.remote and self.gguf_file is not None:
            raise ValueError("gguf_file is dequantised here, which no server does: leave it out, or remote")
        if self.device is not None and self.device_map is not None:
            raise ValueError("device has no effect together with device_map")
        return self

    def loading(self) -> dict[str, Any]:
        """The arguments of `tracer.load` beside the name, those that are set."""
        which, how = ("revision", "adapter", "gguf_file"), ("dtype", "device", "device_map", "attention")
        names = (*which, *how, "host", "weights", "wire")
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        return given | {"remote": True} if self.remote else given

    @property
    def requests(self) -> int:
        """Requests that a remote run may have in flight at a time."""
        return self.in_flight or IN_FLIGHT

    def numbers(self) -> dict[str, Any]:
        """What decides the run's numbers, as JSON holds it; `load_job` makes an equal job of it, defaults apart."""
        fields = type(self).model_fields
        new = {name for name in self.NEW if getattr(self, name) == fields[name].default}
        return self.model_dump(mode="json", exclude={*WITHOUT_EFFECT, *new})


# -------------------------------------------------------------------------------------------- the dataset job


class Evaluate(Record):
    """How the circuit of a dataset is tested: by ablation on other prompts, as in `tracer.evaluate`.

    Attributes:
        test: held-out prompts, all of one length. reference: prompts behind the ablations ``mean`` and ``resample``.
        allow_overlap: test on prompts that the circuit was found on as well; every result says how many there are.
        sizes: nodes of the circuits (neurons, of a position-free circuit), rising.
        edges: also keep the strongest 1 % to 100 % of the circuit's edges, and test what nodes are left.
        minimality: of a circuit of so many nodes, how much faithfulness each of them holds alone; not measured if None.
        seed: of the random control, the resampled prompts and the intervals.
    """

    test: Source
    ablation: Ablation = "mean"
    sizes: Sizes
    edges: bool = False
    minimality: Count | None = None
    reference: Source | None = None
    seed: Natural = 0
    allow_overlap: bool = False

    @model_validator(mode="after")
    def _has_effect(self) -> Evaluate:
        _check_sizes(self.sizes)
        if self.reference is not None and self.ablation in ("zero", "counterfactual"):
            raise ValueError(f"reference has no effect with ablation {self.ablation!r}")
        if self.test.most == 1:
            raise ValueError("test must have at least 2 prompts, for intervals")
        return self


class PruningRules(Record):
    """Which edges are kept; the fields of `tracer.Pruning`."""

    share: Real | None = None
    attribution: Real | None = None
    top: Count | None = None
    node_influence: Real | None = None
    edge_influence: Real | None = None
    drop_dangling: bool = False


class AlwaysOnRules(Record):
    """Neurons that are strong on most prompts though ablating them to their mean does next to nothing; looked for
    before the run, named with their evidence, and left out of it as if they were in `exclude`, where that is asked for.

    Attributes:
        unrelated: prompts that they are looked for on; the first of the run itself if None.
        prompts: how many of them.
        share: strong on more than this share of the prompts. threshold: strong, as a share of ``|metric|``.
            exact_below: ablated to its mean it changes the metric by less than this share of its attribution.
        leave_out: leave them out. What does little alone may still matter: look at the evidence first, and test it.
    """

    unrelated: Source | None = None
    prompts: Annotated[int, Field(ge=2, strict=True)] = 40
    share: Real = Field(0.5, ge=0, lt=1)
    threshold: Real = Field(0.005, gt=0, lt=1)
    exact_below: Real = Field(0.1, gt=0, lt=1)
    leave_out: bool = False


class ConceptRules(Record):
    """Neurons that tell prompts by their labels, as in `tracer.concepts`.

    Attributes:
        labels: of the prompts, each scored by itself. values: of one label, the values to score.
        group: a label that names prompts which belong together.
        candidates: neurons tested for each value. permutations, seed: of the test.
    """

    labels: Names
    values: Names = ()
    group: Name | None = None
    candidates: Count = 50
    permutations: Annotated[int, Field(ge=99, le=2**31, strict=True)] = 10_000
    seed: Natural = 0

    @model_validator(mode="after")
    def _has_effect(self) -> ConceptRules:
        if not self.labels or len(set(self.labels)) < len(self.labels):
            raise ValueError("labels must name at least one, each once")
        if self.values and len(self.labels) > 1:
            raise ValueError("values are of one label, and labels names several")
        if self.group in self.labels:
            raise ValueError("group must be another label than those that are scored")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Every label that is read."""
        return self.labels if self.group is None else (*self.labels, self.group)


def _tokens(value: Any) -> Any:
    """Text is text, and a number a token id; one alone is a list of one."""
    given = as_list(value)
    if is_list(given) and not all(isinstance(one, str | int) and not isinstance(one, bool) for one in given):
        raise ValueError("tokens must be text, each one token, or token ids")
    return given


def _prompts(value: Any) -> Any:
    """How many prompts, or where they come from: one of the two, so that what is wrong is said of that one."""
    if isinstance(value, Mapping | Source):
        return value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("must be how many of the run's own prompts, or a source of prompts as input is")
    return value


def _kind_of_prompts(value: Any) -> str:
    return "count" if isinstance(value, int) else "source"


class SteeringRules(Record):
    """Sweeps at the end of a run: every group of neurons multiplied by every factor, as in `tracer.sweep`. The groups
    are the run's supernodes, where it has any, and the whole circuit.

    Attributes:
        prompts: that are steered: so many of the run's own first ones that went well, or others.
        factors: 0 ablates, 2 amplifies, -1 inverts. tokens: reported besides targets and foils.
        random: control draws for each group. seed: of these.
        everywhere: neurons act at every position, not at their own.
    """

    prompts: Annotated[
        Annotated[Count, Tag("count")] | Annotated[Source, Tag("source")],
        Discriminator(_kind_of_prompts),
        BeforeValidator(_prompts),
    ] = 20
    factors: Annotated[tuple[Real, ...], BeforeValidator(as_list)] = (-1.0, 0.0, 2.0)
    tokens: Annotated[tuple[Natural | Name, ...], BeforeValidator(_tokens)] = ()
    random: Natural = 5
    everywhere: bool = False
    seed: Natural = 0

    @model_validator(mode="after")
    def _has_effect(self) -> SteeringRules:
        if not self.factors or len(set(self.factors)) < len(self.factors):
            raise ValueError("factors must name at least one, each once")
        return self


class DatasetJob(_ModelOptions):
    """Attribution of every prompt of a dataset: nodes and edges of each, and what they come to together.

    Attributes:
        model, revision, adapter, gguf_file, dtype, device, device_map, attention: as in `tracer.load`.
        input: where the prompts come from. limit: only the first so many.
        shard_size: prompts in one unit of work.
        method, baseline, basis, rules, steps, metric, top_k, share, seed: as in `tracer.attribute`.
        of: what the circuits are of inside the model: a neuron as text, ``L12 N345``, or a direction as its `file`, the
            `layer` behind which it is read (behind the final norm without one) and the `name` of a file's tensor.
        reference: prompts of the baseline ``mean``, which needs them.
        nodes, threshold, mass, skip_first, exclude: which nodes of a prompt are kept, as in `tracer.trace`.
        always_on: neurons that look strong on most prompts and do nothing are looked for; not if None.
        edges: trace the edges between them, and those of the circuit of the whole dataset; by default where the metric
            is a sum of logits.
        pruning: which edges are kept, of a prompt's, and of the dataset's by their means.
        profiles: keep the attribution profile of each node, as in `tracer.trace`: the table ``profiles``.
        values: keep the attribution of every neuron, summed over positions, of each prompt: the table ``values``, by
            which `tracer compare` knows of nodes that a prompt does not keep; 4 bytes for each.
        circuit: of the whole dataset, from its mean attribution: ``aligned`` (nodes at their positions), ``free``
            (neurons, whatever the position), or ``none``.
        supernodes: how that circuit's neurons are grouped by their profiles, which it needs; not if None.
        evaluate: how that circuit is tested.
        quality: for the first so many prompts, estimates are compared with exact single ablations.
        tokens: of so many of the circuit's strongest neurons (of the prompts', without a circuit) it is read from the
            weights which tokens they promote, and what drives them; of none if None.
        concepts: labels that neurons are scored for, once all prompts are done; not if None.
        steering: how the circuit and its groups are steered, once all is done; not if None.
        batch: prompts computed at once; planned from the memory there is if None.
        prompt_timeout: seconds after which a prompt counts as hung. retries: of a unit that failed for no prompt's
            fault. max_error_rate: the share of failed prompts above which the run ends.
    """

    NEW: ClassVar[tuple[str, ...]] = (
        *(*_ModelOptions.NEW, "always_on", "profiles", "values", "supernodes", "tokens", "concepts", "steering"),
        *("share", "of"),
    )

    kind: Literal["dataset"] = "dataset"
    input: Source
    limit: Count | None = None
    shard_size: Count = 64
    method: Method = "relp"
    baseline: Baseline = "zero"
    basis: Basis = "activation"
    rules: Annotated[tuple[Rule, ...], BeforeValidator(_rules)] | None = None
    steps: Count = DEFAULT_STEPS
    metric: MetricKind = "auto"
    top_k: Count = DEFAULT_TOP_K
    share: Real | None = None
    of: Annotated[TargetNeuron | TargetDirection | None, BeforeValidator(_of)] = None
    seed: Natural = 0
    reference: Source | None = None
    nodes: Count | None = None
    threshold: Real | None = None
    mass: Real | None = None
    skip_first: bool = False
    exclude: Annotated[tuple[Neuron, ...], BeforeValidator(as_list)] = ()
    always_on: AlwaysOnRules | None = None
    edges: bool = True
    pruning: PruningRules | None = None
    profiles: bool = False
    values: bool = False
    circuit: Literal["none", "aligned", "free"] = "none"
    supernodes: Asked | None = None
    evaluate: Evaluate | None = None
    quality: Natural = 0
    tokens: Count | None = None
    concepts: ConceptRules | None = None
    steering: SteeringRules | None = None
    batch: Count | None = None
    prompt_timeout: Real = Field(600.0, gt=0)
    retries: Natural = 3
    max_error_rate: Real = Field(0.5, ge=0, le=1)

    @model_validator(mode="after")
    def _has_effect(self) -> DatasetJob:
        self.settings()
        check_selection(self.nodes, self.threshold, self.mass)
        if self.limit is not None and self.input.limit is not None:
            raise ValueError("limit and input.limit say the same: leave one of them out")
        if self.rules is not None and len(set(self.rules)) < len(self.rules):
            raise ValueError("rules must name each once")
        if len(set(self.exclude)) < len(self.exclude):
            raise ValueError("exclude must name each neuron once")
        if self.baseline == "mean" and self.reference is None:
            raise ValueError("baseline 'mean' needs reference: the prompts that the mean is over")
        if self.baseline != "mean" and self.reference is not None:
            raise ValueError(f"reference has no effect with baseline {self.baseline!r}")
        self._check_edges()
        self._check_supernodes()
        self._check_evaluate()
        self._check_filters()
        self._check_concepts()
        if self.steering is not None and self.circuit == "none":
            raise ValueError("steering has no effect without a circuit: aligned or free")
        return self

    def _check_edges(self) -> None:
        if self.metric not in SUMS_OF_TARGETS | {"auto"} or self.basis not in EDGE_BASES:
            if self.edges and "edges" in self.model_fields_set:
                if self.basis not in EDGE_BASES:
                    raise ValueError(f"basis {self.basis!r} has no direct edges: use edges: false")
                raise ValueError(f"edges lead into single logits: with metric {self.metric!r} use edges: false")
            # Bypasses the frozen record and `model_fields_set`, so that --set may still choose another metric.
            object.__setattr__(self, "edges", False)
        if self.pruning is not None and not self.edges:
            raise ValueError("pruning has no effect without edges")
        if self.profiles and self.basis not in EDGE_BASES:
            raise ValueError(f"basis {self.basis!r} has no attribution profiles: leave profiles out")
        if self.tokens is not None and self.basis not in EDGE_BASES:
            raise ValueError(f"basis {self.basis!r} has no neurons, of which tokens are read: leave tokens out")
        self.pruning_rules()

    def _check_supernodes(self) -> None:
        if self.supernodes is None:
            return
        if self.circuit == "none":
            raise ValueError("supernodes have no effect without a circuit: aligned or free")
        if not self.profiles:
            raise ValueError("supernodes need profiles: true, by which neurons are compared")
        if self.circuit == "free" and self.supernodes.free is False:
            raise ValueError("supernodes.free is always true of a free circuit")

    def _check_evaluate(self) -> None:
        if self.evaluate is None:
            return
        if self.circuit == "none":
            raise ValueError("evaluate has no effect without a circuit: aligned or free")
        if self.evaluate.edges and not self.edges:
            raise ValueError("evaluate.edges has no effect without edges")
        if self.evaluate.test.origin == self.input.origin:
            raise ValueError("evaluate.test must be other prompts than input, e.g. another split")

    def _check_filters(self) -> None:
        test = None if self.evaluate is None else self.evaluate.test
        references = {"reference": self.reference, "evaluate.reference": self.evaluate and self.evaluate.reference}
        for name, source in references.items():
            if source is not None and source.filter is not None:
                raise ValueError(f"filter has no effect on {name}, whose prompts are asked nothing")
        steered = None if self.steering is None else self.steering.prompts
        for source in (self.input, test, steered if isinstance(steered, Source) else None):
            keep = None if source is None else source.filter
            if keep is not None and self.asks in OWN_METRICS:
                raise ValueError(f"filter needs the prompts' targets, which metric {self.asks!r} does not use")
            if keep == "preferred" and self.metric not in ("auto", "difference"):
                raise ValueError(f"filter 'preferred' needs foils, which metric {self.metric!r} does not use")

    def _check_concepts(self) -> None:
        if self.concepts is None or self.input.task is not None:  # whose labels are known when its prompts are
            return
        for name in self.concepts.names:
            if name not in self.input.labels:
                raise ValueError(f"concepts needs the label {name!r}, which input.labels does not keep: add it there")

    def settings(self) -> Settings:
        """How nodes are attributed.

        Raises:
            JobError: settings that do not go together.
        """
        return settings(
            method=self.method,
            baseline=self.baseline,
            basis=self.basis,
            rules=self.rules,
            steps=self.steps,
            metric=self.metric,
            top_k=self.top_k,
            share=self.share,
            of=self.of,
            seed=self.seed,
        )

    @property
    def asks(self) -> str:
        """The metric that prompts are asked: what `of` and `share` stand for; ``auto`` where each prompt says it."""
        return self.of.kind if self.of is not None else "share" if self.share is not None else self.metric

    def numbers(self) -> dict[str, Any]:
        found = super().numbers()
        if self.evaluate is not None and not self.evaluate.edges:  # runs from before curves of edges go on
            del found["evaluate"]["edges"]
        return found

    def leaving_out(self, record: Mapping[str, Any]) -> DatasetJob:
        """The job with the neurons in `exclude` that its run's record says are always on, where they are left out; once
        the record says of which model they are, those that are named by their experts by their numbers."""
        job = self.numbered(numbering_in(record, self.basis)) if record.get("model") else self
        if self.always_on is None or not self.always_on.leave_out:
            return job
        found = ((one["layer"], one["neuron"]) for one in record.get("always_on", {}).get("neurons", ()))
        return job.model_copy(update={"exclude": (*job.exclude, *(one for one in found if one not in job.exclude))})

    def numbered(self, numbering: Numbering) -> DatasetJob:
        """The job with every neuron in `exclude` as (layer, neuron).

        Raises:
            JobError: an expert, or a neuron of one, that the model does not have.
        """
        if not any(len(one) == 3 for one in self.exclude):
            return self
        return self.model_copy(update={"exclude": tuple(dict.fromkeys(map(numbering.of_parts, self.exclude)))})

    def selection(self) -> dict[str, Any]:
        """The arguments of `tracer.trace` that say which nodes are kept."""
        return {name: getattr(self, name) for name in ("nodes", "threshold", "mass", "skip_first", "exclude")}

    def pruning_rules(self) -> Pruning | None:
        """Which edges are kept; None for the default.

        Raises:
            JobError: a rule out of range.
        """
        return None if self.pruning is None else Pruning(**self.pruning.model_dump())

    @property
    def links_circuit(self) -> bool:
        """Whether the circuit of the whole dataset gets edges."""
        return self.edges and self.circuit != "none"

    @property
    def ends_with_model(self) -> bool:
        """Whether the end of the run needs the model: see runs/units/ending.py."""
        asked = (self.evaluate, self.quality, self.links_circuit, self.supernodes, self.tokens, self.steering)
        return any(asked)

    @property
    def source(self) -> Source:
        """`input`, with the job's own limit."""
        return self.input if self.limit is None else self.input.model_copy(update={"limit": self.limit})


# ------------------------------------------------------------------------------------------------ exemplars


class ExemplarsJob(_ModelOptions):
    """Where in a corpus chosen neurons are strong: exemplars, and how their values are spread. Forward passes only.

    Attributes:
        model, revision, adapter, gguf_file, dtype, device, device_map, attention: as in `tracer.load`.
        input: the documents: texts or token ids, of any length. limit: only the first so many.
        shard_size: documents in one unit of work.
        neurons: LAYER/NEURON, in the basis ``activation``. of: instead, the `top` strongest neurons (100 if None) of a
            run folder: of a dataset's circuit, or a prompt's.
        exemplars: of each neuron and sign the strongest documents. quantiles: of documents' peaks, in percent, of each
            of which `per_quantile` exemplars are drawn with `seed`.
        window: tokens that the model reads at a time; 128, or its context if that is shorter. around: tokens shown on
            either side of a peak.
        skip_first: leave the first token of every window out; if None, only where it is the beginning-of-sequence
            token, at which many neurons of many models are as strong as nowhere else.
        active_share, active_above: from which size on a token counts as strong: a share of the neuron's largest (then
            an edge of the histogram), or a size.
        batch: documents computed at once; as memory allows if None.
        prompt_timeout, retries, max_error_rate: as of a dataset's job.
    """

    kind: Literal["exemplars"] = "exemplars"
    input: Source
    limit: Count | None = None
    shard_size: Count = 256
    neurons: Annotated[tuple[Neuron, ...], BeforeValidator(as_list)] = ()
    of: Name | None = None
    top: Annotated[int, Field(ge=1, le=MOST_NEURONS, strict=True)] | None = None
    exemplars: Annotated[int, Field(ge=1, le=1000, strict=True)] = 20
    quantiles: Annotated[tuple[Annotated[Real, Field(ge=0, le=100)], ...], BeforeValidator(as_list)] = (
        50.0,
        90.0,
        99.0,
    )
    per_quantile: Annotated[int, Field(ge=1, le=1000, strict=True)] = 4
    seed: Annotated[int, Field(ge=0, le=LARGEST, strict=True)] = 0
    window: Annotated[int, Field(ge=2, strict=True)] | None = None
    around: Annotated[int, Field(ge=0, le=1000, strict=True)] = 16
    skip_first: bool | None = None
    active_share: Real = Field(ACTIVE_SHARE, gt=0, le=1)
    active_above: Annotated[Real, Field(gt=0)] | None = None
    batch: Count | None = None
    prompt_timeout: Real = Field(600.0, gt=0)
    retries: Natural = 3
    max_error_rate: Real = Field(0.5, ge=0, le=1)

    @model_validator(mode="after")
    def _has_effect(self) -> ExemplarsJob:
        if bool(self.neurons) == (self.of is not None):
            raise ValueError("neurons are named (neurons: [3/120]) or those of a run (of: RUN): give one of them")
        if len(set(self.neurons)) < len(self.neurons):
            raise ValueError("neurons must name each once")
        if len(self.neurons) > MOST_NEURONS:
            raise ValueError(f"neurons are {len(self.neurons)}, at most {MOST_NEURONS} are looked at in one run")
        if self.neurons and self.top is not None:
            raise ValueError("top only has an effect with of, whose strongest neurons it takes")
        if self.limit is not None and self.input.limit is not None:
            raise ValueError("limit and input.limit say the same: leave one of them out")
        if self.input.filter is not None:
            raise ValueError("filter has no effect on documents, which are asked nothing")
        if len(set(self.quantiles)) < len(self.quantiles):
            raise ValueError("quantiles must name each once")
        if self.active_above is not None and self.active_share != ACTIVE_SHARE:
            raise ValueError("active_share has no effect with active_above")
        return self

    @property
    def source(self) -> Source:
        """`input`, with the job's own limit."""
        return self.input if self.limit is None else self.input.model_copy(update={"limit": self.limit})

    def window_of(self, context_length: int) -> int:
        """Tokens of a window, for a model that reads so many.

        Raises:
            JobError: it reads fewer than the window has.
        """
        if self.window is not None and self.window > context_length:
            rule = f"the model reads at most {context_length} tokens"
            raise JobError(option("window", self.window), rule, "use no more")
        return self.window or min(WINDOW, context_length)


# ------------------------------------------------------------------------------------------------ the benchmark


class PairFiles(Record):
    """A set of pairs of one's own: JSON lines as Marks et al. write them.

    Attributes:
        name: of the set, in tables and file names. train, test: the files.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] = "pairs"
    train: Name
    test: Name


class Combination(NamedTuple):
    """What a benchmark measures apart; `rules` is a variant of ``relp``, and ``all`` of any other method."""

    structure: str
    method: str
    basis: str
    baseline: str
    rules: str = "all"

    @property
    def way(self) -> str:
        """The method, with its variant if it has one: ``relp linear-gate``."""
        return self.method if self.rules == "all" else f"{self.method} {self.rules}"

    def __str__(self) -> str:
        return "/".join(self[:4] if self.rules == "all" else self)


def _several(value: Any) -> Any:
    """One set of files is a list of one."""
    return [value] if isinstance(value, Mapping | PairFiles) else value


class BenchmarkJob(_ModelOptions):
    """The agreement benchmark: every structure x method x basis x baseline, found on train pairs, tested on others.

    Attributes:
        model, revision, adapter, gguf_file, dtype, device, device_map, attention: as in `tracer.load`.
        task: the built-in pairs, of these `structures` of sentences. input: pairs of one's own instead, of one set or
            several.
        train, test: pairs of each structure; of a file the first so many that the model can be asked.
        allow_overlap: test on prompts that are trained on as well, as in Marks et al.'s own files; every result says
            how many there are.
        methods, bases, baselines: as in `tracer.attribute`; a method is combined with the baselines that have an effect
            on it, and one that has none (``random``) runs once.
        rules: variants of ``relp``, each measured apart: ``all``, ``no-half``, ``linear-gate``, or lists of rules.
        ablation: as in `tracer.evaluate`; ``mean`` and ``resample`` take the patch side of the test pairs.
        sizes: nodes of the circuits, rising. Those above all nodes of a structure are left out there; MIB's shares of
            all nodes are added, for CPR and CMD.
        rankings: ``absolute``, strongest attribution first; ``signed``, largest positive attribution first.
        steps: of the path methods.
        seed: of the pairs, the method ``random``, the random control and the intervals.
        filter: only pairs that the model answers so, of train and of test: see `Source`.
    """

    NEW: ClassVar[tuple[str, ...]] = (*_ModelOptions.NEW, "rules", "filter")

    kind: Literal["benchmark"] = "benchmark"
    task: Literal["sva"] | None = None
    input: Annotated[tuple[PairFiles, ...], BeforeValidator(_several)] | None = None
    structures: Annotated[tuple[Structure, ...], BeforeValidator(as_list)] = get_args(Structure)
    train: Count = 300
    test: Annotated[int, Field(ge=2, strict=True)] = 40
    methods: Annotated[tuple[Method, ...], BeforeValidator(as_list)]
    bases: Annotated[tuple[Basis, ...], BeforeValidator(as_list)] = ("activation", "output")
    baselines: Annotated[tuple[Baseline, ...], BeforeValidator(as_list)] = ("counterfactual",)
    rules: Annotated[tuple[str, ...], BeforeValidator(_variants)] = EVERY_RULE
    ablation: Ablation = "mean"
    sizes: Sizes
    rankings: Annotated[tuple[Ranking, ...], BeforeValidator(as_list)] = get_args(Ranking)
    steps: Count = DEFAULT_STEPS
    seed: Natural = 0
    allow_overlap: bool = False
    filter: Keep | None = None

    @model_validator(mode="after")
    def _has_effect(self) -> BenchmarkJob:
        if (self.task is None) == (self.input is None):
            raise ValueError("pairs come from the built-in task (task: sva) or from files (input): give one of them")
        if self.input is not None and self.structures != get_args(Structure):
            raise ValueError("structures has no effect with input, whose sets have names")
        if self.input is not None and (not self.input or len(set(self.sets)) < len(self.sets)):
            raise ValueError("input must name at least one set of pairs, each by a name of its own")
        for name in ("structures", "methods", "bases", "baselines", "rules", "rankings"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must name at least one, each once")
        _check_sizes(self.sizes)
        if self.steps != DEFAULT_STEPS and not PATH_METHODS & set(self.methods):
            raise ValueError(f"steps only have an effect with {', '.join(sorted(PATH_METHODS))}")
        if self.rules != EVERY_RULE and not RULED_METHODS & set(self.methods):
            raise ValueError("rules only have an effect with method relp, which is not among the methods")
        for method in self.methods:
            if not self.baselines_of(method):
                raise ValueError(f"none of the baselines has an effect on method {method!r}")
        return self

    @property
    def sets(self) -> tuple[str, ...]:
        """The names of what is measured apart: structures of sentences, or sets of one's own."""
        return self.structures if self.input is None else tuple(one.name for one in self.input)

    @property
    def files(self) -> dict[str, PairFiles]:
        """The files of each set of one's own."""
        return {one.name: one for one in self.input or ()}

    def baselines_of(self, method: str) -> tuple[str, ...]:
        """The baselines a method is combined with."""
        if method == "random":
            return (NO_BASELINE,)
        return tuple(baseline for baseline in self.baselines if _allowed(method, baseline))

    def combinations(self) -> list[Combination]:
        """Everything that is run, in order."""
        return [
            Combination(structure, method, basis, baseline, rules)
            for structure in self.sets
            for basis in self.bases
            for method in self.methods
            for rules in (self.rules if method in RULED_METHODS else EVERY_RULE)
            for baseline in self.baselines_of(method)
        ]


def _allowed(method: str, baseline: str) -> bool:
    try:
        settings(method=method, baseline=baseline)
    except JobError:
        return False
    return True


# ------------------------------------------------------------------------------------------------ revisions


class CompareRules(Record):
    """How the parts of a run over revisions are compared, as in `tracer.compare`.

    Attributes:
        positions: nodes are matched at their positions. groups: a file of supernodes that are followed.
        permutations, seed: of the tests and intervals.
    """

    positions: bool = False
    groups: Name | None = None
    permutations: Annotated[int, Field(ge=99, le=2**31, strict=True)] = 10_000
    seed: Natural = 0


class RevisionsJob(Record):
    """One dataset's job on several weights of one architecture, each a run of its own, and what differs between them.

    Attributes:
        revisions: of the job's model, such as ``step1000``, in their order. checkpoints: instead, models: folders, or
            ids. adapters: instead, adapters (LoRA), which are compared with the model without.
        trace: the dataset's job, as `DatasetJob`.
        values: keep every neuron's attribution on every prompt, so that nodes are compared that only one keeps.
        compare: how they are compared.
    """

    kind: Literal["revisions"] = "revisions"
    revisions: Names = ()
    checkpoints: Names = ()
    adapters: Names = ()
    trace: DatasetJob
    values: bool = True
    compare: CompareRules = CompareRules()

    @model_validator(mode="after")
    def _has_effect(self) -> RevisionsJob:
        given = {name: value for name in ("revisions", "checkpoints", "adapters") if (value := getattr(self, name))}
        if len(given) != 1:
            raise ValueError("a list of revisions, of checkpoints or of adapters is needed: give one of them")
        ((name, value),) = given.items()
        if len(set(value)) < len(value):
            raise ValueError(f"{name} must name each once")
        if len(value) < 2 and name != "adapters":
            raise ValueError(f"{name} must name two or more, which are compared")
        own = {"revisions": ("revision",), "checkpoints": ("model", "revision"), "adapters": ("adapter",)}[name]
        for key in own:
            if getattr(self.trace, key) != type(self.trace).model_fields[key].default:
                raise ValueError(f"trace.{key} has no effect with {name}, which name it")
        if self.trace.remote and name == "adapters":
            raise ValueError("adapters cannot be merged into weights on a server: leave them out, or trace.remote")
        return self

    def parts(self) -> dict[str, DatasetJob]:
        """The job of each part, by its name, which is that of its folder."""
        if self.checkpoints:
            changes: dict[str, dict[str, Any]] = {one: {"model": one} for one in self.checkpoints}
        elif self.adapters:
            changes = {"base": {}} | {one: {"adapter": one} for one in self.adapters}
        else:
            changes = {one: {"revision": one} for one in self.revisions}
        same = {"values": self.values or self.trace.values}
        names = _folder_names(list(changes))
        each = zip(names, changes.values(), strict=True)
        return {name: self.trace.model_copy(update=same | change) for name, change in each}

    def numbers(self) -> dict[str, Any]:
        """What decides the numbers of every part and of their comparison, but for which parts there are."""
        whole = self.trace.numbers() | {"values": self.values or self.trace.values}
        return {"trace": whole, "compare": self.compare.model_dump(mode="json")}


def _folder_names(given: Sequence[str]) -> list[str]:
    """Names of folders by which the parts are told apart: the last parts of paths, as many as it takes."""
    split, names = [one.rstrip("/").split("/") for one in given], list[str]()
    for count in range(1, max(map(len, split)) + 1):
        names = [re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts[-count:])).strip(".") or "part" for parts in split]
        if len(set(names)) == len(names):
            return names
    return [f"{name}-{number}" for number, name in enumerate(names, 1)]


Job = BenchmarkJob | DatasetJob | ExemplarsJob
AnyJob = Job | RevisionsJob

# ---------------------------------------------------------------------------------------------------- reading

_KINDS: dict[str, type[BenchmarkJob] | type[DatasetJob] | type[ExemplarsJob] | type[RevisionsJob]] = {
    "benchmark": BenchmarkJob,
    "dataset": DatasetJob,
    "exemplars": ExemplarsJob,
    "revisions": RevisionsJob,
}

_EXAMPLES = "see jobs/dataset.yaml, or have one written by 'tracer init'"

_SOURCE: dict[str, Any] = {**dict.fromkeys(Source.model_fields), "columns": dict.fromkeys(ROW_FIELDS)}
_NESTED: dict[str, dict[str, Any]] = {
    "input": _SOURCE,
    "reference": _SOURCE,
    "evaluate": {**dict.fromkeys(Evaluate.model_fields), "test": _SOURCE, "reference": _SOURCE},
    "pruning": dict.fromkeys(PruningRules.model_fields),
    "supernodes": dict.fromkeys(Asked.model_fields),
    "always_on": {**dict.fromkeys(AlwaysOnRules.model_fields), "unrelated": _SOURCE},
    "concepts": dict.fromkeys(ConceptRules.model_fields),
    "steering": {**dict.fromkeys(SteeringRules.model_fields), "prompts": _SOURCE},
}
_KEYS: dict[str, dict[str, Any]] = {
    "benchmark": {**dict.fromkeys(BenchmarkJob.model_fields), "input": dict.fromkeys(PairFiles.model_fields)},
    "dataset": {**dict.fromkeys(DatasetJob.model_fields), **_NESTED},
    "exemplars": {**dict.fromkeys(ExemplarsJob.model_fields), "input": _SOURCE},
    "revisions": {
        **dict.fromkeys(RevisionsJob.model_fields),
        "trace": {**dict.fromkeys(DatasetJob.model_fields), **_NESTED},
        "compare": dict.fromkeys(CompareRules.model_fields),
    },
}
"""The keys of each kind of job; those that hold keys themselves with theirs."""


def _switch_sources(content: dict[str, Any], changes: Sequence[str]) -> None:
    """Where a change gives prompts another kind of source, what only the kind before it has goes: with
    ``input.path=x.jsonl`` a job's ``input: {task: sva, structure: nounpp}`` is that file."""
    names = [text.partition("=")[0].strip() for text in changes]
    for name in names:
        *outer, kind = name.split(".")
        source: Any = content
        for part in outer:
            source = source.get(part) if isinstance(source, Mapping) else None
        if not (outer and kind in TAKES and isinstance(source, dict)):
            continue
        for other in TAKES.keys() & source.keys() - {kind}:
            for key in ({other} | TAKES[other]) - TAKES[kind]:
                if ".".join((*outer, key)) not in names:
                    source.pop(key, None)


def load_job(job: str | Path | Mapping[str, Any] | AnyJob, overrides: Sequence[str] = ()) -> AnyJob:
    """A job from a YAML file, a mapping or a record, with ``key=value`` overrides whose values are YAML as well.

    A key of a record within the job is dotted: ``input.limit=100``, ``input.columns.text=prompt``.

    Raises:
        JobError: an unreadable file, an unknown key (the known ones are named), or an invalid value.
    """
    where = f"job {quoted(str(job), 300)}" if isinstance(job, str | Path) else "job"
    if isinstance(job, BaseModel):
        if not overrides:
            return job
        content = {"kind": job.kind, **job.model_dump(exclude_unset=True)}
    else:
        content = copy.deepcopy(dict(job)) if isinstance(job, Mapping) else parsed(Path(job), where)
    for text in [overrides] if isinstance(overrides, str) else overrides:
        override(content, text)
    _switch_sources(content, [overrides] if isinstance(overrides, str) else overrides)
    kind = content.get("kind")
    if kind is None:
        raise JobError(where, "has no kind", f"give it kind: {' or kind: '.join(_KINDS)}")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise JobError(f"kind={quoted(kind)}", f"must be {' or '.join(_KINDS)}", meant(kind, _KINDS) or _EXAMPLES)
    check_keys(content, _KEYS[kind], f"an {kind} job" if kind[0] in "aeiou" else f"a {kind} job")
    try:
        return _KINDS[kind].model_validate(content)
    except ValidationError as error:
        raise as_job_error(error, where) from None
