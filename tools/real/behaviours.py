"""What each behaviour's circuit does on held-out prompts: steering, a swap, and every prompt's own circuit.

    python tools/real/behaviours.py MODEL RUNS_DIR [--prompts 8] [--pairs 16] [--only states]

RUNS_DIR holds the finished runs of jobs/real/: states, countries, opposites, indirect (others are passed over). For
each, on the test prompts of its job that the model answers rightly:

- steering: the strongest nodes of the dataset's circuit, at their positions, times 0 and times -1: the probability of
  the answer before and after, and with as many random neurons in each layer;
- swap: the strongest neurons of a prompt and of its counterfactual set to the counterfactual's values: how often the
  counterfactual's answer is given; with random neurons instead; and with the prompt's own set to zero; by both rankings
  of `tracer.swap` (baseline zero, counterfactual);
- own: the strongest nodes of each prompt's own circuit alone (everything else as in its counterfactual): faithfulness,
  and completeness, beside as many random neurons in each layer at each position.

Written to RUNS_DIR/behaviours.json, with 95 % intervals: percentile bootstrap over prompts, Wilson's for shares. A
behaviour that is there already, of the same run and options, is not measured again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tracer
from tracer.circuit.from_run import circuit_of
from tracer.errors import TracerError
from tracer.evaluation import ablations, statistics
from tracer.evaluation.ablations import AblatedRow, Ranking, Replacement
from tracer.evaluation.steering import drawn_alike
from tracer.evaluation.swap import BASELINES
from tracer.prompts import Encoded, Prompt
from tracer.runs.jobs import DatasetJob, load_job
from tracer.runs.units.dataset_circuit import mean_of
from tracer.runs.units.tested import test_prompts
from tracer.settings import settings
from tracer.store.run_folder import RunFolder
from tracer.system import wholefile

BEHAVIOURS = ("states", "countries", "opposites", "indirect")
FACTORS, TOPS, RANDOM = (0, -1), (20, 100), 3
KS = (5, 20, 50, 100, 200)
SIZES = (20, 50, 100, 200, 500)
SEED = 0


def prompts_of(model: Any, folder: RunFolder, job: DatasetJob) -> tuple[list[Prompt], dict[str, Any]]:
    """The test prompts of a run's job that are kept, as token ids, and how many were not."""
    assert job.evaluate is not None
    mean = mean_of(folder, folder.commits())
    found = test_prompts(model, job, job.evaluate.test, -1 if mean is None else mean.length)
    made = [
        Prompt(
            token_ids=one.token_ids,
            target=one.target_ids,
            foil=one.foil_ids,
            counterfactual=one.counterfactual_ids,
            id=one.text,
        )
        for one in found.prompts
    ]
    return made, found.record()


