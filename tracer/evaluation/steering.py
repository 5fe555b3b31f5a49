"""Steering: chosen nodes multiplied, set or added to (method.md section 6).

Knows which nodes are acted on and where, the random control, and what is said of the next token and of the text
generated after it. Refuses to know how nodes were chosen, nnsight (model/passes.py), and how a result is printed.
"""

from __future__ import annotations

import csv
import math
import operator
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, SupportsIndex, TypeGuard

import torch
from jaxtyping import Float
from torch import Tensor

from tracer.attribution.attribute import notes
from tracer.attribution.running import Running
from tracer.choices import Basis
from tracer.circuit import supernodes_file
from tracer.circuit.circuit import Graph, Traced
from tracer.circuit.from_run import read_graph
from tracer.errors import JobError, option, quoted, say
from tracer.evaluation.texts import Drawn, Generated, Judge, Samples, judged, sampled
from tracer.experts import Neuron, parse, parse_within
from tracer.model import passes
from tracer.model.model import Model
from tracer.model.named import AnyModel, model_of
from tracer.model.state import undisturbed
from tracer.prompts import Asked, Batch, Encoded, Prompt, Target, as_prompt, decode, encode
from tracer.records import is_list
from tracer.settings import BASES
from tracer.store.storage import is_remote
from tracer.system import jsontext, wholefile
from tracer.system.display import Plotted

TOP = 5
"""How many of the unsteered model's own top tokens are reported next to those asked about."""

Nodes = Graph | Sequence[Sequence[SupportsIndex | str | Neuron] | str]
"""A circuit or imported graph, (layer, position, neuron) triples, or (layer, neuron) pairs. A neuron of an expert may
also be ``"E17 N45"``, and a pair a text: ``"L3 E17 N45"`` or ``"3:17:45"``."""

_Written = tuple[int, int | None, int | Neuron]  # layer, position (None: every one), neuron
_Place = tuple[int, int | None, int]


@dataclass(frozen=True)
class Action:
    """What is done to a node's value: ``factor`` multiplies it, ``set`` replaces it, ``add`` is added to it."""

    kind: str
    amount: float

    @property
    def scale(self) -> float:
        """What the value is multiplied by."""
        return {"factor": self.amount, "set": 0.0, "add": 1.0}[self.kind]

    @property
    def shift(self) -> float:
        """What is then added."""
        return 0.0 if self.kind == "factor" else self.amount


