"""A small run whose neurons have texts and tokens, written by hand, and a language model that answers about them.

`Model` is the behaviour of a `chat_stub.Stub`: each time it explains the same texts it says something else, and it
simulates a neuron as a function of its description and the token.
"""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

import pyarrow as pa

from chat_stub import completion, data_of
from tracer.store import one_prompt, schemas
from tracer.store.run_folder import RunFolder

NEURONS = [(3, 7, 1), (0, 2, -1), (1, 5, 1)]
"""Strongest first."""


def exemplars(layer: int, neuron: int, polarity: int, tops: int = 6, others: int = 4) -> list[dict[str, Any]]:
    """Rows of EXEMPLARS: texts of random tokens with random values, the largest at the peak."""
    dice = random.Random(f"{layer} {neuron} {polarity}")
    found = []
    for kind, count in (("top", tops), ("q90", others // 2), ("q50", others - others // 2)):
        for rank in range(count):
            tokens = [f" w{dice.randrange(40)}" for _ in range(12)]
            values = [polarity * dice.choice((0.0, 0.0, -0.4, dice.random())) for _ in tokens]
            values[8] = polarity * (3.0 - 0.1 * rank if kind == "top" else 1.0)
            about = {"layer": layer, "neuron": neuron, "polarity": polarity, "kind": kind, "rank": rank}
            place = {"value": values[8], "document": len(found) + 100 * neuron, "position": 28, "start": 20}
            found.append({**about, **place, "tokens": tokens, "values": values})
    return found


def write(folder: Path, texts: bool = True, tokens: bool = False) -> RunFolder:
    """A run of one prompt whose strongest neurons are NEURONS."""
    nodes = [
        {"prompt_id": 0, "node_id": i, "kind": "neuron", "layer": layer, "position": 0, "neuron": neuron, "token": "x"}
        | {"activation": 0.5 * sign, "attribution": (-1.0) ** i * (3 - i), "gradient": 1.0}
        for i, (layer, neuron, sign) in enumerate(NEURONS)
    ]
    prompts = pa.Table.from_pylist([{"prompt_id": 0, "text": "x", "status": "ok", "n_nodes": 3}], schemas.PROMPTS)
    tables = {"prompts": prompts, "nodes": pa.Table.from_pylist(nodes, schemas.NODES)}
    one_prompt.write_run(folder, {"kind": "graph", "fingerprint": "f"}, tables)
    run = RunFolder(folder)
    if texts:
        rows = [row for key in NEURONS for row in exemplars(*key)]
        run.write_table("exemplars.parquet", pa.Table.from_pylist(rows, schemas.EXEMPLARS))
    if tokens:
        known = [
            dict(zip(("layer", "neuron", "polarity"), key, strict=True))
            | {"promoted": [f" {key[1]}"], "suppressed": []}
            for key in NEURONS
        ]
        run.write_table("tokens.parquet", pa.Table.from_pylist(known, schemas.TOKENS))
    run.reseal([name for name in ("exemplars.parquet", "tokens.parquet") if run.place.exists(name)])
    return run


def guess(description: str, token: str) -> int:
    """How active the stub's model says that a neuron of this description is at a token."""
    found = hashlib.sha256(f"{description}{token}".encode()).digest()
    return found[1] % 11 if found[0] % 3 == 0 else 0


def model(body: dict[str, Any], before: int) -> Any:
    """What the model answers, the `before`-th time that it is asked the same."""
    asked = data_of(body)
    usage = {"prompt_tokens": 400, "completion_tokens": 60}
    if "description" not in asked:
        seen = hashlib.sha256(repr(asked).encode()).hexdigest()[:6]
        return completion(f'{{"description": "words like {seen}, say {before}"}}', usage=usage)
    active = [
        [text, index, guess(asked["description"], token)]
        for text, tokens in enumerate(asked["texts"])
        for index, token in tokens
        if guess(asked["description"], token)
    ]
    return completion(f'{{"active": {active}}}', usage=usage)
