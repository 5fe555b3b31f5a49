"""Adapters (LoRA and its kin) merged into the weights they were made for, by peft.

Knows what an adapter's folder must hold and which kinds can become a part of the weights; the merged model is one like
any other, and is compared with the unmerged one on a few tokens. Refuses what is left over on either side: an adapter
of another model would be merged in part, silently.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Container, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tracer.errors import ModelError, first_line, option, quoted
from tracer.model import folder, multimodal
from tracer.system import jsontext, wholefile

NOT_WEIGHTS = frozenset(
    "PROMPT_TUNING MULTITASK_PROMPT_TUNING P_TUNING PREFIX_TUNING ADAPTION_PROMPT CPT CARTRIDGE XLORA POLY".split()
)
"""Kinds that add tokens, or parts that depend on the prompt, rather than change weights."""
_PREFIX = "base_model.model."
"""What peft puts before the names of a model's weights."""
_PROBE = 8
"""Tokens on which merged and unmerged are compared."""


@dataclass(frozen=True)
class Adapter:
    """An adapter that can be merged.

    Attributes:
        name: as it was given.
        folder: where its files are. config: its adapter_config.json.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]

    @property
    def shown(self) -> str:
        return f"adapter {quoted(self.name, 200)}"

    def made_for(self, base: str) -> tuple[str, ...]:
        """A sentence where it says that it was made on a model of another name than `base`."""
        said = str(self.config.get("base_model_name_or_path") or "")
        if not said or Path(said).name == Path(base).name:
            return ()
        return (f"{self.shown} says that it was made on {quoted(said)}, and is merged into {quoted(base)}",)


def find(name: str | Path, revision: str | None = None) -> Adapter:
    """An adapter's files, from a folder or a Hugging Face id, of which `revision` is one.

    Raises:
        ModelError: nothing there, no adapter, of a kind that is no change of weights, pickled, or peft is missing.
    """
    given, shown = str(name), f"adapter {quoted(str(name), 200)}"
    path = Path(given).expanduser()
    if path.is_dir():
        folder.check_pointers(path)
    elif isinstance(name, Path) or given.startswith((".", "/", "~")) or given.count("/") != 1:
        raise ModelError(shown, "is no folder", "give the folder or Hugging Face id of an adapter")
    else:
        path = _fetched(given, revision, shown)
    if not (path / folder.ADAPTER).is_file():
        raise ModelError(shown, f"holds no {folder.ADAPTER}", "give the folder or Hugging Face id of an adapter")
    try:
        config = jsontext.parse(wholefile.read(path / folder.ADAPTER))
    except (OSError, ValueError) as error:
        raise ModelError(
            shown, f"its {folder.ADAPTER} cannot be read ({first_line(error)})", "save it again"
        ) from error
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind in NOT_WEIGHTS:
        rule = f"is of the kind {kind}, which is no change of weights and cannot be merged"
        raise ModelError(shown, rule, "use an adapter such as LoRA, or the base model")
    if not (path / folder.ADAPTER_WEIGHTS).is_file():
        pickled = (path / "adapter_model.bin").is_file()
        rule = "its weights are pickled (adapter_model.bin), which is never read" if pickled else "holds no weights"
        raise ModelError(shown, rule, f"save it with peft as {folder.ADAPTER_WEIGHTS}")
    if importlib.util.find_spec("peft") is None:
        rule = "is merged by peft, which is not installed"
        step = "pip install 'neuron-tracer[adapters]', or save what peft_model.merge_and_unload() returns"
        raise ModelError(shown, rule, step)
    return Adapter(given, path, config)


def merged(module: nn.Module, adapter: Adapter, kind: str | None = None) -> nn.Module:
    """The module with the adapter in its weights.

    Args:
        kind: the type of the whole model where the module is only its text part; then what the adapter changes beside
            that part is left out.

    Raises:
        ModelError: the adapter is of another model or of an unknown kind, or the merged model is not what the two
            give apart.
    """
    if getattr(module.config, "quantization_config", None) is not None:
        rule = "cannot be merged into weights of 8 or 4 bit without rounding it away"
        raise ModelError(adapter.shown, rule, f"load the base model with {option('dtype', 'float32')} or bfloat16")
    if any(value.device.type == "meta" for value in module.parameters()):
        rule = "cannot be merged into weights that are offloaded"
        raise ModelError(adapter.shown, rule, "use a device_map that holds them all, or a smaller dtype")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what peft warns of is an error here
            return _merged(module, adapter, kind)
    except ModelError:
        raise
    except Exception as error:
        if folder.out_of_memory(error):
            raise ModelError(adapter.shown, "does not fit in memory beside its model", "use a smaller dtype") from error
        rule = f"cannot be merged into this model ({first_line(error)})"
        raise ModelError(adapter.shown, rule, "give the base model that it was made on") from error


def _merged(module: nn.Module, adapter: Adapter, kind: str | None) -> nn.Module:
    from peft import PeftConfig, get_peft_model
    from peft import __version__ as version
    from peft.utils.save_and_load import get_peft_model_state_dict, set_peft_model_state_dict

    config = PeftConfig.from_pretrained(str(adapter.folder))
    known = {field.name for field in fields(config)}
    if unknown := sorted(name for name, value in adapter.config.items() if value and name not in known):
        rule = f"asks for {unknown[0]}={quoted(adapter.config[unknown[0]])}, which peft {version} does not know"
        raise ModelError(adapter.shown, rule, "install the peft that made it")
    if adapter.config.get("layer_replication"):
        raise ModelError(
            adapter.shown, "replicates layers, so that neurons have no layer of their own", "merge it first"
        )
    config.inference_mode = True
    weights = load_file(adapter.folder / folder.ADAPTER_WEIGHTS)
    if kind is not None:
        weights = _of_text_part(config, weights, module, adapter.shown, kind)
    whole: Any = get_peft_model(module, config)  # type: ignore[arg-type]
    wanted = set(get_peft_model_state_dict(whole, save_embedding_layers=False))
    for left, what in ((weights.keys() - wanted, "without a place in it"), (wanted - weights.keys(), "missing")):
        if left:
            rule = f"is not made for this model: {len(left)} weights {what}, first {min(left)}"
            raise ModelError(adapter.shown, rule, "give the base model that it was made on")
    set_peft_model_state_dict(whole, weights)
    whole.eval()
    apart = _logits(whole)
    module = whole.merge_and_unload(safe_merge=True)
    together = _logits(module.eval())
    gap = float((together - apart).abs().max() / apart.abs().max().clamp_min(1e-12))
    if not gap < (1e-3 if module.dtype in (torch.float32, torch.float64) else 0.1):
        rule = f"merged into the weights it gives other logits than beside them (by {gap:.2g} of the largest)"
        raise ModelError(adapter.shown, rule, "it is of a kind that cannot be merged: use another, or the base model")
    return module


def _of_text_part(
    config: Any, weights: Mapping[str, Tensor], module: nn.Module, shown: str, kind: str
) -> dict[str, Tensor]:
    """The weights of an adapter of a whole model that are its text part's, by their names there.

    Args:
        config: peft's, which is changed: it names the modules that those weights are of.
    """
    bare = {name.removeprefix(_PREFIX): value for name, value in weights.items()}
    kept = {multimodal.renamed(name): value for name, value in bare.items() if not multimodal.is_beside(kind, name)}
    if not kept:
        raise ModelError(shown, f"changes nothing of the text part of {kind!r}", "leave it out")
    parts = {path for path, _ in module.named_modules()}
    saved = tuple(getattr(config, "modules_to_save", None) or ())
    changed = {_owner(name, parts) for name in kept}
    config.target_modules = {path for path in changed if path.rpartition(".")[2] not in saved}
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    for field in ("rank_pattern", "alpha_pattern"):
        given = {multimodal.renamed(name): value for name, value in (getattr(config, field, None) or {}).items()}
        if odd := [name for name in given if "language_model" in name or "text_model" in name]:
            rule = f"has a {field} for {quoted(odd[0])}, which is not a name of the text part"
            raise ModelError(shown, rule, "merge it into the whole model with peft, and give that")
        setattr(config, field, given)
    return {_PREFIX + name: value for name, value in kept.items()}


def _owner(name: str, parts: Container[str]) -> str:
    """The module that a weight of an adapter belongs to."""
    while name and name not in parts:
        name = name.rpartition(".")[0]
    return name


def _logits(module: Any) -> Tensor:
    ids = torch.arange(1, 1 + min(_PROBE, int(module.config.vocab_size) - 1), device=module.device)
    return module(input_ids=ids[None], use_cache=False).logits.float().cpu()


def _fetched(name: str, revision: str | None, shown: str) -> Path:
    """The folder that a Hugging Face id's files are fetched into."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["adapter_*"]))
    except (OSError, HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        rule = f"could not be fetched from Hugging Face ({first_line(error)})"
        raise ModelError(shown, rule, "check the id, the network and HF_ENDPOINT, or give a local folder") from error
