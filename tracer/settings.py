"""The settings of one attribution as a frozen, validated record.

Knows the names of methods, baselines, bases, metrics and RelP rules, which of them go together, and defaults that
several modules share; a setting that would have no effect is refused. Refuses to know any model, prompt or file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from math import isfinite
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError, model_serializer, model_validator

from tracer.choices import Ablation, Baseline, Basis, Method, MetricKind, Rule, SingleAblation
from tracer.errors import JobError, meant, quoted
from tracer.experts import DENSE, Experts, Neuron, Numbering
from tracer.records import LARGEST, Count, Natural, Record

METHODS: tuple[str, ...] = get_args(Method)
BASELINES: tuple[str, ...] = get_args(Baseline)
BASES: tuple[str, ...] = get_args(Basis)
METRICS: tuple[str, ...] = get_args(MetricKind)
ALL_RULES: tuple[str, ...] = get_args(Rule)
ABLATIONS: tuple[str, ...] = get_args(Ablation)
SINGLE_ABLATIONS: tuple[str, ...] = get_args(SingleAblation)
RULES: frozenset[str] = frozenset({"norm", "attention", "activation", "product"})
"""Those that are on by default: the paper's RelP."""
LINEAR_GATE: frozenset[str] = RULES - {"product"} | {"gate"}
"""The linear gate in the place of the half rule."""
LINEARISED = frozenset({RULES, LINEAR_GATE})
"""Sets of rules under which nothing but linear maps is left, so that relevance is conserved."""
VARIANTS: dict[str, frozenset[str]] = {"all": RULES, "no-half": RULES - {"product"}, "linear-gate": LINEAR_GATE}
"""Sets of rules that have a name."""
PATH_METHODS = frozenset({"ig", "conductance", "ig-activation", "relp-ig"})
RULED_METHODS = frozenset({"relp", "relp-ig"})
"""Methods whose gradients are those of the linearised model, so that rules have an effect on them."""
VALUE_TIMES_GRADIENT = frozenset({"relp", "grad", "ig", "ig-activation", "relp-ig"})
"""Methods whose attribution is the distance from the baseline times one gradient."""
EDGE_BASES = frozenset({"activation", "output"})
"""Bases whose nodes write beside one another, so that there are direct edges between them: what a block leaves in the
residual stream holds all that is before it, and what an attention writes is no node of the paths of method.md 4. Only
these come of an MLP, so that the weights say which tokens a neuron promotes."""
BASIS_NAMES: dict[str, str] = {
    "activation": "MLP activations",
    "output": "MLP outputs",
    "residual": "residual stream",
    "attention": "attention outputs",
}
"""Bases in words."""
DEFAULT_STEPS = 10
DEFAULT_TOP_K = 5
IN_FLIGHT = 4
"""Requests at a service at a time, by default."""

# Metrics that are read from inside the model, from what `Settings.of` names, and not from logits.
INSIDE_METRICS = frozenset({"neuron", "direction"})

# Metrics that are weighted sums of single targets, so that edges into those targets are edges into the metric.
SUMS_OF_TARGETS = frozenset({"logit", "difference", "topk", "share"}) | INSIDE_METRICS

# Metrics that are linear in logits or inside the model: only for these does a linearised model conserve relevance.
LINEAR_METRICS = SUMS_OF_TARGETS | {"centred"}

# Metrics whose tokens are the model's own, so that targets have no effect on them.
OWN_METRICS = frozenset({"topk", "share"}) | INSIDE_METRICS