@dataclass(frozen=True)
class Spread:
    """A number under the random control: over its draws."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Shift:
    """A number before and after steering, and under the random control; None without one."""

    before: float
    after: float
    control: Spread | None


@dataclass(frozen=True)
class Effect:
    """What steering did to one next token; its role is ``target``, ``foil``, ``asked`` or ``top``."""

    token: str
    token_id: int
    role: str
    probability: Shift
    logit: Shift


@dataclass(frozen=True, repr=False)
class Steering(Plotted):
    """What steering a set of nodes did to the next token and to the text generated after the prompt.

    Attributes:
        text, tokens: the prompt.
        action: what was done to each node.
        everywhere: whether at every position, generated ones included; else at the nodes' own.
        n_nodes: (position, neuron) pairs of the prompt that were acted on. n_neurons: unique (layer, neuron) pairs.
        per_layer: nodes acted on in each layer (neurons, where everywhere), in the control as well.
        effects: the target, the foil, the tokens asked for, then the unsteered model's top ones; each token once.
        before, after: the greedy next token, unsteered and steered. changed: whether they differ.
        control_changed: in how many of the `random` control draws the greedy next token changed.
        unsteered, steered, control: greedy text, the last of the first control draw; None where not asked for.
        samples: texts that were drawn beside these; None where not asked for.
        random, seed: draws of the control, and how they were drawn.
    """

    text: str
    tokens: tuple[str, ...]
    action: Action
    everywhere: bool
    n_nodes: int
    n_neurons: int
    per_layer: tuple[int, ...]
    effects: tuple[Effect, ...]
    before: str
    after: str
    changed: bool
    control_changed: int
    unsteered: Generated | None
    steered: Generated | None
    control: Generated | None
    random: int
    seed: int
    samples: Samples | None = None

    def to_pandas(self) -> Any:
        """A pandas DataFrame with a row for each token: `token`, `token_id`, `role`; `probability_before` and `_after`,
        `logit_before` and `_after`; and of random neurons `probability_control` and `logit_control` (the mean over
        draws), each with its `_low` and `_high`, NaN without draws."""
        import pandas

        return pandas.DataFrame([_effect_row(one) for one in self.effects])


def _effect_row(effect: Effect) -> dict[str, Any]:
    row: dict[str, Any] = {"token": effect.token, "token_id": effect.token_id, "role": effect.role}
    for name, shift in (("probability", effect.probability), ("logit", effect.logit)):
        row |= {f"{name}_before": shift.before, f"{name}_after": shift.after}
        spread = shift.control or Spread(math.nan, math.nan, math.nan)
        row |= {f"{name}_control": spread.mean, f"{name}_low": spread.low, f"{name}_high": spread.high}
    return row


@undisturbed()
def steer(
    model: AnyModel,
    nodes: Nodes,
    prompt: Asked,
    *,
    target: Target | None = None,
    foil: Target | None = None,
    bos: bool = False,
    factor: float | int | None = None,
    set_to: float | int | None = None,
    add: float | int | None = None,
    everywhere: bool = False,
    positions: Sequence[SupportsIndex] | None = None,
    top: int | None = None,
    basis: Basis | str | None = None,
    tokens: Target = (),
    max_new_tokens: int = 20,
    random: int = 5,
    seed: int = 0,
    temperature: float | int | None = None,
    top_p: float | int | None = None,
    n: int | None = None,
    sample_seed: int = 0,
    judge: Judge | None = None,
) -> Steering:
    """Act on a set of nodes and compare with the unsteered model and with equally many random neurons.

    A circuit's nodes and triples act at their own positions of the prompt; pairs act at every position, those of
    generated tokens included.

    Args:
        model: from `tracer.load`, or the name of a model (``"demo"``, a folder, a Hugging Face id), which is loaded and
            kept until a call names another.
        nodes: whose values change: a circuit; (layer, position, neuron) triples, or (layer, neuron) pairs, in which a
            neuron of an expert is ``"E17 N45"``; or such neurons as text, ``"L3 N345"``.
        prompt: a `tracer.Prompt` or its text. Its next token is reported; it need not be the one the circuit was traced
            on, but be long enough.
        target, foil, bos: of a prompt that is a text, as `tracer.Prompt` has them.
        factor: multiplies: 0 ablates, 2 amplifies, a negative one inverts. Exactly one of these three is given.
        set_to, add: replaces, or is added.
        everywhere: the neurons of a circuit or of triples act at every position too.
        positions: where the neurons act instead, as token indices (negative from the end).
        top: only the first `top` nodes, which are a circuit's strongest.
        basis: of nodes in a list; ``activation`` if None. A circuit knows its own.
        tokens: reported besides the target, the foil and the unsteered model's own top tokens.
        max_new_tokens: generated greedily; 0 for none.
        random: control draws: as many neurons in each layer at the same positions; 0 for none.
        seed: of the draws.
        temperature, top_p, n, sample_seed: any of these draws `n` texts (one if None) beside the greedy one, with and
            without steering: from probabilities at this temperature (1 if None; 0 is greedy), of the likeliest tokens
            whose probabilities reach `top_p` alone, text i with the generator of `sample_seed` + i.
        judge: called with each generated text, without the prompt; its number goes into the result.

    Returns:
        Probabilities and logits before and after, beside random neurons', and the texts; `Steering.plot` draws them.

    Raises:
        JobError: none or several actions, nodes that the model or the prompt does not have, logits no longer finite, a
            temperature or top_p out of range, a judge that fails.
    """
    model, prompt = model_of(model), as_prompt(prompt, target=target, foil=foil, bos=bos)
    action = planned(nodes, factor=factor, set_to=set_to, add=add, everywhere=everywhere, positions=positions, top=top)
    drawn = sampled(temperature, top_p, n, sample_seed, max_new_tokens)
    encoded, basis = _encoded(model, prompt, max_new_tokens, random), _basis(model, nodes, basis)
    there = Running.of(model, [encoded.token_ids], basis)
    places = _acted_on(model, encoded, nodes, there, basis, (top, everywhere, positions))
    run, draws = _Run(model, encoded, action, basis, judge), _draws(places, there, random, seed)
    logits = run.logits([[]])[0], run.logits([places])[0], run.logits(draws)
    return Steering(
        **_about(model, encoded, action, random, seed),
        **_counted(places, model.n_layers, len(encoded.token_ids)),
        effects=_effects(model, _asked(model, encoded, prompt, tokens), *logits),
        **_changed(model, *logits),
        **run.texts(places, draws, max_new_tokens, drawn),
    )


def _about(model: Model, encoded: Encoded, action: Action, random: int, seed: int) -> dict[str, Any]:
    """What was steered, and how."""
    tokens = tuple(decode(model, token) for token in encoded.token_ids)
    return {"text": encoded.text, "tokens": tokens, "action": action, "random": random, "seed": seed}


def planned(
    nodes: Nodes | None = None,
    *,
    factor: float | int | None = None,
    set_to: float | int | None = None,
    add: float | int | None = None,
    everywhere: bool = False,
    positions: Sequence[SupportsIndex] | None = None,
    top: int | None = None,
) -> Action:
    """What `steer` does to each node, and whether it can be, as far as that is known before there is a model.

    Args:
        nodes: None where they are not known yet; the others as of `steer`.

    Raises:
        JobError: none or several actions, no nodes, fewer than `top`, two places that contradict each other.
    """
    action = _action(factor=factor, set_to=set_to, add=add)
    if everywhere and positions is not None:
        value, rule = option("everywhere", True), f"and {option('positions')} contradict each other"
        raise JobError(value, rule, "give one of them")
    if nodes is not None:
        _places(nodes, top)
    return action


def read_nodes(
    path: str | Path, group: str | None = None
) -> Graph | list[tuple[int, int, int | Neuron]] | list[tuple[int, int | Neuron]]:
    """Nodes to steer from a file or a run folder.

    Args:
        path: a run folder, of one prompt or with a dataset's circuit; or JSON lines, or CSV with a header, with
            ``layer``, ``neuron`` and, in every row or in none, ``position``. Where there is an ``expert`` the neuron is
            that one's (by its number in it, or in the layer), and where there is a ``kind`` only rows of the kind
            ``neuron`` count; other fields are left alone. With `group` also a file of groups (supernodes.json).
        group: only the nodes of this group: of the run folder's supernodes, or of the file's.

    Returns:
        The folder's graph; triples in the file's order, or pairs where it has no positions.

    Raises:
        JobError: a file that cannot be read, or a row that is not a node. RunError: a folder that is not a run.
    """
    if is_remote(path) or Path(path).is_dir():
        return read_graph(path) if group is None else _group_of_run(path, group)
    path = Path(path)
    if group is not None:
        return _group_of_file(path, group)
    name = f"file {quoted(str(path), 300)}"
    try:
        text = wholefile.read(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise JobError(name, f"cannot be read ({reason})", "give JSON lines, CSV or a run folder") from error
    if f'"{supernodes_file.FORMAT}"' in text[:200]:
        names = ", ".join(quoted(one.name) for one in supernodes_file.read(path).groups)
        raise JobError(name, f"holds groups of nodes: {names}", f"choose one with {option('group')}")
    rows = _json_rows(text, name) if text.lstrip()[:1] == "{" else _csv_rows(text, name)
    found = [
        (place, *_neuron_of(row, place), row.get("position"))
        for place, row in rows
        if row.get("kind", "neuron") == "neuron"
    ]
    if not found:
        raise JobError(name, "holds no node", "give a row with layer, position and neuron for each")
    without = [place for place, _, _, position in found if position in (None, "")]
    if without and len(without) < len(found):
        raise JobError(without[0], "has no position, others have one", "give every row a position, or none")
    if without:
        return [(layer, neuron) for _, layer, neuron, _ in found]
    return [(layer, _whole(position, "position", place), neuron) for place, layer, neuron, position in found]


# ------------------------------------------------------------------------------------------- what is steered


def _action(**given: float | int | None) -> Action:
    """The one action that was given."""
    chosen = [(name, amount) for name, amount in given.items() if amount is not None]
    if len(chosen) != 1:
        names = " and ".join(option(name, amount) for name, amount in chosen) or "no action"
        rule = f"exactly one of {option('factor')}, {option('set_to')} and {option('add')} is needed"
        examples = (option("factor", 0), option("factor", 2), option("factor", -1))
        raise JobError(names, rule, "give one: {} ablates, {} amplifies, {} inverts".format(*examples))
    name, amount = chosen[0]
    number = isinstance(amount, int | float) and not isinstance(amount, bool)
    if not number or not abs(amount) <= sys.float_info.max:
        raise JobError(f"{option(name)} {quoted(amount)}", "must be a finite number", "use one such as 0, 2 or -1")
    return Action(name.removesuffix("_to"), float(amount))


def _encoded(model: Model, prompt: Prompt, max_new_tokens: int, random: int) -> Encoded:
    """The prompt, checked together with what is asked of it; what should be known of it is said."""
    if not isinstance(prompt, Prompt):
        raise JobError(f"prompt {quoted(prompt)}", "must be a tracer.Prompt", "write tracer.Prompt(...)")
    for name, value in (("max_new_tokens", max_new_tokens), ("random", random)):
        if not is_index(value) or value < 0:
            raise JobError(f"{name}={quoted(value)}", "must be a whole number, 0 or more", "use 0 for none")
    encoded = encode(prompt, model)
    length = len(encoded.token_ids)
    if encoded.positions != (length - 1,):
        rule = "steering reports the token after the prompt, nowhere else"
        raise JobError(f"positions {list(encoded.positions)}", rule, "leave out the prompt's positions")
    if length + max_new_tokens > model.context_length:
        rule = f"the prompt's {length} tokens and these are more than the {model.context_length} the model reads"
        raise JobError(f"max_new_tokens={max_new_tokens}", rule, f"use at most {model.context_length - length}")
    if max_new_tokens and model.looks_ahead:
        rule = "attention looks at later tokens, so that every new one would change all before"
        raise JobError(option("max_new_tokens", max_new_tokens), rule, f"use {option('max_new_tokens', 0)}")
    border = next((border for border in model.tables if length <= border < length + max_new_tokens - 1), None)
    if max_new_tokens and border is not None:
        rule = f"the model reads texts of more than {border} tokens by other position tables, which changes all before"
        step = f"use {option('max_new_tokens', border - length + 1)} or less, or a longer prompt"
        raise JobError(option("max_new_tokens", max_new_tokens), rule, step)
    say(notes((encoded,), model))
    return encoded


def _basis(model: Model, nodes: Nodes, basis: str | None) -> str:
    """What the nodes' numbers count; and a circuit must be the model's own."""
    if basis not in (None, *BASES):
        raise JobError(f"basis={quoted(basis)}", f"must be one of {', '.join(BASES)}", "choose one")
    if not isinstance(nodes, Traced):
        return basis or "activation"
    model.check_traced(nodes.model, nodes.text)
    if basis not in (None, nodes.settings.basis):
        raise JobError(f"basis={basis!r}", f"the circuit's is {nodes.settings.basis!r}", "leave it out")
    return nodes.settings.basis


def _acted_on(
    model: Model,
    encoded: Encoded,
    nodes: Nodes,
    there: Running,
    basis: str,
    how: tuple[int | None, bool, Sequence[SupportsIndex] | None],
) -> list[_Place]:
    """The places that are acted on; `how`: of `steer` the top, everywhere and positions.

    Raises:
        JobError: a neuron that the model, or the prompt, does not have.
    """
    top, everywhere, positions = how
    numbering = model.numbering(basis)
    numbered = dict.fromkeys((layer, at, numbering.numbered(neuron)) for layer, at, neuron in _places(nodes, top))
    places = _moved(list(numbered), model, encoded, everywhere, positions)
    _check_places(places, model, encoded)
    return _running(places, there, basis, strict=not isinstance(nodes, Graph))


def _places(nodes: Nodes, top: int | None) -> list[_Written]:
    """The nodes as (layer, position or None, neuron), the first `top` of them; a free circuit's have no position."""
    if isinstance(nodes, Graph):
        found = [
            (row["layer"], row["position"] if row["position"] >= 0 else None, row["neuron"])
            for row in nodes.neurons.to_pylist()
        ]
    elif isinstance(nodes, Sequence) and not isinstance(nodes, str | bytes):
        found = [_place(node) for node in nodes]
    else:
        raise JobError(
            f"nodes {quoted(nodes)}", "is neither a circuit nor a list", "give a circuit, or [(layer, neuron)]"
        )
    if not found:
        raise JobError("nodes", "there is none to steer", "give at least one neuron")
    if len({position is None for _, position, _ in found}) > 1:
        raise JobError("nodes", "some have a position and some have none", "give all one, or none")
    if top is not None and not (is_index(top) and 1 <= top <= len(found)):
        raise JobError(f"{option('top')} {quoted(top)}", f"there are {len(found)} nodes", f"use 1 to {len(found)}")
    return list(dict.fromkeys(found[:top]))


