"""What `tracer.compare` says, against attributions taken on their own, sets counted by hand, and a planted neuron."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pytest
import torch

import tiny
import tracer
from helpers import refused
from inline import InlinePool
from mixtures import D_EXPERT, N_EXPERTS, mixture
from tracer.circuit.supernodes_file import Group, Member, Supernodes
from tracer.comparison import sides as sources
from tracer.comparison.aligned import BOTH, FLIPPED, ONE, OTHER, aligned
from tracer.comparison.compare import Comparison, apart, compared
from tracer.comparison.differences import Design
from tracer.errors import JobError, RunError
from tracer.prompts import Prompt
from tracer.reports import comparison as reports
from tracer.reports import tables

LAYER, NEURON = 2, 17


def prompts(count: int = 8, length: int = 6, seed: int = 0, ids: bool = False) -> list[Prompt]:
    draw = np.random.default_rng(seed)
    rows = draw.integers(tiny.FIRST, tiny.VOCAB, size=(count, length)).tolist()
    return [
        Prompt(token_ids=[tiny.BOS, *row], target=40, foil=50, id=f"p{at}" if ids else None)
        for at, row in enumerate(rows)
    ]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models: two random ones, and a third that is the first with one neuron more: it reads and is written, where it
    was silent."""
    root = tmp_path_factory.mktemp("models")
    made = {"first": tiny.tiny("llama", biases=False), "other": tiny.tiny("llama", seed=1, biases=False)}
    silent, planted = tiny.tiny("llama", biases=False), tiny.tiny("llama", biases=False)
    for model, loud in ((silent, False), (planted, True)):
        mlp, head = model.model.layers[LAYER].mlp, model.lm_head.weight.data
        mlp.up_proj.weight.data[NEURON] *= 3.0 if loud else 0.0
        away = head[40] - head[50]
        mlp.down_proj.weight.data[:, NEURON] = 2 * away / away.norm()
    made |= {"silent": silent, "planted": planted}
    return {name: tiny.save(model, root / name) for name, model in made.items()}


@functools.cache
def loaded(path: Path) -> tracer.Model:
    return tracer.load(str(path))


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, tracer.Model]:
    return {name: loaded(path) for name, path in folders.items()}


@pytest.fixture(scope="module")
def found(models: dict[str, tracer.Model]) -> Comparison:
    return tracer.compare(models["first"], models["other"], prompts(), nodes=20)


def summed(model: tracer.Model, asked: list[Prompt]) -> np.ndarray:
    """Attributions taken on their own, [prompt, layer, neuron]."""
    return tracer.attribute(model, asked).nodes.double().sum(2).numpy()


# ------------------------------------------------------------------------------------------------ its numbers


def test_attributions_are_those_of_either_model_alone(found: Comparison, models: dict[str, tracer.Model]) -> None:
    means = {end: summed(models[name], prompts()).mean(0) for end, name in (("first", "first"), ("last", "other"))}
    assert found.nodes.num_rows > 40
    for row in found.nodes.to_pylist():
        for end in ("first", "last"):
            wanted = means[end][row["layer"], row["neuron"]]
            assert row[f"attribution_{end}"] == pytest.approx(wanted, abs=1e-4), row
        assert row["difference"] == pytest.approx(row["attribution_last"] - row["attribution_first"], abs=1e-9)
        assert row["low"] <= row["difference"] <= row["high"]
    assert found.every
    assert found.by == "text"
    assert found.n_prompts == (8, 8)


def test_circuits_are_the_strongest_of_the_means(found: Comparison, models: dict[str, tracer.Model]) -> None:
    inside = {}
    for end, name in (("first", "first"), ("last", "other")):
        mean = np.abs(summed(models[name], prompts()).mean(0))
        order = np.argsort(-mean.ravel())[:20]
        inside[end] = {tuple(map(int, np.unravel_index(at, mean.shape))) for at in order}
    for row in found.nodes.to_pylist():
        was, now = ((row["layer"], row["neuron"]) in inside[end] for end in ("first", "last"))
        opposite = row["attribution_first"] * row["attribution_last"] < 0
        wanted = "neither" if not (was or now) else "appeared" if not was else "vanished" if not now else None
        assert row["change"] == (wanted or ("sign" if opposite else "both"))
    both = len(inside["first"] & inside["last"])
    assert found.sides["overlap"].to_pylist() == [None, pytest.approx(both / (40 - both))]
    assert found.sides["n_nodes"].to_pylist() == [20, 20]


