"""Many prompts of your own, the one circuit they share, and whether it holds on prompts that were held out.

Prompts are JSON lines with a text, a target, a foil and a counterfactual. `tracer.run` maps a job over them in worker
processes; stop it and repeat it, and it goes on. No noun of the test prompts is in a prompt that the circuit is found
on. The same job runs on a cluster with `ray="auto"`, or from a shell: `tracer run JOB.yaml --out FOLDER`.

Takes 15 seconds. Needs nothing but tracer. jobs/dataset.yaml has every key of a job, with a comment.

    python examples/dataset.py
"""

import json
from itertools import product
from pathlib import Path

import tracer

FOLDER = Path("runs/examples/dataset")
FOUND_ON = "athlete manager doctor teacher student lawyer"
HELD_OUT = "key boat bridge camera"


def write(path: Path, nouns: str) -> int:
    """A line for each pair of nouns, in both numbers; how many there are."""
    rows = [
        {"id": f"{one}-{other}-{number}", "text": text, "counterfactual": others, "target": target, "foil": foil}
        for one, other in product(nouns.split(), repeat=2)
        if one != other
        for number, (text, others, target, foil) in {
            "plural": (f"The {one}s near the {other}", f"The {one} near the {other}", " are", " is"),
            "singular": (f"The {one} near the {other}", f"The {one}s near the {other}", " is", " are"),
        }.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return len(rows)


def main() -> None:
    train, test = FOLDER.parent / "train.jsonl", FOLDER.parent / "test.jsonl"
    counts = write(train, FOUND_ON), write(test, HELD_OUT)
    job = {
        "kind": "dataset",
        "model": "demo",
        "input": {"path": str(train)},  # also CSV, Parquet, folders, a Hugging Face dataset
        "baseline": "counterfactual",
        "nodes": 100,
        "edges": False,  # edges of every prompt, and of their circuit, take most of a run's time
        "circuit": "aligned",  # all prompts are of one length: nodes are neurons at positions
        "evaluate": {"test": {"path": str(test)}, "ablation": "mean", "sizes": [1, 5, 20, 50, 100]},
    }
    ended = tracer.run(job, FOLDER, workers=1, overwrite=True)
    print(f"{ended.status.statuses['ok']} of {counts[0]} prompts traced; the circuit's strongest nodes:")
    for row in ended.table("circuit").to_pylist()[:5]:
        print(
            f"  L{row['layer']} N{row['neuron']:<4} at position {row['position']} {row['mean_attribution']:+.3f} logits"
        )

    # Everything outside the circuit is set to its mean over the counterfactuals. Also measured are MIB's sizes.
    print(f"on {counts[1]} held-out prompts about other nouns:")
    for row in ended.evaluation.rows():
        if row["size"] in job["evaluate"]["sizes"]:
            kept = f"{row['faithfulness']:.2f} [{row['faithfulness_low']:.2f}, {row['faithfulness_high']:.2f}]"
            print(f"  {row['size']:3} nodes alone keep {kept}, all but them {row['completeness']:.2f}")
    print(f"tables, curves and report.html: {FOLDER}")


if __name__ == "__main__":
    main()
