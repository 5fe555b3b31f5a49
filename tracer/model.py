"""Loading a model, checking it, and knowing where its parts are.

Knows Hugging Face loading, devices and dtypes, and wraps the module for nnsight. A loaded `Model` is frozen and in
evaluation mode; nothing in tracer ever changes it. Refuses weights that are missing or not finite, and
architectures with a module that no RelP rule covers. What is computed on the model is passes.py's business.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from nnsight import TransformersModel
from safetensors import SafetensorError
from torch import nn

from tracer import demo
from tracer.config import ModelRecord
from tracer.errors import ModelError, quoted
from tracer.families import Family, family_of

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
QUANTIZED = ("int8", "nf4", "fp4")
BUDGET_WITHOUT_GPU = 2**30


@dataclass(frozen=True, eq=False)
class Model:
    """A causal language model ready to be traced.

    Attributes:
        name: what it was loaded by; ``demo`` for the shipped one.
        revision: of the Hugging Face id, if one was asked for.
        nn: the nnsight model that traces run on.
        family: where its parts are.
        tokenizer: its Hugging Face tokenizer.
        lock: held by every pass, since two threads on one nnsight model break it.
    """

    name: str
    revision: str | None
    nn: TransformersModel
    family: Family
    tokenizer: Any
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    @property
    def module(self) -> Any:
        """The Hugging Face model itself."""
        return self.nn._module

    @property
    def config(self) -> Any:
        return self.module.config

    @cached_property
    def blocks(self) -> list[Any]:
        """The envoys of the blocks, in order."""
        return list(self.nn.get(self.family.blocks))

    @property
    def embedding(self) -> Any:
        return self.nn.get(self.family.embedding)

    @property
    def head(self) -> Any:
        return self.nn.get(self.family.head)

    @property
    def n_layers(self) -> int:
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        return int(self.config.hidden_size)

    @cached_property
    def d_mlp(self) -> int:
        """Neurons of a layer: the input width of the down projection."""
        down = self.part(0, self.family.down)
        return int(getattr(down, "in_features", None) or down.weight.shape[0])

    def n_neurons(self, basis: str = "activation") -> int:
        """Nodes of a layer at one position: d_mlp, or d_model in the basis ``output``."""
        return self.d_mlp if basis == "activation" else self.d_model

    def part(self, layer: int, path: str) -> Any:
        """A module of a block, by its path in it."""
        return self.module.get_submodule(f"{self.family.blocks}.{layer}.{path}")

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP of a block both read the block's input."""
        return bool(getattr(self.config, "use_parallel_residual", False))

    @property
    def head_size(self) -> int:
        """Coordinates of one attention head."""
        return int(getattr(self.config, "head_dim", None) or self.d_model // self.config.num_attention_heads)

    @property
    def attention_width(self) -> int:
        """Coordinates of all heads together."""
        return self.head_size * int(self.config.num_attention_heads)

    @property
    def value_width(self) -> int:
        """Coordinates of all value heads together."""
        return self.head_size * int(
            getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads
        )

    @cached_property
    def weights_readable(self) -> bool:
        """Whether every weight is a float tensor in memory: not quantised, not offloaded."""
        return all(value.is_floating_point() and value.device.type != "meta" for value in self.module.parameters())

    @property
    def vocab_size(self) -> int:
        return int(self.config.vocab_size)

    @property
    def context_length(self) -> int:
        return int(self.config.max_position_embeddings)

    @property
    def device(self) -> torch.device:
        """Where inputs go: the embedding's device."""
        return self.module.get_input_embeddings().weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.module.dtype

    @property
    def has_biases(self) -> bool:
        """Whether any linear map or norm has a bias, so that relevance is not conserved."""
        return any(name.endswith("bias") for name, _ in self.module.named_parameters())

    @property
    def conserves(self) -> bool:
        """Whether RelP must conserve relevance here: float32 weights and no biases (method.md section 8, 2)."""
        quantized = getattr(self.config, "quantization_config", None) is not None
        return self.dtype == torch.float32 and not self.has_biases and not quantized

    @property
    def soft_cap(self) -> float | None:
        """Of the logits, where the family has one."""
        return getattr(self.config, "final_logit_softcapping", None)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the parameters' names, shapes and up to 4,096 evenly spaced values of each.

        A sample, so that it takes milliseconds on any size; any retraining or other checkpoint changes it.
        """
        digest = hashlib.sha256()
        for name, value in self.module.named_parameters():
            digest.update(f"{name}{tuple(value.shape)}".encode())
            if value.device.type != "meta":
                flat = value.detach().flatten()
                sample = flat[:: max(1, flat.numel() // 4096)]
                digest.update(sample.to("cpu", torch.float32).numpy().tobytes())
        return digest.hexdigest()

    def record(self) -> ModelRecord:
        """What a circuit keeps of the model it came from."""
        return ModelRecord(
            name=self.name,
            revision=self.revision,
            family=self.family.name,
            fingerprint=self.fingerprint,
            dtype=str(self.dtype).removeprefix("torch."),
            n_layers=self.n_layers,
            d_model=self.d_model,
            d_mlp=self.d_mlp,
            n_heads=int(self.config.num_attention_heads),
            parallel=self.parallel,
        )

    def budget(self) -> int:
        """Bytes one batch may use by default: a GiB, or a quarter of a GPU. Never what happens to be free,
        so that the same call is split in the same way."""
        if self.device.type != "cuda":
            return BUDGET_WITHOUT_GPU
        return torch.cuda.get_device_properties(self.device).total_memory // 4

    def bytes_per_token(self, gradient: bool = True) -> int:
        """An upper estimate of what a pass holds for one token of one prompt: activations kept for the backward
        pass, attention patterns at the context used, and the two float32 results."""
        heads = int(getattr(self.config, "num_attention_heads", 1))
        inside = 6 * self.d_mlp + 16 * self.d_model + 2 * heads * min(self.context_length, 1024)
        kept = inside * self.n_layers if gradient else 2 * inside + self.d_mlp * self.n_layers
        return kept * self.dtype.itemsize + 8 * self.d_mlp * self.n_layers


def load(
    name: str | Path | nn.Module = "demo",
    *,
    device: str | None = None,
    dtype: str | None = None,
    revision: str | None = None,
    device_map: str | dict[str, Any] | None = None,
    attention: str | None = None,
    tokenizer: Any = None,
    seed: int = 0,
) -> Model:
    """Load a model to trace.

    Args:
        name: ``demo``, a folder in Hugging Face format, a Hugging Face id, or a module already in memory (which
            needs `tokenizer`, is put in evaluation mode and frozen, and otherwise kept as it is).
        device: ``cpu``, ``cuda``, ``cuda:1``...; a GPU if there is one.
        dtype: ``float32``, the default (attributions are noisy in less), ``bfloat16``, ``float16``, ``float64``, or
            ``int8``, ``nf4``, ``fp4`` with bitsandbytes.
        revision: of a Hugging Face id.
        device_map: ``auto`` spreads the model over several GPUs; instead of `device`.
        attention: ``eager`` or ``sdpa``; the architecture's default if None. Attributions do not depend on it.
        tokenizer: of a module in memory.
        seed: torch's, set before loading.

    Raises:
        ModelError: nothing there, not reachable, not covered by a rule, weights missing or not finite.
    """
    torch.manual_seed(seed)
    if isinstance(name, nn.Module):
        given = {
            "device": device,
            "dtype": dtype,
            "revision": revision,
            "device_map": device_map,
            "attention": attention,
        }
        for option, value in given.items():
            if value is not None:
                raise ModelError(
                    f"{option}={value!r}", "has no effect on a module in memory", "load the module so yourself"
                )
        return _wrap(name, tokenizer, type(name).__name__, None)
    if tokenizer is not None:
        raise ModelError("tokenizer", "has no effect on a model that is loaded by name", "leave it out")
    if device is not None and device_map is not None:
        raise ModelError(f"device={device!r}", "has no effect together with device_map", "give one of them")
    folder = demo.path() if str(name) == "demo" else Path(name).expanduser()
    options: dict[str, Any] = _weights(dtype or "float32")
    if attention is not None:
        options["attn_implementation"] = attention
    placed = device_map if device_map is not None else _device(device)
    source = _source(str(name), folder, revision)
    module, read = _from_pretrained(source, revision, device_map=placed, **options)
    return _wrap(module, read, str(name), revision)


def _source(name: str, folder: Path, revision: str | None) -> str:
    """A folder if there is one, else the name as a Hugging Face id."""
    if folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        if not (folder / "config.json").is_file():
            rule = "is not a folder with a config.json" if folder.exists() else "does not exist"
            raise ModelError(
                f"model {name!r}", rule, "give a folder in Hugging Face format, a Hugging Face id, or 'demo'"
            )
        if revision is not None:
            raise ModelError(f"revision={revision!r}", "has no effect on a folder", "leave it out")
        return str(folder)
    _check_reachable(name, revision)
    return name


def _check_reachable(name: str, revision: str | None) -> None:
    """Fail at once where there is no network: loading would retry for half a minute first."""
    from huggingface_hub import constants, try_to_load_from_cache

    if constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
        return
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        return
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLError):  # certificates are the hub client's own business
            raise _unloadable(name, error) from error


def _device(device: str | None) -> str:
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        kind = torch.device(chosen)
    except RuntimeError:
        raise ModelError(f"device={device!r}", "is no device", "use cpu, cuda or cuda:N") from None
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        raise ModelError(f"device={chosen!r}", f"this machine has {torch.cuda.device_count()} GPUs", "use device='cpu'")
    return chosen


def _weights(dtype: str) -> dict[str, Any]:
    """The loading options of a dtype name."""
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


def _from_pretrained(source: str, revision: str | None, **options: Any) -> tuple[nn.Module, Any]:
    """Module and tokenizer; architectures are checked on their config before any weight is read."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(source, revision=revision)
        with torch.device("meta"):
            family_of(AutoModelForCausalLM.from_config(config), config)
        # Misshapen weights are reported rather than raised, so that the message can name one.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            revision=revision,
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,
            **options,
        )
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise _unloadable(source, error) from error
    module, report = loaded
    if bad := sorted(report["missing_keys"]) + sorted(str(key[0]) for key in report["mismatched_keys"]):
        raise ModelError(
            f"model {source!r}",
            f"{len(bad)} weights are missing or misshapen, first {bad[0]}",
            "use a complete checkpoint; random weights would give wrong numbers",
        )
    return module, tokenizer


