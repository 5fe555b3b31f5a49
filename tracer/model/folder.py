"""Where a model's files are, and what they are: a folder, a GGUF file or an id, looked at before any weight is read.

Knows which files a model needs, and the kinds that look like one and are none: pickled weights, pointers of Git LFS,
sentence encoders, adapters alone, code. Whatever is there and not used is refused, or said. Refuses to load.
"""

from __future__ import annotations

import errno
import http.client
import os
import re
import ssl
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tracer import demo
from tracer.errors import ModelError, TracerError, first_line, option, quoted
from tracer.model import dequantised, gguf, multimodal
from tracer.model.families import discover, listed
from tracer.model.wholes import TEXT_PARTS
from tracer.system import jsontext, wholefile

ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_WEIGHTS = "model.safetensors"
_HEAD = re.compile(r"(ForCausalLM|LMHeadModel|ForConditionalGeneration)$")
"""How architectures that give next tokens are called."""
_SMALL = 1024
"""Bytes: a pointer of Git LFS is smaller, no file of weights is."""
_MOST_LAYERS = 4096
"""Far beyond any model's, and few enough to be built."""
_BESIDE_GGUF = ("config.json", "tokenizer.json", "tokenizer.model", "vocab.json", ADAPTER)
"""Files that would be read if the weights were not in a GGUF file."""
_COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$|\.attention\.masked_bias$")
"""Tables that old checkpoints hold and every model computes from its config: rotary frequencies and causal masks."""


@dataclass(frozen=True)
class Source:
    """A model that was found.

    Attributes:
        where: its folder, its GGUF file, or its id.
        revision: of the id.
        config: its config.json; of a GGUF file what becomes of its metadata.
        adapter: whether an adapter lies beside its weights.
        warnings: what is there and is not used, a sentence each.
        gguf: the header of the GGUF file that its weights are in, if they are in one.
    """

    where: str
    revision: str | None
    config: Mapping[str, Any]
    adapter: bool
    warnings: tuple[str, ...]
    gguf: gguf.Header | None = None

    @property
    def has_text_part(self) -> bool:
        """Whether only a part of it is loaded, the one for text (see multimodal.py)."""
        return self.config.get("model_type") in TEXT_PARTS

    @property
    def shown(self) -> str:
        return shown(self.where)


def shown(where: str) -> str:
    """A folder, a file or an id, as messages name it."""
    if os.path.isdir(where):
        return f"model folder {quoted(where, 200)}"
    return f"model file {quoted(where, 200)}" if os.path.isfile(where) else f"model {quoted(where)}"


def find(name: str | Path, revision: str | None, *, weights: bool = True, gguf_file: str | None = None) -> Source:
    """The shipped model's folder, a folder or GGUF file if there is one, else the name as a Hugging Face id.

    Args:
        weights: whether weights are needed too, and not only the configuration and the tokenizer.
        gguf_file: which GGUF file of the folder or id holds the weights; needed of an id, and of a folder of several.

    Raises:
        ModelError: nothing there, not reachable, or no model: says what it is instead.
    """
    given, folder = str(name), _folder(name)
    if folder is not None:
        if (file := _gguf_in(folder, given, gguf_file)) is None:
            _check_folder(folder, given, weights)
        if revision is not None:
            raise ModelError(option("revision", revision), "has no effect on a folder", "leave it out")
        if name == "demo" and file is None:
            _check_shipped()
        given = str(folder)
    else:
        _check_reachable(given, revision, gguf_file or "config.json")
        file = None if gguf_file is None else _gguf_of_hub(given, gguf_file, revision)
        if weights and file is None and _of_hub(given, "modules.json", revision):
            raise _encoder(f"model {quoted(given)}")
    return _of_files(given, revision) if file is None else _of_gguf(given, file, gguf_file)


def _folder(name: str | Path) -> Path | None:
    """The folder, or file, that a name is of; None if it is a Hugging Face id."""
    given = str(name)
    try:
        folder = demo.path() if isinstance(name, str) and name == "demo" else Path(name).expanduser()
        exists = folder.exists()
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"model {quoted(given)}", f"is not a path ({first_line(error)})", "check how it is written"
        ) from error
    if exists or isinstance(name, Path) or given.startswith((".", "/", "~")) or given.count("/") > 1:
        return folder
    return None


