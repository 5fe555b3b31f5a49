"""What the verb evaluate does once its options are read: a circuit of one prompt, or of a dataset, tested and saved.

Knows what is checked before a model is loaded, and which files an evaluation leaves. Refuses to know how a circuit is
measured (evaluation) and how results look (reports).
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tracer.cli import terminal
from tracer.cli.options import NO_CHAT, Chat
from tracer.errors import JobError, RunError, quoted, writing
from tracer.system import wholefile
from tracer.text import printable

if TYPE_CHECKING:
    from tracer.circuit.circuit import Circuit, Traced
    from tracer.cli.loading import Where
    from tracer.evaluation.curves import Evaluation
    from tracer.evaluation.edge_curves import EdgeCurves
    from tracer.evaluation.knockouts import Knockouts
    from tracer.evaluation.quality import AlwaysOn, Quality
    from tracer.reports.folded import Folded
    from tracer.text import Rows


class Asked(NamedTuple):
    """What a circuit is tested on, and how, as it is known before a model is loaded."""

    pairs: Path | None
    built_in: list[Any] | None
    given: list[Any]
    most: int
    ablation: str | None
    sizes: list[int] | None
    reference: list[Any] | None
    unrelated: list[Any] | None
    allow_overlap: bool
    aligned: bool | None
    bos: bool | None
    seed: int
    edges: bool = False
    supernodes: bool = False
    chat: Chat = NO_CHAT

    @property
    def own(self) -> bool:
        """Whether there are no test pairs."""
        return self.pairs is None and self.built_in is None

    def tests(self, model: Any, length: int | None, bos: bool) -> list[Any] | None:
        """The test pairs that the model can be asked; of a file those of `length` tokens. None where there are none."""
        from tracer.data import tasks
        from tracer.prompts import encode, lacks_bos

        if self.pairs is None:
            return self.built_in
        alone = None if length is None or self.chat.chat else length - (bos and lacks_bos(model))
        reading = tasks.sva.read(self.pairs, model, length=alone)
        if reading.skipped:
            terminal.line(reading.summary(), err=True)
        if length is None or not self.chat.chat:
            return list(reading.pairs)
        fit = [one for one in reading.pairs if len(encode(self.prompt(one, bos), model).token_ids) == length]
        if other := len(reading.pairs) - len(fit):
            terminal.line(f"{other} of {len(reading.pairs)} pairs skipped: not {length} tokens long as asked", err=True)
        return fit

    def prompt(self, pair: Any, bos: bool) -> Any:
        """A test pair as it is asked."""
        from tracer.prompts import with_bos

        return with_bos(self.chat.asked(pair.to_prompt()), bos)

    def others(self, bos: bool) -> list[Any] | None:
        """The reference prompts."""
        from tracer.prompts import with_bos

        return None if self.reference is None else [with_bos(one, bos) for one in self.reference]


class Parts(NamedTuple):
    """What parts of a circuit hold, where it was asked for: its strongest edges, and its groups."""

    edges: EdgeCurves | None = None
    groups: Knockouts | None = None


NO_PARTS = Parts()


class Told(NamedTuple):
    """An evaluation as JSON, as tables, as the rows of its curves, and the files it was saved in."""

    content: str
    shown: Folded
    rows: Rows
    files: list[Path]


def evaluate_circuit(folder: str, asked: Asked, where: Where, place: Path) -> Told:
    """The circuit of one prompt on test pairs, or on its own prompt."""
    import tracer
    from tracer.evaluation.faithfulness import planned
    from tracer.prompts import bos_of, with_bos
    from tracer.reports import document

    circuit, aligned = tracer.Circuit.load(folder), asked.aligned is not False
    planned(
        circuit, asked.ablation, asked.sizes, own=asked.own, has_reference=asked.reference is not None, aligned=aligned
    )
    _check_apart(circuit, [pair.prompt for pair in asked.built_in or asked.given], asked.allow_overlap)
    _check_unrelated(circuit, asked.unrelated)
    _check_edges(circuit, asked)
    grouped = _grouped(circuit, folder, asked)
    model = _loaded(circuit, where)
    bos = circuit.token_ids[0] == bos_of(model) if asked.bos is None else asked.bos
    pairs, others = asked.tests(model, len(circuit.token_ids), bos), asked.others(bos)
    tests = None if pairs is None else [asked.prompt(pair, bos) for pair in pairs]
    how: dict[str, Any] = {
        "reference": others,
        "train": () if pairs is None else [tracer.Prompt(token_ids=circuit.token_ids)],
        "allow_overlap": asked.allow_overlap,
        "seed": asked.seed,
    }
    with terminal.ProgressBar("ablating") as bar:
        result = tracer.evaluate(
            model, circuit, tests, asked.ablation, asked.sizes, **how, aligned=aligned, progress=bar
        )
    edges = _edge_curves(model, circuit, tests, asked.ablation, how) if asked.edges else None
    groups = None if grouped is None else _knockouts(model, grouped, tests, asked.ablation, how)
    mean_of = others or [with_bos(asked.chat.asked(tracer.Prompt(pair.counterfactual)), bos) for pair in pairs or ()]
    qualities = _qualities(model, circuit, mean_of, asked.seed)
    constant = _always_on(model, circuit, asked, bos)
    told = _told(result, place, circuit.text, qualities, constant, Parts(edges, groups))
    first = qualities[0] if qualities else None
    page = document.write_document(circuit, result, first, constant, edges, path=place / "report.html")
    return told._replace(files=[*told.files, page])


def evaluate_run(folder: str, asked: Asked, where: Where, place: Path) -> Told:
    """The circuit of a dataset on test pairs, or on the run's own prompts."""
    from tracer.circuit.from_run import circuit_of
    from tracer.runs.jobs import DatasetJob, load_job
    from tracer.runs.units import dataset_circuit
    from tracer.store.run_folder import RunFolder

    circuit, at = circuit_of(folder), RunFolder(folder)
    _check_of_run(circuit, asked)
    _check_edges(circuit, asked)
    grouped = _grouped(circuit, folder, asked)
    job = load_job((at.record() or {})["job"])
    assert isinstance(job, DatasetJob)
    job = job.leaving_out(at.record() or {})
    model = _loaded(circuit, where)
    bos = job.bos if asked.bos is None else asked.bos
    pairs = asked.tests(model, len(circuit.tokens) if job.circuit == "aligned" else None, bos)
    again = dataset_circuit.Again(
        None if pairs is None else [asked.prompt(pair, bos) for pair in pairs],
        asked.ablation,
        asked.sizes,
        count=asked.most,
        reference=asked.others(bos),
        allow_overlap=asked.allow_overlap,
        seed=asked.seed,
        edges=circuit if asked.edges else None,
        groups=grouped,
    )
    with terminal.ProgressBar("ablating") as bar:
        result, edges, groups = dataset_circuit.evaluate_again(model, job, at, again, bar)
    return _told(result, place, circuit.text, parts=Parts(edges, groups))


