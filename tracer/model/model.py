"""Loading a model, checking it, and knowing where its parts are.

Knows Hugging Face loading, devices and dtypes, and wraps the module for nnsight. A loaded `Model` is frozen and in
evaluation mode; nothing in tracer ever changes it. Refuses weights that are missing or not finite, and
architectures with a module that no RelP rule covers. What is computed on the model is model/passes.py's business.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, get_args

import torch
from nnsight import TransformersModel
from torch import nn

from tracer.batching import side
from tracer.choices import AttentionKernel, Spread
from tracer.errors import JobError, ModelError, RemoteError, first_line, option, quoted, say
from tracer.experts import Experts, Numbering, by_shape
from tracer.model import adapters, dequantised, folder, multimodal, quantised, state, tokens
from tracer.model.backend import Answer, Backend, Local, Part, readable
from tracer.model.families import Family, Layout, family_of, inputs_of, is_biased, looks_ahead, value_heads
from tracer.model.wholes import TEXT_PARTS
from tracer.settings import LINEARISED, ModelRecord, WeightsFile
from tracer.system.display import Shown
from tracer.system.forks import after_fork, cached_property

log = logging.getLogger(__name__)

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
QUANTIZED = ("int8", "nf4", "fp4")
STRATEGIES = get_args(Spread)
"""How accelerate can spread a model over devices."""
KERNELS = get_args(AttentionKernel)
HASH = re.compile(r"[0-9a-f]{64}")
"""What a fingerprint is, but for that of hidden weights."""


@dataclass(frozen=True, eq=False, repr=False)
class Model(Shown):
    """A causal language model ready to be traced.

    Attributes:
        name: what it was loaded by; ``demo`` for the shipped one.
        revision: of the Hugging Face id, if one was asked for.
        nn: the nnsight model that traces run on.
        family: where its parts are.
        tokenizer: its Hugging Face tokenizer.
        lock: held by every pass (`ready`), since two threads on one nnsight model break it; a remote model needs none.
        backend: where it runs; if that is a server, `nn` holds no weights, unless they were asked for.
        adapter: merged into its weights, if one was: its folder or id.
        gguf: the GGUF file that its weights were read from, if it was one.
        warnings: what whoever reads a result should know of how it was loaded, a sentence each; `tracer.load` says it.
    """

    name: str
    revision: str | None
    nn: TransformersModel
    family: Family
    tokenizer: Any
    lock: Any = field(default_factory=threading.RLock, repr=False)
    backend: Backend = field(default=Local(), repr=False)
    adapter: str | None = None
    gguf: WeightsFile | None = None
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        after_fork(self, Model._forked)
        state.check_threads()

    def _forked(self) -> None:
        """In a forked process: a thread that held the lock is not here, and left its pass in the middle."""
        value, lock = f"model {quoted(self.name)}", self.lock
        if not self.backend.survives_fork(self.module):
            lost = state.Interrupted(value, "is on a GPU, which a process that was forked cannot use")
        elif isinstance(lock, nullcontext | state.Interrupted):
            return
        elif lock.acquire(blocking=False):
            lock.release()
            return
        else:
            lost = state.Interrupted(value, "was in use by another thread when this process was forked")
        object.__setattr__(self, "lock", lost)

    @property
    def module(self) -> Any:
        """The Hugging Face model itself."""
        return self.nn._module

    @property
    def config(self) -> Any:
        """Its Hugging Face configuration."""
        return self.module.config

    @cached_property
    def blocks(self) -> list[Any]:
        """The envoys of the blocks, in order."""
        return list(self.nn.get(self.family.blocks))

    @property
    def embedding(self) -> Any:
        """The envoy of the token embedding."""
        return self.nn.get(self.family.embedding)

    @property
    def head(self) -> Any:
        """The envoy of the output head."""
        return self.nn.get(self.family.head)

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Around every pass: alone on the model, which must still be fit for it, with torch's global state aside.

        Raises:
            ModelError: the module here is in training mode, has hooks or was changed otherwise; see `state.check`. Or
                this process was forked while another thread was at it.
        """
        with self.lock, state.undisturbed():
            self.backend.check(self.module)
            yield

    @property
    def remote(self) -> Backend | None:
        """The backend, if it is a server."""
        return None if self.backend.server is None else self.backend

    def each(self, function: Callable[[Part], Answer], parts: Sequence[Part]) -> list[Answer]:
        """What a function gives for each of several parts, in their order; on a server several at a time.

        Args:
            function: of a part. parts: what it is called with.
        """
        return self.backend.each(function, parts)

    def stream(self, function: Callable[[Part], Answer], parts: Sequence[Part]) -> Iterator[Answer]:
        """The same one after the other, as they come; no more are held than are under way.

        Args:
            function: of a part. parts: what it is called with.
        """
        return self.backend.stream(function, parts)

    def sleep(self, seconds: float) -> None:
        """`Backend.sleep`."""
        self.backend.sleep(seconds)

    @cached_property
    def plan(self) -> SimpleNamespace:
        """Where the parts are, as plain values for model/interventions.py."""
        embedding, branch, logits = self.family.scales.of(self.config)
        return SimpleNamespace(
            embedding=self.family.embedding,
            blocks=self.family.blocks,
            constants=[tuple(step) for step in self.family.constants if self._has(step.path)],
            final_norm=tuple(self.family.final_norm),
            head=self.family.head,
            norm_offset=self.family.norm_offset,
            layers=[self._planned(layer, layout) for layer, layout in enumerate(self.layouts)],
            d_model=self.d_model,
            n_heads=int(self.config.num_attention_heads),
            embedding_scale=embedding,
            branch_scale=branch,
            logit_scale=logits,
            soft_cap=self.soft_cap,
            head_rows=self.shows_weights,
            transfer_dtype=self.backend.transfer_dtype,
        )

    def _planned(self, layer: int, layout: Layout) -> SimpleNamespace:
        """Where the parts of a block are."""
        wiring, block = layout.wiring, self.module.get_submodule(f"{self.family.blocks}.{layer}")
        return SimpleNamespace(
            steps=tuple(tuple(step) for step in layout.steps),
            gate=None if wiring.gate is None else wiring.gate.path,
            up=None if wiring.up is None else wiring.up.path,
            down=layout.down,
            experts=self._mixture(layer, layout),
            gated=layout.gated,
            gate_part=None if wiring.gate is None else tuple(wiring.gate),
            up_part=None if wiring.up is None else tuple(wiring.up),
            value=None if wiring.value is None else tuple(wiring.value),
            output=tuple(wiring.output),
            attention_in=wiring.attention_in,
            attention_out=wiring.attention_out,
            mlp_in=wiring.mlp_in,
            mlp_out=wiring.mlp_out,
            latent=None if wiring.latent is None else tuple(wiring.latent),
            latent_norm=wiring.latent_norm,
            value_conv=wiring.value_conv,
            heads_norm=wiring.heads_norm,
            parallel=self._parallel(layout),
            value_norm=wiring.value_norm,
            scalar=wiring.scalar,
            in_place=wiring.in_place,
            n_values=value_heads(block, layout, int(self.config.num_attention_heads)),
        )

    def _mixture(self, layer: int, layout: Layout) -> SimpleNamespace | None:
        """Where the parts of a block's mixture are, and how large."""
        found = self.experts[layer]
        if found is None:
            return None
        sizes = {"count": found.n_experts, "width": found.d_expert, "n_slots": found.n_used}
        return SimpleNamespace(**vars(layout.experts), **sizes, shared_width=found.d_shared, d_model=self.d_model)

    def _parallel(self, layout: Layout) -> bool:
        """Whether attention and MLP of a block both read its input."""
        given = layout.wiring.parallel
        return bool(getattr(self.config, given)) if isinstance(given, str) else given

    @cached_property
    def experts(self) -> tuple[LayerExperts | None, ...]:
        """Of each block its mixture, None of one with an MLP."""
        return tuple(
            None if laid.experts is None else experts_in(self.module.get_submodule(self.family.blocks)[layer], laid)
            for layer, laid in enumerate(self.layouts)
        )

    @cached_property
    def layouts(self) -> tuple[Layout, ...]:
        """Of each block."""
        return self.family.laid_out(self.module)

    def _has(self, path: str) -> bool:
        return any(name == path for name, _ in self.module.named_modules())

    @property
    def n_layers(self) -> int:
        """Its blocks."""
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.config.hidden_size)

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Neurons of each layer: the input width of the down projection or, of a mixture, the neurons of all experts,
        shared ones last."""
        blocks = self.module.get_submodule(self.family.blocks)
        each = zip(blocks, self.layouts, self.experts, strict=True)
        return tuple(
            width_of(block, layout) if mixture is None else mixture.n_neurons for block, layout, mixture in each
        )

    @property
    def d_mlp(self) -> int:
        """Neurons of the largest layer."""
        return max(self.widths)

    @cached_property
    def mixtures(self) -> tuple[Experts, ...]:
        """Its mixtures of experts, those of one shape together; none of a dense model."""
        mixed = ((layer, one) for layer, one in enumerate(self.experts) if one is not None)
        return tuple(by_shape((layer, one.n_experts, one.d_expert, one.d_shared) for layer, one in mixed))

    def numbering(self, basis: str = "activation") -> Numbering:
        """How its neurons are numbered; in the basis ``output`` no expert has any."""
        return Numbering(self.mixtures if basis == "activation" else ())

    def n_neurons(self, basis: str = "activation") -> int:
        """How far neurons of a layer are numbered: d_mlp, or d_model in the basis ``output``."""
        return self.d_mlp if basis == "activation" else self.d_model

    def check_neuron(self, named: str, layer: int, neuron: int, basis: str = "activation") -> None:
        """Refuse a neuron that the model does not have; layers may differ in width.

        Args:
            named: as whoever asked for it wrote it. layer, neuron: which. basis: what its number counts.

        Raises:
            JobError: it is outside.
        """
        known = 0 <= layer < self.n_layers
        size = self.widths[layer] if known and basis == "activation" else self.n_neurons(basis)
        if known and 0 <= neuron < size:
            return
        alike = basis != "activation" or len({*self.widths}) == 1
        where = "in each" if alike else f"in layer {layer}" if known else "in the largest"
        rule = f"the model has layers 0 to {self.n_layers - 1} and neurons 0 to {size - 1} {where}"
        raise JobError(named, rule, "choose one of them")

    @cached_property
    def running(self) -> int:
        """Neurons that run at a token, in the layer where most do: d_mlp but for a mixture."""
        pairs = zip(self.widths, self.experts, strict=True)
        return max(width if mixture is None else mixture.n_running for width, mixture in pairs)

    @cached_property
    def routed(self) -> int:
        """Experts that a token goes to, at most; 0 without any."""
        return max((mixture.n_used for mixture in self.experts if mixture is not None), default=0)

    def n_nodes(self, basis: str = "activation") -> int:
        """Nodes at one position, of all layers: neurons of experts that do not run there are none."""
        if basis != "activation":
            return self.n_layers * self.d_model
        pairs = zip(self.widths, self.experts, strict=True)
        return sum(width if mixture is None else mixture.n_running for width, mixture in pairs)

    def part(self, layer: int, path: str) -> Any:
        """A module of a block.

        Args:
            layer: of the block. path: in it.
        """
        return self.module.get_submodule(f"{self.family.blocks}.{layer}.{path}")

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP of every block both read the block's input."""
        return all(self._parallel(layout) for layout in self.layouts)

    @property
    def weights_readable(self) -> bool:
        """Whether every weight is a float tensor in memory: not quantised, not offloaded."""
        return readable(self.module)

    def check_rules(self, rules: Iterable[str]) -> None:
        """Refuse a RelP rule that is only about a kind of MLP that the model does not have.

        Raises:
            JobError: the linear gate, of MLPs without a gate: its numbers would be those of all rules.
        """
        if "gate" in rules and not any(layout.gated for layout in self.layouts):
            rule = f"has no effect on a {self.family.name} model: its MLPs have no gate, and no half rule to replace"
            raise JobError("the rule 'gate' (linear-gate)", rule, "leave it out, or use a model with gated MLPs")
        if {"norm"} <= set(rules) and "attention" not in rules and any(layout.of_pattern for layout in self.layouts):
            rule = f"needs the rule 'attention' on a {self.family.name} model, whose queries' and keys' norm has none"
            raise JobError("the rule 'norm'", rule, "add 'attention', or leave out 'norm'")

    def replays(self, rules: frozenset[str]) -> bool:
        """Whether its linearisation under these rules can be computed here, without gradients."""
        here = self.remote is None or not any(self.experts)
        return rules in LINEARISED and self.weights_readable and self.replayed and here

    @property
    def shows_weights(self) -> bool:
        """Whether what runs where the model is can read every weight as a float tensor."""
        return self.backend.shows_weights(self.module)

    def replays_there(self, rules: frozenset[str]) -> bool:
        """Whether its linearisation under these rules can be computed where the model is, without gradients."""
        return rules in LINEARISED and self.shows_weights and self.replayed

    @property
    def replayed(self) -> bool:
        """Whether the linear replay knows all kinds of blocks that it has; see `Layout`."""
        return all(layout.replayed for layout in self.layouts)

    @property
    def has_weights(self) -> bool:
        """Whether weights are here, readable or not: a remote model's are elsewhere unless they were asked for."""
        return any(value.device.type != "meta" for value in self.module.parameters())

    @property
    def vocab_size(self) -> int:
        """Rows of the output head."""
        return int(self.config.vocab_size)

    @property
    def end_tokens(self) -> tuple[int, ...]:
        """The tokens that end a text, by its tokenizer and its configurations."""
        configs = (self.config, getattr(self.module, "generation_config", None), self.tokenizer)
        given = [getattr(one, "eos_token_id", None) for one in configs]
        every = [one if isinstance(one, list | tuple) else [one] for one in given]
        return tuple(sorted({int(token) for tokens in every for token in tokens if token is not None}))

    @property
    def context_length(self) -> int:
        """Tokens that it reads at most."""
        return int(self.config.max_position_embeddings)

    @property
    def looks_ahead(self) -> bool:
        """Whether its attention also looks at later tokens, so that edges lead back from them."""
        return looks_ahead(self.config)

    @cached_property
    def tables(self) -> tuple[int, ...]:
        """Lengths above which the model turns positions by other tables (LongRoPE), rising."""
        given = getattr(self.config, "rope_parameters", None) or {}
        each = [given] if "rope_type" in given else [part for part in given.values() if isinstance(part, dict)]
        long = [part for part in each if part.get("rope_type") == "longrope"]
        return tuple(sorted({int(part["original_max_position_embeddings"]) for part in long}))

    @cached_property
    def borders(self) -> Sequence[int]:
        """Lengths, rising, on both sides of which prompts must not share a batch: those of `tables`, since the longest
        prompt of a batch decides; or every length from one on, where queries are then scaled by their column, padding
        included (`attn_temperature_tuning`)."""
        if getattr(self.config, "attn_temperature_tuning", False):
            return range(max(1, int(self.config.floor_scale) - 1), self.context_length)
        return self.tables

    def side(self, length: int) -> int:
        """Which prompts of this length may share a batch with: those of the same number (see `borders`)."""
        return side(length, self.borders)

    @property
    def device(self) -> torch.device:
        """Where inputs go: the embedding's device; a server moves them itself."""
        return self.backend.device(self.module)

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return self.backend.dtype(self.module)

    @property
    def has_biases(self) -> bool:
        """Whether any linear map or norm has a bias, so that relevance is not conserved."""
        return is_biased(self.module)

    @property
    def conserves(self) -> bool:
        """Whether RelP must conserve relevance here: float32 weights and no biases."""
        quantized = getattr(self.config, "quantization_config", None) is not None
        return self.dtype == torch.float32 and not (self.has_biases or quantized or self.backend.quantized)

    @property
    def soft_cap(self) -> float | None:
        """Of the logits, where the family has one."""
        return getattr(self.config, "final_logit_softcapping", None)

    @property
    def fingerprint(self) -> str:
        """A hash of the parameters' names, shapes and up to 4,096 evenly spaced values of each, as they are now.

        It is a sample, so that it takes milliseconds on any size: retraining changes it in practice, but a change to
        few weights of a tensor of more than 4,096 can go unseen, and so does any to weights that are offloaded. Of a
        remote model it was taken on the server; where weights are hidden there, it is a text that says so.
        """
        return self.backend.fingerprint(self.module)

    def record(self) -> ModelRecord:
        """What a circuit keeps of the model it came from."""
        return ModelRecord(
            name=self.name,
            revision=self.revision,
            adapter=self.adapter,
            gguf=self.gguf,
            family=self.family.name,
            fingerprint=self.fingerprint,
            dtype=str(self.dtype).removeprefix("torch."),
            n_layers=self.n_layers,
            d_model=self.d_model,
            d_mlp=self.d_mlp,
            n_heads=int(self.config.num_attention_heads),
            parallel=self.parallel,
            experts=self.mixtures,
        )

    def check_traced(self, traced: ModelRecord, text: str) -> None:
        """Refuse the circuit of the prompt `text` if it was not traced on this model.

        Args:
            traced: the model that it was traced on. text: the prompt, for the message.

        Raises:
            JobError: it was traced on another, or in another dtype.
            RemoteError: nothing says that it was, since a server hides the weights.
        """
        if traced.fingerprint == self.fingerprint:
            return
        value, mine = f"circuit of {quoted(text)}", self.record()
        may_be = _shape_of(traced) == _shape_of(mine)
        if may_be and not HASH.fullmatch(traced.fingerprint):
            rule = "was traced where weights are hidden, so that they cannot be compared"
            raise RemoteError(value, rule, "use it with that key, or trace it again with weights='local'")
        if may_be and not HASH.fullmatch(mine.fingerprint):
            rule = f"weights on {self.backend.host} are hidden and cannot be compared with those it was traced on"
            raise RemoteError(value, rule, "compare them here with weights='local'")
        if may_be and traced.dtype != mine.dtype:
            rule = f"was traced in {traced.dtype}, this model is in {mine.dtype}"
            raise JobError(value, rule, "trace it again on this model, or load the model in that dtype")
        where = "".join(f", {part} {name}" for part in ("revision", "adapter") if (name := getattr(traced, part)))
        raise JobError(value, "was traced on another model", f"load that one: {traced.name}{where}")

    def budget(self) -> int:
        """`Backend.budget`."""
        return self.backend.budget(self.module)

    def bytes_per_token(self, gradient: bool = True, length: int = 1024) -> int:
        """An estimate of what a pass holds for one token of one prompt, for splitting work into batches.

        It counts activations (all layers' for a backward pass), attention patterns over `length` positions or the
        context if that is shorter, the two float32 results, and the float32 logits of the token with their gradient,
        which are held only where logits are read. It is not a bound: prompts longer than `length` hold more patterns,
        and kernels allocate workspace as well.

        Args:
            gradient: whether the pass is a backward one too. length: tokens of the longest prompt.
        """
        heads = int(getattr(self.config, "num_attention_heads", 1))
        sizes = Sizes(
            self.n_layers,
            self.d_model,
            self.running,
            self.d_mlp,
            self.routed,
            self.vocab_size,
            self.dtype.itemsize,
        )
        return bytes_per_token(sizes, heads * min(self.context_length, length), gradient)