class TargetNeuron(Record):
    """A neuron as what a circuit is of: the metric is its value, times its sign.

    Attributes:
        layer, neuron: which; `neuron` is its number in the layer, but of an `expert` without a `width`, as a person
            writes one, that in the expert.
        sign: 1, or -1 for what drives it below 0.
        expert: that it belongs to, of a mixture. width: neurons of an expert, once the model is known (`numbered`).
    """

    layer: int = Field(ge=0, le=LARGEST)
    neuron: int = Field(ge=0, le=LARGEST)
    sign: Literal[1, -1] = 1
    expert: Natural | None = None
    width: Count | None = None

    @model_serializer(mode="wrap")
    def _said(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Without an expert where it has none."""
        return {name: value for name, value in handler(self).items() if value is not None}

    @property
    def kind(self) -> Literal["neuron", "direction"]:
        """The metric that it makes."""
        return "neuron"

    @property
    def name(self) -> str:
        """As people write it: ``L12 N345``, of an expert ``L3 E17 N45``, with ``-`` behind it for its negative side."""
        inside = self.neuron - (self.expert or 0) * (self.width or 0)
        return f"{Neuron(self.layer, self.expert, inside)}{'-' if self.sign < 0 else ''}"

    @property
    def number(self) -> int:
        """Its number in the layer.

        Raises:
            ValueError: only the model knows it: see `numbered`.
        """
        if self.expert is not None and self.width is None:
            raise ValueError(f"the number of {self.name} is not known")
        return self.neuron

    def numbered(self, numbering: Numbering) -> TargetNeuron:
        """The same by its number in its layer, with its expert.

        Raises:
            JobError: an expert, or a neuron of one, that the model does not have.
        """
        if self.width is not None:
            return self
        number = numbering.number(Neuron(self.layer, self.expert, self.neuron))
        expert, width = numbering.expert(self.layer, number), numbering.width(self.layer)
        parts = {"neuron": number, "expert": expert, "width": None if expert is None else width}
        return self.model_copy(update=parts)


class TargetDirection(Record):
    """A direction as what a circuit is of: the metric is its product with a state of the model.

    Attributes:
        vector: its d_model coordinates, used as they are: of length 1 the metric is the state's length along it.
        layer: the state is the residual stream behind this block; None: what leaves the final norm, which the head's
            rows read (the unembedding's space).
        label: what it is called.
    """

    vector: tuple[float, ...] = Field(min_length=1)
    layer: int | None = Field(default=None, ge=0, le=LARGEST)
    label: str = "direction"

    @model_validator(mode="after")
    def _says_something(self) -> TargetDirection:
        if not all(map(isfinite, self.vector)) or not any(self.vector):
            raise ValueError("a direction must have finite coordinates, and one that is not 0")
        return self

    @property
    def kind(self) -> Literal["neuron", "direction"]:
        """The metric that it makes."""
        return "direction"

    @property
    def name(self) -> str:
        """What it is called, and where it is read."""
        return f"{self.label} {'behind the final norm' if self.layer is None else f'behind block {self.layer}'}"


class Settings(Record):
    """How nodes are attributed (method.md sections 2 and 3).

    Attributes:
        method: how the gradient is taken; ``relp`` is one pass over the linearised model.
        baseline: what a neuron is compared with.
        basis: ``activation`` (input of the down projection), ``output`` (its output), ``residual`` (what a block leaves
            in the residual stream) or ``attention`` (what an attention adds to it).
        metric: one number per prompt; ``auto`` is the logit difference with a foil, else the target logit.
        rules: the RelP rules that are on; empty unless the method is ``relp`` or ``relp-ig``. ``gate`` stands in the
            place of ``product``: one of them at most.
        steps: interpolation steps of `PATH_METHODS`.
        top_k: how many of the model's top tokens the metric ``topk`` sums.
        share: of the next token's probability: the metric ``share`` is of the fewest tokens that hold it.
        of: what the metrics ``neuron`` and ``direction`` are of, which stands for them.
        seed: of the method ``random``.
    """

    method: Method = "relp"
    baseline: Baseline = "zero"
    basis: Basis = "activation"
    metric: MetricKind = "auto"
    rules: frozenset[Rule] = frozenset()
    steps: int = Field(DEFAULT_STEPS, ge=1, le=LARGEST)
    top_k: int = Field(DEFAULT_TOP_K, ge=1, le=LARGEST)
    seed: int = Field(0, ge=0, le=LARGEST)
    share: float | None = Field(None, gt=0, lt=1)
    of: TargetNeuron | TargetDirection | None = None

    @model_serializer(mode="wrap")
    def _as_before_targets(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Without a key that says nothing, so that the fingerprints of circuits stay what they were."""
        kept = handler(self)
        return {name: value for name, value in kept.items() if name not in ("share", "of") or value is not None}

    @model_validator(mode="after")
    def _has_effect(self) -> Settings:
        if self.method not in RULED_METHODS and self.rules:
            raise ValueError(f"rules only have an effect with method 'relp' or 'relp-ig', not {self.method!r}")
        if self.of is not None and self.metric not in ("auto", self.of.kind):
            raise ValueError(f"metric has no effect with of={self.of.name!r}, which is one: not {self.metric!r}")
        if self.of is None and self.metric in INSIDE_METRICS:
            raise ValueError(f"metric {self.metric!r} needs of: what it is of")
        if self.share is not None and self.metric not in ("auto", "share"):
            raise ValueError(f"share only has an effect with metric 'share', not {self.metric!r}")
        if self.share is None and self.metric == "share":
            raise ValueError("metric 'share' needs share: how much of the probability")
        if self.share is not None and self.of is not None:
            raise ValueError("share and of each say what is asked about: leave one of them out")
        check_rules(self.rules)
        if self.method not in PATH_METHODS and self.steps != DEFAULT_STEPS:
            raise ValueError(f"steps only have an effect with {sorted(PATH_METHODS)}, not {self.method!r}")
        if self.metric != "topk" and self.top_k != DEFAULT_TOP_K:
            raise ValueError(f"top_k only has an effect with metric 'topk', not {self.metric!r}")
        if self.method != "random" and self.seed:
            raise ValueError(f"seed only has an effect with method 'random', not {self.method!r}")
        if self.method == "random" and self.baseline != "zero":
            raise ValueError("a baseline has no effect with method 'random'")
        if self.method == "conductance" and self.baseline == "mean":
            raise ValueError("the baseline 'mean' has no effect with method 'conductance'")
        return self

    def record(self) -> dict[str, Any]:
        """The settings as JSON holds them: rules in order, so that equal settings are equal text."""
        return self.model_dump(mode="json") | {"rules": sorted(self.rules)}

    @property
    def conserves(self) -> bool:
        """Whether relevance must be conserved on a bias-free model (method.md section 8, identity 2)."""
        return self.method == "relp" and self.rules in LINEARISED and self.metric in LINEAR_METRICS

    def numbered(self, numbering: Numbering) -> Settings:
        """With the neuron that they are `of` by its number in its layer.

        Raises:
            JobError: an expert, or a neuron of one, that the model does not have.
        """
        return (
            self.model_copy(update={"of": self.of.numbered(numbering)}) if isinstance(self.of, TargetNeuron) else self
        )

    @property
    def edge_rules(self) -> frozenset[str]:
        """The rules of the linearisation that edges are traced in, whatever the method."""
        return frozenset(self.rules) if self.method in RULED_METHODS else RULES


class WeightsFile(Record):
    """The GGUF file that a model's weights were read from.

    Attributes:
        file: its name in the model's folder or repository. sha256: of the whole file.
        types: of its tensors, that of most weights first: what they were dequantised from.
    """

    file: str
    sha256: str
    types: tuple[str, ...]

    @property
    def shown(self) -> str:
        """In words, for whoever reads a result."""
        verb = "read" if set(self.types) <= {"F32", "F16", "BF16", "F64"} else "dequantised"
        return f"{verb} from {', '.join(self.types)} ({self.file}, SHA-256 {self.sha256[:12]})"


class ModelRecord(Record):
    """Which model a circuit belongs to; `fingerprint` is a hash of a sample of its weights, an `adapter` merged, `gguf`
    the file that they were read from, if it was one; `experts` its mixtures, of whose neurons an expert has some."""

    name: str
    revision: str | None
    adapter: str | None = None
    gguf: WeightsFile | None = None
    family: str
    fingerprint: str
    dtype: str
    n_layers: int
    d_model: int
    d_mlp: int
    n_heads: int
    parallel: bool
    experts: tuple[Experts, ...] = ()

    @model_serializer(mode="wrap")
    def _as_before_adapters(self, handler: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
        """Without a key that says nothing, so that the fingerprints of circuits stay what they were."""
        kept = handler(self)
        return {name: value for name, value in kept.items() if name not in ("adapter", "gguf", "experts") or value}

    def numbering(self, basis: str = "activation") -> Numbering:
        """How its neurons are numbered; in the basis ``output`` no expert has any."""
        return Numbering(self.experts if basis == "activation" else ())

    @property
    def shown(self) -> str:
        """The model in words: its name, what is merged into it, and the file that its weights were read from."""
        merged = "" if self.adapter in (None, self.name) else f" with {self.adapter} merged"
        return f"{self.name}{merged}{'' if self.gguf is None else f', {self.gguf.shown}'}"

    def loading(self) -> dict[str, Any]:
        """The arguments of `tracer.load` beside the name that say which weights, those that are set."""
        file = None if self.gguf is None or self.name.endswith(".gguf") else self.gguf.file
        given = {"revision": self.revision, "gguf_file": file, "adapter": self.adapter}
        return {name: value for name, value in given.items() if value is not None}


def numbering_in(record: Mapping[str, Any], basis: str = "activation") -> Numbering:
    """How the neurons of a run's model are numbered, by the run's record; as of a dense model until it says which."""
    made = record.get("model")
    return DENSE if made is None else ModelRecord.model_validate(made).numbering(basis)


def check_rules(rules: Iterable[str]) -> None:
    """Refuse rules that say two things of one product.

    Raises:
        ValueError: the half rule and the linear gate are both among them.
    """
    if {"product", "gate"} <= frozenset(rules):
        raise ValueError("rules cannot have both 'product' and 'gate': each says what becomes of act(gate) * up")


def rules_of(name: str) -> frozenset[str]:
    """The RelP rules that a name stands for: that of one of `VARIANTS`, or rules joined by ``+``, or ``none``.

    Raises:
        ValueError: no such variant or rule, a rule twice, or rules that do not go together.
    """
    if name in VARIANTS:
        return VARIANTS[name]
    rules = [] if name == "none" else name.split("+")
    if len(set(rules)) < len(rules) or not set(rules) <= set(ALL_RULES):
        known = f"{', '.join(VARIANTS)}, none, or some of {', '.join(ALL_RULES)}, each once"
        raise ValueError(f"rules must be {known} and joined by +, not {quoted(name)}")
    check_rules(rules)
    return frozenset(rules)


def rules_name(rules: Iterable[str]) -> str:
    """The name of a set of rules, from which `rules_of` makes it."""
    given = frozenset(rules)
    named = next((name for name, one in VARIANTS.items() if one == given), None)
    return named or "+".join(rule for rule in ALL_RULES if rule in given) or "none"


def settings(*, rules: Iterable[str] | None = None, **values: Any) -> Settings:
    """`Settings` from arguments; `rules=None` means the default ones for `RULED_METHODS` and none elsewhere; a name out
    of `VARIANTS` its rules.

    Raises:
        JobError: an unknown name, a value out of range, or a setting without effect.
    """
    if isinstance(rules, str):
        if rules not in VARIANTS:
            rule = f"must be {', '.join(VARIANTS)} or a list of names"
            raise JobError(f"rules={rules!r}", rule, f"write rules=[{rules!r}]")
        rules = VARIANTS[rules]
    if rules is None:
        rules = RULES if values.get("method", "relp") in RULED_METHODS else ()
    try:
        return Settings(rules=frozenset(rules), **values)  # type: ignore[arg-type]
    except ValidationError as error:
        raise as_job_error(error, depth=1) from None


def as_job_error(error: ValidationError, where: str = "settings", depth: int | None = None) -> JobError:
    """The first problem of a pydantic error as value, rule, next step.

    Args:
        where: what was validated. depth: parts of a nested field's name that are shown; all of them if None.
    """
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"][:depth] if not str(part).startswith("literal["))
    if first["type"] == "missing":
        return JobError(where, f"has no {name}", "give it a value")
    rule = first["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    step = ""
    if first["type"] == "literal_error":
        rules = [one["msg"] for one in error.errors() if one["input"] == first["input"]]
        step = meant(first["input"], re.findall(r"'([^']*)'", " ".join(rules)))
    return JobError(
        f"{name}={quoted(first['input'])}" if name else where, rule, step or "change or leave out that setting"
    )
