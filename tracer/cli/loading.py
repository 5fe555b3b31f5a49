"""A verb's model: loaded here or on NDIF, by name or as the record of what was traced on it says.

Knows the options that say which model, and where. Refuses to know what is asked of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tracer.cli import terminal
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

    remote: Annotated[
        bool, typer.Option("--remote", help="Run on NDIF (NDIF_API_KEY, NDIF_HOST); no weights are loaded here.")
    ] = False
    local_weights: Annotated[
        bool,
        typer.Option(
            "--local-weights", help="With --remote: load the weights here too, where NDIF takes no gradients."
        ),
    ] = False

    def load(self, name: str, **options: Any) -> Any:
        """A model, here or on NDIF."""
        import torch

        import tracer

        torch.set_num_threads(min(torch.get_num_threads(), machine.cores().count))  # it knows no quotas
        if not self.remote:
            if self.local_weights:
                raise JobError("--local-weights", "has no effect without --remote", "leave it out")
            return tracer.load(name, **options)
        weights = "local" if self.local_weights else None
        return tracer.load(name, remote=True, weights=weights, report=report, **options)


def report(line: str) -> None:
    """The state of a remote job."""
    terminal.line(line, err=True)


@dataclass(frozen=True)
class Where:
    """Where the model of a circuit is: as the circuit's record says, unless this says otherwise."""

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
            return self.there.load(self.model or "demo", **options)
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