class LayerExperts(NamedTuple):
    """The mixture of a block: how many experts there are, neurons of each, neurons of shared experts, and how many
    experts a token goes to."""

    n_experts: int
    d_expert: int
    d_shared: int
    n_used: int

    @property
    def n_neurons(self) -> int:
        """Of all experts."""
        return self.n_experts * self.d_expert + self.d_shared

    @property
    def n_running(self) -> int:
        """Neurons that run at a token."""
        return self.n_used * self.d_expert + self.d_shared


def width_of(block: nn.Module, layout: Layout) -> int:
    """Neurons of a block's MLP: the input width of the down projection."""
    return inputs_of(block.get_submodule(layout.down))


def experts_in(block: nn.Module, layout: Layout) -> LayerExperts:
    """The sizes of a block's mixture."""
    laid = layout.experts
    assert laid is not None
    down: Any = block.get_submodule(laid.path).down_proj
    shared = 0 if laid.shared is None else int(block.get_submodule(f"{laid.shared}.down_proj").in_features)  # type: ignore[arg-type]
    used = int(block.get_submodule(laid.router).top_k)  # type: ignore[arg-type]
    return LayerExperts(int(down.shape[0]), int(down.shape[1 if laid.transposed else 2]), shared, used)


def _shape_of(record: ModelRecord) -> dict[str, Any]:
    """The fields that two names, or two dtypes, of one model share."""
    return record.model_dump(exclude={"name", "revision", "adapter", "gguf", "fingerprint", "dtype"})