def test_correlations_are_over_all_neurons(found: Comparison, models: dict[str, tracer.Model]) -> None:
    one, other = (summed(models[name], prompts()).mean(0).ravel() for name in ("first", "other"))
    assert found.sides["pearson_all"][1].as_py() == pytest.approx(np.corrcoef(one, other)[0, 1], abs=1e-5)


def test_the_metric_is_that_of_the_models(found: Comparison, models: dict[str, tracer.Model]) -> None:
    metrics = [tracer.attribute(models[name], prompts()).metric.double().numpy() for name in ("first", "other")]
    difference = float((metrics[1] - metrics[0]).mean())
    assert float(found.metric.estimate[0]) == pytest.approx(difference, abs=1e-4)
    assert found.sides["metric"].to_pylist() == pytest.approx([one.mean() for one in metrics], abs=1e-4)


def test_a_planted_neuron_is_what_differs(models: dict[str, tracer.Model]) -> None:
    said = tracer.compare(models["silent"], models["planted"], prompts(16), threshold=0.05)
    strongest = said.nodes.to_pylist()[0]
    assert (strongest["layer"], strongest["neuron"]) == (LAYER, NEURON)
    assert strongest["change"] == "appeared"
    assert strongest["attribution_first"] == 0
    gone = tracer.compare(models["planted"], models["silent"], prompts(16), threshold=0.05).nodes.to_pylist()[0]
    assert (gone["layer"], gone["neuron"], gone["change"]) == (LAYER, NEURON, "vanished")
    assert gone["difference"] == pytest.approx(-strongest["difference"])


def test_one_model_beside_itself_differs_by_nothing(models: dict[str, tracer.Model]) -> None:
    said = tracer.compare(models["first"], models["first"], prompts(), names=["one", "two"])
    assert set(said.nodes["difference"].to_pylist()) == {0.0}
    assert said.found == 0
    assert set(said.nodes["q"].to_pylist()) <= {1.0, None}
    assert {name for name, count in said.counts.items() if count} <= {"both", "neither"}
    row = said.sides.to_pylist()[1]
    assert (row["overlap"], row["weighted_overlap"], row["appeared"]) == (1, 1, 0)
    assert row["pearson_all"] == pytest.approx(1)


def test_exchanging_the_sides_exchanges_the_signs(found: Comparison, models: dict[str, tracer.Model]) -> None:
    back = tracer.compare(models["other"], models["first"], prompts(), nodes=20)
    one, other = ({(row["layer"], row["neuron"]): row for row in each.nodes.to_pylist()} for each in (found, back))
    assert one.keys() == other.keys()
    turned = {"appeared": "vanished", "vanished": "appeared"}
    for key, row in one.items():
        its = other[key]
        assert row["difference"] == pytest.approx(-its["difference"])
        assert row["p"] == pytest.approx(its["p"])
        assert row["q"] == pytest.approx(its["q"])
        assert turned.get(row["change"], row["change"]) == its["change"]


# ------------------------------------------------------------------------------------------------ its prompts


def test_two_sets_of_prompts_on_one_model(models: dict[str, tracer.Model]) -> None:
    one, other = prompts(5), prompts(7, seed=1)
    said = tracer.compare((models["first"], one), (models["first"], other))
    assert said.by is None
    assert said.n_prompts == (5, 7)
    assert "no prompt in common" in said.notes[0]
    means = [summed(models["first"], asked).mean(0) for asked in (one, other)]
    for row in said.nodes.to_pylist()[:20]:
        wanted = means[1][row["layer"], row["neuron"]] - means[0][row["layer"], row["neuron"]]
        assert row["difference"] == pytest.approx(wanted, abs=1e-4)