def _place(node: Any) -> _Written:
    if isinstance(node, str):
        named = parse(node)
        return named.layer, None, named.neuron if named.expert is None else named
    if is_list(node) and len(node) in (2, 3) and all(is_index(part) for part in node[:-1]):
        numbers = [operator.index(part) for part in node[:-1]]
        if (neuron := written(numbers[0], node[-1])) is not None:
            return numbers[0], numbers[1] if len(numbers) == 2 else None, neuron
    rule = "is neither (layer, position, neuron) nor (layer, neuron)"
    raise JobError(f"node {quoted(node)}", rule, "give whole numbers, such as (1, 5, 13)")


def _moved(
    places: list[_Place], model: Model, encoded: Encoded, everywhere: bool, positions: Sequence[SupportsIndex] | None
) -> list[_Place]:
    """The same neurons at every position, or at those given."""
    if positions is not None:
        at: Sequence[int | None] = encode(Prompt(token_ids=encoded.token_ids, positions=positions), model).positions
    elif everywhere:
        at = (None,)
    else:
        return places
    return list(dict.fromkeys((layer, position, neuron) for layer, _, neuron in places for position in at))


def _check_places(places: Sequence[_Place], model: Model, encoded: Encoded) -> None:
    length = len(encoded.token_ids)
    for layer, position, _ in places:
        if not 0 <= layer < model.n_layers:
            rule, step = f"the model has {model.n_layers} layers", f"use 0 to {model.n_layers - 1}"
            raise JobError(f"layer {layer}", rule, step)
        if position is not None and not 0 <= position < length:
            rule = f"the prompt {quoted(encoded.text)} has {length} tokens"
            step = f"give a longer prompt, {option('positions')}, or {option('everywhere', True)}"
            raise JobError(f"position {position}", rule, step)


