"""The tokens of neurons, from the weights alone: which a neuron promotes and suppresses, and which drive it.

Knows which neurons are asked about, and where the weights can be read: in this process or on the model's server. What
is computed beside them is meaning/weights.py. Refuses to know prompts: a neuron says the same in all of them here, and
what it does in one depends on the rest of the model.

**Promoted and suppressed.** A neuron (layer, neuron, polarity) adds ``value * w`` to the residual stream, w its column
of the down projection. By how much a unit of \\|value\\| moves the logit of a token directly, in logits per unit::

    polarity * U[token].N(P(w))

U is the unembedding; N the final norm and P the norm behind the MLP (Gemma 2 and 3, OLMo 2; the identity elsewhere),
both with their gains (1 + weight in Gemma) and a LayerNorm's centring, but **of statistic 1**: a norm divides by the
size of the whole residual stream, which no weight says, and which scales all tokens alike. So numbers compare between
tokens of a neuron, and only roughly between neurons. Biases belong to no neuron. A soft-cap of the logits never changes
the order of single logits; numbers are of the logits before it. What later blocks make of the direction is left out.

**Driven by.** The neuron's value, ``act(gate) * up`` (``act(up)`` in an MLP without a gate), if a token's embedding, as
it enters the first block, were the whole residual stream before the MLP: behind its norm with the statistic that the
embedding gives, biases included, position embeddings not. In the first layers that is near what a token does there.

Source: nostalgebraist (2020), interpreting GPT: the logit lens; Geva et al. (2022), arXiv 2203.14680.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, TypeVar

import pyarrow as pa
import torch

from tracer.choices import Basis
from tracer.circuit.circuit import Graph, Traced
from tracer.circuit.said import Key, key_of
from tracer.errors import JobError, ModelError, RemoteError, option, quoted
from tracer.meaning import weights
from tracer.model import passes
from tracer.model.backend import Of
from tracer.model.model import Model
from tracer.model.named import AnyModel, model_of
from tracer.model.state import undisturbed
from tracer.prompts import decoded
from tracer.records import Record, as_int, is_list
from tracer.settings import BASIS_NAMES, EDGE_BASES
from tracer.store.schemas import TOKENS
from tracer.system.display import Shown

AnyGraph = TypeVar("AnyGraph", bound=Graph)
MOST = 1000
"""Tokens of a list."""
TOGETHER = 1024
"""Neurons of one product."""
PIECE = 2**24
"""Numbers that are held of a piece of the vocabulary, in each of a few products."""


class Token(Record):
    """A token of a neuron's list.

    Attributes:
        text, token_id: which; the text with its spaces.
        value: of it in this list. gate, up: beside a value, what comes before it (`gate` None in an MLP without one).
    """

    text: str
    token_id: int
    value: float
    gate: float | None = None
    up: float | None = None


class NeuronTokens(Shown, Record):
    """What the weights say of a neuron, strongest first.

    It adds ``value * w`` to the residual stream, w its column of the down projection: by how much a unit of \\|value\\|
    moves the logit of a token directly, behind the final norm with its gain and statistic 1, is what it promotes. Its
    value if a token's embedding were the whole residual stream before the MLP is what it is driven by.

    Attributes:
        layer, neuron, polarity: which; polarity is 1 or -1, the sign of its value.
        promoted, suppressed: logits per unit of |value|, the largest and the smallest.
        driven_by: tokens whose embeddings give it a value of that sign, and that value; may be fewer than asked for.
        gate: tokens of the largest gate before its activation; empty in an MLP without one.
        up: tokens of the largest (polarity -1: the smallest) other factor, or of all that there is without a gate.
    """

    layer: int
    neuron: int
    polarity: int
    promoted: tuple[Token, ...]
    suppressed: tuple[Token, ...]
    driven_by: tuple[Token, ...] = ()
    gate: tuple[Token, ...] = ()
    up: tuple[Token, ...] = ()

    def to_pandas(self) -> Any:
        """A pandas DataFrame with a row for each token of each list: `list` (``promoted``, ``suppressed``,
        ``driven_by``, ``gate``, ``up``), `token`, `token_id`, `value`, and beside what drives it `gate` and `up`."""
        import pandas

        names = ("promoted", "suppressed", "driven_by", "gate", "up")
        columns = ("list", "token", "token_id", "value", "gate", "up")
        tokens: list[tuple[str, Token]] = [(name, one) for name in names for one in getattr(self, name)]
        rows = [(name, one.text, one.token_id, one.value, one.gate, one.up) for name, one in tokens]
        return pandas.DataFrame(rows, columns=list(columns))


@undisturbed()
def neuron_tokens(
    model: AnyModel,
    neurons: Iterable[Sequence[int]],
    k: int = 10,
    *,
    driven: bool = True,
    basis: Basis | str = "activation",
) -> list[NeuronTokens]:
    """The tokens of some neurons, all in a few products over the vocabulary, on the model's device or server.

    Args:
        model: from `tracer.load`, or the name of a model (``"demo"``, a folder, a Hugging Face id), which is loaded and
            kept until a call names another.
        neurons: (layer, neuron, polarity) each, or (layer, neuron), which is both polarities, 1 first.
        k: tokens of each list.
        driven: also what drives them: `driven_by`, `gate` and `up`, which are twice the work again.
        basis: ``output`` for coordinates of the MLPs' outputs in the place of neurons, which nothing drives; no other.

    Returns:
        One each, in the order of `neurons`.

    Raises:
        JobError: no neuron, one outside the model, a `k` out of range, or another basis.
        ModelError, RemoteError: the weights cannot be read: quantised, offloaded, or hidden on a server.
    """
    check_basis(basis)
    model = model_of(model)
    keys = _keys(model, neurons, basis)
    if (count := as_int(k)) is None or not 1 <= count <= MOST:
        raise JobError(option("k", k), f"must be a whole number of tokens from 1 to {MOST:,}", "use 10")
    check_readable(model)
    driven, unique = driven and basis == "activation", sorted({key[:2] for key in keys})
    found = dict[Key, NeuronTokens]()
    for first in range(0, len(unique), TOGETHER):
        some = unique[first : first + TOGETHER]
        parts = _extremes(model, some, min(count, n_tokens(model)), driven, basis)
        listed = [one[0] for name, one in parts.items() if name != "beside" and one is not None]
        text = decoded(model, torch.cat([ids.flatten() for ids in listed]).unique().tolist())
        for row, (layer, neuron) in enumerate(some):
            for end, polarity in enumerate((1, -1)):
                key = Key(layer, neuron, polarity)
                if key in keys:
                    found[key] = _tokens_of(key, parts, row, end, text)
    return [found[key] for key in keys]


def promoted(model: AnyModel, neurons: Iterable[Sequence[int]], k: int = 10) -> pa.Table:
    """The tokens of some neurons as an Arrow table, one row each: `layer`, `neuron`, `polarity`, then `promoted`,
    `suppressed` and `driven_by`, each with its `_ids` and its `_values` (logits per unit of the neuron; of what drives
    it the neuron's value).

        tracer.promoted("demo", [(1, 324, -1)])["promoted"][0]

    Args:
        model: from `tracer.load`, or the name of a model (``"demo"``, a folder, a Hugging Face id), which is loaded and
            kept until a call names another.
        neurons: (layer, neuron, polarity) each, or (layer, neuron), which is both polarities, 1 first.
        k: tokens of each list.

    Returns:
        A row each, in the order of `neurons`.

    Raises:
        JobError: no neuron, one outside the model, or a `k` out of range.
        ModelError, RemoteError: the weights cannot be read: quantised, offloaded, or hidden on a server.
    """
    return table_of(neuron_tokens(model, neurons, k))


def with_tokens(
    model: AnyModel,
    graph: AnyGraph,
    k: int = 10,
    *,
    driven: bool = False,
    neurons: Iterable[Sequence[int]] | None = None,
) -> AnyGraph:
    """The same circuit with the tokens of its neurons, which `save` keeps, and tables, pages and exports name.

    On a CPU it is work: as much as the output head on as many tokens as there are neurons.

    Args:
        model: from `tracer.load`, or the name of a model (``"demo"``, a folder, a Hugging Face id), which is loaded and
            kept until a call names another.
        graph: a circuit, or any graph traced on this model.
        k: tokens of each list.
        driven: also the tokens that drive them.
        neurons: of these alone, (layer, neuron, polarity) each, or (layer, neuron); all of the graph's if None.

    Returns:
        A copy of the circuit, with its tokens in `neuron_tokens`.

    Raises:
        JobError: a graph of another model, or in a basis without neurons.
        ModelError, RemoteError: the weights cannot be read: quantised, offloaded, or hidden on a server.
    """
    model = model_of(model)
    if not isinstance(graph, Traced):
        raise JobError("imported graph", "is of no model that is known", "trace the prompt")
    model.check_traced(graph.model, graph.text)
    check_basis(graph.settings.basis)
    keys = list(keys_of(graph) if neurons is None else neurons)
    found = neuron_tokens(model, keys, k, driven=driven, basis=graph.settings.basis) if keys else []
    return graph.model_copy(update={"neuron_tokens": table_of(found)})


def keys_of(graph: Graph) -> list[Key]:
    """The neurons of a graph, each once, strongest first; both polarities where a node has no activation."""
    rows = graph.neurons.select(["layer", "neuron", "activation"]).to_pylist()
    return list(dict.fromkeys(key for row in rows for key in key_of(row)))


def table_of(found: Sequence[NeuronTokens]) -> pa.Table:
    """Neurons' tokens as a table in `schemas.TOKENS`; what drives them is null where it was not asked for."""
    rows = []
    for one in found:
        row: dict[str, Any] = {"layer": one.layer, "neuron": one.neuron, "polarity": one.polarity}
        for name in ("promoted", "suppressed", "driven_by"):
            tokens: tuple[Token, ...] = getattr(one, name)
            if name == "driven_by" and not one.up:
                continue
            row[name] = [token.text for token in tokens]
            row[f"{name}_ids"] = [token.token_id for token in tokens]
            row[f"{name}_values"] = [token.value for token in tokens]
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=TOKENS)


