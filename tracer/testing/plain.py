"""The linearisation of method.md section 3 a second time, in plain PyTorch: what the product is checked against.

It knows operations, not families: a norm is what takes an `rsqrt`, a pattern what comes of a `softmax`, the half rule
is for any product of two tensors that both carry gradient. So it cannot repeat a mistake in a family's data. Refuses to
know nnsight and tracer's rules; of a family it is told where the embedding and the down projections are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

Change = Callable[[int, Tensor], Tensor]
"""From a layer and its neurons [prompt, column, neuron] to what is passed on in their place."""

CONSTANTS = {"softmax", "sigmoid", "rsqrt", "topk"}
"""Operations whose result is a constant: patterns, gates, routers, and the statistics of norms."""
ACTIVATIONS = {"silu", "gelu", "relu", "tanh", "clamp", "clip"}
"""Operations that become their input times a constant."""
WHOLE = ("scaled_dot_product_attention", "layer_norm", "rms_norm")
"""Operations that hold a norm or a pattern inside."""
PRODUCTS = {"mul", "__mul__", "__rmul__", "multiply"}
SUMS = {"add", "__add__", "__radd__"}
QUOTIENTS = {"div", "__truediv__", "true_divide"}
DELTA_RULE = "chunk_gated_delta_rule"
"""How the names of functions end that carry a state from token to token, of queries, keys and values; transformers has
them in a model's file, or an attention holds the one that it runs."""
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


