"""The linearisation of method.md section 3 a second time, in plain PyTorch: what the product is checked against.

It knows operations, not families: a norm is what takes an `rsqrt`, a pattern what comes of a `softmax`, the half rule
is for any product of two tensors that both carry gradient. So it cannot repeat a mistake in a family's data. Refuses to
know nnsight and tracer's rules; of a family it is told where the embedding and the down projections are.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Change = Callable[[int, Tensor], Tensor]
"""From a layer and its neurons [prompt, column, neuron] to what is passed on in their place."""

CONSTANTS = {"softmax", "sigmoid", "rsqrt", "topk"}
"""Operations whose result is a constant: patterns, gates, routers, and the statistics of norms."""
ACTIVATIONS = {"silu", "gelu", "relu", "tanh", "clamp", "clip"}
"""Operations that become their input times a constant."""
PRODUCTS = {"mul", "__mul__", "__rmul__", "multiply"}
QUOTIENTS = {"div", "__truediv__", "true_divide"}
DELTA_RULE = "chunk_gated_delta_rule"
"""How functions end that carry a state from token to token, of queries, keys and values."""
MATRIX_PRODUCTS = {"matmul", "__matmul__", "bmm", "mm", "einsum"}


class _Swap(torch.autograd.Function):
    """The value of one tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, surrogate: Tensor) -> Tensor:  # noqa: ARG004  autograd passes a context
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:  # noqa: ARG004
        return None, gradients[0]


def _swap(value: Tensor, surrogate: Tensor) -> Tensor:
    return _Swap.apply(value.detach(), surrogate)


class _Wall(torch.autograd.Function):
    """A matrix product of two tensors that both carry gradient, as of queries and keys: none may come back this way."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, name: str) -> Tensor:
        ctx.name = name
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        raise NotImplementedError(f"a gradient comes through {ctx.name} of two tensors that both depend on the input")


def _carries(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple):
        parts = [_detached(part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def _times_constant(function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """`function(z)`, with the gradient of ``z * stop(function(z) / z)``."""
    with torch.no_grad():
        value = function(z)
        factor = torch.where(z == 0, 0.0, value / torch.where(z == 0, 1.0, z))
    return _swap(value, z * factor)


def _of_values(rule: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, *args: Any, **given: Any) -> Any:
    """A delta rule as it is, linear in its values alone: the rules for single operations are not for its own."""
    named = {name: _detached(one) for name, one in given.items()}
    with torch._C.DisableTorchFunction():
        return rule(query.detach(), key.detach(), value, *map(_detached, args), **named)


class Linearised(TorchFunctionMode):
    """While it is on, operations carry the gradients of the linearised model; their values are as they were."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, name = dict(kwargs or {}), getattr(function, "__name__", "")
        if name in ("scaled_dot_product_attention", "layer_norm", "rms_norm"):
            return getattr(self, f"_{name}")(function, *args, **given)
        if name in CONSTANTS or (name in ("pow", "__pow__") and args[1] == -0.5):
            return _detached(function(*args, **given))
        if name in ACTIVATIONS and _carries(args[0]):
            return _times_constant(lambda z: function(z, *args[1:], **given), args[0])
        if name in QUOTIENTS:
            return function(args[0], *map(_detached, args[1:]), **given)
        out, both = function(*args, **given), all(map(_carries, args[:2])) and len(args) > 1
        if both and name in PRODUCTS:
            return _swap(out, 0.5 * (args[0] * args[1].detach() + args[0].detach() * args[1]))
        return _Wall.apply(out, name) if both and name in MATRIX_PRODUCTS else out

    def _scaled_dot_product_attention(
        self, function: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, *args: Any, **given: Any
    ) -> Tensor:
        return function(query.detach(), key.detach(), value, *args, **given)

    def _layer_norm(
        self, function: Callable[..., Tensor], x: Tensor, shape: Any, weight: Any = None, bias: Any = None,
        eps: float = 1e-5, **_: Any,
    ) -> Tensor:  # fmt: skip
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.pow(2).mean(-1, keepdim=True) + eps).rsqrt().detach()
        linear = centred * scale * (1.0 if weight is None else weight)
        return _swap(function(x, shape, weight, bias, eps), linear if bias is None else linear + bias)

    def _rms_norm(
        self, function: Callable[..., Tensor], x: Tensor, shape: Any, weight: Any = None, eps: float | None = None
    ) -> Tensor:
        scale = (x.pow(2).mean(-1, keepdim=True) + (torch.finfo(x.dtype).eps if eps is None else eps)).rsqrt().detach()
        return _swap(function(x, shape, weight, eps), x * scale * (1.0 if weight is None else weight))