def _unloadable(source: str, error: Exception) -> ModelError:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if os.path.isdir(source):
        return ModelError(
            f"model folder {quoted(source)}", reason, "check that it is complete, with safetensors weights"
        )
    return ModelError(
        f"model {source!r}",
        f"could not be fetched from Hugging Face ({reason[:160]})",
        "check the id and the network, or give a local folder; 'demo' needs neither",
    )


def _wrap(module: Any, tokenizer: Any, name: str, revision: str | None) -> Model:
    if tokenizer is None:
        raise ModelError(f"model {name}", "comes without a tokenizer", "pass tokenizer=")
    if not hasattr(getattr(module, "config", None), "model_type"):
        raise ModelError(
            f"module {name}", "is no Hugging Face language model", "pass a model from AutoModelForCausalLM"
        )
    family = family_of(module, module.config)
    module.eval().requires_grad_(False)
    for parameter, value in _real_parameters(module):
        if not bool(value.isfinite().all()):
            raise ModelError(f"weight {parameter}", "holds NaN or infinity", "use an intact checkpoint")
    wrapped = TransformersModel(module, task="text-generation", tokenizer=tokenizer)
    return Model(name, revision, wrapped, family, tokenizer)


def _real_parameters(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Floating-point parameters that are in memory, not offloaded."""
    for name, value in module.named_parameters():
        if value.is_floating_point() and value.device.type != "meta":
            yield name, value.detach()