def test_prompts_are_paired_by_the_users_ids_and_others_are_said(models: dict[str, tracer.Model]) -> None:
    one, other = prompts(5, ids=True), prompts(7, seed=1, ids=True)
    said = tracer.compare((models["first"], one), (models["first"], list(reversed(other))))
    assert said.by == "id"
    assert said.n_prompts == (5, 5)
    assert any("2 of 7 prompts" in note and "left out" in note for note in said.notes)
    assert any("5 of 5 prompts of the same id have other texts" in note for note in said.notes)
    rows = summed(models["first"], other)[:5] - summed(models["first"], one)
    first = said.nodes.to_pylist()[0]
    assert first["difference"] == pytest.approx(rows[:, first["layer"], first["neuron"]].mean(), abs=1e-4)


def test_one_prompt_has_its_circuits_and_no_tests(models: dict[str, tracer.Model]) -> None:
    (asked,) = prompts(1)
    said = tracer.compare(models["first"], models["other"], [asked], nodes=15)
    kept = [
        {(row["layer"], row["neuron"]) for row in tracer.trace(models[name], asked, nodes=15).neurons.to_pylist()}
        for name in ("first", "other")
    ]
    counts = said.counts
    assert counts["appeared"] == len(kept[1] - kept[0])
    assert counts["vanished"] == len(kept[0] - kept[1])
    assert counts["both"] + counts["sign"] == len(kept[0] & kept[1])
    assert counts["neither"] == 0
    assert set(said.nodes["q"].to_pylist()) == {None}
    assert said.found == 0
    assert "no tests" in reports.summary(said)


def test_nodes_can_be_matched_at_their_positions(models: dict[str, tracer.Model]) -> None:
    said = tracer.compare(models["first"], models["other"], prompts(), nodes=15, positions=True)
    whole = [tracer.attribute(models[name], prompts()).nodes.double().mean(0).numpy() for name in ("first", "other")]
    assert said.every
    assert min(said.nodes["position"].to_pylist()) >= 0
    for row in said.nodes.to_pylist()[:30]:
        place = row["layer"], row["position"], row["neuron"]
        assert row["difference"] == pytest.approx(whole[1][place] - whole[0][place], abs=1e-4)
    with refused(JobError, "tokens"):
        tracer.compare((models["first"], prompts(2)), (models["first"], prompts(2, length=4)), positions=True)


# ------------------------------------------------------------------------------------------------ runs, circuits


def ran(folder: Path, model: Path, **changes: Any) -> Path:
    rows = [{"token_ids": list(one.token_ids or ()), "target_ids": [40], "foil_ids": [50]} for one in prompts()]
    file = folder.parent / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = {"kind": "dataset", "model": str(model), "input": {"path": str(file)}, "nodes": 20, "shard_size": 3}
    tracer.run(job | changes, folder, pool=InlinePool())
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, folders: dict[str, Path]) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    made = {name: ran(root / name, folders[name], values=True, circuit="free") for name in ("first", "other")}
    return made | {f"kept-{name}": ran(root / f"kept-{name}", folders[name]) for name in ("first", "other")}


def test_runs_that_keep_all_values_say_what_the_models_say(found: Comparison, runs: dict[str, Path]) -> None:
    said = tracer.compare(runs["first"], str(runs["other"]))
    assert said.every
    assert said.names == ("first", "other")
    assert not said.notes
    assert said.counts == found.counts
    assert said.n_tested == found.n_tested
    mine, its = ({(row["layer"], row["neuron"]): row for row in one.nodes.to_pylist()} for one in (said, found))
    assert mine.keys() == its.keys()
    for key, row in mine.items():
        assert row["difference"] == pytest.approx(its[key]["difference"], abs=1e-4)
        assert row["n_first"] == its[key]["n_first"]
        assert row["change"] == its[key]["change"]


def test_of_runs_without_values_what_is_not_kept_counts_as_nothing_and_is_said(
    runs: dict[str, Path], models: dict[str, tracer.Model]
) -> None:
    said = tracer.compare(runs["kept-first"], runs["kept-other"])
    assert not said.every
    assert any("counts as 0" in note for note in said.notes)
    assert set(said.sides["pearson_all"].to_pylist()) == {None}
    sums: dict[tuple[int, int], float] = {}
    for asked in prompts():
        for row in tracer.trace(models["first"], asked, nodes=20).neurons.to_pylist():
            key = row["layer"], row["neuron"]
            sums[key] = sums.get(key, 0.0) + row["attribution"] / 8
    for row in said.nodes.to_pylist():
        assert row["attribution_first"] == pytest.approx(sums.get((row["layer"], row["neuron"]), 0.0), abs=1e-4)