def n_tokens(model: Model) -> int:
    """Tokens that the tokenizer knows, of the rows of the output head: rows behind them stand for nothing."""
    added = max(getattr(model.tokenizer, "added_tokens_decoder", None) or [-1]) + 1
    known = max(int(getattr(model.tokenizer, "vocab_size", 0) or 0), added)
    rows = min(passes.n_logits(model), int(model.module.get_input_embeddings().weight.shape[0]))
    return min(known, rows) or rows


def has_tokens(basis: str) -> bool:
    """Whether what is attributed to in a basis leaves an MLP, so that the weights say which tokens it promotes."""
    return basis in EDGE_BASES


def check_basis(basis: str) -> None:
    """Refuse a basis whose coordinates promote nothing that is known.

    Raises:
        JobError: it is one of these, or none.
    """
    if not has_tokens(basis):
        rule = f"is of the {BASIS_NAMES[basis]}: tokens are of neurons" if basis in BASIS_NAMES else "is no basis"
        raise JobError(option("basis", basis), rule, f"leave tokens out, or use {' or '.join(sorted(EDGE_BASES))}")


def check_readable(model: Model) -> None:
    """Refuse a model whose weights cannot be read.

    Raises:
        ModelError, RemoteError: they are quantised, offloaded, or hidden on a server.
    """
    if is_readable(model):
        return
    value, what = f"model {quoted(model.name)}", "tokens are read from the weights, which are"
    if model.remote is not None:
        step = f"load them here too: {option('weights', 'local')}"
        raise RemoteError(f"{value} on {model.backend.host}", f"{what} hidden there", step)
    step = "load the model in a float dtype, on devices that hold it, or leave tokens out"
    raise ModelError(value, f"{what} quantised or offloaded", step)


