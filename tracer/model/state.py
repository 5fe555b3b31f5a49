"""What must hold of a module in memory, and of torch around it, whenever something is computed.

`check` is asked at every pass, since a module may be changed after it was loaded; it reads no weight and takes
milliseconds. `undisturbed` puts torch's global state aside. In a process that was forked the parent's other threads are
missing, of Python and of torch: `Interrupted`, `check_threads`. Refuses to know how a module came about, and families.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from nnsight.intervention.source import Controller
from torch import nn
from torch.nn.modules import module as hooks_of_all

from tracer.errors import ModelError
from tracer.system.forks import after_fork

_HOOKS = {
    "_forward_pre_hooks": "forward pre-hook",
    "_forward_hooks": "forward hook",
    "_backward_pre_hooks": "backward pre-hook",
    "_backward_hooks": "backward hook",
}
_HARMLESS = ("transformers.utils.output_capturing.", "transformers.modeling_utils.PreTrainedModel.enable_input_require")
"""What hooks are called that transformers leaves on a module whose hidden states were asked for, or whose gradients are
checkpointed: they change no value."""
_PLACING = ("AlignDevicesHook", "CpuOffload", "UserCpuOffloadHook")
"""Hooks of accelerate that move values and change none."""
_WRAPPERS = {
    "DataParallel": "module.module",
    "DistributedDataParallel": "module.module",
    "FullyShardedDataParallel": "module.module",
    "OptimizedModule": "module._orig_mod",
}


@contextmanager
def undisturbed() -> Iterator[None]:
    """Compute as if torch were just imported: no inference mode, no autocast, float32 and the CPU as its defaults, its
    matrix products in float32 (not TF32 or bfloat16); and gradients only where a pass takes them, whatever the weights
    require.

    What a caller has set is as before afterwards. Also a decorator.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        for kind in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device() != torch.device("cpu"):
            stack.enter_context(torch.device("cpu"))
        if (dtype := torch.get_default_dtype()) != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        _multiply_in_float32(stack)
        stack.enter_context(torch.no_grad())
        yield


def _multiply_in_float32(stack: ExitStack) -> None:
    """Until the stack ends; torch's two ways to say it exclude each other."""
    backends: Any = torch.backends
    parts: list[Any] = [getattr(backends.cuda, "matmul", None), getattr(backends.mkldnn, "matmul", None)]
    if not all(hasattr(part, "fp32_precision") for part in (backends, *parts)):  # torch before 2.9
        if (precision := torch.get_float32_matmul_precision()) != "highest":
            torch.set_float32_matmul_precision("highest")
            stack.callback(torch.set_float32_matmul_precision, precision)
        return
    for part in parts:
        given = part.fp32_precision
        if {given, backends.fp32_precision} & {"tf32", "bf16"}:
            part.fp32_precision = "ieee"
            stack.callback(setattr, part, "fp32_precision", given)


class Interrupted:
    """In the place of a lock that cannot be had: whoever wants it is told why.

    Args:
        value, rule: of the error.
    """

    def __init__(self, value: str, rule: str) -> None:
        self._value, self._rule = value, rule

    def __enter__(self) -> NoReturn:
        step = "load the model in this process, or start it with multiprocessing's 'spawn'"
        raise ModelError(self._value, self._rule, step)

    def __exit__(self, *_: object) -> None:
        pass


_threads = SimpleNamespace(used=False, lost=False)
"""Whether torch computed in several threads here, and whether a fork left these behind."""


def check_threads() -> None:
    """Refuse to compute in several threads where a fork left them behind: torch would wait for them for ever.

    Raises:
        ModelError: this process was forked, and torch was told to use more than one thread since.
    """
    if (count := torch.get_num_threads()) > 1:
        if _threads.lost:
            rule = f"was forked from one that computed, and there are no {count} threads of torch in it"
            raise ModelError("this process", rule, "call torch.set_num_threads(1), or start it with 'spawn'")
        _threads.used = True


def _left_behind(_: object) -> None:
    """In a forked process: one thread, as in the workers of torch's DataLoader, since the others are not there."""
    if _threads.used:
        _threads.lost = True
        torch.set_num_threads(1)


after_fork(sys.modules[__name__], _left_behind)


