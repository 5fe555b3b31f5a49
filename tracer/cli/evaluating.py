"""The verb evaluate: its options, and what of them contradicts each other.

Knows which of them say what a circuit is tested on. Refuses to know what is done with them (cli/evaluated.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

import typer

from tracer import choices
from tracer.cli import output, terminal
from tracer.cli.evaluated import Asked, evaluate_circuit, evaluate_run, writable
from tracer.cli.graphs import beside
from tracer.cli.loading import Device, GgufFile, There, Where
from tracer.cli.options import MOST, Chat, Folder, Format, Style, flat, lines, numbers
from tracer.errors import JobError


@dataclass(frozen=True, kw_only=True)
class Tests:
    """The test pairs, what nodes are replaced by, and the sizes of circuits."""

    PANEL: ClassVar[str] = "Tests"

    pairs: Annotated[
        Path | None, typer.Option(help="Test pairs, JSON lines as Marks et al.: clean_prefix, patch_prefix, ...")
    ] = None
    structure: Annotated[
        choices.Structure | None,
        typer.Option(
            help="Or built-in agreement pairs: {}. Default: the prompt that the circuit was "
            "found on, which shows what suffices there."
        ),
    ] = None
    count: Annotated[
        int | None,
        typer.Option(help="How many built-in pairs, or prompts of a run over many. Default: 40.", min=1, max=MOST),
    ] = None
    ablation: Annotated[
        choices.Ablation | None,
        typer.Option(
            help="What other nodes are replaced by: {}. Default: mean; on the circuit's own prompt the counterfactual "
            "if it has one, else zero."
        ),
    ] = None
    reference: Annotated[
        Path | None, typer.Option(help="Text file, a prompt a line: what mean and resample are taken over.")
    ] = None
    allow_overlap: Annotated[
        bool,
        typer.Option("--allow-overlap", help="Test on the circuit's own prompt too; every result says how often."),
    ] = False
    sizes: Annotated[str | None, typer.Option(help="Circuit sizes: '10,50,200'. Default: a grid up to all.")] = None

    edges: Annotated[
        bool,
        typer.Option(
            "--edges", help="Also keep the strongest 1 % to 100 % of the edges, and test what nodes are left."
        ),
    ] = False
    chat: Chat

    supernodes: Annotated[
        bool,
        typer.Option(
            "--supernodes", help="Also what each supernode of the run is worth: the circuit without it, it alone."
        ),
    ] = False

    def check(self) -> None:
        """Refuse options that contradict each other."""
        self.chat.check()
        if self.chat.chat and self.structure is None and self.pairs is None and self.reference is None:
            raise JobError("--chat", "has no effect on the circuit's own prompt", "leave it out, or give test pairs")
        if self.pairs is not None and self.structure is not None:
            raise JobError("test pairs", "come from a file or are built in", "give --pairs or --structure, or neither")
        if self.count is not None and self.pairs is not None:
            raise JobError(f"--count {self.count}", "has no effect with --pairs", "leave it out")


@dataclass(frozen=True)
class How:
    """The model that the circuit is tested on, and how."""

    PANEL: ClassVar[str] = "Model"

    model: Annotated[
        str | None,
        typer.Option(help="Where the circuit's model is now: a folder, or an id. Its weights must be the same."),
    ] = None
    revision: Annotated[
        str | None, typer.Option(help="Revision of a Hugging Face id. Default: the circuit's own, without --model.")
    ] = None
    adapter: Annotated[
        str | None, typer.Option(help="Where the adapter is that was merged. Default: where it was, without --model.")
    ] = None
    gguf_file: GgufFile = None
    aligned: Annotated[
        bool | None,
        typer.Option(
            "--aligned/--no-aligned", help="Nodes at their positions (default), or their neurons at every position."
        ),
    ] = None
    device: Device = None
    dtype: Annotated[
        choices.Dtype | None, typer.Option(help="{}. Default: the circuit's own; with --remote, the server's.")
    ] = None
    unrelated: Annotated[
        Path | None, typer.Option(help="Text file, a prompt a line: neurons that are strong there too are named.")
    ] = None
    bos: Annotated[
        bool | None,
        typer.Option(help="Begin texts with the beginning-of-sequence token. Default: as the circuit's prompt does."),
    ] = None
    seed: Annotated[int, typer.Option(help="Of the random control, resampling and intervals.", min=0, max=MOST)] = 0

    def where(self, there: There) -> Where:
        """Where the model is."""
        return Where(self.model, self.revision, self.adapter, self.gguf_file, self.device, self.dtype, there)


@terminal.report_errors
@flat
def evaluate(
    folder: Folder,
    tests: Tests,
    how: How,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of evaluation.json, .png, report.html (edges.png). Default: the run's; of a run over many "
            "RUN/evaluate."
        ),
    ] = None,
    style: Style = Format.auto,
    *,
    there: There,
) -> None:
    """Does the circuit hold: faithfulness and completeness on test pairs, by ablation, with intervals.

    Example: tracer evaluate runs/demo --structure nounpp
    """
    from tracer.store import one_prompt
    from tracer.store.record import MANY

    tests.check()
    many = one_prompt.read_record(folder).get("kind") in MANY
    if tests.count is not None and tests.structure is None and not many:
        raise JobError(f"--count {tests.count}", "has no effect on the circuit's own prompt", "leave it out")
    place = writable(out or beside(folder, "evaluate" if many else "."))
    evaluated = evaluate_run if many else evaluate_circuit
    told = evaluated(folder, _asked(tests, how), how.where(there), place)
    output.put(style, lambda: told.shown, lambda: told.rows, lambda: told.content)
    output.also(style, f"saved {', '.join(map(str, told.files[:-1]))} and {told.files[-1]}")


def _asked(tests: Tests, how: How) -> Asked:
    """What the options say.

    Raises:
        JobError: pairs or prompts that cannot be read.
    """
    from tracer.data import tasks

    most = tests.count or 40
    return Asked(
        pairs=tests.pairs,
        built_in=tasks.sva.generate(tests.structure, "test", most) if tests.structure else None,
        given=tasks.sva.pairs_of(tests.pairs) if tests.pairs is not None else [],
        most=most,
        ablation=tests.ablation,
        sizes=numbers(tests.sizes, "--sizes"),
        reference=lines(tests.reference, False, chat=tests.chat),
        unrelated=lines(how.unrelated, False, "--unrelated", tests.chat),
        allow_overlap=tests.allow_overlap,
        aligned=how.aligned,
        bos=how.bos,
        seed=how.seed,
        edges=tests.edges,
        supernodes=tests.supernodes,
        chat=tests.chat,
    )
