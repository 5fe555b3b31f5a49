"""Sweeps: every factor on every group of nodes on every prompt, beside random groups of the same size.

Knows which rows share a forward pass and what is read of them. Refuses to know how groups were found
(evaluation/groups.py), statistics over prompts (evaluation/responses.py), nnsight (model/passes.py), and how a result
is shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tracer.attribution.attribute import notes
from tracer.attribution.exact import Progress
from tracer.attribution.running import Running
from tracer.choices import Basis
from tracer.circuit.circuit import Graph, Traced
from tracer.errors import JobError, option, quoted, say
from tracer.evaluation.groups import Group, Groups, check_nodes, controls, groups_of
from tracer.evaluation.responses import GroupResponse, Response, group_responses, responses
from tracer.evaluation.steering import is_index
from tracer.model import passes
from tracer.model.model import Model
from tracer.model.named import AnyModel, model_of
from tracer.model.state import undisturbed
from tracer.prompts import Asked, Encoded, Prompt, Target, Vocabulary, as_prompts, decode, encode
from tracer.settings import BASES
from tracer.store.parquet import table_of
from tracer.store.schemas import STEERING, STEERING_GROUPS
from tracer.system import bars
from tracer.system.display import Plotted

FACTORS = (-1.0, 0.0, 2.0)
"""Inverted, ablated, amplified."""


class Row(NamedTuple):
    """One thing that is done to a prompt: the number of a group, the factor, and which control draw (-1: none)."""

    group: int
    factor: float
    draw: int


@dataclass(frozen=True)
class Plan:
    """What is done to each prompt.

    Attributes:
        groups: that are multiplied. controls: random ones of the same size, for each of them.
        asked: tokens that every prompt is asked about.
    """

    groups: tuple[Group, ...]
    controls: tuple[tuple[Group, ...], ...]
    factors: tuple[float, ...]
    asked: tuple[int, ...] = ()
    basis: str = "activation"

    @property
    def rows(self) -> list[Row]:
        """Everything that is done, in order."""
        return [
            Row(number, factor, draw)
            for number, drawn in enumerate(self.controls)
            for factor in self.factors
            for draw in range(-1, len(drawn))
        ]

    def done(self, row: Row) -> Group:
        """The nodes that are multiplied."""
        return self.groups[row.group] if row.draw < 0 else self.controls[row.group][row.draw]

    def tokens(self, prompt: Encoded) -> dict[int, str]:
        """The tokens that a prompt is asked about, and their roles."""
        named = (("target", prompt.target_ids), ("foil", prompt.foil_ids), ("asked", self.asked))
        roles: dict[int, str] = {}
        for role, ids in named:
            for token in ids:
                roles.setdefault(token, role)
        return roles


@dataclass(frozen=True)
class Measured:
    """What the rows of a plan did to one prompt; tokens are those it is asked about and its own greedy one, last.

    Attributes:
        logits, probabilities: of the tokens, of the untouched prompt first.
        greedy: the likeliest next token, of the untouched prompt first.
        kl: KL(untouched, row) in nats. kept: of each group's activations; see `schemas.STEERING_GROUPS`.
    """

    logits: Float[Tensor, "every token"]
    probabilities: Float[Tensor, "every token"]
    greedy: Int[Tensor, " every"]
    kl: Float[Tensor, " row"]
    kept: Float[Tensor, "row group"]

    @property
    def changed(self) -> Bool[Tensor, " row"]:
        """Whether the greedy token is another."""
        return self.greedy[1:] != self.greedy[0]


@dataclass(frozen=True, repr=False)
class Sweep(Plotted):
    """What multiplying groups of nodes did to prompts.

    Attributes:
        tokens: Arrow table: a row for each prompt, group, factor, draw and token.
        groups: Arrow table: what each did to the activations of all groups.
    """

    tokens: Any
    groups: Any

    def to_pandas(self) -> Any:
        """The table `tokens` as a pandas DataFrame: `prompt_id`, `text`, `group`, `n_nodes`, `factor`, `draw` (-1: the
        group itself; else a random one), `token_id`, `token`, `role`, `probability_before` and `_after`,
        `logit_before` and `_after`, `greedy_before` and `_after`, `changed`, and `kl` (nats)."""
        return self.tokens.to_pandas()

    def responses(self, seed: int = 0) -> list[Response]:
        """Over prompts, for each group, factor and token: the mean change with its interval, beside the control's."""
        return responses(self.tokens.to_pylist(), seed)

    def group_responses(self, seed: int = 0) -> list[GroupResponse]:
        """Over prompts, for each group and factor, what is kept of the others' activations."""
        return group_responses(self.groups.to_pylist(), seed)


