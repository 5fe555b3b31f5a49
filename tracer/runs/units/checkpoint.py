"""What a stage at the end of a run keeps of its work, so that one that is stopped goes on.

Knows a file of tensors with the key of what they were made from. Refuses to know what they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from tracer.store.run_folder import RunFolder


def write(folder: RunFolder, name: str, key: str, tensors: Mapping[str, Tensor]) -> None:
    """Keep tensors under a key."""
    marked = {**tensors, "key": torch.tensor(list(key.encode()), dtype=torch.uint8)}
    folder.place.write(name, save({part: tensor.contiguous() for part, tensor in marked.items()}))


def read(folder: RunFolder, name: str, key: str) -> dict[str, Tensor] | None:
    """What was kept under the same key; None where that is not so, or it is damaged."""
    try:
        held = load(folder.place.read(name))
        found = bytes(held.pop("key").tolist()).decode()
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    return held if found == key else None
