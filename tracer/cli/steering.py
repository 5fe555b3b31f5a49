"""The verb steer: its options, and what is checked before a model is loaded.

Knows which arguments of `tracer.steer` the options are. Refuses to know what is done to neurons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from tracer import choices
from tracer.cli import output, terminal
from tracer.cli.loading import Adapter, Device, GgufFile, There, Where
from tracer.cli.options import MOST, Bos, Chat, Format, Style, flat, numbers
from tracer.errors import JobError, quoted
from tracer.experts import FORMS

if TYPE_CHECKING:
    from tracer.prompts import Prompt


@dataclass(frozen=True)
class Tokens:
    """The tokens whose probabilities are shown, and how the prompt begins."""

    PANEL: ClassVar[str] = "Prompt"

    target: Annotated[list[str] | None, typer.Option(help='Token asked about: " are".')] = None
    foil: Annotated[list[str] | None, typer.Option(help="Wrong token.")] = None
    token: Annotated[list[str] | None, typer.Option(help="Another token whose probability is shown. Repeatable.")] = (
        None
    )
    bos: Bos = False

    def prompt(self, text: str) -> Prompt:
        """The prompt that is asked about them."""
        from tracer.prompts import Prompt

        return Prompt(text, target=self.target or None, foil=self.foil or None, bos=self.bos)


@dataclass(frozen=True)
class Which:
    """The nodes that are acted on."""

    PANEL: ClassVar[str] = "Selection"

    nodes: Annotated[
        str | None,
        typer.Option(
            help="A run folder (of one prompt, or a dataset's with its circuit), or a CSV or JSON-lines file of layer, "
            "neuron, position; with --group also a supernodes.json. Default: the prompt's own."
        ),
    ] = None
    group: Annotated[str | None, typer.Option(help="Only this supernode of --nodes, by its name.")] = None
    neuron: Annotated[
        list[str] | None,
        typer.Option(help=f"In place of --nodes a neuron at every position, as {FORMS}. Repeatable."),
    ] = None

    def chosen(self) -> Any:
        """As `tracer.steer` takes them; None for the prompt's own.

        Raises:
            JobError: a group of nothing, or two answers. As `read_nodes`.
        """
        from tracer.evaluation import steering

        if self.group is not None and self.nodes is None:
            raise JobError(f"--group {quoted(self.group)}", "is of a run or a groups file", "name it with --nodes")
        if self.neuron and self.nodes is not None:
            raise JobError(f"--neuron {self.neuron[0]}", "and --nodes both say what is steered", "give one of them")
        return self.neuron or (None if self.nodes is None else steering.read_nodes(self.nodes, self.group))


@dataclass(frozen=True)
class Action:
    """What is done to nodes, to which and where."""

    PANEL: ClassVar[str] = "Action"

    factor: Annotated[float | None, typer.Option(help="Multiply: 0 ablates, 2 amplifies, -1 inverts.")] = None
    set_to: Annotated[float | None, typer.Option(help="Set to this value.")] = None
    add: Annotated[float | None, typer.Option(help="Add this value.")] = None
    top: Annotated[int | None, typer.Option(help="Only the strongest this many nodes.", min=1, max=MOST)] = None
    everywhere: Annotated[
        bool, typer.Option("--everywhere", help="At every position, new tokens included; else at the nodes' own.")
    ] = False
    positions: Annotated[str | None, typer.Option(help="Where instead of the nodes' own positions: '-1' or '2,5'.")] = (
        None
    )

    def arguments(self) -> dict[str, Any]:
        """As `tracer.steer` takes it."""
        return vars(self) | {"positions": numbers(self.positions, "--positions")}


@dataclass(frozen=True)
class Drawn:
    """What is generated, what is drawn to compare with, and texts that are drawn beside the greedy ones."""

    PANEL: ClassVar[str] = "Texts and controls"

    max_new_tokens: Annotated[int, typer.Option(help="Length of the generated texts.", min=0, max=MOST)] = 20
    random: Annotated[int, typer.Option(help="Draws of equally many random neurons.", min=0, max=MOST)] = 5
    seed: Annotated[int, typer.Option(help="Of the random draws.", min=0, max=MOST)] = 0
    temperature: Annotated[
        float | None, typer.Option(help="Draw texts too, at this temperature. Default with --samples: 1.", min=0)
    ] = None
    top_p: Annotated[
        float | None, typer.Option(help="Draw only among the likeliest tokens whose probabilities reach this sum.")
    ] = None
    n: Annotated[int | None, typer.Option("--samples", help="How many texts are drawn.", min=1, max=MOST)] = None
    sample_seed: Annotated[
        int, typer.Option(help="Of the first text drawn; the next has the next.", min=0, max=MOST)
    ] = 0


@dataclass(frozen=True, kw_only=True)
class Steered(Where):
    """The model that is steered."""

    PANEL: ClassVar[str] = "Model"

    model: Annotated[
        str | None,
        typer.Option(help="'demo', a folder, or a Hugging Face id. Default: the model of --nodes' circuit, else demo."),
    ] = None
    revision: Annotated[
        str | None, typer.Option(help="Revision of a Hugging Face id. Default: that of the circuit, without --model.")
    ] = None
    adapter: Adapter = None
    gguf_file: GgufFile = None
    device: Device = None
    dtype: Annotated[choices.Dtype | None, typer.Option(help="{}. Default: that of the circuit, else float32.")] = None
    there: There


@terminal.report_errors
@flat
def steer(
    text: Annotated[str, typer.Argument(help="The prompt.")],
    *,
    which: Which,
    tokens: Tokens,
    action: Action,
    chat: Chat,
    drawn: Drawn,
    where: Steered,
    style: Style = Format.auto,
) -> None:
    """Multiply, set or add to a circuit's neurons, and see what the model then says, beside random neurons.

    Example: tracer steer "The secretaries near the car" --target " are" --foil " is" --top 10 --factor -1 --everywhere
    """
    import tracer
    from tracer.circuit.circuit import Traced
    from tracer.evaluation import steering, texts
    from tracer.reports import tables

    prompt, how = chat.asked(tokens.prompt(text)), action.arguments()
    chosen = which.chosen()
    steering.planned(chosen, **how)
    texts.sampled(drawn.temperature, drawn.top_p, drawn.n, drawn.sample_seed, drawn.max_new_tokens)
    terminal.quiet()
    model = where.load(chosen.model if isinstance(chosen, Traced) else None)
    if chosen is None:
        chosen = tracer.trace(model, prompt, action.top, edges=False)
    result = tracer.steer(model, chosen, prompt, **how, tokens=tokens.token or (), **vars(drawn))
    output.put(
        style,
        lambda: tables.steering_table(result),
        lambda: tables.steering_rows(result),
        lambda: tables.steering_json(result),
    )
