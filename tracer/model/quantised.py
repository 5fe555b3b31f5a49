"""Checkpoints whose weights are numbers of 8 or 4 bit with scales: which are read, and as what.

Knows the formats that transformers dequantises while it reads them, here to floats of the dtype that was asked for, on
whatever machine: gradients and the replay of edges need floats. Refuses the others by name, before any weight is read:
some would be cast to floats without their scales.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tracer.errors import ModelError, option, quoted

FLOATS: dict[str, str] = {
    "fp8": "on a GPU that has fp8 they would also round what goes into them",
    "mxfp8": "on a GPU that has fp8 they would also round what goes into them",
    "mxfp4": "",
}
"""Formats whose weights are dequantised, and what running them as they are would do beside."""
_KEPT = ("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit")
"""Formats whose modules have rules (families.LINEAR) and whose weights stay as they are."""


def method(config: Any) -> str | None:
    """The format of a checkpoint's weights, by its configuration; None where they are floats, or will be."""
    given = getattr(config, "quantization_config", None)
    if given is None:
        return None
    fields = given if isinstance(given, dict) else given.to_dict()
    named = fields.get("quant_method")
    if named is None and (fields.get("load_in_4bit") or fields.get("load_in_8bit")):
        named = _KEPT[0]
    return str(getattr(named, "value", named))


def prepare(config: Any, name: str, dtype: Any) -> tuple[str, ...]:
    """Have a checkpoint's weights dequantised, and a sentence where they will be.

    Args:
        config: of the model, which is changed. name: what messages call it. dtype: what was asked for.

    Raises:
        ModelError: a format that is not read; or weights are to be dequantised and quantised again.
    """
    kind = method(config)
    if kind is None or kind in _KEPT:
        return ()
    if kind not in FLOATS:
        rule = (
            f"its weights are quantised by {quoted(kind)}, which is not read; read are {', '.join((*FLOATS, _KEPT[0]))}"
        )
        raise ModelError(name, rule, "use the checkpoint that it was made from, or save one with its weights as floats")
    if not isinstance(dtype, torch.dtype):
        rule = f"is not for {name}, whose weights are dequantised when they are read"
        raise ModelError(option("dtype", "int8, nf4 or fp4"), rule, "use float32, bfloat16 or float16")
    given = config.quantization_config
    config.quantization_config = (given if isinstance(given, dict) else given.to_dict()) | {"dequantize": True}
    beside = f": {FLOATS[kind]}" if FLOATS[kind] else ""
    return (f"the weights of {name} are {kind} and are dequantised to {str(dtype).removeprefix('torch.')}{beside}",)


def settle(module: nn.Module, name: str, dtype: torch.dtype) -> None:
    """Cast what was dequantised, and what was beside it, to one dtype, in place.

    Raises:
        ModelError: some weights are offloaded, or are still no floats.
    """
    for path, value in module.named_parameters():
        if value.device.type == "meta":
            rule = "cannot be dequantised where they are offloaded"
            raise ModelError(f"weights of {name}", rule, "use a device_map that holds them all, or a smaller dtype")
        if not value.is_floating_point() or value.dtype.itemsize < torch.bfloat16.itemsize:
            rule = f"is still {str(value.dtype).removeprefix('torch.')} after it was read"
            raise ModelError(f"weight {path} of {name}", rule, "use the checkpoint that it was made from")
        value.data = value.data.to(dtype)
