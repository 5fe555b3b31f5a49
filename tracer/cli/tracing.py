"""The verb trace: its options, what is checked before a model is loaded, and what is printed and saved.

Knows which arguments of `tracer.trace` the options are. Refuses to know how a circuit is traced.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from tracer import choices
from tracer.cli import output, terminal
from tracer.cli.graphs import show_graph
from tracer.cli.loading import Adapter, Device, GgufFile, There
from tracer.cli.options import MOST, Bos, Chat, Format, Overwrite, Shown, flat, lines, numbers
from tracer.errors import JobError, RunError, option, quoted
from tracer.experts import FORMS, parse

if TYPE_CHECKING:
    from tracer.attribution.pruning import Pruning
    from tracer.circuit.circuit import Circuit, Graph
    from tracer.prompts import Prompt
    from tracer.settings import Settings


@dataclass(frozen=True, kw_only=True)
class Question:
    """The prompt, and what is asked of it."""

    PANEL: ClassVar[str] = "Prompt"

    text: Annotated[str | None, typer.Argument(help="The prompt; or give --token-ids.", show_default=False)] = None
    target: Annotated[
        list[str] | None,
        typer.Option(
            help='Token asked about, with its space: " are". Repeat for several. Default: the model\'s own top token.'
        ),
    ] = None
    foil: Annotated[list[str] | None, typer.Option(help="Wrong token; the metric becomes the logit difference.")] = None
    answer: Annotated[
        str | None,
        typer.Option(
            help='Answer of any number of tokens, with its space: " New York". It is read behind the prompt; the '
            "metric is its log-probability (with --metric logit the sum of its logits, which has edges)."
        ),
    ] = None
    counterfactual: Annotated[
        str | None, typer.Option(help="Paired prompt of equal length: the baseline, unless --baseline says another.")
    ] = None
    token_ids: Annotated[str | None, typer.Option(help="The prompt as ids: '1,351,95'.")] = None
    positions: Annotated[
        str | None, typer.Option(help="Where the logits are read: '-1' or '3,5'. Default: the last.")
    ] = None
    rollout: Annotated[
        int | None,
        typer.Option(
            help="Ask about the model's own N-th next token, after its own N - 1 before it, instead of a target.",
            min=1,
            max=MOST,
        ),
    ] = None
    bos: Bos = False
    chat: Chat

    def prompt(self) -> Prompt:
        """The prompt that `tracer.trace` takes, before a rollout."""
        from tracer.prompts import Prompt

        if self.rollout is not None and self.target:
            raise JobError("--rollout and --target", "both say what is asked about", "give one of them")
        if self.rollout is not None and self.answer is not None:
            raise JobError("--rollout and --answer", "both say what is asked about", "give one of them")
        prompt = Prompt(
            text=self.text,
            token_ids=numbers(self.token_ids, "--token-ids"),
            target=self.target or None,
            foil=self.foil or None,
            counterfactual=self.counterfactual,
            positions=numbers(self.positions, "--positions"),
            answer=self.answer,
            bos=self.bos,
        )
        return self.chat.asked(prompt)

    def rolled_out(self, model: Any, prompt: Prompt) -> Prompt:
        """The prompt with the model's own continuation, where that is asked for."""
        import tracer

        return prompt if self.rollout is None else tracer.rollout(model, prompt, self.rollout)


@dataclass(frozen=True)
class Source:
    """The model that is traced."""

    PANEL: ClassVar[str] = "Model"

    model: Annotated[str, typer.Option(help="'demo', a folder, a GGUF file, or a Hugging Face id.")] = "demo"
    revision: Annotated[str | None, typer.Option(help="Revision of a Hugging Face id.")] = None
    adapter: Adapter = None
    gguf_file: GgufFile = None
    device: Device = None
    device_map: Annotated[str | None, typer.Option(help="'auto' spreads the model over several GPUs.")] = None
    dtype: Annotated[choices.Dtype | None, typer.Option(help="Default: float32. Of these: {}.")] = None

    def load(self, there: There) -> Any:
        """The model, here or on NDIF."""
        options = {name: value for name, value in vars(self).items() if name != "model"}
        return there.load(self.model, **options)