@undisturbed()
def sweep(
    model: AnyModel,
    groups: Groups,
    prompts: Asked | Sequence[Asked],
    *,
    factors: Sequence[float | int] = FACTORS,
    tokens: Target = (),
    only: Sequence[str] | None = None,
    everywhere: bool = False,
    basis: Basis | str | None = None,
    random: int = 5,
    seed: int = 0,
    memory: int | None = None,
    progress: Progress | bool | None = None,
) -> Sweep:
    """Multiply each group of nodes by each factor on each prompt, and see what the model then says.

    Args:
        model: from `tracer.load`, or the name of a model (``"demo"``, a folder, a Hugging Face id), which is loaded and
            kept until a call names another.
        groups: a circuit (its groups and the whole of it), nodes by name (``{"Texas": [(layer, position, neuron)]}``,
            or (layer, neuron) for every position), or a file supernodes.json.
        prompts: each a `tracer.Prompt` with its target and foil, if it has any, or its text; prompt_id counts them.
        factors: 0 ablates, 2 amplifies, -1 inverts.
        tokens: reported besides targets, foils and the greedy token: those of other groups' answers, for instance.
        only: names of groups; all if None.
        everywhere: the neurons act at every position of a prompt; else nodes at their own.
        basis: of nodes that are no circuit's; ``activation`` if None.
        random: control draws for each group: as many neurons in each layer at the same positions, none of the group's.
        seed: of the draws.
        memory: bytes one batch may use; by default a GiB, or a quarter of a GPU.
        progress: a bar appears on a terminal and in a notebook after half a second; False for none, or a function
            that is called with (prompts done, all prompts).

    Returns:
        What each factor on each group did to each prompt, as tables; `Sweep.responses` has means with intervals, and
        `Sweep.plot` draws them.

    Raises:
        JobError: no group, prompt or factor, an unknown group, nodes that the model or a prompt does not have, a token
            that is several, logits no longer finite.

    """
    model, prompts = model_of(model), as_prompts(prompts)
    if not prompts:
        raise JobError("prompts=[]", "there is nothing to steer", "give at least one prompt")
    check_factors(factors)
    kind = _basis(model, groups, basis)
    chosen = groups_of(groups, only, model.numbering(kind))
    encoded = [asked(prompt, model) for prompt in prompts]
    say(notes(encoded, model))
    ids = asked_tokens(model, tokens)
    asked_of, where = [one.token_ids for one in encoded], (everywhere, kind)
    plan = planned(model, chosen, asked_of, tuple(map(float, factors)), ids, where, (random, seed))
    for one in encoded:
        check_length(plan, one)
    found = []
    with bars.shown(progress, "steering") as report:
        for done in measured(model, encoded, plan, memory):
            found.append(done)
            if report is not None:
                report(len(found), len(encoded))
    return tables(plan, range(len(encoded)), encoded, found, model)


def check_factors(factors: Sequence[float | int]) -> None:
    """Refuse what is not several finite numbers.

    Raises:
        JobError: none, one twice, or one that is not finite.
    """
    if not factors:
        raise JobError("factors=[]", "at least one is needed", "0 ablates, 2 amplifies, -1 inverts")
    for one in factors:
        if isinstance(one, bool) or not isinstance(one, int | float) or not abs(one) < float("inf"):
            raise JobError(f"factors={quoted(one)}", "must be finite numbers", "use some such as 0, 2 or -1")
    if len(set(factors)) < len(factors):
        raise JobError(f"factors={quoted(list(factors))}", "names one twice", "name each once")


def asked(prompt: Prompt, model: Model) -> Encoded:
    """A prompt's tokens, of which the one after the last is asked for.

    Raises:
        JobError: it is read elsewhere, or cannot be encoded.
    """
    if not isinstance(prompt, Prompt):
        raise JobError(f"prompt {quoted(prompt)}", "must be a tracer.Prompt", "write tracer.Prompt(...)")
    one = encode(prompt, model)
    if one.positions != (len(one.token_ids) - 1,):
        rule = "steering reports the token after the prompt, nowhere else"
        raise JobError(f"positions {list(one.positions)}", rule, "leave out the prompt's positions")
    return one