class Sizes(NamedTuple):
    """Of a model, as `Model.bytes_per_token` counts by them.

    Attributes:
        d_mlp: neurons that run at a token, in the layer where most do. numbered: that a layer has numbers for.
        routed: experts that a token goes to.
    """

    n_layers: int
    d_model: int
    d_mlp: int
    numbered: int
    routed: int
    vocab_size: int
    itemsize: int


def bytes_per_token(of: Sizes, patterns: int, gradient: bool) -> int:
    """`Model.bytes_per_token` where only a model's sizes are known; `patterns`: attention weights of a token."""
    inside = 6 * of.d_mlp + 16 * of.d_model + 2 * patterns
    kept = inside * of.n_layers if gradient else 2 * inside + of.d_mlp * of.n_layers
    kept += 4 * of.routed * of.d_model
    return kept * of.itemsize + 8 * of.numbered * of.n_layers + 8 * of.vocab_size


@state.undisturbed()
def load(
    name: str | Path | nn.Module = "demo",
    *,
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    attention: str | None = None,
    adapter: str | Path | None = None,
    gguf_file: str | None = None,
    tokenizer: Any = None,
    seed: int = 0,
) -> Model:
    """Load a model to trace.

    Args:
        name: ``demo``, a folder in Hugging Face format (always a path if it is a `Path`), a GGUF file or a folder with
            one and no other weights, a Hugging Face id, or a module already in memory (which needs `tokenizer`, is put
            in evaluation mode and frozen, and otherwise kept as it is). Of a model that also takes images or sound the
            text part is loaded; in memory it shares the weights. The shipped demo's weights must be the committed ones.
        device: ``cpu``, ``cuda``, ``cuda:1``..., or ``mps``, ``xpu`` where there is one; a GPU if there is one.
        dtype: ``float32``, the default (attributions are noisy in less), ``bfloat16``, ``float16``, ``float64``, by
            name or torch's own, or ``int8``, ``nf4``, ``fp4`` with bitsandbytes.
        revision: of a Hugging Face id.
        device_map: ``auto`` spreads the model over several GPUs (also ``balanced``, ``balanced_low_0``,
            ``sequential``, a device, or a dict of module to device); instead of `device`.
        attention: ``eager`` or ``sdpa``; the architecture's default if None. Attributions do not depend on it.
        adapter: the folder or Hugging Face id of an adapter (LoRA and its kin) that peft merges into the weights; one
            that lies beside the weights is merged without being asked for, and said.
        gguf_file: the GGUF file of the folder or Hugging Face id that holds weights, configuration and tokenizer; the
            weights are dequantised to `dtype` (with the package gguf). Its tokenizer puts no special token first.
        tokenizer: of a module in memory: a Hugging Face tokenizer, or the folder or id of one.
        seed: torch's, set before loading.

    Raises:
        ModelError: nothing there, not reachable, not covered by a rule, weights missing, without a place or not finite,
            an option that cannot be, an adapter that cannot be merged, or too little memory.
    """
    torch.manual_seed(seed)
    if isinstance(name, nn.Module):
        _without_effect(
            device=device,
            dtype=dtype,
            revision=revision,
            device_map=device_map,
            attention=attention,
            adapter=adapter,
            gguf_file=gguf_file,
        )
        return _in_memory(name, tokenizer)
    if not isinstance(name, str | Path):
        raise ModelError(f"model {quoted(name)}", "is not a name, folder or module", "give a folder or id, or 'demo'")
    if tokenizer is not None:
        raise ModelError("tokenizer", "has no effect on a model that is loaded by name", "leave it out")
    if device is not None and device_map is not None:
        raise ModelError(f"device={device!r}", "has no effect together with device_map", "give one of them")
    # A folder named "demo" is not the shipped model, and must not be mistaken for it later.
    label = os.path.join(".", "demo") if isinstance(name, Path) and str(name) == "demo" else str(name)
    source = folder.find(name, revision, gguf_file=gguf_file)
    if source.gguf is not None:
        check_dequantised(source, dtype)
    options = _kernel(attention) | _weights("float32" if dtype is None else dtype)
    options["device_map"] = _device(device) if device_map is None else _device_map(device_map)
    return _loaded(source, label, revision, _adapter(source, label, adapter, options), options)


