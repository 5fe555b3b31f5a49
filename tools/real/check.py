"""Measure a run's circuits once more with plain PyTorch hooks, and compare: python tools/real/check.py runs/real/sva

The ranking is tracer's (paired RelP, activations, the first structure). What is ablated, to what, and what becomes of
the metric is worked out here with hooks on the Hugging Face model alone.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import tracer
from tracer.runs.jobs import BenchmarkJob, Combination
from tracer.runs.units.benchmark import Benchmark, mean_attribution
from tracer.runs.units.benchmark_report import Outcome
from tracer.store.run_folder import RunFolder

SIZES = (20, 30, 50, 100, 200)
CLOSE = 1e-3
"""Of faithfulness: two kernels' roundings, divided by the metric's fall."""


class Plain:
    """The Hugging Face model, and the pairs it is tested on."""

    def __init__(self, name: str, test: Any) -> None:
        path = Path(name)
        where = {"gguf_file": path.name} if path.suffix == ".gguf" else {}
        folder = path.parent if where else name
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, **where, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        self.ids = torch.tensor([one.token_ids for one in test])
        self.targets = torch.tensor([[one.target_ids[0], one.foil_ids[0]] for one in test])
        self.inputs = [layer.mlp.down_proj for layer in self.model.model.layers]
        self.means = self._means(torch.tensor([one.counterfactual_ids for one in test]))

    def _means(self, ids: Tensor) -> list[Tensor]:
        """Of each layer's activations over the patch side of the pairs, per position."""
        seen: dict[int, Tensor] = {}
        hooks = [
            part.register_forward_pre_hook(lambda _, args, layer=layer: seen.update({layer: args[0].mean(0)}))
            for layer, part in enumerate(self.inputs)
        ]
        self.model(ids)
        for hook in hooks:
            hook.remove()
        return [seen[layer] for layer in range(len(seen))]

    def metric(self, kept: Tensor) -> float:
        """Mean over pairs of target minus foil; activations that are not kept [layer, pos, neuron] are replaced."""
        hooks = [
            part.register_forward_pre_hook(
                lambda _, args, layer=layer: (torch.where(kept[layer], args[0], self.means[layer]),)
            )
            for layer, part in enumerate(self.inputs)
        ]
        logits = self.model(self.ids).logits[:, -1].gather(1, self.targets).double()
        for hook in hooks:
            hook.remove()
        return float((logits[:, 0] - logits[:, 1]).mean())


@torch.no_grad()
def main() -> int:
    """Exit code 0 where both agree."""
    folder = RunFolder(sys.argv[1])
    job = BenchmarkJob.model_validate((folder.record() or {})["job"])
    structure, model = job.sets[0], tracer.load(job.model)
    data = Benchmark(job, model)._data(structure)
    mean = mean_attribution(job, model, data.train, Combination(structure, "relp", "activation", "counterfactual"))
    outcomes = (Outcome.model_validate(commit.outcome) for commit in folder.commits())
    wanted = (structure, "relp", "activation", "counterfactual")
    (run,) = (one.rankings["absolute"] for one in outcomes if one.combination[:4] == wanted)
    plain, order = Plain(job.model, data.test), mean.abs().flatten().sort(descending=True, stable=True).indices
    nothing = torch.zeros_like(mean, dtype=torch.bool)
    empty, whole, worst = plain.metric(nothing), plain.metric(~nothing), 0.0
    print(f"{structure}: size, faithfulness and completeness of the run, and by plain hooks")
    for size in SIZES:
        kept = nothing.flatten().index_fill(0, order[:size], True).view_as(mean)
        mine = [(plain.metric(one) - empty) / (whole - empty) for one in (kept, ~kept)]
        theirs = [float(one.estimate[run.sizes.index(size)]) for one in (run.faithfulness, run.completeness)]
        worst = max(worst, *(abs(a - b) for a, b in zip(mine, theirs, strict=True)))
        print(f"{size:>5}  {theirs[0]:.4f} {theirs[1]:.4f}   {mine[0]:.4f} {mine[1]:.4f}")
    print(f"largest difference {worst:.1e}: {'agrees' if worst < CLOSE else 'DOES NOT AGREE'}")
    return int(worst >= CLOSE)


if __name__ == "__main__":
    sys.exit(main())