@dataclass
class Pass:
    """One forward pass of a plain model.

    Attributes:
        logits: [prompt, column, token].
        embedding: what left the embedding [prompt, column, d_model], a leaf of the gradients.
        raw: each layer's neurons as computed [prompt, column, neuron]. neurons: the same as they are passed on.
    """

    logits: Tensor
    embedding: Tensor
    raw: list[Tensor]
    neurons: list[Tensor]

    def gradients(self, value: Tensor) -> tuple[list[Tensor], Tensor]:
        """Of a number, to each layer's neurons and to the embedding."""
        ends = [*self.neurons, self.embedding]
        grads = torch.autograd.grad(value, ends, retain_graph=True, allow_unused=True, materialize_grads=True)
        return list(grads[:-1]), grads[-1]


@dataclass(frozen=True)
class Plain:
    """A model of its own, on which nothing but hooks of PyTorch ever ran, and where its parts are.

    Attributes:
        module: the Hugging Face model.
        embedding: whose output is the tokens' embeddings. downs: of each layer, the module whose input its neurons are.
        activations: modules that are activation functions, whatever they are made of.
    """

    module: nn.Module
    embedding: nn.Module
    downs: tuple[nn.Module, ...]
    activations: tuple[nn.Module, ...] = ()

    def run(
        self, inputs: Mapping[str, Any], *, linear: bool = False, change: Change | None = None, hold: bool = False
    ) -> Pass:
        """One forward pass with gradients.

        Args:
            inputs: the model's keyword arguments.
            linear: with the gradients of the linearised model, in the place of its own.
            change: what each layer's neurons are set to. hold: they are constants: leaves that no gradient passes.
        """
        seen = Pass(torch.empty(0), torch.empty(0), [], [])

        def enter(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            seen.embedding = output.detach().clone().requires_grad_()
            return seen.embedding

        def tap(layer: int, value: Tensor) -> Tensor:
            seen.raw.append(value)
            passed = value if change is None else change(layer, value)
            seen.neurons.append(passed.detach().clone().requires_grad_() if hold else passed)
            return seen.neurons[-1]

        def enter_down(layer: int, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tap(layer, args[0]), *args[1:]

        with ExitStack() as stack, torch.enable_grad():
            stack.callback(self.embedding.register_forward_hook(enter).remove)
            for layer, down in enumerate(self.downs):
                stack.callback(down.register_forward_pre_hook(partial(enter_down, layer)).remove)
            stack.enter_context(self._activations() if linear else nullcontext())
            stack.enter_context(self._recurrences() if linear else nullcontext())
            stack.enter_context(Linearised() if linear else nullcontext())
            seen.logits = self.module(**inputs).logits
        return seen

    @contextmanager
    def _recurrences(self) -> Iterator[None]:
        """Delta rules with all that they are given but values as constants; and norms with a gate, which is one."""
        with ExitStack() as stack:
            for part in self.module.modules():
                if "gate" in inspect.signature(part.forward).parameters:
                    hook = part.register_forward_pre_hook(lambda _, args: (args[0], *map(_detached, args[1:])))
                    stack.callback(hook.remove)
            for module in {sys.modules[type(part).__module__] for part in self.module.modules()}:
                for name, whole in [*vars(module).items()]:
                    if name.endswith(DELTA_RULE):
                        stack.callback(setattr, module, name, whole)
                        setattr(module, name, partial(_of_values, whole))
            yield

    @contextmanager
    def _activations(self) -> Iterator[None]:
        """Activation functions, whatever they are made of, as their input times a constant."""
        known = ("transformers.activations", "torch.nn.modules.activation")
        found = {part for part in self.module.modules() if type(part).__module__ in known} | {*self.activations}
        with ExitStack() as stack:
            for part in found:
                whole = part.forward
                part.forward = lambda z, whole=whole: _times_constant(whole, z)
                stack.callback(part.__dict__.pop, "forward")
            yield


def batch(rows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """The keyword arguments of a left-padded batch, written apart from the product; positions count real tokens."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "use_cache": False,
    }