def test_circuits_are_compared_as_they_are(models: dict[str, tracer.Model], tmp_path: Path) -> None:
    (asked,) = prompts(1)
    circuits = [tracer.trace(models[name], asked, nodes=10) for name in ("first", "other")]
    said = tracer.compare(*circuits, names=["a", "b"])
    circuits[0].save(tmp_path / "a")
    again = tracer.compare(tmp_path / "a", circuits[1], names=["a", "b"])
    assert said.nodes.equals(again.nodes)
    assert said.courses.equals(again.courses)


# ------------------------------------------------------------------------------------------------ over more sides


def test_several_sides_are_followed_in_their_order(models: dict[str, tracer.Model]) -> None:
    names = ("silent", "planted", "first")
    given = Supernodes(
        groups=(
            Group(name="planted", nodes=(Member(layer=LAYER, position=-1, neuron=NEURON),)),
            Group(
                name="two",
                nodes=(
                    Member(layer=0, position=-1, neuron=3, polarity=1),
                    Member(layer=1, position=-1, neuron=4),
                ),
            ),
        )
    )
    said = tracer.compare(*(models[name] for name in names), prompts(), nodes=20, groups=given, names=names)
    rows = said.courses.to_pylist()
    sums = {name: summed(models[name], prompts()) for name in names}
    for row in rows:
        mine = sums[row["name"]]
        if row["group"] is None:
            wanted = mine[:, row["layer"], row["neuron"]].mean()
        elif row["group"] == "planted":
            wanted = mine[:, LAYER, NEURON].mean()
        else:
            wanted = (mine[:, 0, 3] + mine[:, 1, 4]).mean()
        assert row["attribution"] == pytest.approx(wanted, abs=1e-4)
        assert row["low"] <= row["attribution"] + 1e-9
        assert row["attribution"] - 1e-9 <= row["high"]
    courses = {(row["group"], row["layer"], row["neuron"]) for row in rows}
    assert len(rows) == 3 * len(courses)
    assert len(courses) - 2 == len({key for key in courses if key[0] is None})
    assert list(reports.followed(said)) == ["planted", "two"]
    assert said.sides["name"].to_pylist() == list(names)
    assert said.sides["overlap_last"].to_pylist()[-1] == 1


def test_names_tell_sides_apart() -> None:
    assert apart(["runs/a/x", "runs/b/x"]) == ["a/x", "b/x"]
    assert apart(["m", "m"]) == ["m (1)", "m (2)"]
    assert apart(["p/one/", "p/two"]) == ["one", "two"]


# ------------------------------------------------------------------------------------------------ what is refused


def test_sides_that_do_not_fit_are_refused(
    models: dict[str, tracer.Model], runs: dict[str, Path], tmp_path: Path
) -> None:
    (asked,) = prompts(1)
    narrow = loaded(tiny.save(tiny.tiny("llama", intermediate_size=40), tmp_path / "narrow"))
    short = loaded(tiny.save(tiny.tiny("llama", n_layers=2), tmp_path / "short"))
    with refused(JobError, "architecture", "d_mlp"):
        tracer.compare(models["first"], narrow, [asked])
    with refused(JobError, "3 and 2 layers"):
        tracer.compare(models["first"], short, [asked])
    logit = tracer.trace(models["first"], Prompt(token_ids=asked.token_ids, target=40), nodes=5)
    with refused(JobError, "metric"):
        tracer.compare(logit, tracer.trace(models["first"], asked, nodes=5))
    with refused(JobError, "two or more"):
        tracer.compare(models["first"], [asked])
    with refused(JobError, "without prompts"):
        tracer.compare(models["first"], models["other"])
    with refused(JobError, "only has an effect on models"):
        tracer.compare(runs["first"], runs["other"], nodes=5)
    with refused(JobError, "only have an effect on models"):
        tracer.compare(runs["first"], runs["other"], prompts=[asked])
    with refused(JobError, "sides"):
        tracer.compare(runs["first"], runs["other"], names=["one"])
    with refused(JobError, "cannot be compared"):
        tracer.compare(runs["first"], 3)
    with refused(RunError):
        tracer.compare(runs["first"], tmp_path / "nothing")


