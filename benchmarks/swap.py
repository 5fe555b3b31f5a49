"""Two hops: put one state's neurons in place of another's, and see whether the answer becomes the other's capital.

For pairs of held-out cities in different states, the k strongest neurons of both prompts are set to the values they
have on the other city's prompt; beside it equally many random neurons, and plain zeroing of the first prompt's k. The
demo model, RelP, position by position; 95 % Wilson intervals over pairs.

    python benchmarks/swap.py [--pairs 40] [--seed 0]
"""

from __future__ import annotations

import argparse

import torch

import tracer
from tracer.data.tasks import capitals


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--pairs", type=int, default=40)
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    torch.set_num_threads(1)
    pairs = capitals.pairs("test", options.pairs, options.seed)
    found = tracer.swap(tracer.load("demo"), [pair.to_prompt() for pair in pairs], seed=options.seed)
    print(
        f"{found.n_pairs} pairs of held-out cities, seed {options.seed}: share that answers the other state's capital"
    )
    print(f"{'k':>4}{'nodes':>8}{'swapped':>22}{'random':>22}{'zeroed':>22}{'zeroed, own stays':>20}")
    for i, k in enumerate(found.ks):
        cells = []
        for outcome in found.arms.values():
            rate = outcome.becomes
            cells.append(f"{float(rate.estimate[i]):.3f} [{float(rate.low[i]):.2f}, {float(rate.high[i]):.2f}]")
        stays = float(found.zeroed.stays.estimate[i])
        print(f"{k:>4}{float(found.n_nodes[i]):>8.0f}" + "".join(f"{cell:>22}" for cell in cells) + f"{stays:>20.3f}")


if __name__ == "__main__":
    main()