def _loaded(
    source: folder.Source, label: str, revision: str | None, found: adapters.Adapter | None, options: dict[str, Any]
) -> Model:
    """The model of files that were found, with an adapter in its weights if one was.

    Args:
        label: what it is called. options: transformers'.
    """
    with _silence():
        module, (read, remarks) = _from_pretrained(source, **options)
        if found is not None:
            module = adapters.merged(module, found, source.config["model_type"] if source.has_text_part else None)
    said = (*source.warnings, *remarks, *(() if found is None else found.made_for(label)))
    if found is not None and source.adapter:
        said += (f"the adapter beside the weights of {source.shown} is merged into them",)
    origin = {
        "adapter": None if found is None else found.name,
        "gguf": None if source.gguf is None else source.gguf.record(),
    }
    with folder.building(source.where):
        return _wrap(module, read, label, revision, **origin, warnings=said)


def _in_memory(module: nn.Module, tokenizer: Any) -> Model:
    """A module that is loaded already, with the tokenizer that was given for it, or the one of that name."""
    given, said = _tokenizer(str(tokenizer), None) if isinstance(tokenizer, str | Path) else (tokenizer, ())
    if hasattr(given, "tokenizer") and not hasattr(given, "convert_ids_to_tokens"):
        rule = "is a processor, of images or sound too, and only text is traced"
        raise ModelError(
            f"tokenizer of the type {type(given).__name__}", rule, "give its tokenizer: processor.tokenizer"
        )
    if given is not None and not (callable(given) and hasattr(given, "decode")):
        raise ModelError(f"tokenizer={quoted(given)}", "is not a tokenizer", "give one from AutoTokenizer, or a name")
    name, kind = type(module).__name__, getattr(getattr(module, "config", None), "model_type", None)
    if kind in TEXT_PARTS:
        with _silence():
            module = multimodal.text_part(module)
        said += (
            f"{name} ({kind}) also takes {TEXT_PARTS[kind].takes}: its text part is traced, so that prompts are "
            "text alone",
        )
    return _wrap(module, given, name, None, warnings=said)