def is_readable(model: Model) -> bool:
    """Whether its weights can be read as numbers where it is, or here."""
    return model.shows_weights or (model.has_weights and model.weights_readable)


def _keys(model: Model, neurons: Iterable[Sequence[int]], basis: str) -> list[Key]:
    """The neurons asked for, each once."""
    keys: dict[Key, None] = {}
    for given in neurons:
        parts = [as_int(part) for part in given] if is_list(given) else []
        if len(parts) not in (2, 3) or None in parts or parts[2:] not in ([], [1], [-1]):
            rule = "must be (layer, neuron) or (layer, neuron, polarity) with polarity 1 or -1"
            raise JobError(f"neuron {quoted(given)}", rule, "give whole numbers, as in (3, 120, 1)")
        layer, neuron = int(parts[0] or 0), int(parts[1] or 0)
        model.check_neuron(f"layer {layer}, neuron {neuron}", layer, neuron, basis)
        keys |= {Key(int(parts[0] or 0), int(parts[1] or 0), int(sign or 0)): None for sign in parts[2:] or (1, -1)}
    if not keys:
        raise JobError("neurons", "are none", "give at least one (layer, neuron)")
    return list(keys)


def _extremes(model: Model, neurons: Sequence[Sequence[int]], count: int, driven: bool, basis: str) -> dict[str, Any]:
    """`weights.extremes` of neurons in rising layers, where the weights can be read."""
    ask = SimpleNamespace(
        neurons=torch.tensor([list(one) for one in neurons]),
        basis=basis,
        count=count,
        n_tokens=n_tokens(model),
        piece=PIECE,
        driven=driven,
    )
    if not model.shows_weights:
        with model.ready():
            return weights.extremes(SimpleNamespace(_module=model.module), model.plan, ask)
    shape = len(neurons), 2, count
    both = Of(shape, torch.int64, ask.n_tokens), Of(shape, finite=True)
    form: dict[str, Any] = {"effect": both}
    if driven:
        gated = weights.has_gates(model.plan)
        form |= {"value": both, "up": both, "gate": both if gated else None, "beside": Of((2, *shape), finite=True)}
    return passes.session(model, weights.extremes, ask, form)