def check_kind(module: nn.Module, weights: bool = True) -> None:
    """Refuse a module around a model, whose inside is meant, and weights that cannot be differentiated through.

    Args:
        weights: whether they are meant to be here.

    Raises:
        ModelError: names the kind, and what to pass instead.
    """
    for path, part in module.named_modules():
        _check_whole(path, part)
    for parameter, value in module.named_parameters():
        if value.is_inference():
            rule = "was made under torch.inference_mode(), so that no gradient runs through it"
            raise ModelError(f"weight {parameter}", rule, "load the model outside of it")
        if type(value).__name__ == "DTensor":
            rule = "is spread over processes (DTensor)"
            raise ModelError(f"weight {parameter}", rule, "load the model whole, or with device_map='auto'")
    if weights and all(value.device.type == "meta" for value in module.parameters()):
        rule = "holds no weight in memory: all are on the meta device, or offloaded"
        raise ModelError(
            _shown("", module), rule, "load the model by name, with device_map='auto' where it is too large"
        )


def check(module: nn.Module, loaded: bool = True) -> None:
    """Refuse a module that would not compute what its weights and its family say.

    Args:
        loaded: whether it was wrapped for tracing already.

    Raises:
        ModelError: it is in training mode, has hooks, an adapter that is not merged, another part or another `forward`.
    """
    for attribute, kind in _HOOKS.items():
        for hook in getattr(hooks_of_all, f"_global{attribute}").values():
            rule = f"is a {kind} on every module, which may change what is computed"
            raise ModelError(f"hook {_name(hook)}", rule, "remove it (handle.remove()) while tracing")
    for path, part in module.named_modules():
        _check_whole(path, part)
        inside = part.__dict__
        if part.training:
            rule = "is in training mode, in which dropout changes the numbers"
            raise ModelError(_shown(path, part), rule, "call .eval() on the model")
        if any(inside[attribute] for attribute in _HOOKS):
            _check_hooks(path, part)
        if "_hf_hook" in inside:
            _check_placing(path, part)
        if not isinstance(inside.get("forward"), Controller):
            _check_forward(path, part, loaded)


def _check_whole(path: str, part: nn.Module) -> None:
    kind = type(part)
    if kind.__name__ in _WRAPPERS:
        rule = f"is a wrapper around {'a part of the' if path else 'a'} model"
        raise ModelError(_shown(path, part), rule, f"pass the model without it: {_WRAPPERS[kind.__name__]}")
    if kind.__module__.startswith("peft."):
        rule = "belongs to an adapter of peft that is not merged"
        raise ModelError(_shown(path, part), rule, "merge it: pass peft_model.merge_and_unload()")
    if part.__dict__.get("_compiled_call_impl") is not None:
        rule = "is compiled (module.compile()), so that nothing inside can be read"
        raise ModelError(_shown(path, part), rule, "load the model again, without compiling it")


def _check_hooks(path: str, part: nn.Module) -> None:
    for attribute, kind in _HOOKS.items():
        for hook in part.__dict__[attribute].values():
            if not f"{getattr(hook, '__module__', '')}.{_name(hook)}".startswith(_HARMLESS):
                rule = f"has a {kind} ({_name(hook)}), which may change what is computed"
                raise ModelError(_shown(path, part), rule, "remove it (handle.remove()) while tracing")


def _check_placing(path: str, part: nn.Module) -> None:
    """Refuse hooks of accelerate that do more than move values."""
    placing = part.__dict__["_hf_hook"]
    for hook in getattr(placing, "hooks", (placing,)):
        if type(hook).__name__ not in _PLACING:
            rule = f"has accelerate's {type(hook).__name__}, which may change what is computed"
            raise ModelError(_shown(path, part), rule, "remove it: accelerate.hooks.remove_hook_from_module")


def _check_forward(path: str, part: nn.Module, loaded: bool) -> None:
    """Refuse a `forward` that is neither the class's, nor accelerate's around it; and any that came after loading."""
    placed = "_hf_hook" in part.__dict__
    if loaded:
        rule = "was put in, or placed by accelerate, after the model was loaded here"
        raise ModelError(_shown(path, part), rule, "change the module first, then load it with tracer.load")
    if "forward" in part.__dict__ and not placed:
        rule = "has a forward of its own in the place of its class's"
        raise ModelError(_shown(path, part), rule, "load the model as it was, or trace one without the change")


def _shown(path: str, part: nn.Module) -> str:
    return f"module {path} ({type(part).__name__})" if path else f"module {type(part).__name__}"


def _name(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", None) or type(hook).__name__)