def _adapter(
    source: folder.Source, label: str, adapter: str | Path | None, options: dict[str, Any]
) -> adapters.Adapter | None:
    """The adapter to merge: the one asked for, or the one beside the weights; checked before these are read."""
    if adapter is not None and source.adapter and str(adapter) != label:
        rule = f"and there is one beside the weights of {source.shown} already"
        raise ModelError(option("adapter", str(adapter)), rule, "leave it out, or move adapter_config.json away")
    if adapter is None and not source.adapter:
        return None
    if "quantization_config" in options:
        rule = "cannot be merged into weights of 8 or 4 bit without rounding it away"
        raise ModelError(
            f"adapter {quoted(str(adapter or label))}", rule, f"leave out {option('dtype')}, or use bfloat16"
        )
    return adapters.find(label, source.revision) if source.adapter else adapters.find(adapter or label)


@state.undisturbed()
def skeleton(name: str | Path, *, revision: str | None = None, attention: str | None = None) -> Model:
    """A model without weights: its configuration, its modules on the meta device and its tokenizer.

    It becomes usable where `remote` says that its weights are (see ndif/probe.py).

    Raises:
        ModelError: as `load`, but for weights.
    """
    from transformers import AutoModelForCausalLM

    options = _kernel(attention)
    source = folder.find(name, revision, weights=False)
    if source.gguf is not None:
        raise ModelError(source.shown, "is a GGUF file, which no server runs", "load it here, without remote")
    if source.has_text_part:
        more = TEXT_PARTS[source.config["model_type"]].takes
        rule = f"takes {more} beside text, and a server runs it whole, which no rule covers"
        raise ModelError(source.shown, rule, "load it here, where its text part alone is loaded")
    with folder.building(source.where), _silence():
        config = multimodal.configuration(source.where, revision)
        check_architecture(config, attention)
        read, remarks = tokens.read_tokenizer(source)
        with torch.device("meta"):
            module = AutoModelForCausalLM.from_config(config, trust_remote_code=False, **options)
    said = (*source.warnings, *remarks)
    if source.adapter:
        said += (f"the adapter beside the weights of {source.shown} is not known to be merged on a server",)
    with folder.building(source.where):
        return _wrap(module, read, str(name), revision, warnings=said, device="meta")