def _of_files(given: str, revision: str | None) -> Source:
    """A folder or an id with a config.json."""
    with building(given):
        config = _json(given, "config.json", revision)
        beside = _json(given, ADAPTER, revision)
        code = [*_code(config), *_code(_json(given, "tokenizer_config.json", revision))]
    if not config and beside:
        raise _adapter_alone(f"model {quoted(given)}", given, beside)
    if not config and "gguf" in given.lower():
        rule = "has no config.json"
        raise ModelError(shown(given), rule, f"if it has GGUF files, say which: {option('gguf_file', 'NAME.gguf')}")
    _check_type(shown(given), config, code)
    _check_kernels(shown(given), config)
    _check_layers(shown(given), config)
    said = tuple(_left_out(given, config))
    if (kind := config.get("model_type")) in TEXT_PARTS:
        rest = "its text part is loaded alone, so that prompts are text alone"
        said += (f"{shown(given)} ({kind}) also takes {TEXT_PARTS[kind].takes}: {rest}",)
    if code:
        used = f"model and tokenizer are what transformers has for the type {config.get('model_type')!r}"
        said += (f"{shown(given)} names code of its own ({', '.join(code)}), which is not run: {used}",)
    return Source(given, revision, config, bool(beside), said)


def _of_gguf(given: str, path: Path, gguf_file: str | None) -> Source:
    """A GGUF file, which is weights, configuration and tokenizer alike."""
    header = gguf.read(path, gguf_file or path.name, shown(str(path)))
    _check_layers(header.name, {"block_count": header.values.get(f"{header.architecture}.block_count")})
    with building(str(path)):
        config = dequantised.configuration(header).to_dict()
    said = dequantised.unread(header)
    if os.path.isdir(given) and (beside := [file for file in _BESIDE_GGUF if (path.parent / file).is_file()]):
        rule = "configuration and tokenizer are those in the GGUF file"
        said += (f"{shown(given)} also holds {', '.join(beside)}, not read: {rule}",)
    return Source(str(path), None, config, False, said, header)


def path_of(source: Source, file: str) -> str | None:
    """Where a file of the model is, fetched if need be; None where it has none."""
    return _path(source.where, file, source.revision)


@contextmanager
def without_adapter(source: Source) -> Iterator[str]:
    """The model's folder as if no adapter were beside its weights, which transformers would put in unmerged."""
    where = source.where
    if not source.adapter:
        yield where
        return
    if not os.path.isdir(where):
        from huggingface_hub import snapshot_download

        where = snapshot_download(
            where, revision=source.revision, allow_patterns=["*.safetensors", "*.json", "*.model"]
        )
    with tempfile.TemporaryDirectory() as view:
        for file in Path(where).iterdir():
            if not file.name.startswith("adapter_"):
                (Path(view) / file.name).symlink_to(file.resolve())
        yield view


def check_fit(source: Source, report: Mapping[str, Any]) -> None:
    """Refuse a checkpoint that does not fill its architecture, or has weights that the architecture has no place for.

    Args:
        report: transformers' loading info. Where a text part is loaded, the vision part needs no place.

    Raises:
        ModelError: names the first of them.
    """
    name = f"model {source.where!r}"
    if bad := sorted(report["missing_keys"]) + sorted(str(key[0]) for key in report["mismatched_keys"]):
        raise ModelError(
            name,
            f"{len(bad)} weights are missing or misshapen, first {bad[0]}",
            "use a complete checkpoint; random weights would give wrong numbers",
        )
    extra = sorted(key for key in report["unexpected_keys"] if not _COMPUTED.search(key))
    if source.has_text_part:
        extra = [key for key in extra if not multimodal.is_beside(source.config["model_type"], key)]
    if extra:
        raise ModelError(
            name,
            f"its architecture has no place for {len(extra)} weights of the checkpoint, first {', '.join(extra[:3])}",
            "correct config.json (biases, layers, model_type), or use the checkpoint's own architecture: without them "
            "it is another model",
        )


