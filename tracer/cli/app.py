"""The command line: verbs, their options, and how errors are shown.

Each verb imports what it needs inside itself, so that --help is instant. A `TracerError` is printed as one line and
ends with code 2; anything else is a bug and keeps its traceback. Knows no method and no format.
"""

from __future__ import annotations

import itertools
import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tracer.cli import evaluating, runs, terminal
from tracer.cli.loading import Where, report
from tracer.cli.loading import loaded as _loaded
from tracer.cli.terminal import MOST
from tracer.errors import JobError, RunError, TracerError, first_line, quoted, say
from tracer.text import is_text

if TYPE_CHECKING:
    from tracer.attribution.pruning import Pruning
    from tracer.circuit.circuit import Graph

# The base class of click's usage errors, or of those of the copy that newer typer bundles.
UsageError: type[Exception] = typer.BadParameter.__mro__[1]

app = typer.Typer(
    help="Find circuits of MLP neurons in language models, and prove what was found.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _version(asked: bool) -> bool:
    if asked:
        from tracer import __version__

        typer.echo(f"tracer {__version__}")
        raise typer.Exit
    return asked


@app.callback()
def root(
    version: Annotated[  # its callback prints it
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Find circuits of MLP neurons in language models, and prove what was found."""


class Format(StrEnum):
    """How a circuit is printed."""

    table = "table"
    json = "json"
    csv = "csv"


Rows = Annotated[int, typer.Option(help="Nodes shown in the table; all are kept and saved.", min=1, max=MOST)]
OfRun = Annotated[
    int | None,
    typer.Option("--prompt", help="Of a run over many: a prompt's number (prompt_id). Default: the dataset's circuit."),
]
Style = Annotated[Format, typer.Option("--format", help="table for people, json or csv for scripts.")]

Bos = Annotated[
    bool,
    typer.Option("--bos", help="Begin the text with the beginning-of-sequence token where the tokenizer does not."),
]
Remote = Annotated[
    bool,
    typer.Option("--remote", help="Run on NDIF (NDIF_API_KEY, NDIF_HOST); no weights are loaded here."),
]
LocalWeights = Annotated[
    bool,
    typer.Option("--local-weights", help="With --remote: load the weights here too, where NDIF takes no gradients."),
]

Adapter = Annotated[
    str | None,
    typer.Option("--adapter", help="An adapter (LoRA) merged into the model: a folder, or a Hugging Face id."),
]


@app.command()
@terminal.report_errors
def trace(
    text: Annotated[str | None, typer.Argument(help="The prompt; or give --token-ids.", show_default=False)] = None,
    target: Annotated[
        list[str] | None,
        typer.Option(
            help='Token asked about, with its space: " are". Repeat for several. Default: the model\'s own top token.'
        ),
    ] = None,
    foil: Annotated[
        list[str] | None, typer.Option(help="Wrong token; the metric becomes the logit difference.")
    ] = None,
    counterfactual: Annotated[
        str | None, typer.Option(help="Paired prompt of equal length: the baseline, unless --baseline says another.")
    ] = None,
    token_ids: Annotated[str | None, typer.Option(help="The prompt as ids: '1,351,95'.")] = None,
    positions: Annotated[
        str | None, typer.Option(help="Where the logits are read: '-1' or '3,5'. Default: the last.")
    ] = None,
    bos: Bos = False,
    model: Annotated[str, typer.Option(help="'demo', a folder, or a Hugging Face id.")] = "demo",
    revision: Annotated[str | None, typer.Option(help="Revision of a Hugging Face id.")] = None,
    adapter: Adapter = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. Default: a GPU if there is one.")] = None,
    device_map: Annotated[str | None, typer.Option(help="'auto' spreads the model over several GPUs.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 (the default), bfloat16, float16, float64, int8, nf4, fp4.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="relp, grad, ig, conductance, ig-activation, exact, delta, random.")
    ] = "relp",
    baseline: Annotated[
        str | None,
        typer.Option(help="zero, mean, counterfactual. Default: the counterfactual if there is one, else zero."),
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Text file, a prompt a line: the mean baseline is taken over it.")
    ] = None,
    basis: Annotated[str, typer.Option(help="activation (neurons) or output (of the MLP).")] = "activation",
    metric: Annotated[str, typer.Option(help="auto, logit, difference, logprob, centred.")] = "auto",
    top: Annotated[
        int | None, typer.Option(help="Trace the sum of the model's top K logits instead of a target.", max=MOST)
    ] = None,
    without_rule: Annotated[
        list[str] | None, typer.Option(help="Switch off a RelP rule: norm, attention, activation, product.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Interpolation steps of ig, conductance, ig-activation.", max=MOST)] = 10,
    seed: Annotated[int, typer.Option(help="Of the method random.", max=MOST)] = 0,
    nodes: Annotated[
        int | None,
        typer.Option(
            help="Nodes to keep, strongest first. Default: 200, unless --threshold or --mass is given.", max=MOST
        ),
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Keep |attribution| >= this share of |metric| (paper: .005).")
    ] = None,
    mass: Annotated[
        float | None, typer.Option(help="Keep the fewest nodes with this share of all |attribution|.")
    ] = None,
    skip_first: Annotated[bool, typer.Option("--skip-first", help="Leave out position 0 (BOS).")] = False,
    exclude: Annotated[
        list[str] | None, typer.Option(help="A neuron never taken, as LAYER/NEURON. Repeatable.")
    ] = None,
    edges: Annotated[
        bool | None, typer.Option("--edges/--no-edges", help="Trace the direct edges between the nodes kept.")
    ] = None,
    edge_share: Annotated[
        float | None, typer.Option(help="Keep edges with at least this |share| of their target. Default: .01.")
    ] = None,
    edge_attribution: Annotated[
        float | None, typer.Option(help="Keep edges with at least this |attribution|, in logits.")
    ] = None,
    top_edges: Annotated[int | None, typer.Option(help="Keep at most this many edges.", max=MOST)] = None,
    node_influence: Annotated[
        float | None, typer.Option(help="Keep the fewest nodes with this share of all influence (usual: .8).")
    ] = None,
    edge_influence: Annotated[
        float | None, typer.Option(help="Keep the fewest edges with this share of the influence (usual: .98).")
    ] = None,
    drop_dangling: Annotated[
        bool, typer.Option("--drop-dangling", help="Drop nodes that no kept edge leads into, or none out of.")
    ] = False,
    out: Annotated[
        str | None, typer.Option(help="Save the run folder here (Parquet and run.json): a path, s3:// or gs://.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another run in that folder.")] = False,
    rows: Rows = 20,
    style: Style = Format.table,
    remote: Remote = False,
    local_weights: LocalWeights = False,
) -> None:
    """Trace one prompt: which MLP neurons, at which positions, make the model say that.

    Example: tracer trace "The secretaries near the car" --target " are" --foil " is"
    """
    import tracer
    from tracer.attribution import trace as tracing
    from tracer.attribution.attribute import check_question
    from tracer.attribution.selection import node_limit
    from tracer.settings import RULES
    from tracer.store import one_prompt

    prompt = tracer.Prompt(
        text=text,
        token_ids=_numbers(token_ids, "--token-ids"),
        target=target or None,
        foil=foil or None,
        counterfactual=counterfactual,
        positions=_numbers(positions, "--positions"),
        bos=bos,
    )
    if top is not None and metric != "auto":
        raise JobError(f"--metric {metric}", "has no effect with --top", "leave one of them out")
    others = _lines(reference, bos) if reference is not None else None
    rules = _rules(without_rule, method, RULES)
    pruning = _pruning(
        share=edge_share,
        attribution=edge_attribution,
        top=top_edges,
        node_influence=node_influence,
        edge_influence=edge_influence,
        drop_dangling=drop_dangling or None,
    )
    excluded = [_neuron(name) for name in exclude or ()]
    how: dict[str, Any] = {"method": method, "baseline": baseline, "basis": basis, "rules": rules, "steps": steps}
    how |= {"metric": "topk" if top is not None else metric, "top_k": 5 if top is None else top, "seed": seed}
    kept: dict[str, Any] = {"nodes": nodes, "threshold": threshold, "mass": mass, "edges": edges, "pruning": pruning}
    settings, _ = tracing.checked([prompt], **kept, **how)
    check_question(prompt, settings, others)
    mine = {
        "prompt": text if text is not None else list(prompt.token_ids or ()),
        "settings": {name: value for name, value in settings.record().items() if name != "metric"},
        "selection": {"nodes": node_limit(nodes, threshold, mass), "threshold": threshold, "mass": mass},
        "model": {"name": model},
    }
    if out is not None:
        one_prompt.check_writable(out, overwrite, lambda there: _can_be(there, mine))
    terminal.quiet()
    places = {"device": device, "device_map": device_map, "dtype": dtype}
    loaded = _loaded(model, remote, local_weights, revision=revision, adapter=adapter, **places)
    if out is not None:
        mine["model"] = {"fingerprint": loaded.fingerprint}
        one_prompt.check_writable(out, overwrite, lambda there: _can_be(there, mine))
    with terminal.ProgressBar(f"{method} on {model}") as bar:
        circuit = tracer.trace(
            loaded, prompt, **kept, **how, reference=others, skip_first=skip_first, exclude=excluded, progress=bar
        )
    _show(circuit, style, rows)
    if out is not None:
        saved = _saved(circuit, out, overwrite)
        terminal.line(f"saved to {saved}; 'tracer show {saved}' prints it again", err=style is not Format.table)


@app.command()
@terminal.report_errors
def show(
    folder: Annotated[str, typer.Argument(help="A run folder: of one prompt, or a dataset's with its circuit.")],
    rows: Rows = 20,
    style: Style = Format.table,
    prompt: OfRun = None,
) -> None:
    """Print a saved circuit again, a dataset's circuit, or one prompt's graph of a run."""
    from tracer.circuit.from_run import read_graph

    _show(read_graph(folder, prompt), style, rows)


@app.command()
@terminal.report_errors
def view(
    source: Annotated[str, typer.Argument(help="A run folder, or a graph file.")],
    out: Annotated[Path | None, typer.Option(help="The page. Default: graph.html in the run folder.")] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    prompt: OfRun = None,
) -> None:
    """Write the graph page: one HTML file that opens from disk and needs no network."""
    from tracer.reports import tables

    graph = _graph(source, prompt)
    page = tables.view(graph, out or _beside(source, "graph.html", file_too=True))
    terminal.line(f"wrote {page} ({_size(page)}); open it in a browser")
    if open_page:
        typer.launch(page.resolve().as_uri())


@app.command()
@terminal.report_errors
def export(
    source: Annotated[str, typer.Argument(help="A run folder, or a graph file.")],
    form: Annotated[str, typer.Option("--format", help="neuronpedia, mib, graphml, csv.")] = "neuronpedia",
    out: Annotated[
        Path | None, typer.Option(help="The file. Default: FORMAT.json (.graphml, .csv) in the folder.")
    ] = None,
    groups: Annotated[
        Path | None, typer.Option(help="Groups and pins saved from the page, exported as supernodes and pinned nodes.")
    ] = None,
    scan: Annotated[str | None, typer.Option(help="The model's name on Neuronpedia: letters, digits, - and _.")] = None,
    slug: Annotated[
        str | None, typer.Option(help="The graph's name there: letters, digits, - and _. Default: from the prompt.")
    ] = None,
    prompt: OfRun = None,
) -> None:
    """Write a circuit for another tool, and say what its format cannot hold."""
    from tracer.circuit import exchange

    graph = _graph(source, prompt)
    if groups is not None:
        if form != "neuronpedia":
            raise JobError("--groups", f"has no effect with format {form!r}", "leave it out")
        graph = graph.model_copy(update=exchange.read_chosen(groups, graph)._asdict())
    ending = form if form in ("graphml", "csv") else "json"
    done = exchange.export(graph, out or _beside(source, f"{form}.{ending}"), form, scan=scan, slug=slug)
    for file in done.files:
        terminal.line(f"wrote {file} ({_size(file)})")
    terminal.line(f"left out: {'; '.join(done.lost)}")


@app.command("import")
@terminal.report_errors
def import_(
    file: Annotated[Path, typer.Argument(help="A Neuronpedia or circuit-tracer graph file (JSON).")],
    out: Annotated[str | None, typer.Option(help="Save it as a run folder here: a path, s3:// or gs://.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another run in that folder.")] = False,
    max_mib: Annotated[int, typer.Option(help="Refuse a larger file unread.", min=1, max=MOST)] = 256,
    rows: Rows = 20,
    style: Style = Format.table,
) -> None:
    """Read a graph file as data; one that tracer wrote comes back as the same circuit."""
    from tracer.circuit import exchange

    graph = exchange.import_graph(file, max_mib * 2**20)
    _show(graph, style, rows)
    if out is not None:
        graph.save(out, overwrite)
        terminal.line(f"saved to {out}; 'tracer view {out}' draws it", err=style is not Format.table)


@app.command()
@terminal.report_errors
def evaluate(
    folder: Annotated[str, typer.Argument(help="A run folder: of one prompt, or a dataset's with its circuit.")],
    pairs: Annotated[
        Path | None, typer.Option(help="Test pairs, JSON lines as Marks et al.: clean_prefix, patch_prefix, ...")
    ] = None,
    structure: Annotated[
        str | None,
        typer.Option(
            help="Or built-in agreement pairs: simple, nounpp, rc, within_rc. Default: the prompt that the circuit was "
            "found on, which shows what suffices there."
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(help="How many built-in pairs, or prompts of a run over many. Default: 40.", min=1, max=MOST),
    ] = None,
    ablation: Annotated[
        str | None,
        typer.Option(
            help="zero, mean, counterfactual, resample. Default: mean; on the circuit's own prompt the counterfactual "
            "if it has one, else zero."
        ),
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Text file, a prompt a line: what mean and resample are taken over.")
    ] = None,
    allow_overlap: Annotated[
        bool,
        typer.Option("--allow-overlap", help="Test on the circuit's own prompt too; every result says how often."),
    ] = False,
    sizes: Annotated[str | None, typer.Option(help="Circuit sizes: '10,50,200'. Default: a grid up to all.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Where the circuit's model is now: a folder, or an id. Its weights must be the same."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Revision of a Hugging Face id. Default: the circuit's own, without --model.")
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="Where the adapter is that was merged. Default: where it was, without --model.")
    ] = None,
    aligned: Annotated[
        bool | None,
        typer.Option(
            "--aligned/--no-aligned", help="Nodes at their positions (default), or their neurons at every position."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. Default: a GPU if there is one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Default: the circuit's own; with --remote, the server's.")] = None,
    unrelated: Annotated[
        Path | None, typer.Option(help="Text file, a prompt a line: neurons that are strong there too are named.")
    ] = None,
    bos: Annotated[
        bool | None,
        typer.Option(help="Begin texts with the beginning-of-sequence token. Default: as the circuit's prompt does."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random control, resampling and intervals.", min=0, max=MOST)] = 0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of evaluation.json, .png, report.html. Default: the run's; of a run over many RUN/evaluate."
        ),
    ] = None,
    style: Style = Format.table,
    remote: Remote = False,
    local_weights: LocalWeights = False,
) -> None:
    """Does the circuit hold: faithfulness and completeness on test pairs, by ablation, with intervals.

    Example: tracer evaluate runs/demo --structure nounpp
    """
    from tracer.data import tasks
    from tracer.store import one_prompt

    if pairs is not None and structure is not None:
        raise JobError("test pairs", "come from a file or are built in", "give --pairs or --structure, or neither")
    if style is Format.csv:
        raise JobError("--format csv", "is of nodes, an evaluation has curves", "use table or json")
    if count is not None and pairs is not None:
        raise JobError(f"--count {count}", "has no effect with --pairs", "leave it out")
    many = one_prompt.read_record(folder).get("kind") in ("dataset", "benchmark")
    if count is not None and structure is None and not many:
        raise JobError(f"--count {count}", "has no effect on the circuit's own prompt", "leave it out")
    place = evaluating.writable(out or _beside(folder, "evaluate" if many else "."))
    asked = evaluating.Asked(
        pairs=pairs,
        built_in=tasks.sva.generate(structure, "test", count or 40) if structure else None,
        given=tasks.sva.pairs_of(pairs) if pairs is not None else [],
        most=count or 40,
        ablation=ablation,
        sizes=_numbers(sizes, "--sizes"),
        reference=None if reference is None else _lines(reference, False),
        unrelated=None if unrelated is None else _lines(unrelated, False, "--unrelated"),
        allow_overlap=allow_overlap,
        aligned=aligned,
        bos=bos,
        seed=seed,
    )
    where = Where(model, revision, adapter, device, dtype, remote, local_weights)
    content, shown, files = (evaluating.evaluate_run if many else evaluating.evaluate_circuit)(
        folder, asked, where, place
    )
    if style is Format.json:
        terminal.data(content)
        return
    terminal.tables().print(shown)
    terminal.line(f"saved {', '.join(map(str, files[:-1]))} and {files[-1]}")


@app.command()
@terminal.report_errors
def steer(
    text: Annotated[str, typer.Argument(help="The prompt.")],
    nodes: Annotated[
        str | None,
        typer.Option(
            help="A run folder (of one prompt, or a dataset's with its circuit), or a CSV or JSON-lines file of layer, "
            "neuron, position. Default: the prompt's own."
        ),
    ] = None,
    target: Annotated[list[str] | None, typer.Option(help='Token asked about: " are".')] = None,
    foil: Annotated[list[str] | None, typer.Option(help="Wrong token.")] = None,
    token: Annotated[
        list[str] | None, typer.Option(help="Another token whose probability is shown. Repeatable.")
    ] = None,
    factor: Annotated[float | None, typer.Option(help="Multiply: 0 ablates, 2 amplifies, -1 inverts.")] = None,
    set_to: Annotated[float | None, typer.Option(help="Set to this value.")] = None,
    add: Annotated[float | None, typer.Option(help="Add this value.")] = None,
    top: Annotated[int | None, typer.Option(help="Only the strongest this many nodes.", min=1, max=MOST)] = None,
    everywhere: Annotated[
        bool, typer.Option("--everywhere", help="At every position, new tokens included; else at the nodes' own.")
    ] = False,
    positions: Annotated[
        str | None, typer.Option(help="Where instead of the nodes' own positions: '-1' or '2,5'.")
    ] = None,
    bos: Bos = False,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the generated texts.", min=0, max=MOST)] = 20,
    random: Annotated[int, typer.Option(help="Draws of equally many random neurons.", min=0, max=MOST)] = 5,
    seed: Annotated[int, typer.Option(help="Of the random draws.", min=0, max=MOST)] = 0,
    model: Annotated[
        str | None,
        typer.Option(help="'demo', a folder, or a Hugging Face id. Default: the model of --nodes' circuit, else demo."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(help="Revision of a Hugging Face id. Default: that of the circuit, without --model.")
    ] = None,
    adapter: Adapter = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1. Default: a GPU if there is one.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16, ... Default: that of the circuit, else float32.")
    ] = None,
    remote: Remote = False,
    local_weights: LocalWeights = False,
) -> None:
    """Multiply, set or add to a circuit's neurons, and see what the model then says, beside random neurons.

    Example: tracer steer "The secretaries near the car" --target " are" --foil " is" --top 10 --factor -1 --everywhere
    """
    import tracer
    from tracer.circuit.circuit import Traced
    from tracer.evaluation import steering
    from tracer.reports import tables

    prompt = tracer.Prompt(text, target=target or None, foil=foil or None, bos=bos)
    how: dict[str, Any] = {"factor": factor, "set_to": set_to, "add": add, "everywhere": everywhere, "top": top}
    how["positions"] = _numbers(positions, "--positions")
    chosen = None if nodes is None else steering.read_nodes(nodes)
    steering.planned(chosen, **how)
    terminal.quiet()
    if isinstance(chosen, Traced):
        loaded = Where(model, revision, adapter, device, dtype, remote, local_weights).load(chosen.model)
    else:
        places = {"adapter": adapter, "device": device, "dtype": dtype, "revision": revision}
        loaded = _loaded(model or "demo", remote, local_weights, **places)
    if chosen is None:
        chosen = tracer.trace(loaded, prompt, top, edges=False)
    result = tracer.steer(
        loaded,
        chosen,
        prompt,
        **how,
        tokens=token or (),
        max_new_tokens=max_new_tokens,
        random=random,
        seed=seed,
    )
    terminal.tables().print(tables.steering_table(result))


@app.command()
@terminal.report_errors
def doctor(
    model: Annotated[
        str | None, typer.Option(help="The model to measure the identities on: demo if none is given.")
    ] = None,
    adapter: Adapter = None,
    remote: Annotated[bool, typer.Option("--remote", help="What NDIF grants, and the identities there.")] = False,
    given: Annotated[
        str | None, typer.Argument(help="The model, instead of --model.", metavar="[MODEL]", show_default=False)
    ] = None,
) -> None:
    """Versions, devices, memory, and the method's identities measured on a model, here or on NDIF."""
    from rich.table import Table

    from tracer.cli import doctor as checkup
    from tracer.reports.tables import cell

    terminal.quiet()
    if given is not None and model is not None:
        raise JobError(f"model {quoted(given)} and --model {quoted(model)}", "one is measured at a time", "give one")
    model = given or model or "demo"
    console = terminal.tables()
    for title, values in (("Installation", checkup.environment()), ("Optional", checkup.optional())):
        table = Table(title=title, title_justify="left", box=None, show_header=False, padding=(0, 2, 0, 0))
        for name, value in values.items():
            table.add_row(name, cell(value))
        console.print(table, "")
    if remote and adapter is not None:
        raise JobError(f"--adapter {adapter}", "cannot be merged into weights on a server", "leave one of them out")
    checks = checkup.remote(model, report=report) if remote else checkup.identities(model, adapter)
    table = Table(
        title=f"{'NDIF and identities' if remote else 'Identities'} on {cell(model)}",
        title_justify="left",
        box=None,
        show_header=False,
        padding=(0, 2, 0, 0),
    )
    for check in checks:
        table.add_row("[green]ok[/]" if check.holds else "[red]FAILED[/]", check.name, cell(check.measured))
    console.print(table)
    if remote and not all(check.holds for check in checks):
        terminal.complain("what FAILED above is not granted, or wrong there: without gradients use --local-weights")
        raise typer.Exit(1)
    if not all(check.holds for check in checks):
        terminal.complain(
            "an identity fails: numbers from this installation cannot be trusted; run it on 'demo' and report it"
        )
        raise typer.Exit(1)


for verb in runs.VERBS:
    app.command()(verb)


def main() -> None:
    """The console script: every error a user can fix is one line on standard error, with exit code 2."""
    try:
        terminal.Output.take()
        for given in sys.argv[1:]:
            if not is_text(given):
                step = "give texts as UTF-8, and rename a file whose name is not"
                raise JobError(f"argument {quoted(given)}", "holds bytes that are not UTF-8 text", step)
        code = app(standalone_mode=False)
        if sys.stdout is not None:  # it was closed, as by >&-
            sys.stdout.flush()
    except TracerError as error:
        terminal.complain(str(error))
        sys.exit(2)
    except OSError as error:
        # What a name given here cannot be is the user's to mend; any other error of the system is a bug of ours.
        if not isinstance(error.filename, str) or not any(error.filename in given for given in sys.argv[1:]):
            raise
        terminal.complain(f"path {quoted(error.filename, 200)}: {error.strerror}; give another name")
        sys.exit(2)
    except UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
            sys.exit(2)
        message = " ".join(error.format_message().split()).rstrip(".?")  # type: ignore[attr-defined]
        terminal.complain(f"{message}; see --help for what is possible")
        sys.exit(2)
    except (typer.Abort, KeyboardInterrupt):
        terminal.complain("interrupted; nothing was saved")
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)


def _graph(source: str, prompt: int | None) -> Graph:
    """What a run folder or a graph file holds; of a run over many prompts its circuit, or one prompt's graph."""
    from tracer.circuit.exchange import import_graph
    from tracer.circuit.from_run import read_graph

    if prompt is None and Path(source).is_file():
        return import_graph(source)
    return read_graph(source, prompt)


def _beside(source: str, name: str, file_too: bool = False) -> Path:
    """Where a file goes by default: into a run folder, or beside a graph file (`file_too`: under its name)."""
    from tracer.store.storage import is_remote

    if is_remote(source):
        raise JobError(f"run {quoted(source, 200)}", "is not on this machine", "name a file here with --out")
    path = Path(source)
    if path.is_dir():
        return path / name
    return path.with_suffix(Path(name).suffix) if file_too else path.parent / name


def _size(file: Path) -> str:
    return f"{max(0.1, file.stat().st_size / 1024):,.1f} KiB"


def _can_be(there: dict[str, Any], mine: dict[str, Any]) -> bool:
    """Whether a saved run's record can be of the circuit that is about to be traced, by what is known of it already."""
    was = there.get("circuit") or {}
    parts = all(
        was.get(part, {}).get(name) == value for part in mine if part != "prompt" for name, value in mine[part].items()
    )
    return parts and mine["prompt"] in (was.get("text"), was.get("token_ids"))


def _saved(graph: Graph, out: str, overwrite: bool) -> str:
    """Save a graph, and return where: beside the folder asked for, if that holds another run after all, for what was
    computed is not thrown away."""
    for number in itertools.count(2):
        place = out if number == 2 else f"{out.rstrip('/')}-{number - 1}"
        try:
            graph.save(place, overwrite)
        except RunError as error:
            if "holds another run" not in error.rule or number > 99:
                raise
            terminal.note(str(error))
        else:
            return place
    raise AssertionError


def _show(graph: Graph, style: Format, rows: int) -> None:
    from tracer.circuit.circuit import Circuit
    from tracer.reports import tables

    if style is Format.csv:
        terminal.data(tables.graph_csv(graph).rstrip())
        return
    if style is Format.json:
        terminal.data(tables.graph_json(graph))
        return
    table = tables.circuit_table(graph, rows) if isinstance(graph, Circuit) else tables.graph_table(graph, rows)
    terminal.tables().print(table)
    if isinstance(graph, Circuit):
        say(graph.warnings)


def _numbers(value: str | None, option: str) -> list[int] | None:
    if value is None:
        return None
    parts = value.replace(",", " ").split()
    if not all(re.fullmatch(r"[-+]?[0-9]{1,18}", part) for part in parts):
        raise JobError(
            f"{option} {quoted(value)}", "must be whole numbers", "separate them by commas, as in '1,351,95'"
        )
    return [int(part) for part in parts]


def _neuron(value: str) -> tuple[int, int]:
    layer, slash, neuron = value.partition("/")
    if not (slash and all(part.isdecimal() and len(part) < 10 for part in (layer, neuron))):
        raise JobError(f"--exclude {quoted(value)}", "must be LAYER/NEURON", "write it as in '3/120'")
    return int(layer), int(neuron)


def _pruning(**rules: Any) -> Pruning | None:
    """The pruning rules that were given; None where none was, so that --no-edges can refuse them."""
    from tracer.attribution.pruning import Pruning

    given = {name: value for name, value in rules.items() if value is not None}
    return Pruning(**given) if given else None


def _rules(off: list[str] | None, method: str, rules: frozenset[str]) -> frozenset[str] | None:
    if not off:
        return None
    if unknown := sorted(set(off) - rules):
        raise JobError(f"--without-rule {unknown[0]}", f"must be one of {', '.join(sorted(rules))}", "choose one")
    if method != "relp":
        raise JobError(f"--without-rule {off[0]}", f"has no effect with method {method!r}", "leave it out")
    return rules - frozenset(off)


def _lines(path: Path, bos: bool, option: str = "--reference") -> list[Any]:
    import tracer
    from tracer.system import wholefile

    try:
        lines = [line for line in wholefile.read(path).decode("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(
            f"{option} {str(path)!r}", f"cannot be read ({first_line(error)})", "give a text file, a prompt a line"
        ) from None
    if not lines:
        raise JobError(f"prompts {str(path)!r}", "holds no prompt", "give a text file, a prompt a line")
    return [tracer.Prompt(line, bos=bos) for line in lines]
