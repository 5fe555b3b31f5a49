"""Any function of the logits as what a circuit is of: its gradient, as a direction behind the final norm.

Knows how a function is linearised at the logits. Refuses to know what is made of a direction (attribution/targets.py).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tracer.attribution.targets import direction
from tracer.errors import JobError, RemoteError, first_line, quoted
from tracer.model import head, passes
from tracer.model.named import AnyModel, model_of
from tracer.model.state import undisturbed
from tracer.prompts import Asked, Batch, as_prompt, encode
from tracer.settings import TargetDirection


@undisturbed()
def direction_of(model: AnyModel, prompt: Asked, function: Callable[[Tensor], Tensor]) -> TargetDirection:
    """A function of the next token's logits as what this prompt's circuit is of (`tracer.trace`, ``of=``): its gradient
    at the prompt, to what leaves the final norm where the prompt is read.

    It is first order: the circuit's metric is the gradient's product with that state, and neither the function's value
    nor what it does far from the prompt; attributions and edges are those of the function, linearised at the logits. Of
    a weighted sum of logits it is the sum itself, up to the head's bias; a soft-cap is linearised with the function.

    Args:
        model: from `tracer.load`, or the name of a model (``"demo"``, a folder, a Hugging Face id), which is loaded and
            kept until a call names another.
        prompt: a `tracer.Prompt`, or its text; what it asks about has no effect.
        function: of the logits [vocab], float32, at the prompt's position; gives one number, differentiable in them.

    Returns:
        The direction, called by the function's name.

    Raises:
        JobError: several positions, a function that fails, gives no single number or depends on no logit.
        RemoteError: the model is on a server, which is not sent functions of a user's.
    """
    model, prompt = model_of(model), as_prompt(prompt)
    name = getattr(function, "__name__", type(function).__name__)
    value, step = f"function {quoted(name)}", "return one number made of the logits by torch"
    if model.remote is not None:
        rule = "of a user's own is not sent to a server"
        raise RemoteError(value, rule, "load the model here, or make a tracer.direction of its gradient")
    encoded = encode(prompt, model)
    if len(encoded.positions) > 1:
        raise JobError(f"positions {list(encoded.positions)}", "a function is of one position's logits", "give one")
    at = max(encoded.positions)
    state = passes.read(model, Batch((encoded.token_ids,)))[0, at]
    unit = head.of(model.nn, model.plan)
    with torch.inference_mode(False), torch.enable_grad():
        leaf = state.clone().to(unit.weight.device).requires_grad_(True)
        raw = unit.weight.detach().float() @ leaf
        logits = head.capped(unit, raw if unit.bias is None else raw + unit.bias.detach().float())
        try:
            score = function(logits)
        except Exception as error:  # a user's own code fails as it likes
            raise JobError(value, f"fails on the logits ({first_line(error)})", step) from error
        if not isinstance(score, Tensor) or score.numel() != 1:
            raise JobError(value, "gives no single number", step)
        if not score.requires_grad:
            raise JobError(value, "gives a number that does not depend on the logits", step)
        (slope,) = torch.autograd.grad(score.sum(), [leaf])
    return direction(slope, None, label=f"gradient of {name}")