def check_pointers(folder: Path) -> None:
    """Refuse a folder with files that Git LFS has not fetched.

    Raises:
        ModelError: names the first.
    """
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.stat().st_size < _SMALL and file.read_bytes().startswith(gguf.POINTER):
            rule = f"its {file.name} is a pointer of Git LFS, not the file"
            raise ModelError(f"folder {quoted(str(folder), 200)}", rule, "fetch it: git lfs pull in that folder")


# ------------------------------------------------------------------------------------------- kinds of folders


def _check_folder(folder: Path, given: str, weights: bool) -> None:
    """Refuse a folder, or a file, that is no model, by what it is instead."""
    name = f"model {quoted(given, 200)}"
    if not folder.is_dir():
        rule = "is a file, not a folder with a config.json" if folder.exists() else "does not exist"
        raise ModelError(name, rule, "give a folder in Hugging Face format, a Hugging Face id, or 'demo'")
    try:
        check_pointers(folder)
        files = sorted(file.name for file in folder.iterdir())
    except OSError as error:
        raise unloadable(str(folder), error) from error
    if "modules.json" in files and weights:
        raise _encoder(name)
    if "config.json" not in files:
        if ADAPTER in files:
            raise _adapter_alone(name, given, _json(str(folder), ADAPTER, None))
        rule = "is not a folder with a config.json"
        raise ModelError(name, rule, "give a folder in Hugging Face format, a Hugging Face id, or 'demo'")
    if not weights or any(file.endswith(".safetensors") and file != ADAPTER_WEIGHTS for file in files):
        return
    if pickled := [file for file in files if file.endswith(_PICKLED)]:
        rule = f"its weights are pickled ({pickled[0]}), which can run code and is never read; safetensors are needed"
        step = "where you trust it: transformers' from_pretrained(FOLDER).save_pretrained(NEW) writes safetensors"
        raise ModelError(name, rule, step)
    raise ModelError(name, "holds no weights (no *.safetensors)", "use a complete folder")


def _gguf_in(folder: Path, given: str, gguf_file: str | None) -> Path | None:
    """The GGUF file that a name or `gguf_file` is of, or the only one of a folder without other weights."""
    if gguf_file is not None:
        return _gguf_named(folder, given, gguf_file)
    if folder.suffix == gguf.SUFFIX and folder.is_file():
        return folder
    try:
        files = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    except OSError as error:
        raise unloadable(str(folder), error) from error
    found = [file for file in files if file.endswith(gguf.SUFFIX)]
    if not found or any(file.endswith(".safetensors") and file != ADAPTER_WEIGHTS for file in files):
        return None
    if len(found) > 1:
        rule = f"holds {len(found)} GGUF files: {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}"
        raise ModelError(f"model {quoted(given, 200)}", rule, f"say which: {option('gguf_file', found[0])}")
    return folder / found[0]


def _gguf_named(folder: Path, given: str, gguf_file: str) -> Path | None:
    """The file of a folder that `gguf_file` names; None where there is no folder, which is another error."""
    value = option("gguf_file", gguf_file)
    _check_gguf_name(gguf_file)
    if folder.is_file():
        raise ModelError(value, f"has no effect on {shown(str(folder))}", "leave it out")
    if not folder.is_dir():
        return None
    if not (folder / gguf_file).is_file():
        there = sorted(file.name for file in folder.glob(f"*{gguf.SUFFIX}"))
        raise ModelError(
            value,
            f"is not in model folder {quoted(given, 200)}",
            f"give one of {', '.join(there[:5])}" if there else "leave it out: it holds no .gguf file",
        )
    return folder / gguf_file


def _gguf_of_hub(name: str, gguf_file: str, revision: str | None) -> Path:
    """A GGUF file of a Hugging Face id, fetched."""
    _check_gguf_name(gguf_file)
    if (path := _of_hub(name, gguf_file, revision)) is None:
        raise ModelError(option("gguf_file", gguf_file), f"is not in model {quoted(name)}", "check its name there")
    return Path(path)


