"""What a circuit can be of beside tokens: a neuron, or a direction, as a user gives them.

Knows how they are written and read from files. Refuses to know any model: whether one has them is attribute.py's.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from tracer.errors import JobError, first_line, option, quoted
from tracer.records import LARGEST, as_python, is_list
from tracer.settings import TargetDirection, TargetNeuron, as_job_error

Of = str | TargetNeuron | TargetDirection | None
"""What a circuit is of inside the model, as it is given."""

_NEURON = re.compile(
    r"\s*(?:L(\d{1,9})\s+(?:E(\d{1,9})\s+)?N(\d{1,18})|(\d{1,9})/(?:(\d{1,9})/)?(\d{1,18}))\s*([+-]?)\s*",
    re.IGNORECASE,
)
_NUMBERS = re.compile(r"[\s,;]+")
_LARGEST_FILE = 2**26


def target(given: Any) -> TargetNeuron | TargetDirection | None:
    """What is asked about inside the model, as settings keep it.

    Raises:
        JobError: a text that names no neuron, or something else.
    """
    if given is None or isinstance(given, TargetNeuron | TargetDirection):
        return given
    named = _NEURON.fullmatch(given) if isinstance(given, str) else None
    if named is None:
        step = "write a neuron as in 'L12 N345' ('L3 E17 N45' of an expert), with a - behind it for its negative side, "
        step += "or make a tracer.direction"
        raise JobError(f"{option('of')} {quoted(given)}", "is neither a neuron nor a direction", step)
    layer, expert, neuron = (named[part] or named[part + 3] for part in (1, 2, 3))
    if int(neuron) > LARGEST:
        raise JobError(f"{option('of')} {quoted(given)}", "is no neuron of any model", "choose another")
    return TargetNeuron(
        layer=int(layer),
        expert=None if expert is None else int(expert),
        neuron=int(neuron),
        sign=-1 if named[7] == "-" else 1,
    )


def direction(
    given: str | Path | Tensor | Any, layer: int | None = None, *, name: str | None = None, label: str | None = None
) -> TargetDirection:
    """A direction as what a circuit is of: the metric is its product with a state of the model, in units of both: of a
    direction of length 1 the metric is how far the state goes along it.

    Args:
        given: d_model numbers (a tensor, an array, a list), or a file of them: ``.safetensors``, ``.json``, ``.csv``
            or ``.txt``.
        layer: the state is the residual stream behind this block; if None it is what leaves the final norm, in the
            space of the unembedding: a row of the head gives that token's logit, up to its bias and a soft-cap.
        name: of the tensor in a file of several.
        label: what it is called; the file's own name if None.

    Returns:
        The direction, as `tracer.trace` and `tracer.attribute` take it (``of=``).

    Raises:
        JobError: a file that cannot be read, or what is no vector of numbers.
    """
    called = label
    if isinstance(given, str | Path):
        path = Path(given)
        called, given = label or path.stem, _read(path, name)
    elif name is not None:
        raise JobError(option("name", name), "has no effect without a file", "leave it out")
    numbers = as_python(given.detach().float().cpu() if isinstance(given, Tensor) else given)
    if is_list(numbers) and len(numbers) == 1 and is_list(numbers[0]):
        numbers = numbers[0]
    if not is_list(numbers) or not all(isinstance(one, int | float) and not isinstance(one, bool) for one in numbers):
        raise JobError(f"direction {quoted(called or given)}", "is not a vector of numbers", "give d_model of them")
    try:
        return TargetDirection(vector=tuple(map(float, numbers)), layer=layer, label=called or "direction")
    except ValidationError as error:
        raise as_job_error(error, "direction", 1) from None


def _read(path: Path, name: str | None) -> Any:
    """The numbers of a file."""
    value, step = f"direction {str(path)!r}", "give a .safetensors, .json, .csv or .txt file of d_model numbers"
    kind = path.suffix.lower()
    if kind not in (".safetensors", ".json", ".csv", ".txt"):
        raise JobError(value, f"is of the kind {kind or 'without a name'}, which is not read", step)
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise JobError(value, f"is larger than {_LARGEST_FILE >> 20} MiB", step)
        if kind == ".safetensors":
            return _tensor(path, name)
        if name is not None:
            raise JobError(option("name", name), f"has no effect on a {kind} file", "leave it out")
        text = path.read_text("utf-8-sig")
        if kind == ".json":
            return json.loads(text)
        return [float(part) for part in _NUMBERS.split(text.strip()) if part]
    except (OSError, ValueError, RecursionError) as error:
        raise JobError(value, f"cannot be read ({first_line(error)})", step) from None


def _tensor(path: Path, name: str | None) -> Tensor:
    """One tensor of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    value = f"direction {str(path)!r}"
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            names = list(file.keys())
            chosen = names[0] if name is None and len(names) == 1 else name
            if chosen is None or chosen not in names:
                rule = f"holds {', '.join(names[:10]) or 'nothing'}" + (f", not {name}" if name is not None else "")
                raise JobError(value, rule, "name one of its tensors")
            tensor: Tensor = file.get_tensor(chosen)
    except SafetensorError as error:
        raise JobError(value, f"cannot be read ({first_line(error)})", "give another file") from None
    if not torch.is_floating_point(tensor):
        raise JobError(value, f"its tensor {chosen} is not of floating-point numbers", "name another")
    return tensor.squeeze()
