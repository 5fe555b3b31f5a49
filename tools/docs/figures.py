"""The figures of the concept pages, computed on the shipped demo model.

    python tools/docs/figures.py          writes docs/img/*.png and docs/img/figures.json, the numbers drawn
    python tools/docs/figures.py --check  computes the numbers again and says which moved

Nothing here is drawn by hand: every bar and line is a result of the public interface. Tests compare the numbers with
those computed anew (tests/docs/test_docs_figures.py).
"""

from __future__ import annotations

import argparse
import json
import textwrap
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch

mpl.use("Agg")
from matplotlib import pyplot as plt

import tracer

IMAGES = Path(__file__).resolve().parents[2] / "docs" / "img"
PLURAL, SINGULAR = "The secretaries near the car", "The secretary near the car"
DALLAS = "the capital of the state containing Dallas is"
BLUE, ORANGE, GREY = "#3949ab", "#e64a19", "#9e9e9e"
TOLERANCE = 2e-3
"""By which a number may differ on another machine: roundings of float32 sums, and what they decide."""

Numbers = dict[str, Any]


def baselines(model: Any) -> Numbers:
    """Summed |attribution| by layer and position: from zero, and from the counterfactual."""
    pair = tracer.Prompt(PLURAL, " are", " is", counterfactual=SINGULAR)
    found: Numbers = {"tokens": [model.tokenizer.decode([one]) for one in model.tokenizer(PLURAL)["input_ids"]]}
    for name in ("zero", "counterfactual"):
        nodes = tracer.attribute(model, [pair], baseline=name).nodes[0]
        found[name] = nodes.abs().sum(-1).tolist()
    return found


def conservation(model: Any) -> Numbers:
    """The summed attribution of the embeddings over the metric, for three linearisations of one prompt."""
    prompts = [tracer.Prompt(text, target, foil) for text, target, foil in QUESTIONS]
    found: Numbers = {"prompts": [one.text for one in prompts]}
    ways = {"RelP": {}, "RelP without the half rule": {"rules": "no-half"}, "plain gradient": {"method": "grad"}}
    for name, how in ways.items():
        said = tracer.attribute(model, prompts, **how)
        found[name] = (said.embeddings.sum(-1) / said.metric).tolist()
    return found


QUESTIONS = (
    (PLURAL, " are", " is"),
    ("The keys near the cabinet", " are", " is"),
    ("the city of Dallas", " Texas", " Florida"),
    (DALLAS, " Austin", " Albany"),
)


def explained(model: Any) -> Numbers:
    """The part of the logit of " are" that the kept edges hold, by the number of nodes kept."""
    prompt = tracer.Prompt(PLURAL, " are", " is")
    sizes = [5, 10, 20, 50, 100, 200, 500, 1000]
    found: Numbers = {"sizes": sizes, "kept .01 share": [], "kept all edges": []}
    for size in sizes:
        for name, pruning in (("kept .01 share", None), ("kept all edges", tracer.Pruning(share=0.0))):
            circuit = tracer.trace(model, prompt, nodes=size, pruning=pruning)
            (logit,) = [one for one in circuit.rows("logit") if one["token"] == " are"]
            found[name].append(logit["explained"])
    return found


def holding(model: Any) -> Numbers:
    """Faithfulness and completeness of a circuit on its own prompt and on held-out pairs, by its size."""
    from tracer.data.tasks import sva

    prompt = tracer.Prompt(PLURAL, " are", " is", counterfactual=SINGULAR)
    sizes = [1, 2, 5, 10, 20, 50, 100, 200, 500]
    circuit = tracer.trace(model, prompt, nodes=500, edges=False)
    others = [one.to_prompt() for one in sva.generate("nounpp", "test", 20)]
    others = [one for one in others if one.text not in (PLURAL, SINGULAR)]
    found: Numbers = {"sizes": sizes, "pairs": len(others)}
    for name, prompts in (("own prompt", None), ("other prompts", others)):
        said = tracer.evaluate(
            model, circuit, prompts, "mean", sizes, reference=others, train=[prompt] if prompts else ()
        )
        found[name] = {
            "faithfulness": said.faithfulness.estimate.tolist(),
            "completeness": said.completeness.estimate.tolist(),
            "random": said.control_faithfulness.estimate.tolist(),
        }
    return found


def supernodes(model: Any) -> Numbers:
    """What turning each supernode of the two-hop prompt around does to p(" Austin"), beside random groups."""
    circuit = tracer.trace(model, tracer.Prompt(DALLAS), metric="topk", nodes=60, profiles=True)
    grouped = tracer.supernodes(tracer.with_tokens(model, circuit), 5, method="agglomerative")
    groups = {
        one.name: [(node.layer, node.position, int(node.neuron)) for node in one.nodes] for one in grouped.file.groups
    }
    swept = tracer.sweep(model, groups, [tracer.Prompt(DALLAS, " Austin")], factors=[-1])
    rows = [row for row in swept.tokens.to_pylist() if row["token"] == " Austin"]
    found: Numbers = {"before": rows[0]["probability_before"], "groups": {}}
    for name, nodes in groups.items():
        mine = [row for row in rows if row["group"] == name]
        found["groups"][name] = {
            "nodes": len(nodes),
            "after": next(row["probability_after"] for row in mine if row["draw"] == -1),
            "random": [row["probability_after"] for row in mine if row["draw"] >= 0],
        }
    return found