def _running(places: list[_Place], there: Running, basis: str, strict: bool) -> list[_Place]:
    """The places at which there is such a neuron. That a circuit's own is not there, on another prompt, is said; of one
    that is named it is an error."""
    kept = []
    for place in places:
        layer, position, neuron = place
        if not 0 <= neuron < (width := there.widths[layer]):
            raise JobError(f"neuron {neuron}", f"a layer has {width} in the basis {basis}", f"use 0 to {width - 1}")
        if position is None or there.has(layer, position, neuron):
            kept.append(place)
        elif strict:
            raise there.lacking(layer, position, neuron)
    if not kept:
        layer, position, neuron = places[0]
        raise there.lacking(layer, position or 0, neuron)
    if less := len(places) - len(kept):
        say([f"{less} of the {len(places)} nodes are of experts that do not run there on this prompt: left out"])
    return kept


def _draws(places: Sequence[_Place], there: Running, random: int, seed: int) -> list[list[_Place]]:
    """The random sets of a control."""
    generator = torch.Generator().manual_seed(seed)
    return [drawn_alike(places, there, generator) for _ in range(random)]


def drawn_alike(places: Sequence[_Place], there: Running, generator: torch.Generator) -> list[_Place]:
    """As many random neurons in each layer at each position, among those that are there."""
    counts = Counter((layer, position) for layer, position, _ in places)
    pools = {place: there.numbers(*place) for place in counts}
    return [
        (layer, position, neuron)
        for (layer, position), count in counts.items()
        for pool in [pools[layer, position]]
        for neuron in pool[torch.randperm(len(pool), generator=generator)[:count]].tolist()
    ]