def _check_gguf_name(gguf_file: str) -> None:
    if not isinstance(gguf_file, str) or not gguf_file.endswith(gguf.SUFFIX):
        raise ModelError(f"gguf_file {quoted(gguf_file)}", f"must be the name of a {gguf.SUFFIX} file", "correct it")
    if os.path.isabs(gguf_file) or ".." in Path(gguf_file).parts:
        rule = "must be inside the model's folder or repository"
        raise ModelError(option("gguf_file", gguf_file), rule, "give the file as the model itself")


def _encoder(name: str) -> ModelError:
    rule = "is a sentence-transformers model (modules.json): it gives embeddings of texts, no next token"
    return ModelError(name, rule, "give the language model that it was made from")


def _adapter_alone(name: str, given: str, config: Mapping[str, Any]) -> ModelError:
    base = config.get("base_model_name_or_path")
    made_on = f", made on {quoted(base)}" if base else ""
    return ModelError(
        name,
        f"is an adapter alone{made_on}: it has no config.json and no weights of a model",
        f"give its base model, and {option('adapter', given)}",
    )


def _code(config: Mapping[str, Any]) -> list[str]:
    """The classes of its own that a configuration names."""
    auto = config.get("auto_map")
    every = auto.values() if isinstance(auto, Mapping) else auto if isinstance(auto, list) else []
    names = [name for one in every for name in (one if isinstance(one, list) else [one]) if isinstance(name, str)]
    return list(dict.fromkeys(names))


def _left_out(where: str, config: Mapping[str, Any]) -> Iterator[str]:
    """What of a model is not read, or is used otherwise than its files say."""
    named = config.get("architectures")
    if isinstance(named, list) and named and not any(_HEAD.search(str(name)) for name in named):
        yield (
            f"the config.json of {shown(where)} names the architecture {quoted(named[0])}, which gives no next token: "
            "the head for that comes from elsewhere (where it is tied, from the embedding)"
        )
    if not os.path.isdir(where):
        return
    files = {file.name for file in Path(where).glob("*.safetensors")} - {ADAPTER_WEIGHTS}
    index = _json(where, f"{_WEIGHTS}.index.json", None).get("weight_map")
    read = {_WEIGHTS} if _WEIGHTS in files else set(index.values()) if isinstance(index, dict) else files
    if unread := sorted(files - read):
        more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
        yield f"{shown(where)} also holds {', '.join(unread[:3])}{more}: no weights are read from there"


def _check_type(name: str, config: Mapping[str, Any], code: list[str]) -> None:
    """Refuse a model type that transformers does not have."""
    from transformers import CONFIG_MAPPING
    from transformers import __version__ as version

    kind = config.get("model_type")
    if not isinstance(kind, str | None):
        raise ModelError(name, f"its config.json has model_type={quoted(kind)}, which is not text", "correct it")
    if kind is not None and kind not in CONFIG_MAPPING:
        discover()  # a package that has families has their configurations
    if kind is None or kind in CONFIG_MAPPING:
        return
    if code:
        rule = (
            f"its model type {kind!r} is defined by code that comes with it ({', '.join(code[:3])}), which is never run"
        )
        raise ModelError(name, rule, f"use a model of a type that has rules: {listed()}")
    rule = f"its model type {kind!r} is not known to transformers {version}"
    raise ModelError(name, rule, f"use a model of a type that has rules: {listed()}")


def _check_layers(name: str, config: Mapping[str, Any]) -> None:
    """Refuse more layers than any model has."""
    for key in ("num_hidden_layers", "n_layer", "n_layers", "block_count"):
        if isinstance(many := config.get(key), int) and many > _MOST_LAYERS:
            raise ModelError(name, f"its configuration has {key}={quoted(many)}", "correct it")


def _check_kernels(name: str, config: Mapping[str, Any]) -> None:
    """Refuse a configuration that names a kernel of a hub, which transformers would fetch and run."""
    parts = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    ends = ("attn_implementation", "kernels")
    for key, value in (item for part in parts for item in part.items() if str(item[0]).endswith(ends)):
        for one in value.values() if isinstance(value, Mapping) else [value]:
            if isinstance(one, str) and "/" in one:
                rule = (
                    f"its configuration asks for the kernel {quoted(one)}, a hub's code, which is never fetched or run"
                )
                raise ModelError(name, rule, f"take {key} out of its config.json")