def test_another_tokenizer_is_seen_by_the_same_text(models: dict[str, tracer.Model]) -> None:
    (asked,) = prompts(1)
    one = sources.of_model(models["first"], [asked], "one", nodes=5)
    ids = (*one.prompts[0].token_ids[:-1], 99)
    other = sources.Asked(None, one.prompts[0].text, ids, 1.0)
    from dataclasses import replace

    with refused(JobError, "tokenizer"):
        compared([one, replace(one, name="other", prompts=(other,))], design=Design())


def test_other_methods_are_said(models: dict[str, tracer.Model]) -> None:
    (asked,) = prompts(1)
    circuits = [tracer.trace(models["first"], asked, nodes=5, method=method) for method in ("relp", "grad")]
    assert any("method relp and grad" in note for note in tracer.compare(*circuits).notes)


# ------------------------------------------------------------------------------------------------ what is shown


def test_both_graphs_lie_in_one(models: dict[str, tracer.Model]) -> None:
    (asked,) = prompts(1)
    circuits = [tracer.trace(models[name], asked, nodes=30) for name in ("first", "other")]
    said = tracer.compare(*circuits, names=["a", "b"])
    both = aligned(said)
    rows = both.graph.nodes.to_pylist()
    keyed = [
        {
            (row["kind"], row["layer"], row["position"], row["neuron"]): row["attribution"]
            for row in one.nodes.to_pylist()
        }
        for one in circuits
    ]
    assert len(rows) == len(keyed[0].keys() | keyed[1].keys())
    for row, side, first, last in zip(rows, both.node_sides, both.first, both.last, strict=True):
        key = row["kind"], row["layer"], row["position"], row["neuron"]
        one, other = keyed[0].get(key), keyed[1].get(key)
        assert (one is None) == math.isnan(first)
        assert (other is None) == math.isnan(last)
        wanted = ONE if other is None else OTHER if one is None else FLIPPED if one * other < 0 else BOTH
        assert side == wanted
        assert row["attribution"] == (other if other is not None else one)
    assert len(both.edge_sides) == both.graph.n_edges
    assert (
        both.edge_sides.count(ONE) + both.edge_sides.count(BOTH) + both.edge_sides.count(FLIPPED) == circuits[0].n_edges
    )
    assert (
        both.edge_sides.count(OTHER) + both.edge_sides.count(BOTH) + both.edge_sides.count(FLIPPED)
        == circuits[1].n_edges
    )


def test_prompts_of_other_lengths_share_one_place(models: dict[str, tracer.Model]) -> None:
    sides = [(models["first"], prompts(1, length=length)) for length in (4, 6)]
    said = tracer.compare(*sides, nodes=20)
    both = aligned(said)
    assert both.graph.tokens == ("any position",)
    by_neuron: dict[tuple[int, int], float] = {}
    for row in said.graphs[1].neurons.to_pylist() if said.graphs[1] is not None else []:
        key = row["layer"], row["neuron"]
        by_neuron[key] = by_neuron.get(key, 0.0) + row["attribution"]
    for row, last in zip(both.graph.nodes.to_pylist(), both.last, strict=True):
        if row["kind"] == "neuron" and not math.isnan(last):
            assert last == pytest.approx(by_neuron[row["layer"], row["neuron"]], abs=1e-5)
    assert "any position" in reports.graph_page(said)


def test_a_comparison_is_written_whole(found: Comparison, tmp_path: Path) -> None:
    written = {path.name for path in reports.write(found, tmp_path / "out")}
    assert written == set(reports.files(found))
    assert "graphs.html" in written
    page = (tmp_path / "out" / "report.html").read_text()
    assert "What differs" in page
    assert "first" in page
    content = json.loads(reports.as_json(found))
    assert content["n_tested"] == found.n_tested
    assert len(content["nodes"]) == found.nodes.num_rows
    assert len(reports.as_rows(found).rows) == found.nodes.num_rows
    assert reports.files(found) == reports.files(found)


def test_the_same_call_gives_the_same_bits(found: Comparison, models: dict[str, tracer.Model]) -> None:
    again = tracer.compare(models["first"], models["other"], prompts(), nodes=20)
    for name, table in found.tables().items():
        assert table.equals(again.tables()[name]), name