def asked_tokens(vocabulary: Vocabulary, tokens: Target) -> tuple[int, ...]:
    """The ids of tokens that every prompt is asked about.

    Raises:
        JobError: text that is several tokens, or an id out of the vocabulary.
    """
    if isinstance(tokens, Sequence) and not isinstance(tokens, str) and not tokens:
        return ()
    try:
        return encode(Prompt(token_ids=[0], target=tokens), vocabulary).target_ids
    except JobError as error:
        raise JobError(error.value.replace("target", "token", 1), error.rule, error.next_step) from error


def planned(
    model: Model,
    groups: Sequence[Group],
    prompts: Sequence[tuple[int, ...]],
    factors: Sequence[float],
    ids: tuple[int, ...],
    where: tuple[bool, str],
    drawn: tuple[int, int],
) -> Plan:
    """What is done to each prompt, with the random groups. A group that has no room for others beside it in a layer
    gets none, which is said.

    Args:
        prompts: their tokens: of a mixture random neurons are those of experts that run on them.
        ids: of the tokens asked about. where: whether at every position, and the basis. drawn: how many random groups,
            and their seed.

    Raises:
        JobError: nodes that the model does not have.
    """
    (everywhere, basis), (random, seed) = where, drawn
    for name, value in (("random", random), ("seed", seed)):
        if not is_index(value) or value < 0:
            raise JobError(option(name, value), "must be a whole number, 0 or more", "use 0")
    there = Running.of(model, prompts, basis)
    check_nodes(groups, there.widths)
    made = tuple(group.everywhere() for group in groups) if everywhere else tuple(groups)
    others = [tuple(controls(group, there, random, seed)) for group in made]
    full = [quoted(group.name) for group, found in zip(made, others, strict=True) if random and not found]
    if full:
        say([f"no random control for {', '.join(full)}: too few other neurons in a layer"])
    return Plan(made, tuple(others), tuple(factors), ids, basis)


def check_length(plan: Plan, prompt: Encoded) -> None:
    """Refuse a prompt that is too short for a group's positions.

    Raises:
        JobError: names both.
    """
    longest = max(plan.groups, key=lambda group: group.longest)
    if longest.longest > len(prompt.token_ids):
        rule = f"has {len(prompt.token_ids)} tokens, group {quoted(longest.name)} a node at position"
        step = f"give prompts of the circuit's length, or {option('everywhere', True)}"
        raise JobError(f"prompt {quoted(prompt.text)}", f"{rule} {longest.longest - 1}", step)


def _basis(model: Model, groups: Groups, basis: str | None) -> str:
    """What the nodes' numbers count; and a circuit must be the model's own."""
    if basis not in (None, *BASES):
        raise JobError(f"basis={quoted(basis)}", f"must be one of {', '.join(BASES)}", "choose one")
    if not isinstance(groups, Graph) or not isinstance(groups, Traced):
        return basis or "activation"
    model.check_traced(groups.model, groups.text)
    if basis not in (None, groups.settings.basis):
        raise JobError(f"basis={basis!r}", f"the circuit's is {groups.settings.basis!r}", "leave it out")
    return groups.settings.basis


# ------------------------------------------------------------------------------------------------ measuring


def measured(model: Model, prompts: Sequence[Encoded], plan: Plan, memory: int | None = None) -> Iterator[Measured]:
    """What a plan does to each prompt, in their order. A batch is rows of one prompt, the untouched prompt first, so
    that no number depends on other prompts; a server gets a request for each batch, several at a time.

    Args:
        memory: bytes one batch may use.

    Raises:
        JobError: logits that are no longer finite.
    """
    budget = model.budget() if memory is None else memory
    return model.stream(lambda part: _of_prompt(model, part[0], plan, budget), [(one,) for one in prompts])