@dataclass(frozen=True)
class How:
    """How nodes are attributed."""

    PANEL: ClassVar[str] = "Method"

    method: Annotated[choices.Method, typer.Option(help="How nodes are attributed: {}.")] = "relp"
    baseline: Annotated[
        choices.Baseline | None,
        typer.Option(help="What nodes are compared with: {}. Default: the counterfactual if there is one, else zero."),
    ] = None
    reference: Annotated[
        Path | None, typer.Option(help="Text file, a prompt a line: the mean baseline is taken over it.")
    ] = None
    basis: Annotated[
        choices.Basis,
        typer.Option(
            help="What nodes are: {} (neurons, outputs of the MLP, the stream behind each block, outputs of the "
            "attention). The last two have nodes and no edges."
        ),
    ] = "activation"
    metric: Annotated[choices.MetricName, typer.Option(help="What is explained: {}.")] = "auto"
    top_k: Annotated[
        int | None, typer.Option(help="Trace the sum of the model's top K logits instead of a target.", max=MOST)
    ] = None
    share: Annotated[
        float | None,
        typer.Option(
            help="Instead of a target, ask about the fewest of the model's own next tokens that hold this share of "
            "probability, each weighed by it: .9."
        ),
    ] = None
    of: Annotated[
        str | None,
        typer.Option(
            "--of",
            help="Instead of a target, what drives a neuron: 'L12 N345', of an expert 'L3 E17 N45', with a - behind it "
            "what drives it below 0.",
        ),
    ] = None
    direction: Annotated[
        Path | None,
        typer.Option(
            help="Instead of a target, a direction of the residual stream: a .safetensors, .json, .csv or .txt file of "
            "d_model numbers."
        ),
    ] = None
    direction_layer: Annotated[
        int | None,
        typer.Option(help="With --direction: read behind this block. Default: behind the final norm.", min=0, max=MOST),
    ] = None
    direction_name: Annotated[
        str | None, typer.Option(help="With --direction: which tensor of a .safetensors file.")
    ] = None
    rules: Annotated[
        str | None,
        typer.Option(
            help="RelP's rules: all, no-half, linear-gate, or those of norm, attention, activation, product (the half "
            "rule), gate (the linear gate) that are on, joined by +. Default: all."
        ),
    ] = None
    without_rule: Annotated[
        list[choices.PlainRule] | None, typer.Option(help="Switch off a RelP rule: {}. Repeatable.")
    ] = None
    steps: Annotated[
        int, typer.Option(help="Interpolation steps of ig, conductance, ig-activation, relp-ig.", max=MOST)
    ] = 10
    seed: Annotated[int, typer.Option(help="Of the method random.", max=MOST)] = 0

    def check(self) -> None:
        """Refuse a metric beside what is one, and what has no effect without a direction."""
        names = ("top_k", "share", "of", "direction")
        given = [option(name) for name in names if getattr(self, name) is not None]
        if self.metric != "auto":
            given = [f"--metric {self.metric}", *given]
        if len(given) > 1 and given != ["--metric share", "--share"]:
            raise JobError(given[0], f"has no effect with {given[1]}", "leave one of them out")
        for name in ("direction_layer", "direction_name"):
            if getattr(self, name) is not None and self.direction is None:
                raise JobError(option(name, getattr(self, name)), "has no effect without --direction", "leave it out")

    def _of(self) -> Any:
        """What is asked about inside the model."""
        from tracer.attribution.targets import direction, target

        if self.direction is None:
            return target(self.of)
        return direction(self.direction, self.direction_layer, name=self.direction_name)

    def arguments(self) -> dict[str, Any]:
        """As `tracer.trace` takes it, but for the reference."""
        metric, top_k = (self.metric, 5) if self.top_k is None else ("topk", self.top_k)
        given = {name: getattr(self, name) for name in ("method", "baseline", "basis", "steps", "seed")}
        return given | {
            "rules": self._rules(),
            "metric": metric,
            "top_k": top_k,
            "share": self.share,
            "of": self._of(),
        }

    def _rules(self) -> frozenset[str] | None:
        from tracer.settings import RULED_METHODS, RULES, rules_of

        off = self.without_rule
        if self.rules is not None:
            if off or self.method not in RULED_METHODS:
                what = f"with --without-rule {off[0]}" if off else f"with method {self.method!r}"
                raise JobError(f"--rules {self.rules}", f"has no effect {what}", "leave one of them out")
            try:
                return rules_of(self.rules)
            except ValueError as error:
                rule, _, _ = str(error).removeprefix("rules ").partition(", not ")
                raise JobError(f"--rules {quoted(self.rules)}", rule, "choose among them") from None
        if not off:
            return None
        if unknown := sorted(set(off) - RULES):
            raise JobError(f"--without-rule {unknown[0]}", f"must be one of {', '.join(sorted(RULES))}", "choose one")
        if self.method not in RULED_METHODS:
            raise JobError(f"--without-rule {off[0]}", f"has no effect with method {self.method!r}", "leave it out")
        return RULES - frozenset(off)