def _tokens_of(key: Key, parts: dict[str, Any], row: int, end: int, text: Mapping[int, str]) -> NeuronTokens:
    """One neuron's lists, out of those of all; `end` is the place of its polarity."""

    def listed(name: str, end: int, sign: int = 1) -> tuple[Token, ...]:
        at, values = (tensor[row, end].tolist() for tensor in parts[name])
        return tuple(
            Token(text=text[one], token_id=one, value=sign * value + 0.0) for one, value in zip(at, values, strict=True)
        )

    lists: dict[str, Any] = {"promoted": listed("effect", end, key.polarity)}
    lists["suppressed"] = listed("effect", 1 - end, key.polarity)
    if "value" in parts:
        gate, up = (tensor[row, end].tolist() for tensor in parts["beside"].unbind(0))
        gates = [None] * len(gate) if parts["gate"] is None else gate
        driven = [
            token.model_copy(update={"gate": one, "up": other})
            for token, one, other in zip(listed("value", end), gates, up, strict=True)
            if token.value * key.polarity > 0
        ]
        lists |= {"driven_by": tuple(driven), "up": listed("up", end)}
        lists["gate"] = () if parts["gate"] is None else listed("gate", 0)
    return NeuronTokens(layer=key.layer, neuron=key.neuron, polarity=key.polarity, **lists)