# ---------------------------------------------------------------------------------------------- reading files


def _json(where: str, file: str, revision: str | None) -> dict[str, Any]:
    """A JSON file of a folder or an id; empty where there is none."""
    path = _path(where, file, revision)
    if path is None:
        return {}
    content = jsontext.parse(wholefile.read(path))
    if not isinstance(content, dict):
        raise ValueError(f"{file} is not a JSON object")
    return content


def _path(where: str, file: str, revision: str | None) -> str | None:
    path = os.path.join(where, file) if os.path.isdir(where) else _of_hub(where, file, revision)
    return path if path is not None and os.path.isfile(path) else None


def _of_hub(name: str, file: str, revision: str | None) -> str | None:
    """The path of a file of a Hugging Face id, fetched; None where it has none."""
    from transformers.utils import cached_file

    quietly = ("missing_entries", "gated_repo", "connection_errors")
    options: dict[str, Any] = {f"_raise_exceptions_for_{kind}": False for kind in quietly}
    try:
        return cached_file(name, file, revision=revision, **options)
    except (OSError, ValueError) as error:
        raise unloadable(name, error) from error


def _check_shipped() -> None:
    """Refuse changed weights: all documented numbers of the demo model are of the committed ones."""
    try:
        intact = demo.verify()
    except (OSError, ValueError, IndexError):
        intact = False
    if not intact:
        raise ModelError("model 'demo'", "its weights are not the ones shipped (by SHA-256)", "reinstall neuron-tracer")


def _check_reachable(name: str, revision: str | None, file: str) -> None:
    """Fail at once where there is no network: loading would retry for half a minute first."""
    from huggingface_hub import constants, try_to_load_from_cache

    try:
        if constants.HF_HUB_OFFLINE or isinstance(try_to_load_from_cache(name, file, revision=revision), str):
            return
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:
        return
    except (OSError, ValueError, http.client.HTTPException) as error:
        # Certificates are left to the hub client, which may trust others than Python does.
        if not isinstance(getattr(error, "reason", error), ssl.SSLError):
            raise unloadable(name, error) from error


# ----------------------------------------------------------------------------------------------------- errors


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; a failed allocation of torch on the CPU is recognised by its text alone."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError) or getattr(error, "errno", None) == errno.ENOMEM
    said = str(error).lower()
    words = ("can't allocate memory", "not enough memory", "out of memory", "status_alloc_failed")  # the last is CUDA's
    return known or any(part in said for part in words)


@contextmanager
def building(source: str, placed: Any = None) -> Iterator[None]:
    """Around what other packages make of a model's files: whatever they raise is that the files cannot be loaded."""
    try:
        yield
    except TracerError:
        raise
    except BaseException as error:
        # A panic of the tokenizers library is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise unloadable(source, error, placed) from error


def unloadable(source: str, error: BaseException, placed: Any = None) -> ModelError:
    """What went wrong with a folder or an id: memory, a package, code, the device map, files, or the network."""
    name = shown(source)
    if out_of_memory(error):
        return ModelError(
            name, f"does not fit in memory ({first_line(error)})", "use a smaller dtype, or device_map='auto'"
        )
    if isinstance(error, ImportError):
        return ModelError(name, first_line(error), "install the package that it needs")
    if "trust_remote_code" in str(error):
        rule = "its model or tokenizer is defined by code that comes with it, which is never run"
        return ModelError(name, rule, "use a model whose parts transformers has itself")
    if isinstance(placed, dict) and isinstance(error, ValueError):
        return ModelError(
            f"device_map={quoted(placed)}", first_line(error), "give every module a device, or use 'auto'"
        )
    rule, step = first_line(" ".join(str(error).split()), 300), "check that it is complete, with safetensors weights"
    if not isinstance(error, (OSError, ValueError, RuntimeError)):
        rule = f"cannot be built from its files ({type(error).__name__}: {rule})"
    if not os.path.exists(source) and "does not appear to have a file named" not in str(error):
        rule = f"could not be fetched from Hugging Face ({rule})"
        step = "check the id, the network and HF_ENDPOINT, or give a local folder; 'demo' needs neither"
    return ModelError(name, rule, step)