def test_adapters_are_compared_with_the_model_without(folders: dict[str, Path], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folders["first"], dtype=torch.float32)
    torch.manual_seed(0)
    tuned = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["down_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    with_it = tracer.load(str(folders["first"]), adapter=str(tmp_path / "adapter"))
    said = tracer.compare(loaded(folders["first"]), with_it, prompts())
    assert said.by == "text"
    assert max(map(abs, said.nodes["difference"].to_pylist())) > 0.01
    assert said.names[0] != said.names[1]


# ------------------------------------------------------------------------------------------------ mixtures


@pytest.fixture(scope="module")
def mixed() -> tuple[Comparison, dict[str, tracer.Model]]:
    """Two mixtures of experts compared, with a group that names a neuron by its expert."""
    models = {"one": mixture(seed=0), "two": mixture(seed=1)}
    group = Supernodes.model_validate({"groups": [{"name": "pair", "nodes": [member(1, "E3 N5"), member(2, "7:2")]}]})
    how: dict[str, Any] = {"names": list(models), "groups": group, "nodes": 20}
    return tracer.compare(*models.values(), prompts(), **how), models


def member(layer: int, neuron: str) -> dict[str, Any]:
    return {"layer": layer, "position": -1, "neuron": neuron}


def expert_of(row: dict[str, Any]) -> int | None:
    """Layer 0 is dense; others have 8 experts of 12 neurons."""
    return None if row["layer"] == 0 else row["neuron"] // D_EXPERT


def test_neurons_of_experts_are_matched_and_named(mixed: tuple[Comparison, dict[str, tracer.Model]]) -> None:
    found, models = mixed
    means = {
        end: summed(model, prompts()).mean(0) for end, model in zip(("first", "last"), models.values(), strict=True)
    }
    rows = found.nodes.to_pylist()
    assert {row["expert"] for row in rows} >= {None, 0, N_EXPERTS - 1}
    for row in rows:
        assert row["expert"] == expert_of(row)
        for end in ("first", "last"):
            assert row[f"attribution_{end}"] == pytest.approx(means[end][row["layer"], row["neuron"]], abs=1e-4)
    courses = found.courses.to_pylist()
    assert all(row["expert"] == (None if row["group"] else expert_of(row)) for row in courses)
    pair = [row["attribution"] for row in courses if row["group"] == "pair"]
    wanted = [float(mean[1, 3 * D_EXPERT + 5] + mean[2, 7 * D_EXPERT + 2]) for mean in means.values()]
    assert pair == pytest.approx(wanted, abs=1e-4)


def test_experts_are_named_wherever_a_comparison_is_shown(mixed: tuple[Comparison, dict[str, tracer.Model]]) -> None:
    found, models = mixed
    row = next(row for row in found.nodes.to_pylist() if row["expert"] is not None and row["change"] != "neither")
    short = f"E{row['expert']} N{row['neuron'] % D_EXPERT}"
    assert short in {cell for line in reports.nodes_sheet(found).rows for cell in line}
    assert short in reports.document(found)
    assert json.loads(reports.as_json(found))["nodes"][0].keys() >= {"neuron", "expert"}
    assert "expert" in reports.as_rows(found).names
    alone = tracer.compare(*models.values(), prompts(), nodes=20)
    strongest = reports.followed(alone)
    assert any(" E" in name for name in strongest)
    for name, course in strongest.items():
        assert name == mixture_name(course[0])
    for each in (alone, tracer.compare(*models.values(), prompts(1), nodes=20)):  # without graphs, and with them
        both = aligned(each).graph
        assert both.nodes.filter(pc.field("kind") == "neuron")["expert"].null_count < both.n_nodes
        drawn = tables.payload(both).nodes.experts
        numbers = both.nodes.select(["layer", "neuron", "expert"]).to_pylist()
        assert drawn
        assert all((expert, at) == divmod(numbers[row]["neuron"], D_EXPERT) for row, (expert, at) in drawn.items())


def mixture_name(row: dict[str, Any]) -> str:
    expert = expert_of(row)
    return f"L{row['layer']} " + (f"N{row['neuron']}" if expert is None else f"E{expert} N{row['neuron'] % D_EXPERT}")