def means(values: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """The mean over prompts of each column, with its bootstrap interval."""
    made = statistics.bootstrap(torch.tensor(values, dtype=torch.float64), statistics.mean, seed=SEED).record()
    return [dict(zip(made, column, strict=True)) for column in zip(*made.values(), strict=True)]


def steering(model: Any, circuit: Any, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """The dataset's circuit steered on each prompt, at its nodes' own positions."""
    rows = []
    for top in sorted({min(top, circuit.neurons.num_rows) for top in TOPS}):
        for factor in FACTORS:
            how: dict[str, Any] = {"factor": factor, "top": top, "random": RANDOM, "seed": SEED, "max_new_tokens": 0}
            found = [tracer.steer(model, circuit, prompt, **how) for prompt in prompts]
            shifts = [one.effects[0].probability for one in found]
            table = [(one.before, one.after, one.control.mean if one.control else 0.0) for one in shifts]
            changed = [(float(one.changed), one.control_changed / RANDOM) for one in found]
            names = ("before", "after", "random", "changed", "random_changed")
            columns = dict(zip(names, [*means(table), *means(changed)], strict=True))
            rows.append({"top": top, "factor": factor, "n_prompts": len(prompts), **columns})
    return rows


def own_circuits(model: Any, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """Faithfulness and completeness of each prompt's own circuit by size, and of random nodes."""
    encoded = [tracer.prompts.encode(prompt, model) for prompt in prompts]
    generator = torch.Generator().manual_seed(SEED)
    rows: list[AblatedRow] = []
    for number, (prompt, one) in enumerate(zip(prompts, encoded, strict=True)):
        circuit = tracer.trace(model, prompt, SIZES[-1], baseline="counterfactual", edges=False)
        nodes = [(row["layer"], row["position"], row["neuron"]) for row in circuit.neurons.to_pylist()]
        drawn = [drawn_alike(nodes[:size], model.n_neurons("activation"), generator) for size in SIZES]
        rows += [_row(one, (), number, stays=True), _row(one, (), number, stays=False)]
        for stays in (True, False):
            rows += [_row(one, nodes[:size], number, stays) for size in SIZES]
        rows += [_row(one, some, number, stays=True) for some in drawn]
    to = Replacement(tuple(one.counterfactual_ids or () for one in encoded))
    metric = settings(metric="difference")
    found = ablations.measured(model, rows, to, metric, "activation", model.budget()).view(len(prompts), -1)
    empty, full, rest = found[:, 0], found[:, 1], found[:, 2:]
    names = ("faithfulness", "completeness", "random")
    curves = {name: _curve(part, empty, full) for name, part in zip(names, rest.chunk(3, 1), strict=True)}
    return [
        {"size": size, "n_prompts": len(prompts), **{name: curves[name][i] for name in names}}
        for i, size in enumerate(SIZES)
    ]


def _row(prompt: Encoded, nodes: Sequence[Any], number: int, stays: bool) -> AblatedRow:
    some = torch.tensor(nodes, dtype=torch.int32).view(-1, 3)
    return AblatedRow(prompt, Ranking.of(some), (0, 0, len(some)), stays, number)


def _curve(part: Tensor, empty: Tensor, full: Tensor) -> list[dict[str, Any]]:
    table = torch.cat([empty[:, None], full[:, None], part], 1)
    made = statistics.bootstrap(
        table, lambda rows: statistics.restored(rows[..., 2:], rows[..., 0], rows[..., 1]), seed=SEED
    ).record()
    return [dict(zip(made, column, strict=True)) for column in zip(*made.values(), strict=True)]


def measured(model: Any, folder: RunFolder, job: DatasetJob, n_prompts: int, n_pairs: int) -> dict[str, Any]:
    """All that is said of one behaviour."""
    started, circuit = time.perf_counter(), circuit_of(str(folder.place))
    prompts, tested = prompts_of(model, folder, job)
    statuses = (folder.place.read_json("progress.json") or {}).get("statuses", {})
    few = prompts[:n_prompts]
    found = {one: tracer.swap(model, prompts[:n_pairs], KS, baseline=one, seed=SEED) for one in BASELINES}
    return {
        "statuses": statuses,
        "tested": tested,
        "steering": steering(model, circuit, few),
        "swap": {
            one: {"n_pairs": swap.n_pairs, "answered": float(swap.answered.estimate), "rows": swap.rows()}
            for one, swap in found.items()
        },
        "own": own_circuits(model, prompts[:n_pairs]),
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    """Measure every behaviour whose run is there, and write what was found."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("model")
    arguments.add_argument("runs", type=Path)
    arguments.add_argument("--prompts", type=int, default=8, help="that are steered")
    arguments.add_argument("--pairs", type=int, default=16, help="that are swapped, and traced themselves")
    arguments.add_argument("--only", choices=BEHAVIOURS, help="one of them")
    given = arguments.parse_args()
    out = given.runs / "behaviours.json"
    done: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    model = tracer.load(given.model)
    for name in (given.only,) if given.only else BEHAVIOURS:
        folder = RunFolder(str(given.runs / name))
        record = folder.record() or {}
        if not folder.place.exists("_SUCCESS.json"):
            print(f"{name}: no finished run in {given.runs / name}", file=sys.stderr)
            continue
        job = load_job(record["job"])
        assert isinstance(job, DatasetJob)
        made_of = {"job": record["numbers"], "model": record["model"], "packages": record["packages"]}
        made_of |= {"prompts": given.prompts, "pairs": given.pairs, "tops": TOPS, "ks": KS, "sizes": SIZES}
        made_of = json.loads(json.dumps(made_of))
        if done.get(name, {}).get("made_of") == made_of:
            print(f"{name}: there already")
            continue
        done[name] = {"made_of": made_of, **measured(model, folder, job, given.prompts, given.pairs)}
        wholefile.write(out, json.dumps(done, indent=1))
        print(f"{name}: measured in {done[name]['seconds']:.0f} s; wrote {out}")


if __name__ == "__main__":
    try:
        main()
    except TracerError as error:
        sys.exit(f"error: {error}")