# -------------------------------------------------------------------------------------------------- drawing


def draw_baselines(found: Numbers) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.7), sharey=True)
    largest = max(max(map(max, found[name])) for name in ("zero", "counterfactual"))
    tokens = [one.replace(" ", "␣") for one in found["tokens"]]
    for axis, name in zip(axes, ("zero", "counterfactual"), strict=True):
        axis.imshow(found[name], aspect="auto", origin="lower", cmap="Blues", vmin=0, vmax=largest)
        axis.set(title=f"baseline {name}", xticks=range(len(tokens)), yticks=range(len(found[name])))
        axis.set_xticklabels(tokens, rotation=35, ha="right")
    axes[0].set_ylabel("layer")
    figure.colorbar(axes[-1].images[0], ax=axes, label="summed |attribution|, logits")
    save(figure, "baselines")


def draw_conservation(found: Numbers) -> None:
    figure, axis = plt.subplots(figsize=(7.5, 2.9))
    names, colours = [name for name in found if name != "prompts"], (BLUE, ORANGE, GREY)
    for number, (name, colour) in enumerate(zip(names, colours, strict=True)):
        places = [place + 0.25 * (number - 1) for place in range(len(found["prompts"]))]
        axis.bar(places, found[name], 0.24, label=name, color=colour)
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set_xticks(range(len(found["prompts"])), [textwrap.fill(one, 20) for one in found["prompts"]], fontsize=7)
    axis.set_ylabel("embeddings' sum / metric")
    axis.legend(fontsize=7)
    save(figure, "conservation")


def draw_explained(found: Numbers) -> None:
    figure, axis = plt.subplots(figsize=(5.5, 2.9))
    axis.plot(found["sizes"], found["kept all edges"], "o-", color=BLUE, label="all edges kept")
    axis.plot(found["sizes"], found["kept .01 share"], "s--", color=ORANGE, label="edges of a share of .01 and more")
    axis.axhline(1, color="black", linewidth=0.8)
    axis.set(xscale="log", xlabel="nodes kept", ylabel="explained, of the logit ␣are")
    axis.legend(fontsize=7)
    save(figure, "explained")


def draw_holding(found: Numbers) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.9), sharey=True)
    for axis, name in zip(axes, ("own prompt", "other prompts"), strict=True):
        for line, colour in (("faithfulness", BLUE), ("completeness", ORANGE), ("random", GREY)):
            label = "faithfulness of random nodes" if line == "random" else line
            axis.plot(found["sizes"], found[name][line], "o-", markersize=3, color=colour, label=label)
        title = "its own prompt" if name == "own prompt" else f"{found['pairs']} other prompts"
        axis.set(xscale="log", xlabel="nodes kept", title=title)
        axis.axhline(1, color="black", linewidth=0.6)
        axis.axhline(0, color="black", linewidth=0.6)
    axes[1].legend(fontsize=7, loc="center right")
    save(figure, "holding")


def draw_supernodes(found: Numbers) -> None:
    figure, axis = plt.subplots(figsize=(7, 2.6))
    for place, group in enumerate(found["groups"].values()):
        axis.barh(place, group["after"], color=BLUE, label="the group" if place == 0 else None)
        dots = [place] * len(group["random"])
        axis.plot(
            group["random"], dots, "o", color=ORANGE, markersize=4, label="random neurons" if place == 0 else None
        )
    axis.axvline(found["before"], color="black", linewidth=0.8, label="before")
    named = [f"{name} ({group['nodes']})" for name, group in found["groups"].items()]
    axis.set_yticks(range(len(named)), named, fontsize=7)
    axis.set(xlabel='p(" Austin") with the values turned around', xlim=(0, 1))
    axis.invert_yaxis()
    axis.legend(fontsize=7, loc="upper left", bbox_to_anchor=(0.18, 1.0))
    save(figure, "supernodes")


def save(figure: Any, name: str) -> None:
    figure.savefig(IMAGES / f"{name}.png", dpi=110, bbox_inches="tight", pil_kwargs={"optimize": True})
    plt.close(figure)


FIGURES: dict[str, tuple[Callable[[Any], Numbers], Callable[[Numbers], None]]] = {
    "baselines": (baselines, draw_baselines),
    "conservation": (conservation, draw_conservation),
    "explained": (explained, draw_explained),
    "holding": (holding, draw_holding),
    "supernodes": (supernodes, draw_supernodes),
}


def moved(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two sets of numbers differ by more than the tolerance."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [line for key in one for line in moved(one[key], other[key], f"{where}/{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [line for n, pair in enumerate(zip(one, other, strict=True)) for line in moved(*pair, f"{where}/{n}")]
    if isinstance(one, float) and isinstance(other, int | float):
        return [] if abs(one - other) <= TOLERANCE * max(1.0, abs(one)) else [f"{where}: {one} is now {other}"]
    return [] if one == other else [f"{where}: {one} is now {other}"]


def main() -> int:
    """Exit code 0 where nothing moved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", tracer.TracerWarning)  # what they say stands in the text beside the figures
    model = tracer.load("demo")
    found = {name: compute(model) for name, (compute, _) in FIGURES.items()}
    path = IMAGES / "figures.json"
    if check:
        lines = moved(json.loads(path.read_text(encoding="utf-8")), found)
        print("\n".join(lines) or "no number moved")
        return bool(lines)
    IMAGES.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, (_, draw) in FIGURES.items():
        draw(found[name])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