def _loaded(circuit: Traced, where: Where) -> Any:
    """The model that a circuit was traced on."""
    terminal.quiet()
    model = where.load(circuit.model)
    model.check_traced(circuit.model, circuit.text)
    return model


def _told(
    result: Evaluation,
    place: Path,
    title: str,
    qualities: Sequence[Quality] = (),
    constant: list[AlwaysOn] | None = None,
    parts: Parts = NO_PARTS,
) -> Told:
    """An evaluation, saved as JSON and as pictures."""
    from tracer.reports import figures, tables

    content = tables.evaluation_json(result, qualities, constant, *parts)
    files = [tables.write_page(content, place / "evaluation.json")]
    files.append(tables.plot_evaluation(result, place / "evaluation.png", title))
    if parts.edges is not None:
        files.append(tables.write_page(figures.edge_curves_png(parts.edges, printable(title, 90)), place / "edges.png"))
    shown = tables.evaluation_table(result, qualities, constant, *parts)
    return Told(content, shown, tables.evaluation_rows(result), files)


def _edge_curves(
    model: Any, circuit: Circuit, tests: list[Any] | None, ablation: str | None, how: dict[str, Any]
) -> EdgeCurves:
    """What the circuit's strongest edges alone hold, on the same test prompts."""
    from tracer.evaluation.edge_curves import edge_curves

    with warnings.catch_warnings(), terminal.ProgressBar("keeping the strongest edges") as bar:
        warnings.simplefilter("ignore")  # the evaluation has said it
        return edge_curves(model, circuit, tests, ablation, **how, progress=bar)


def _knockouts(
    model: Any, circuit: Circuit, tests: list[Any] | None, ablation: str | None, how: dict[str, Any]
) -> Knockouts:
    """What each supernode is worth, on the same test prompts."""
    from tracer.evaluation.knockouts import knockouts

    with warnings.catch_warnings(), terminal.ProgressBar("leaving out each supernode") as bar:
        warnings.simplefilter("ignore")  # the evaluation has said it
        return knockouts(model, circuit, tests, ablation, **how, progress=bar)


def _grouped(circuit: Traced, folder: str, asked: Asked) -> Any:
    """The circuit with the supernodes of its run, None where they are not asked about; refused before a model is loaded
    where there are none."""
    from tracer.circuit import supernodes_file
    from tracer.evaluation.knockouts import check_grouped

    if not asked.supernodes:
        return None
    if asked.aligned is False:
        raise JobError("--supernodes", "are of nodes at their positions", "leave out --no-aligned")
    file = supernodes_file.of_run(folder)
    if file is None:
        rule, step = "has no supernodes.json", f"make one: tracer group {folder}"
        raise RunError(f"run {quoted(folder, 300)}", rule, step)
    grouped = supernodes_file.apply(file, circuit)
    check_grouped(grouped)
    return grouped