def _without_effect(**options: Any) -> None:
    for name, value in options.items():
        if value is not None:
            raise ModelError(f"{name}={value!r}", "has no effect on a module in memory", "load the module so yourself")


@contextmanager
def _silence() -> Iterator[None]:
    """Silence progress bars and loading reports while a model is read: problems are raised instead.

    The user's settings are as before afterwards. Bars of downloads, which take long, stay.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    hook = logging.set_tqdm_hook(lambda factory, args, kwargs: factory(*args, **{**kwargs, "disable": True}))
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.set_tqdm_hook(hook)


def _device(device: str | None, option: str = "device") -> str:
    """A device that this machine has, by default a GPU if there is one."""
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else str(device)
    try:
        kind = torch.device(chosen)
    except RuntimeError:
        raise ModelError(f"{option}={device!r}", "is not a device", "use cpu, cuda or cuda:N") from None
    counts = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    counts["xpu"] = torch.xpu.device_count()
    if kind.type not in counts:
        raise ModelError(f"{option}={device!r}", "is not a device that models run on", "use cpu, cuda or cuda:N")
    if (kind.index or 0) >= counts[kind.type]:
        what = "GPUs" if kind.type == "cuda" else f"devices of the kind {kind.type}"
        step = f"use {option}='cpu'"
        raise ModelError(f"{option}={chosen!r}", f"this machine has {counts[kind.type]} {what}", step)
    return chosen


def _device_map(device_map: Any) -> str | dict[str, Any]:
    """A strategy's name, a device, or a dict of devices, each of which this machine has."""
    if isinstance(device_map, str):
        return device_map if device_map in STRATEGIES else _known_place(device_map)
    if not isinstance(device_map, dict) or not device_map:
        raise ModelError(
            f"device_map={quoted(device_map)}", f"must be {', '.join(STRATEGIES)}, a device or a dict", "use 'auto'"
        )
    places = list(device_map.values())
    if places[0] == "disk":  # inputs go to the first device
        raise ModelError(f"device_map={quoted(device_map)}", "begins on disk", "give the first module a device")
    for place in places:
        if place != "disk":
            _known_place(f"cuda:{place}" if isinstance(place, int) else str(place))
    return device_map


