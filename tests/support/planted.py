"""A hand-built linear model whose neurons belong to known groups, and its circuits with profiles by autograd.

The neurons of a group attend to the same kind of token, read nearly the same direction and write nearly the same one.
No two groups share all of that: some share what they read, some what they write.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from tracer.circuit.circuit import Traced, edges_table, nodes_table
from tracer.meaning.profiles import SCHEMA
from tracer.settings import ModelRecord, settings
from tracer.store.schemas import PROFILES

WIDTH = 24
TOKENS, LOGITS = 6, 5


class Planted(NamedTuple):
    """Circuits of one model.

    Attributes:
        circuits: of each prompt, with profiles. groups: of each (layer, neuron), 0 ..
    """

    circuits: list[Traced]
    groups: dict[tuple[int, int], int]

    def table(self) -> pa.Table:
        """All prompts' profiles, as `meaning.profiles.read` has them."""
        parts = []
        for number, circuit in enumerate(self.circuits):
            rows, own = circuit.neurons.to_pylist(), circuit.profiles
            assert own is not None
            columns = {
                "prompt_id": [number] * len(rows),
                **{name: [row[name] for row in rows] for name in ("node_id", "layer", "position", "neuron")},
                "polarity": [-1 if row["activation"] < 0 else 1 for row in rows],
                "input": own["input"].combine_chunks(),
                "output": own["output"].combine_chunks(),
                "n_tokens": [TOKENS] * len(rows),
            }
            parts.append(pa.table({field.name: pa.array(columns[field.name], field.type) for field in SCHEMA}))
        return pa.concat_tables(parts)


def planted(n_prompts: int = 4, n_groups: int = 5, each: int = 6, noise: float = 0.15, seed: int = 0) -> Planted:
    """Prompts of a model with so many groups of so many neurons."""
    made = torch.Generator().manual_seed(seed)
    looks = 0.2 * torch.rand(n_groups, TOKENS, generator=made)  # the attention of each group
    looks[range(n_groups), [group % TOKENS for group in range(n_groups)]] += 1
    reads = torch.randn(n_groups, WIDTH, generator=made)
    unembed = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=made))[0][:LOGITS]
    writes = unembed[[group % LOGITS for group in range(n_groups)]] * WIDTH**0.5
    looks[1], reads[1] = looks[0], reads[0]  # what drives the first two is the same; what they do is not
    writes[2] = writes[3]
    where = [(number % 3, 10 + number) for number in range(n_groups * each)]
    groups = {place: number % n_groups for number, place in enumerate(where)}
    member = torch.tensor([groups[place] for place in where])
    read = reads[member] + noise * torch.randn(len(where), WIDTH, generator=made)
    write = writes[member] + noise * torch.randn(len(where), WIDTH, generator=made)
    circuits = []
    for _ in range(n_prompts):
        present = 0.5 + torch.rand(TOKENS, n_groups, generator=made)  # of what each group reads
        embedded = torch.randn(TOKENS, WIDTH, generator=made) + present @ reads
        circuits.append(_circuit(embedded, looks[member], read, write, unembed, where))
    return Planted(circuits, groups)


def _circuit(
    embedded: Tensor, looks: Tensor, read: Tensor, write: Tensor, unembed: Tensor, where: list[tuple[int, int]]
) -> Traced:
    embedded = embedded.double().requires_grad_()
    values = torch.einsum("nt,td,nd->n", looks.double(), embedded, read.double())
    logits = unembed.double() @ (values @ write.double())
    into = [(embedded * torch.autograd.grad(value, embedded, retain_graph=True)[0]).sum(1) for value in values]
    out_of = torch.stack([values * torch.autograd.grad(one, values, retain_graph=True)[0] for one in logits], 1)
    order = out_of.sum(1).abs().argsort(descending=True).tolist()
    return _graph(
        [where[one] for one in order],
        values.detach()[order].tolist(),
        torch.stack(into).detach()[order].numpy(),
        out_of.detach()[order].numpy(),
    )


def _graph(where: list[tuple[int, int]], values: list[float], into: np.ndarray, out_of: np.ndarray) -> Traced:
    """A circuit of these neurons, all at the last position, with an edge from each to every logit and from the first
    embedding to each."""
    size = len(where)
    kinds = ["neuron"] * size + ["embedding"] * TOKENS + ["logit"] * LOGITS
    attribution = [*out_of.sum(1).tolist(), *([0.0] * TOKENS), *([1.0] * LOGITS)]
    empty = [None] * len(kinds)
    nodes = nodes_table(
        {
            "kind": kinds,
            "layer": [layer for layer, _ in where] + [-1] * TOKENS + [3] * LOGITS,
            "position": [TOKENS - 1] * size + list(range(TOKENS)) + [TOKENS - 1] * LOGITS,
            "neuron": [neuron for _, neuron in where] + list(range(TOKENS)) + list(range(LOGITS)),
            "token": [""] * size + [f"t{i}" for i in range(TOKENS)] + [f" word{i}" for i in range(LOGITS)],
            "activation": [*values, *([None] * TOKENS), *([1.0] * LOGITS)],
            "attribution": attribution,
            **dict.fromkeys(("gradient", "explained", "influence", "bias_share"), empty),
        }
    )
    pairs = [(size, node, float(into[node, 0])) for node in range(size)]
    pairs += [(node, size + TOKENS + k, float(out_of[node, k])) for node in range(size) for k in range(LOGITS)]
    pairs += [
        (node, other, 0.5 * node - other) for node in range(size) for other in range(node + 1, min(node + 4, size))
    ]
    links = edges_table(
        {
            "source": [pair[0] for pair in pairs],
            "target": [pair[1] for pair in pairs],
            "weight": [pair[2] for pair in pairs],
            "share": [None] * len(pairs),
            "attribution": [pair[2] * 0.5 for pair in pairs],
        }
    )
    profiles = {"prompt_id": [0] * size, "node_id": range(size), "input": list(into), "output": list(out_of)}
    return Traced(
        nodes=nodes,
        links=links,
        profiles=pa.table({field.name: pa.array(profiles[field.name], field.type) for field in PROFILES}),
        text="planted",
        tokens=tuple(f"t{i}" for i in range(TOKENS)),
        n_layers=3,
        settings=settings(),
        model=_MODEL,
    )


_MODEL = ModelRecord(
    name="planted",
    revision=None,
    family="llama",
    fingerprint="0",
    dtype="float32",
    n_layers=3,
    d_model=WIDTH,
    d_mlp=100,
    n_heads=1,
    parallel=False,
)


def shuffled(circuit: Traced, seed: int) -> Traced:
    """The same circuit with its neurons in another order."""
    size, order = circuit.n_nodes, np.random.default_rng(seed).permutation(circuit.n_nodes)
    whole = [*order.tolist(), *range(size, circuit.nodes.num_rows)]
    nodes = circuit.nodes.take(whole).drop_columns("node_id")
    numbered = nodes.add_column(1, "node_id", pa.array(range(len(whole)), pa.int32()))
    place = np.argsort(whole)
    assert circuit.links is not None
    assert circuit.profiles is not None
    ends = {end: pa.array(place[circuit.links[end].to_numpy()], pa.int32()) for end in ("source", "target")}
    links = circuit.links
    for number, (end, column) in enumerate(ends.items(), 1):
        links = links.set_column(number, end, column)
    profiles = circuit.profiles.take(order).set_column(1, "node_id", pa.array(range(size), pa.int32()))
    return circuit.model_copy(update={"nodes": numbered, "links": links, "profiles": profiles})