def _check_edges(circuit: Traced, asked: Asked) -> None:
    """Refuse curves of edges where there are none, before a model is loaded."""
    from tracer.evaluation.edge_curves import surviving

    if asked.edges and asked.aligned is False:
        raise JobError("--edges", "are between nodes at their positions", "leave out --no-aligned")
    if asked.edges:
        surviving(circuit)


def _check_of_run(circuit: Traced, asked: Asked) -> None:
    """Refuse what a dataset's circuit cannot be asked."""
    from tracer.evaluation.testset import check_ablation
    from tracer.runs.units.dataset_circuit import n_ranked

    if asked.aligned is not None:
        raise JobError("--aligned", "is what the job of a run over many says (circuit:)", "leave it out")
    if asked.unrelated is not None:
        raise JobError("--unrelated", "has no effect on a dataset's circuit", "leave it out, or evaluate one prompt's")
    if asked.ablation is not None or asked.reference is not None:
        check_ablation(asked.ablation or "mean", asked.reference is not None)
    sizes, most = asked.sizes, n_ranked(circuit)
    if sizes is not None and (not sizes or sizes[0] < 1 or sizes != sorted(set(sizes)) or sizes[-1] > most):
        given = f"--sizes {','.join(map(str, sizes))}"
        raise JobError(given, f"must rise from 1 to at most {most}, all there are on its prompts", "change them")


def writable(folder: Path) -> Path:
    """A folder for results, refused before anything is computed if it cannot be written."""
    with writing(folder, "folder", "choose another with --out"):
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        if not there.is_dir():
            raise RunError(f"path {quoted(str(there), 300)}", "is a file, not a folder", "choose another with --out")
        tempfile.TemporaryFile(dir=there).close()
        for name in ("evaluation.json", "evaluation.png", "edges.png", "report.html"):
            wholefile.check(folder / name)
    return folder


def _qualities(model: Any, circuit: Circuit, reference: list[Any], seed: int) -> list[Quality]:
    """How well the attributions follow single ablations: to the circuit's own baseline, and to the mean over the
    reference where that reaches all positions."""
    import tracer
    from tracer.attribution.attribute import Reference
    from tracer.prompts import encode

    reaches = any(len(encode(one, model).token_ids) >= len(circuit.token_ids) for one in reference)
    if circuit.settings.baseline == "mean":
        same = reaches and Reference(reference).hash(model) == circuit.reference
        asked: list[dict[str, Any]] = [{"reference": reference}] if same else []
    else:
        asked = [{}, *([{"ablation": "mean", "reference": reference}] if reaches else [])]
    with terminal.ProgressBar("checking the estimate") as bar:
        return [tracer.estimate_quality(model, circuit, **how, seed=seed, progress=bar) for how in asked]


def _always_on(model: Any, circuit: Circuit, asked: Asked, bos: bool) -> list[AlwaysOn] | None:
    """Neurons of the circuit that are strong on unrelated prompts too; None where there are no such prompts."""
    from tracer.evaluation import quality
    from tracer.prompts import with_bos

    apart = asked.unrelated if asked.unrelated is not None else _unrelated(asked.built_in is not None, circuit)
    return quality.always_on(model, circuit, [with_bos(one, bos) for one in apart]) if apart else None


def _check_unrelated(circuit: Circuit, prompts: list[Any] | None) -> None:
    if prompts is None:
        return
    if len(prompts) < 2:
        raise JobError(f"--unrelated with {len(prompts)} prompt", "at least 2 are needed", "give more; 20 is usual")
    if circuit.settings.baseline == "counterfactual":
        rule = "its lines have no counterfactuals, from which this circuit was traced"
        raise JobError("--unrelated", rule, "leave it out, or call tracer.always_on with prompts that have one")


def _unrelated(built_in: bool, circuit: Circuit) -> list[Any]:
    """Prompts that have nothing to do with agreement; none where the pairs are the user's own."""
    import tracer
    from tracer.data import tasks

    paired = circuit.settings.baseline == "counterfactual"
    return [
        tracer.Prompt(pair.prompt, counterfactual=pair.counterfactual if paired else None)
        for pair in (tasks.capitals.pairs("test", 10) if built_in else ())
    ]


def _check_apart(circuit: Circuit, tests: list[str], allow_overlap: bool) -> None:
    """Refuse to test a circuit on its own prompt, before a model is loaded, unless that is allowed."""
    shared = tests.count(circuit.text)
    if shared and not allow_overlap:
        raise JobError(
            f"{shared} of {len(tests)} test prompts",
            f"are the prompt that the circuit was found on, {quoted(circuit.text)}",
            "take it out of the pairs, or give --allow-overlap, which every result says",
        )