# ---------------------------------------------------------------------------------------- what it does


@dataclass(frozen=True)
class _Run:
    """A prompt and an action, to be run on several sets of nodes."""

    model: Model
    prompt: Encoded
    action: Action
    basis: str
    judge: Judge | None = None

    def logits(self, sets: Sequence[Sequence[_Place]]) -> Float[Tensor, "set vocab"]:
        """Of the next token, with each set acted on."""
        length = len(self.prompt.token_ids)
        each = self.model.bytes_per_token(gradient=False, length=length) * length
        step = max(1, self.model.budget() // each)

        def some(part: range) -> Tensor:
            batch = Batch((self.prompt.token_ids,) * len(part))
            edits = self._edits([sets[i] for i in part])
            return passes.intervened(self.model, batch, edits, basis=self.basis)[:, -1]

        parts = [range(start, min(start + step, len(sets))) for start in range(0, len(sets), step)]
        logits = torch.cat([torch.empty(0, self.model.vocab_size), *self.model.each(some, parts)])
        if not bool(logits.isfinite().all()):
            rule = "makes the logits infinite or NaN"
            raise JobError(f"{self.action.kind}={self.action.amount:g}", rule, "use a smaller amount")
        return logits

    def texts(
        self, places: Sequence[_Place], draws: Sequence[Sequence[_Place]], max_new_tokens: int, drawn: Drawn | None
    ) -> dict[str, Any]:
        """The generated texts of a `Steering`."""
        names = ("unsteered", "steered", "control")
        sets = dict(zip(names, ([], places, *draws[:1]), strict=False)) if max_new_tokens else {}
        greedy = {name: self.generate(one, max_new_tokens, 1)[0] for name, one in sets.items()}
        made: dict[str, Any] = dict.fromkeys(names)
        made |= {name: judged(one, self.judge) for name, one in greedy.items()}
        if drawn is None:
            return made
        texts = {name: tuple(self._drawn(one, max_new_tokens, drawn)) for name, one in sets.items()}
        how = (float(drawn.temperature), float(drawn.top_p), drawn.seed)
        return made | {"samples": Samples(*how, **{name: texts.get(name, ()) for name in names})}

    def _drawn(self, places: Sequence[_Place], max_new_tokens: int, drawn: Drawn) -> Iterator[Generated]:
        """Texts that are drawn, as many at a time as memory allows."""
        length = len(self.prompt.token_ids) + max_new_tokens
        step = max(1, self.model.budget() // (self.model.bytes_per_token(gradient=False, length=length) * length))
        parts = [range(start, min(start + step, drawn.n)) for start in range(0, drawn.n, step)]
        for one in self.model.each(
            lambda part: self.generate(places, max_new_tokens, len(part), drawn.sampling(part)), parts
        ):
            yield from (judged(text, self.judge) for text in one)

    def generate(
        self, places: Sequence[_Place], max_new_tokens: int, n: int, sampling: passes.Sampling | None = None
    ) -> list[Generated]:
        """What the model goes on with, `n` times."""
        batch, edits = Batch((self.prompt.token_ids,) * n), self._edits([places] * n)
        always = bool(places) and places[0][1] is None
        found = passes.generated(
            self.model,
            batch,
            [] if always else edits,
            everywhere=edits if always else (),
            max_new_tokens=max_new_tokens,
            basis=self.basis,
            sampling=sampling,
        )
        return [self._text(row) for row in found.tolist()]

    def _text(self, ids: list[int]) -> Generated:
        """Tokens up to the first end, which a row repeats until all have ended."""
        end = next((at for at, token in enumerate(ids) if token in self.model.end_tokens), len(ids))
        ids = ids[: end + 1]
        text = self.model.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return Generated(tuple(ids), text)

    def _edits(self, sets: Sequence[Sequence[_Place]]) -> list[passes.Edit]:
        """One edit for each layer that a set has nodes in, one row for each set."""
        length, width = len(self.prompt.token_ids), self.model.n_neurons(self.basis)
        rows = [(layer, row, position, neuron) for row, one in enumerate(sets) for layer, position, neuron in one]
        columns = 1 if rows and rows[0][2] is None else length
        edits = []
        for layer in sorted({row[0] for row in rows}):
            mask = torch.zeros(len(sets), columns, width, dtype=torch.bool)
            index = torch.tensor([(row, position or 0, neuron) for at, row, position, neuron in rows if at == layer])
            mask[index.unbind(-1)] = True
            edits.append(passes.Edit(layer, mask, self.action.scale, self.action.shift))
        return edits


def _counted(places: Sequence[_Place], n_layers: int, length: int) -> dict[str, Any]:
    """What a `Steering` says of its nodes' numbers, on a prompt of this length."""
    everywhere = places[0][1] is None
    return {
        "everywhere": everywhere,
        "n_nodes": len(places) * (length if everywhere else 1),
        "n_neurons": len({(layer, neuron) for layer, _, neuron in places}),
        "per_layer": tuple(sum(place[0] == layer for place in places) for layer in range(n_layers)),
    }


def _changed(model: Model, before: Tensor, after: Tensor, control: Tensor) -> dict[str, Any]:
    """What a `Steering` says of the greedy next token."""
    first, then = int(before.argmax()), int(after.argmax())
    return {
        "before": decode(model, first),
        "after": decode(model, then),
        "changed": first != then,
        "control_changed": int((control.argmax(-1) != first).sum()),
    }


def _asked(model: Model, encoded: Encoded, prompt: Prompt, tokens: Target) -> list[tuple[int, str]]:
    """The tokens to report and their roles; the model's own top ones come later."""
    empty = isinstance(tokens, Sequence) and not isinstance(tokens, str) and not tokens
    more = () if empty else encode(replace(prompt, target=tokens, foil=None, counterfactual=None), model).target_ids
    roles = (("target", encoded.target_ids), ("foil", encoded.foil_ids), ("asked", more))
    return [(token, role) for role, ids in roles for token in ids]


def _effects(
    model: Model, asked: Sequence[tuple[int, str]], before: Tensor, after: Tensor, control: Tensor
) -> tuple[Effect, ...]:
    roles: dict[int, str] = {}
    top = before.topk(min(TOP, model.vocab_size)).indices.tolist()
    for token, role in [*asked, *((token, "top") for token in top)]:
        roles.setdefault(token, role)
    chances = [part.softmax(-1) for part in (before, after, control)]
    return tuple(
        Effect(decode(model, token), token, role, _shift(token, *chances), _shift(token, before, after, control))
        for token, role in roles.items()
    )


def _shift(token: int, before: Tensor, after: Tensor, control: Tensor) -> Shift:
    drawn = control[:, token]
    spread = Spread(float(drawn.mean()), float(drawn.min()), float(drawn.max())) if len(drawn) else None
    return Shift(float(before[token]), float(after[token]), spread)


# ------------------------------------------------------------------------------------------ files of nodes


def _group_of_run(address: str | Path, group: str) -> Graph:
    """The circuit of a run, with the nodes of one of its groups alone."""
    graph, file = read_graph(address), supernodes_file.of_run(address)
    if file is None:
        rule, step = "its run has no supernodes.json", f"make one: tracer group {address}"
        raise JobError(f"{option('group')} {quoted(group)}", rule, step)
    return supernodes_file.only(file, group, graph)


def _group_of_file(path: Path, group: str) -> list[tuple[int, int, int | Neuron]] | list[tuple[int, int | Neuron]]:
    """The neurons of one group of a file, with their positions, or without where it names none."""
    nodes = [node for node in supernodes_file.read(path).group(group).nodes if node.layer >= 0]
    free = [node.position == supernodes_file.ANYWHERE for node in nodes]
    if all(free):
        return list(dict.fromkeys((node.layer, node.written) for node in nodes))
    if any(free):
        rule = "some of its nodes have a position and some have none"
        raise JobError(f"{option('group')} {quoted(group)}", rule, "give all one, or none")
    return [(node.layer, node.position, node.written) for node in nodes]


def _json_rows(text: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = jsontext.parse(line)
        except jsontext.JsonError as error:
            step = 'write {"layer": 1, "position": 5, "neuron": 13}'
            raise JobError(f"{name}, line {number}", str(error), step) from error
        if not isinstance(row, dict):
            raise JobError(f"{name}, line {number}", "is not a JSON object", "give one object a line")
        yield f"{name}, line {number}", row


def _csv_rows(text: str, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    reader, step = csv.DictReader(text.splitlines(), skipinitialspace=True), "begin it with layer,position,neuron"
    try:
        columns = [column.strip() for column in reader.fieldnames or ()]
        reader.fieldnames = columns
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise JobError(name, f"is not CSV ({error})", f"{step}; or write JSON lines") from error
    if twice := [column for column in columns if columns.count(column) > 1]:
        raise JobError(name, f"has the column {twice[0]!r} twice", "leave one of them out")
    if missing := [column for column in ("layer", "neuron") if column not in columns]:
        rule = f"has no column {missing[0]!r} in its first line"
        raise JobError(name, rule, f"{step}; or write JSON lines")
    for number, row in rows:
        yield f"{name}, line {number}", row


def _neuron_of(row: dict[str, Any], place: str) -> tuple[int, int | Neuron]:
    """Layer and neuron of a row of a file."""
    layer, neuron = (_whole(row.get(column), column, place) for column in ("layer", "neuron"))
    if row.get("expert") in (None, ""):
        return layer, neuron
    return layer, Neuron(layer, _whole(row["expert"], "expert", place), neuron)


def _whole(value: Any, column: str, place: str) -> int:
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        number = None
    if not is_index(number):
        raise JobError(f"{place}", f"its {column} is {quoted(value)}, not a whole number", "give whole numbers")
    return operator.index(number)


def written(layer: int, neuron: Any) -> int | Neuron | None:
    """A neuron as part of a node: a number, or a text that may name its expert; None for anything else.

    Raises:
        JobError: a text that is no neuron.
    """
    if isinstance(neuron, str):
        named = parse_within(layer, neuron)
        return named.neuron if named.expert is None else named
    if isinstance(neuron, Neuron):
        return neuron
    return operator.index(neuron) if is_index(neuron) else None


def is_index(value: Any) -> TypeGuard[int]:
    """A whole number of any kind, but not a truth value."""
    return hasattr(value, "__index__") and not isinstance(value, bool) and getattr(value, "ndim", 0) == 0