def _of_prompt(model: Model, prompt: Encoded, plan: Plan, budget: int) -> Measured:
    """All rows of one prompt."""
    length, rows = len(prompt.token_ids), plan.rows
    each = model.bytes_per_token(gradient=False, length=length) * length
    step = max(1, budget // each - 1)
    nodes = [group.on(length) for group in plan.groups]
    members = torch.tensor([node for group in nodes for node in group], dtype=torch.int32).view(-1, 3)
    order = members[:, 0].argsort(stable=True)
    mine = torch.tensor([number for number, group in enumerate(nodes) for _ in group])[order]
    tokens = torch.tensor(list(plan.tokens(prompt)), dtype=torch.int64)

    def some(part: Sequence[int]) -> Measured:
        chosen = [rows[i] for i in part]
        entries, scale = _entries(plan, chosen)
        what = passes.Multiplied(entries, scale, members[order], tokens)
        logits, likely, greedy, kl, values = passes.swept(
            model, prompt.token_ids, len(chosen) + 1, what, basis=plan.basis
        )
        if not bool(logits.isfinite().all() & kl.isfinite().all()):
            factor = max((row.factor for row in chosen), key=abs)
            raise JobError(f"factors={factor:g}", "makes the logits infinite or NaN", "use a smaller amount")
        return Measured(logits, likely, greedy, kl[1:], _kept(values, mine, len(plan.groups)))

    parts = [range(start, min(start + step, len(rows))) for start in range(0, len(rows), step)]
    return _joined(model.each(some, parts))


def _entries(plan: Plan, rows: Sequence[Row]) -> tuple[Int[Tensor, "entry 4"], Float[Tensor, " entry"]]:
    """What `interventions.scale_nodes` takes; the rows follow the untouched one."""
    entries, scale = [], []
    for number, row in enumerate(rows, start=1):
        places = plan.done(row).places
        entries += [(layer, number, -1 if at is None else at, neuron) for layer, at, neuron in places]
        scale += [row.factor] * len(places)
    return torch.tensor(entries, dtype=torch.int32).view(-1, 4), torch.tensor(scale, dtype=torch.float64)


def _kept(
    values: Float[Tensor, "every member"], mine: Int[Tensor, " member"], n_groups: int
) -> Float[Tensor, "row group"]:
    """Of each group's activations, how much is kept; NaN where all were 0."""
    was, now = values[:1].double(), values[1:].double()

    def summed(of: Tensor) -> Tensor:
        return torch.zeros(len(of), n_groups, dtype=torch.double).index_add_(1, mine, of)

    return (summed(was * now) / summed(was * was)).float()


def _joined(parts: Sequence[Measured]) -> Measured:
    """The rows of several batches of one prompt; the untouched one is the first batch's."""
    first = parts[0]
    after = {
        name: torch.cat([getattr(first, name), *(getattr(part, name)[1:] for part in parts[1:])])
        for name in ("logits", "probabilities", "greedy")
    }
    more = {name: torch.cat([getattr(part, name) for part in parts]) for name in ("kl", "kept")}
    return replace(first, **after, **more)


# ------------------------------------------------------------------------------------------------ tables


def tables(
    plan: Plan, ids: Sequence[int], prompts: Sequence[Encoded], found: Sequence[Measured], vocabulary: Vocabulary
) -> Sweep:
    """What was measured on prompts as tables.

    Args:
        ids: of the prompts.
    """
    words: dict[int, str] = {}

    def word(token: int) -> str:
        return words.get(token) or words.setdefault(token, decode(vocabulary, token))

    tokens: dict[str, list[Any]] = {name: [] for name in STEERING.names}
    groups: dict[str, list[Any]] = {name: [] for name in STEERING_GROUPS.names}
    for number, prompt, done in zip(ids, prompts, found, strict=True):
        for at, row in enumerate(plan.rows):
            same = {"prompt_id": number, "group": plan.groups[row.group].name, "factor": row.factor, "draw": row.draw}
            about = {"text": prompt.text, "n_nodes": len(plan.done(row).on(len(prompt.token_ids)))}
            about |= {"greedy_before": word(int(done.greedy[0])), "greedy_after": word(int(done.greedy[1 + at]))}
            for cells in _cells(plan, prompt, done, at):
                _add(tokens, same | about | cells | {"token": word(cells["token_id"])})
            for other, kept in zip(plan.groups, done.kept[at].tolist(), strict=True):
                _add(groups, same | {"other": other.name, "kept": None if math.isnan(kept) else kept})
    return Sweep(table_of(STEERING, tokens), table_of(STEERING_GROUPS, groups))


def _cells(plan: Plan, prompt: Encoded, done: Measured, at: int) -> Iterator[dict[str, Any]]:
    """What a row of the plan did to each token of a prompt."""
    roles = plan.tokens(prompt)
    first = int(done.greedy[0])
    places = {token: (place, role) for place, (token, role) in enumerate(roles.items())}
    places.setdefault(first, (len(roles), "top"))
    for token, (place, role) in places.items():
        yield {
            "token_id": token,
            "role": role,
            "probability_before": float(done.probabilities[0, place]),
            "probability_after": float(done.probabilities[1 + at, place]),
            "logit_before": float(done.logits[0, place]),
            "logit_after": float(done.logits[1 + at, place]),
            "changed": bool(done.changed[at]),
            "kl": float(done.kl[at]),
        }


def _add(columns: dict[str, list[Any]], cells: dict[str, Any]) -> None:
    for name, value in cells.items():
        columns[name].append(value)