def _known_place(place: str) -> str:
    try:
        torch.device(place)
    except RuntimeError:
        rule = f"is neither a device nor one of {', '.join(STRATEGIES)}"
        raise ModelError(f"device_map={place!r}", rule, "use device_map='auto', or device=") from None
    return _device(place, "device_map")


def _kernel(attention: str | None) -> dict[str, Any]:
    """The loading options of an attention kernel."""
    if attention not in (None, *KERNELS):
        raise ModelError(f"attention={attention!r}", f"must be one of {', '.join(KERNELS)}", "leave it out")
    return {} if attention is None else {"attn_implementation": attention}


def _weights(dtype: str | torch.dtype) -> dict[str, Any]:
    """The loading options of a dtype."""
    if isinstance(dtype, torch.dtype):
        if dtype not in DTYPES.values():  # torch.int8 is not bitsandbytes' int8
            raise ModelError(f"dtype={dtype}", f"must be one of {', '.join(DTYPES)}", "choose one")
        return {"dtype": dtype}
    if dtype in DTYPES:
        return {"dtype": DTYPES[dtype]}
    if dtype not in QUANTIZED:
        raise ModelError(f"dtype={dtype!r}", f"must be one of {', '.join((*DTYPES, *QUANTIZED))}", "choose one")
    from transformers import BitsAndBytesConfig

    try:
        importlib.metadata.version("bitsandbytes")
    except importlib.metadata.PackageNotFoundError:
        raise ModelError(
            f"dtype={dtype!r}",
            "needs bitsandbytes, which is not installed",
            "pip install 'neuron-tracer[quantized]'",
        ) from None
    if dtype == "int8":
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}
    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=dtype, bnb_4bit_compute_dtype=torch.bfloat16)
    return {"quantization_config": four}


def _from_pretrained(source: folder.Source, **options: Any) -> tuple[nn.Module, tuple[Any, tuple[str, ...]]]:
    """Module, and what `tokens.read_tokenizer` gives; architectures are checked on their config before weights."""
    from transformers import AutoModelForCausalLM

    revision = {} if source.adapter else {"revision": source.revision}
    with folder.building(source.where, options.get("device_map")):
        config = configuration(source)
        said = quantised.prepare(config, source.shown, options.get("dtype"))
        check_architecture(configuration(source), options.get("attn_implementation"))
        if source.has_text_part or said:
            options |= {"config": config}
        if source.has_text_part:
            options |= {"key_mapping": multimodal.KEYS}
        read, remarks = tokens.read_tokenizer(source)
        # Misshapen weights are reported rather than raised, so that the message can name one.
        options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
        if source.gguf is not None:
            weights = dequantised.weights(source.gguf, config, options["dtype"])
            kind: Any = type(dequantised.empty(configuration(source)))
            loaded: Any = kind.from_pretrained(None, config=config, state_dict=weights, **options)
        else:
            options |= {"use_safetensors": True, "trust_remote_code": False, **revision}
            with folder.without_adapter(source) as alone:
                loaded = AutoModelForCausalLM.from_pretrained(alone, **options)
    module, report = loaded
    folder.check_fit(source, report)
    if said:
        quantised.settle(module, source.shown, options["dtype"])
    return module, (read, (*remarks, *said))