class Linearised(TorchFunctionMode):
    """While it is on, operations carry the gradients of the linearised model; their values are as they were.

    What is held constant is kept in the order of operations. With what another pass kept, the linearised model itself
    is computed: other inputs move its values as its gradients say, without any autograd.

    Args:
        held: what another pass over the same tokens `kept`.
    """

    def __init__(self, held: Sequence[Any] | None = None) -> None:
        super().__init__()
        self.kept: list[Any] = []
        self._held = None if held is None else iter(held)
        self._offsets = WeakTensorKeyDictionary()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, name = dict(kwargs or {}), getattr(function, "__name__", "")
        carried = [_carries(part) for part in args]
        if name in WHOLE:
            out = getattr(self, f"_{name}")(function, *args, **given)
        elif not any(carried):
            out = function(*args, **given)
        elif name in CONSTANTS or (name in ("pow", "__pow__") and -0.5 in (*args[1:], *given.values())):
            out = self.constant(function(*args, **given))
        elif name in ACTIVATIONS:
            out = self.times_constant(lambda z: function(z, *args[1:], **given), args[0])
        elif name in QUOTIENTS:
            out = function(args[0], *map(self.constant, args[1:]), **given)
        elif name in PRODUCTS and all(carried):
            out = self._product(*args)
        else:
            out = function(*args, **given)
            out = _Wall.apply(out, name) if name in MATRIX_PRODUCTS and all(carried[:2]) else out
            if name in SUMS and any(isinstance(part, int | float) for part in args):
                self._offsets[out] = sum(part for part in args if isinstance(part, int | float))
        return out

    def constant(self, value: Any) -> Any:
        """What was computed, here or in the other pass, without its gradient."""
        value = _detached(value) if self._held is None else next(self._held)
        self.kept.append(value)
        return value

    def exactly(self, compute: Callable[[], Tensor], linear: Tensor) -> Tensor:
        """The value of what is computed with the gradient of `linear`, which is that value too; in a pass with other
        inputs `linear` itself."""
        return _swap(compute(), linear) if self._held is None else linear

    def times_constant(self, function: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        """`function(z)`, as ``z * stop(function(z) / z)``."""
        factor = self.constant(torch.where(z == 0, 0.0, function(z) / torch.where(z == 0, 1.0, z)))
        return self.exactly(lambda: function(z.detach()), z * factor)

    def _product(self, one: Tensor, other: Tensor) -> Tensor:
        """The half rule; a number that was added to a factor has no gradient to share."""
        first, second = (float(self._offsets.get(part) or 0.0) for part in (one, other))
        of_one, of_other = self.constant((0.5 * (other + second), 0.5 * (one + first)))
        return self.exactly(
            lambda: one.detach() * other.detach(), (one - first) * of_one + (other - second) * of_other + first * second
        )

    def _scaled_dot_product_attention(
        self, function: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, *args: Any, **given: Any
    ) -> Tensor:
        query, key = self.constant((query, key))
        return function(query, key, value, *args, **given)

    def _layer_norm(
        self, function: Callable[..., Tensor], x: Tensor, shape: Any, weight: Any = None, bias: Any = None,
        eps: float = 1e-5, **_: Any,
    ) -> Tensor:  # fmt: skip
        centred = x - x.mean(-1, keepdim=True)
        scale = self.constant((centred.pow(2).mean(-1, keepdim=True) + eps).rsqrt())
        linear = centred * scale * (1.0 if weight is None else weight)
        return self.exactly(lambda: function(x, shape, weight, bias, eps), linear if bias is None else linear + bias)

    def _rms_norm(
        self, function: Callable[..., Tensor], x: Tensor, shape: Any, weight: Any = None, eps: float | None = None
    ) -> Tensor:
        least = torch.finfo(x.dtype).eps if eps is None else eps
        scale = self.constant((x.pow(2).mean(-1, keepdim=True) + least).rsqrt())
        return self.exactly(lambda: function(x, shape, weight, eps), x * scale * (1.0 if weight is None else weight))


@dataclass(frozen=True)
class Neurons:
    """Where a layer's neurons are: what enters its down projections.

    Attributes:
        width: of the layer, in numbers of neurons.
        downs: each module whose input is some of them, and the number of its first.
        experts: the module whose fused parameter ``down_proj`` [expert, ...] the others enter, if there is one.
    """

    width: int
    downs: tuple[tuple[nn.Module, int], ...]
    experts: nn.Module | None = None


@dataclass
class Pass:
    """One forward pass of a plain model.

    Attributes:
        logits: [prompt, column, token].
        embedding: what left the embedding [prompt, column, d_model], a leaf of the gradients.
        raw: each layer's neurons by number as computed [prompt, column, neuron], 0 of an expert that did not run.
        values: the same as they are passed on, without gradient.
        kept: of the linearisation, see `Linearised`.
        handles: what gradients to neurons are taken to. biases: what is added whatever the prompt.
    """

    logits: Tensor
    embedding: Tensor
    raw: list[Tensor]
    values: list[Tensor]
    kept: list[Any]
    handles: list[Tensor]
    biases: tuple[Tensor, ...]

    def of_biases(self, value: Tensor) -> Tensor:
        """How much of a number of the linearised model comes of its biases."""
        if not self.biases:
            return torch.zeros(())
        grads = torch.autograd.grad(value, self.biases, retain_graph=True, allow_unused=True, materialize_grads=True)
        parts = [(bias * grad).sum() for bias, grad in zip(self.biases, grads, strict=True)]
        return torch.stack(parts).sum().detach()

    def gradients(self, value: Tensor) -> tuple[list[Tensor], Tensor]:
        """Of a number, to each layer's neurons and to the embedding."""
        ends = [*self.handles, self.embedding]
        grads = torch.autograd.grad(value, ends, retain_graph=True, allow_unused=True, materialize_grads=True)
        return list(grads[:-1]), grads[-1]


class _Taps(TorchFunctionMode):
    """Every neuron that enters a down projection, seen and set: by hooks on modules, and where experts' weights are
    fused by the matrix products with them, whose rows are the tokens that were last looked up."""

    def __init__(self, layers: Sequence[Neurons], shape: tuple[int, int], change: Change | None, hold: bool) -> None:
        super().__init__()
        self.layers, self.shape, self.change, self.hold = layers, shape, change, hold
        self.handles = [torch.zeros(*shape, one.width).requires_grad_() for one in layers]
        self.raw = [torch.zeros(shape[0] * shape[1], one.width) for one in layers]
        self.values = [torch.zeros(shape[0] * shape[1], one.width) for one in layers]
        self.fused = {}
        for layer, one in enumerate(layers):
            if one.experts is not None:
                weight: Any = one.experts.down_proj
                self.fused[weight.untyped_storage().data_ptr()] = (layer, weight[0].numel())
        self.tokens = torch.empty(0, dtype=torch.long)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given, name = dict(kwargs or {}), getattr(function, "__name__", "")
        if name == "__getitem__" and isinstance(args[1], Tensor) and args[1].dtype == torch.long and args[1].ndim == 1:
            self.tokens = args[1]
        if self.fused and name in (*MATRIX_PRODUCTS, "linear") and len(args) > 1 and isinstance(args[1], Tensor):
            found = self.fused.get(args[1].untyped_storage().data_ptr())
            if found is not None:
                args = (self._experts(args[0], args[1], *found), *args[1:])
        return function(*args, **given)

    def _experts(self, x: Tensor, weight: Tensor, layer: int, size: int) -> Tensor:
        """The neurons of one expert where it runs [row, neuron]; or of all, at all tokens [expert, row, neuron]."""
        if x.ndim == 2:
            return self.tap(layer, int(weight.storage_offset()) // size * x.shape[-1], x, self.tokens)
        every = torch.arange(x.shape[1])
        return torch.stack([self.tap(layer, number * x.shape[-1], one, every) for number, one in enumerate(x)])

    def enter(self, layer: int, first: int, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Before a down projection runs."""
        flat = args[0].reshape(-1, args[0].shape[-1])
        return self.tap(layer, first, flat, torch.arange(len(flat))).view_as(args[0]), *args[1:]

    def tap(self, layer: int, first: int, x: Tensor, tokens: Tensor) -> Tensor:
        """See neurons [row, neuron] of these tokens, and give what is passed on."""
        at = tokens[:, None], torch.arange(first, first + x.shape[-1])
        self.raw[layer] = self.raw[layer].index_put(at, x.float())
        if self.change is not None:
            whole = torch.zeros_like(self.raw[layer]).index_put(at, x.float())
            x = self.change(layer, whole.view(*self.shape, -1)).flatten(0, 1)[at].to(x.dtype)
        x = x.detach() if self.hold else x
        self.values[layer][at] = x.detach().float()
        return x + self.handles[layer].flatten(0, 1)[at].to(x.dtype)


@dataclass(frozen=True)
class Plain:
    """A model of its own, on which nothing but hooks of PyTorch ever ran, and where its parts are.

    Attributes:
        module: the Hugging Face model.
        embedding: whose output is the tokens' embeddings.
        layers: where each layer's neurons are.
        activations: modules that are activation functions, whatever they are made of.
        biases: parameters that are added whatever the prompt, embeddings of positions among them.
    """

    module: nn.Module
    embedding: nn.Module
    layers: tuple[Neurons, ...]
    activations: tuple[nn.Module, ...] = ()
    biases: tuple[nn.Parameter, ...] = ()

    def run(
        self,
        inputs: Mapping[str, Any],
        *,
        linear: bool = False,
        hold: bool = False,
        change: Change | None = None,
        entry: Tensor | None = None,
        held: Sequence[Any] | None = None,
    ) -> Pass:
        """One forward pass with gradients.

        Args:
            inputs: the model's keyword arguments.
            linear: with the gradients of the linearised model, in the place of its own.
            hold: neurons are constants, which no gradient passes.
            change: what each layer's neurons are set to. entry: what the embedding's output is set to.
            held: constants of another linearised pass, for this one to be that linear map.
        """
        rows, columns = inputs["input_ids"].shape
        taps, mode = _Taps(self.layers, (rows, columns), change, hold), Linearised(held) if linear else None
        entered: list[Tensor] = []

        def enter(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            entered.append((output if entry is None else entry).detach().clone().requires_grad_())
            return entered[0]

        with ExitStack() as stack, torch.enable_grad():
            stack.callback(self.embedding.register_forward_hook(enter).remove)
            for layer, one in enumerate(self.layers):
                for down, first in one.downs:
                    stack.callback(down.register_forward_pre_hook(partial(taps.enter, layer, first)).remove)
            if mode is not None:
                stack.enter_context(self._parts(mode))
                stack.enter_context(mode)
            stack.enter_context(taps)
            logits = self.module(**inputs).logits
            raw = [one.view(rows, columns, -1) for one in taps.raw]
        values = [one.view(rows, columns, -1) for one in taps.values]
        return Pass(logits, entered[0], raw, values, [] if mode is None else mode.kept, taps.handles, self.biases)

    @contextmanager
    def _parts(self, mode: Linearised) -> Iterator[None]:
        """What is held as a whole, and not by its operations: activations, whatever they are made of, are their input
        times a constant; the gate of a gated norm is a constant; and so is what a delta rule's state is written and
        read with."""
        known = ("transformers.activations", "torch.nn.modules.activation")
        with ExitStack() as stack:
            for part in self.module.modules():
                kind = type(part)
                if kind.__module__ in known or part in self.activations:
                    _replace(stack, part, "forward", partial(_activation, mode, part.forward))
                elif kind.__name__.endswith("NormGated"):
                    _replace(stack, part, "forward", partial(_gated, mode, part.forward))
            files = {sys.modules[type(part).__module__] for part in self.module.modules()}
            for owner in (*files, *self.module.modules()):
                for name, rule in [*vars(owner).items()]:
                    if name.endswith(DELTA_RULE) and callable(rule):
                        _replace(stack, owner, name, partial(_delta, mode, rule))
            yield


def _replace(stack: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Another attribute until the stack ends."""
    before = vars(owner).get(name)
    setattr(owner, name, value)
    stack.callback(partial(delattr, owner, name) if before is None else partial(setattr, owner, name, before))


def _activation(mode: Linearised, whole: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        return mode.times_constant(whole, z)


def _gated(mode: Linearised, whole: Callable[..., Tensor], x: Tensor, gate: Tensor) -> Tensor:
    return whole(x, mode.constant(gate))


def _delta(mode: Linearised, rule: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, **given: Any) -> Any:
    query, key, decay, share = mode.constant((query, key, given.pop("g"), given.pop("beta")))
    return rule(query, key, value, g=decay, beta=share, **given)


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
