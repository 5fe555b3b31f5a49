"""The verb neuron: what one neuron does, by the weights alone and by what a run knows of it.

Knows its options. Refuses to know what is read of the weights, and how it is shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import typer

from tracer import choices
from tracer.cli import output, terminal
from tracer.cli.loading import Adapter, Device, GgufFile, There, Where
from tracer.cli.options import Format, Style, flat


@dataclass(frozen=True, kw_only=True)
class Asked(Where):
    """The model whose neuron it is."""

    PANEL: ClassVar[str] = "Model"

    model: Annotated[
        str | None,
        typer.Option(help="'demo', a folder, a GGUF file, or a Hugging Face id. Default: that of --run, else demo."),
    ] = None
    revision: Annotated[str | None, typer.Option(help="Revision of a Hugging Face id.")] = None
    adapter: Adapter = None
    gguf_file: GgufFile = None
    device: Device = None
    dtype: Annotated[
        choices.Dtype | None, typer.Option(help="Default: that of the run, else float32. Of these: {}.")
    ] = None
    there: There


@terminal.report_errors
@flat
def neuron(
    layer: Annotated[int, typer.Argument(help="Its layer, from 0.", min=0)],
    number: Annotated[
        str, typer.Argument(help="Its number in the layer, from 0; of an expert EXPERT:NEURON.", metavar="NEURON")
    ],
    where: Asked,
    top: Annotated[int, typer.Option(help="Tokens of each list.", min=1, max=1000)] = 10,
    run: Annotated[
        str | None, typer.Option(help="A run folder: also what it knows of the neuron, prompts and descriptions.")
    ] = None,
    style: Style = Format.auto,
) -> None:
    """What a neuron says: the tokens it promotes and suppresses, and those that drive it, from the weights alone.

    Example: tracer neuron 1 324 --model demo; of an expert: tracer neuron 1 17:45 --model MODEL
    """
    from tracer.experts import parse_within
    from tracer.meaning import known, tokens
    from tracer.reports import neurons

    named = parse_within(layer, number)
    traced = None if run is None else known.model_of(run)
    if traced is not None:
        traced.numbering().number(named)  # refused before the model is loaded
    terminal.quiet()
    model: Any = where.load(traced)
    if traced is not None:
        model.check_traced(traced, str(run))
    numbering = model.numbering()
    pair = numbering.pair(named)
    about = None if run is None else known.read(run, *pair)
    found = tokens.neuron_tokens(model, [pair], top)
    output.put(
        style,
        lambda: neurons.neuron_table(found, about, numbering),
        lambda: neurons.neuron_rows(found),
        lambda: neurons.neuron_json(found, about),
    )