def check_dequantised(source: folder.Source, dtype: str | torch.dtype | None) -> None:
    """Refuse 8 and 4 bit for a GGUF file.

    Raises:
        ModelError: names what to use instead.
    """
    if dtype in QUANTIZED:
        rule = f"is not for {source.shown}, whose weights are dequantised when they are read"
        raise ModelError(option("dtype", str(dtype)), rule, "use float32, bfloat16 or float16")


def configuration(source: folder.Source) -> Any:
    """The configuration of a model that was found, as a new object at each call: building on one changes it."""
    if source.gguf is not None:
        return dequantised.configuration(source.gguf)
    return multimodal.configuration(source.where, source.revision)


def read_tokenizer(name: str, revision: str | None = None, gguf_file: str | None = None) -> Any:
    """The tokenizer of a model that is not loaded.

    Raises:
        ModelError: the model has none.
    """
    return _tokenizer(name, revision, gguf_file)[0]


def _tokenizer(name: str, revision: str | None, gguf_file: str | None = None) -> tuple[Any, tuple[str, ...]]:
    source = folder.find(name, revision, weights=False, gguf_file=gguf_file)
    with folder.building(source.where), _silence():
        return tokens.read_tokenizer(source)


def check_architecture(config: Any, attention: str | None) -> None:
    """Build the model without its weights: every module needs a rule, and the attention kernel support."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        family_of(AutoModelForCausalLM.from_config(config, trust_remote_code=False), config)
        if attention is None:
            return
        try:
            AutoModelForCausalLM.from_config(config, attn_implementation=attention, trust_remote_code=False)
        except (ValueError, ImportError) as error:
            raise ModelError(f"attention={attention!r}", first_line(error), "leave it out") from error


def _wrap(
    module: Any,
    tokenizer: Any,
    name: str,
    revision: str | None,
    *,
    adapter: str | None = None,
    gguf: WeightsFile | None = None,
    warnings: tuple[str, ...] = (),
    **options: Any,
) -> Model:
    if tokenizer is None:
        raise ModelError(f"model {name}", "comes without a tokenizer", "pass tokenizer=")
    state.check_kind(module, weights="device" not in options)
    if not hasattr(getattr(module, "config", None), "model_type"):
        raise ModelError(
            f"module {name}", "is not a Hugging Face language model", "pass a model from AutoModelForCausalLM"
        )
    family = family_of(module, module.config)
    for part in module.modules():
        # bitsandbytes would repack 4-bit weights at the first inference on a CPU, into a form without a gradient.
        if hasattr(part, "support_avx512bf16_for_cpu"):
            part.support_avx512bf16_for_cpu = False
    state.check(module.eval().requires_grad_(False), loaded=False)
    for parameter, value in _real_parameters(module):
        if not bool(value.isfinite().all()):
            raise ModelError(f"weight {parameter}", "holds NaN or infinity", "use an intact checkpoint")
    if "device" not in options:
        _check_experts(module, family)
    wrapped = TransformersModel(module, task="text-generation", tokenizer=tokenizer, **options)
    model = Model(name, revision, wrapped, family, tokenizer, adapter=adapter, gguf=gguf, warnings=warnings)
    say(warnings)
    log.info("loaded %s: %s, %d layers of %d neurons, %s", name, family.name, model.n_layers, model.d_mlp, module.dtype)
    return model


def _check_experts(module: nn.Module, family: Family) -> None:
    """Refuse a mixture of experts whose weights cannot be read: neurons of experts are computed beside the model's own
    kernels, from the same weights (model/experts.py).

    Raises:
        ModelError: names a weight that is offloaded, or no float.
    """
    for number, layout in enumerate(family.laid_out(module)):
        for path in () if layout.experts is None else layout.experts.read:
            for name, value in module.get_submodule(f"{family.blocks}.{number}.{path}").named_parameters():
                kind, where = str(value.dtype).removeprefix("torch."), f"{family.blocks}.{number}.{path}.{name}"
                if value.device.type == "meta":
                    rule = "is offloaded, and neurons of experts are computed from it outside its module"
                    step = "use a device_map that holds all experts, a smaller dtype, or remote="
                    raise ModelError(f"weight {where}", rule, step)
                if not value.is_floating_point() or value.dtype.itemsize < torch.bfloat16.itemsize:
                    rule = f"is {kind}, and neurons of experts are computed from it as floats"
                    raise ModelError(f"weight {where}", rule, "use float32, bfloat16 or float16")


def _real_parameters(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Floating-point parameters that are in memory, not offloaded."""
    for name, value in module.named_parameters():
        if value.is_floating_point() and value.device.type != "meta":
            yield name, value.detach()
