"""A verb's model: loaded here or on NDIF, by name or as the record of what was traced on it says.

Knows the options that say which model, and where. Refuses to know what is asked of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from tracer.cli import terminal
from tracer.errors import JobError, ModelError
from tracer.system import machine

if TYPE_CHECKING:
    from tracer.settings import ModelRecord


def loaded(name: str, remote: bool, local_weights: bool, **options: Any) -> Any:
    """A model here or on NDIF."""
    import torch

    import tracer

    torch.set_num_threads(min(torch.get_num_threads(), machine.cores().count))  # it knows no quotas
    if not remote:
        if local_weights:
            raise JobError("--local-weights", "has no effect without --remote", "leave it out")
        return tracer.load(name, **options)
    return tracer.load(name, remote=True, weights="local" if local_weights else None, report=report, **options)


def report(line: str) -> None:
    """The state of a remote job."""
    terminal.line(line, err=True)


class Where(NamedTuple):
    """The options that say which model is loaded, and where."""

    model: str | None
    revision: str | None
    adapter: str | None
    device: str | None
    dtype: str | None
    remote: bool
    local_weights: bool

    def load(self, traced: ModelRecord) -> Any:
        """The model that something was traced on: `--model`, else as its record names it.

        Raises:
            TracerError: it cannot be loaded, or is another.
        """
        mine = self.model is None
        options = {
            "revision": self.revision or (traced.revision if mine else None),
            "adapter": self.adapter or (traced.adapter if mine else None),
            "device": self.device,
            "dtype": self.dtype or (None if self.remote else traced.dtype),  # a server has its own
        }
        try:
            return loaded(self.model or traced.name, self.remote, self.local_weights, **options)
        except ModelError as error:
            if not mine or repr(traced.name) not in error.value:
                raise
            step = f"{error.next_step}; if the model is elsewhere, say where with --model"
            more = " (and its adapter with --adapter)" if traced.adapter else ""
            raise ModelError(
                error.value, f"{error.rule} (so the circuit's record names its model)", step + more
            ) from error
