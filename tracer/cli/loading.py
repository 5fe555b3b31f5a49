"""A verb's model: loaded here or on NDIF, by name or as the record of what was traced on it says.

Knows the options that say which model, and where. Refuses to know what is asked of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from tracer import choices
from tracer.cli import manner, waiting
from tracer.errors import JobError, ModelError
from tracer.system import machine

if TYPE_CHECKING:
    from tracer.settings import ModelRecord

Adapter = Annotated[
    str | None,
    typer.Option("--adapter", help="An adapter (LoRA) merged into the model: a folder, or a Hugging Face id."),
]
GgufFile = Annotated[
    str | None, typer.Option("--gguf-file", help="The GGUF file of the folder or id that holds the weights.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. Default: a GPU if there is one.")]


@dataclass(frozen=True)
class There:
    """Whether a model runs on a server."""

    PANEL: ClassVar[str] = "Remote"

    remote: Annotated[
        bool, typer.Option("--remote", help="Run on NDIF (NDIF_API_KEY, NDIF_HOST); no weights are loaded here.")
    ] = False
    weights: Annotated[
        choices.Weights | None,
        typer.Option(help="With --remote: {} loads the weights here too, where NDIF takes no gradients."),
    ] = None

    def load(self, name: str, **options: Any) -> Any:
        """A model, here or on NDIF."""
        import torch

        import tracer

        torch.set_num_threads(min(torch.get_num_threads(), machine.cores().count))  # it knows no quotas
        if not self.remote:
            if self.weights is not None:
                raise JobError(f"--weights {self.weights}", "has no effect without --remote", "leave it out")
            options = _filled(options)
            return _loaded(f"loading {name}", name, lambda: tracer.load(name, **options))
        asked = {"remote": True, "weights": self.weights, "report": report} | options
        return _loaded(f"asking the server for {name}", name, lambda: tracer.load(name, **asked))


def _filled(options: dict[str, Any]) -> dict[str, Any]:
    """How a model is loaded here, with the user's defaults where nothing else says it."""
    usual = dict(manner.now().fallback)
    if options.get("device_map") is not None:
        usual.pop("device", None)
    mine = {name: usual[name] for name in ("device", "dtype") if usual.get(name) and options.get(name) is None}
    return options | mine


def _loaded(doing: str, name: str, load: Callable[[], Any]) -> Any:
    """A model, with signs of life while it comes."""
    logging.getLogger(manner.LOGGER).info("%s", doing)
    with waiting.Signs(lambda: f"{doing}{_size(name)}"):
        return load()


def _size(name: str) -> str:
    """What of a model's weights is on this disk, in words; of one that is being fetched, what has come."""
    from tracer import demo

    place = demo.path() if name == "demo" else Path(name)
    if not place.exists() and name.count("/") == 1:
        from huggingface_hub.constants import HF_HUB_CACHE

        place = Path(HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "blobs"
    try:
        files = [one for one in place.iterdir() if one.is_file()] if place.is_dir() else [place]
        total = sum(one.stat().st_size for one in files)
    except OSError:
        return ""
    return f" ({total / 2**30:.1f} GiB)" if total >= 2**26 else ""


def report(line: str) -> None:
    """The state of a remote job."""
    if not manner.now().quiet:
        waiting.Signs.say(line)


@dataclass(frozen=True)
class Where:
    """Where the model of a circuit is: as the circuit's record says, unless this says otherwise."""

    PANEL: ClassVar[str] = "Model"

    model: str | None
    revision: str | None
    adapter: str | None
    gguf_file: str | None
    device: str | None
    dtype: str | None
    there: There

    def load(self, traced: ModelRecord | None) -> Any:
        """The model that something was traced on: `--model`, else as its record names it; without a record the demo.

        Raises:
            TracerError: it cannot be loaded, or is another.
        """
        options = {name: value for name, value in vars(self).items() if name not in ("model", "there")}
        if traced is None:
            return self.there.load(self.model or manner.now().fallback.get("model", "demo"), **options)
        if not self.there.remote:  # a server has its own
            options["dtype"] = self.dtype or traced.dtype
        if self.model is not None:
            return self.there.load(self.model, **options)
        options |= {name: options[name] or value for name, value in traced.loading().items()}
        try:
            return self.there.load(traced.name, **options)
        except ModelError as error:
            if repr(traced.name) not in error.value:
                raise
            step = f"{error.next_step}; if the model is elsewhere, say where with --model"
            more = " (and its adapter with --adapter)" if traced.adapter else ""
            raise ModelError(
                error.value, f"{error.rule} (so the circuit's record names its model)", step + more
            ) from error