@dataclass(frozen=True)
class Edges:
    """Which edges are kept."""

    PANEL: ClassVar[str] = "Selection"

    edge_share: Annotated[
        float | None, typer.Option(help="Keep edges with at least this |share| of their target. Default: .01.")
    ] = None
    edge_attribution: Annotated[
        float | None, typer.Option(help="Keep edges with at least this |attribution|, in logits.")
    ] = None
    top_edges: Annotated[int | None, typer.Option(help="Keep at most this many edges.", max=MOST)] = None
    node_influence: Annotated[
        float | None, typer.Option(help="Keep the fewest nodes with this share of all influence (usual: .8).")
    ] = None
    edge_influence: Annotated[
        float | None, typer.Option(help="Keep the fewest edges with this share of the influence (usual: .98).")
    ] = None
    drop_dangling: Annotated[
        bool, typer.Option("--drop-dangling", help="Drop nodes that no kept edge leads into, or none out of.")
    ] = False

    def pruning(self) -> Pruning | None:
        """The rules that were given; None where none was, so that --no-edges can refuse them."""
        from tracer.attribution.pruning import Pruning

        asked = {
            "share": self.edge_share,
            "attribution": self.edge_attribution,
            "top": self.top_edges,
            "node_influence": self.node_influence,
            "edge_influence": self.edge_influence,
            "drop_dangling": self.drop_dangling or None,
        }
        given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
        return Pruning(**given) if given else None


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Which nodes are kept, and which edges between them."""

    PANEL: ClassVar[str] = "Selection"

    nodes: Annotated[
        int | None,
        typer.Option(
            help="Nodes to keep, strongest first. Default: 200, unless --threshold or --mass is given.", max=MOST
        ),
    ] = None
    threshold: Annotated[
        float | None, typer.Option(help="Keep |attribution| >= this share of |metric| (paper: .005).")
    ] = None
    mass: Annotated[float | None, typer.Option(help="Keep the fewest nodes with this share of all |attribution|.")] = (
        None
    )
    skip_first: Annotated[bool, typer.Option("--skip-first", help="Leave out position 0 (BOS).")] = False
    exclude: Annotated[list[str] | None, typer.Option(help=f"A neuron never taken, as {FORMS}. Repeatable.")] = None
    without_always_on: Annotated[
        Path | None,
        typer.Option(
            help="Text file, an unrelated prompt a line: neurons that are strong there too, and do nothing, are left "
            "out and named."
        ),
    ] = None
    edges: Annotated[
        bool | None, typer.Option("--edges/--no-edges", help="Trace the direct edges between the nodes kept.")
    ] = None
    profiles: Annotated[
        bool,
        typer.Option(
            "--profiles",
            help="Keep each node's attribution profile: what every token does to it, and it to each target.",
        ),
    ] = False
    pruned: Edges

    def arguments(self) -> dict[str, Any]:
        """As `tracer.trace` takes it, but for positions and neurons that are left out."""
        given = {name: getattr(self, name) for name in ("nodes", "threshold", "mass", "edges", "profiles")}
        return given | {"pruning": self.pruned.pruning()}

    def unrelated(self, settings: Settings, asked: Question) -> list[Prompt] | None:
        """The prompts on which always-on neurons are looked for.

        Raises:
            JobError: fewer than two, or a baseline that they do not have.
        """
        found = lines(self.without_always_on, asked.bos, "--without-always-on", asked.chat)
        if found is None:
            return None
        if len(found) < 2:
            raise JobError(
                f"--without-always-on with {len(found)} prompt", "at least 2 are needed", "give more; 20 is usual"
            )
        if settings.baseline == "counterfactual":
            rule = "its lines have no counterfactuals, from which this prompt is traced"
            raise JobError("--without-always-on", rule, "leave it out, or give --baseline zero")
        return found


@dataclass(frozen=True)
class Saved:
    """Where the circuit is saved."""

    PANEL: ClassVar[str] = "Output"

    out: Annotated[
        str | None, typer.Option(help="Save the run folder here (Parquet and run.json): a path, s3:// or gs://.")
    ] = None
    overwrite: Overwrite = False
    tokens: Annotated[
        bool | None,
        typer.Option(
            "--tokens/--no-tokens",
            help="Read from the weights which tokens each neuron promotes: of all that are saved or, without --out, of "
            "those in the table. Default: where the weights are here, and nodes are of MLPs.",
        ),
    ] = None

    def check(self, mine: dict[str, Any]) -> None:
        """Refuse a folder that cannot be written, or holds another circuit than the one that is about to be traced, by
        what is known of it already."""
        from tracer.store import one_prompt

        if self.out is not None:
            one_prompt.check_writable(self.out, self.overwrite, partial(_can_be, mine=mine))

    def with_tokens(self, model: Any, circuit: Circuit, shown: Shown) -> Circuit:
        """The circuit with the tokens of its neurons: of all where it is saved or printed whole, else of those in the
        table."""
        from tracer.circuit.said import key_of
        from tracer.meaning import tokens

        asked = self.tokens
        if asked is None:
            there = model.remote is None and tokens.has_tokens(circuit.settings.basis)
            asked = there and tokens.is_readable(model)
        if not asked or (self.out is None and shown.style in (Format.csv, Format.tsv)):
            return circuit
        rows = circuit.neurons.to_pylist()
        if self.out is None and shown.style is Format.table:
            rows = rows[: shown.tall]
        return tokens.with_tokens(model, circuit, neurons=[key for row in rows for key in key_of(row)])

    def save(self, graph: Graph, style: Format) -> None:
        """Save a graph, and say where: beside the folder asked for, if that holds another run after all, for what was
        computed is not thrown away."""
        if self.out is None:
            return
        for number in itertools.count(2):
            place = self.out if number == 2 else f"{self.out.rstrip('/')}-{number - 1}"
            try:
                graph.save(place, self.overwrite)
            except RunError as error:
                if "holds another run" not in error.rule or number > 99:
                    raise
                terminal.note(str(error))
            else:
                output.also(style, f"saved to {place}; 'tracer show {place}' prints it again")
                return


@terminal.report_errors
@flat
def trace(question: Question, source: Source, how: How, kept: Kept, saved: Saved, shown: Shown, there: There) -> None:
    """Trace one prompt: which MLP neurons, at which positions, make the model say that.

    Example: tracer trace "The secretaries near the car" --target " are" --foil " is"
    """
    import tracer
    from tracer.attribution import trace as tracing
    from tracer.attribution.attribute import check_question
    from tracer.meaning.tokens import check_basis, check_readable

    prompt = question.prompt()
    how.check()
    others = lines(how.reference, question.bos, chat=question.chat)
    asked = how.arguments() | kept.arguments()
    named = [parse(name) for name in kept.exclude or ()]
    settings, _ = tracing.checked([prompt], **asked)
    check_question(prompt, settings, others)
    if saved.tokens:
        check_basis(settings.basis)
    unrelated = kept.unrelated(settings, question)
    mine = _known(prompt, settings, kept, question)
    saved.check(mine | {"model": {"name": source.model}})
    terminal.quiet()
    model = source.load(there)
    prompt = question.rolled_out(model, prompt)
    if saved.out is not None:
        saved.check(mine | {"model": {"fingerprint": model.fingerprint}})
    if saved.tokens:
        check_readable(model)
    left_out = [model.numbering(settings.basis).pair(neuron) for neuron in named]
    with terminal.ProgressBar(f"{how.method} on {source.model}") as bar:
        how_to: dict[str, Any] = {**asked, "skip_first": kept.skip_first, "reference": others, "progress": bar}
        circuit = tracer.trace(model, prompt, **how_to, exclude=left_out)
        if unrelated is not None:
            circuit = _without_always_on(model, prompt, circuit, unrelated, left_out, how_to)
    circuit = saved.with_tokens(model, circuit, shown)
    show_graph(circuit, shown)
    saved.save(circuit, shown.style)


def _without_always_on(
    model: Any,
    prompt: Prompt,
    circuit: Circuit,
    unrelated: list[Prompt],
    left_out: list[tuple[int, int]],
    how: dict[str, Any],
) -> Circuit:
    """The circuit traced again without the neurons that are always on, which are named in it; as it is if none is."""
    import tracer

    found = tracer.always_on(model, circuit, unrelated)
    if found:
        exclude = {*left_out, *((one.layer, one.neuron) for one in found)}
        circuit = tracer.trace(model, prompt, **how, exclude=exclude)
    said = f"{len(found)} always-on neurons are left out, found on {len(unrelated)} unrelated prompts"
    names = "; ".join(circuit.numbering.name(one.layer, one.neuron) for one in found[:5])
    names += "; ..." if found[5:] else ""
    evidence = [{name: value for name, value in vars(one).items() if name != "n_nodes"} for one in found]
    kept = {"always_on": {"prompts": len(unrelated), "neurons": evidence}}
    warnings = (*circuit.warnings, f"{said}: {names}" if found else said)
    return circuit.model_copy(update={"warnings": warnings, "notes": circuit.notes | kept})


def _known(prompt: Prompt, settings: Settings, kept: Kept, asked: Question) -> dict[str, Any]:
    """What a record will say of the circuit that is about to be traced; of its prompt nothing, where the model has a
    part in it."""
    from tracer.attribution.selection import node_limit

    nodes, threshold, mass = kept.nodes, kept.threshold, kept.mass
    given = prompt.text if prompt.text is not None else list(prompt.token_ids or ())
    return {
        "prompt": None if prompt.messages is not None or (asked.rollout or 1) > 1 else given,
        "settings": {name: value for name, value in settings.record().items() if name != "metric"},
        "selection": {
            "nodes": node_limit(nodes, threshold, mass),
            "threshold": threshold,
            "mass": mass,
            "profiles": kept.profiles or None,
        },
    }


def _can_be(there: dict[str, Any], mine: dict[str, Any]) -> bool:
    """Whether a saved run's record can be of the circuit that is about to be traced, by what is known of it already."""
    was = there.get("circuit") or {}
    parts = all(
        was.get(part, {}).get(name) == value for part in mine if part != "prompt" for name, value in mine[part].items()
    )
    return parts and mine["prompt"] in (None, was.get("text"), was.get("token_ids"))
