"""The case studies of jobs/cases: the demo's, and the paper's on a tiny random model with Llama's chat template."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

import chats
import tiny
import tracer
from inline import InlinePool
from tracer.circuit import supernodes_file
from tracer.circuit.from_run import circuit_of
from tracer.meaning.collapse import collapse

pytestmark = pytest.mark.slow

CASES = Path(__file__).resolve().parents[2] / "jobs" / "cases"
SECTIONS = {"tokens": "promotes", "supernodes": "s-supernodes", "concepts": "s-concepts", "steering": "s-steering"}


def done(name: str, out: Path, changes: list[str]) -> tracer.Run:
    return tracer.run(CASES / f"{name}.yaml", out, set=changes, pool=InlinePool())


def check_report(run: tracer.Run, out: Path) -> None:
    page = (out / "report.html").read_text(encoding="utf-8")
    for key, part in SECTIONS.items():
        assert (part in page) == (getattr(run.job, key) is not None), key
    assert "What is missing" not in page


# ------------------------------------------------------------------------------------------------------- the demo's


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[tracer.Run, Path]:
    out = tmp_path_factory.mktemp("case") / "capitals"
    return done("capitals-demo", out, []), out


def test_the_demos_report_has_every_part(demo: tuple[tracer.Run, Path]) -> None:
    run, out = demo
    assert run.table("prompts").filter(pc.field("status") == "ok").num_rows == 233
    check_report(run, out)


def test_its_supernodes_are_its_circuit_and_their_edges_add_up(demo: tuple[tracer.Run, Path]) -> None:
    graph = circuit_of(demo[1])
    file = supernodes_file.of_run(demo[1])
    assert file is not None
    grouped = supernodes_file.apply(file, graph)
    members = [node for ids in grouped.groups.values() for node in ids]
    assert len(set(members)) == len(members) == graph.n_nodes
    whole = collapse(grouped).edges
    assert graph.links is not None
    for name in ("weight", "attribution"):
        wanted = graph.links[name].to_numpy().astype("float64").sum()
        assert whole[name].to_numpy().sum() == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_neurons_that_tell_a_state_say_it_or_its_capital(demo: tuple[tracer.Run, Path]) -> None:
    run, _ = demo
    found = run.table("concepts").filter((pc.field("auroc") > 0.9) & (pc.field("q") < 0.05)).to_pylist()
    capital = {
        row["state"]: row["capital"] for row in (dict(one) for one in run.table("prompts")["labels"].to_pylist())
    }
    model = tracer.load("demo")
    said = tracer.promoted(model, {(row["layer"], row["neuron"]) for row in found}, k=20).to_pylist()
    promoted = {(row["layer"], row["neuron"], row["polarity"]): row["promoted"] for row in said}

    def share(shift: int) -> float:
        """Of the neurons that tell a state, those that promote its name or capital; or another state's."""
        states = sorted(capital)
        hits = 0
        for row in found:
            state = states[(states.index(row["value"]) + shift) % len(states)]
            names = {f" {state.split()[0]}", f" {capital[state].split()[0]}"}
            hits += bool(names & set(promoted[row["layer"], row["neuron"], row["polarity"]]))
        return hits / len(found)

    assert len(found) > 100
    assert share(0) > 2 * max(share(shift) for shift in (1, 7, 20))


def test_turning_the_circuit_around_does_more_than_random_neurons(demo: tuple[tracer.Run, Path]) -> None:
    turned = (pc.field("group") == "whole circuit") & (pc.field("factor") == -1)
    rows = demo[0].table("steering").filter(turned & (pc.field("probability_before") > 0.5))

    def fall(table: pa.Table) -> float:
        before, after = (table[f"probability_{when}"].to_numpy() for when in ("before", "after"))
        return float((before - after).mean())

    own, control = (rows.filter(kept) for kept in (pc.field("draw") == -1, pc.field("draw") >= 0))
    assert fall(own) > 0.5
    assert fall(own) > 5 * abs(fall(control))


# ------------------------------------------------------------------------------------------------------- the paper's


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama with Llama's chat template, which knows nothing."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    words = chats.tokenizer("llama")
    tiny.tiny("llama", vocab_size=len(words), max_position_embeddings=1024).save_pretrained(folder)
    words.save_pretrained(folder)
    return str(folder)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "changes"),
    [
        (
            "capitals",
            ["input.count=8", "evaluate.test.count=40", "evaluate.sizes=[5,50]", "evaluate.ablation=zero", "quality=1"],
        ),
        ("addition", ["input.count=40", "concepts.labels=[mod2,tens]"]),
        ("antonyms", ["concepts.labels=[language]"]),
        ("user-modelling", ["concepts.labels=[country]"]),
    ],
)
def test_a_case_of_the_papers_goes_all_the_way(name: str, changes: list[str], small: str, tmp_path: Path) -> None:
    less = [f"model={small}", "nodes=20"] + (["threshold=null"] if name != "addition" else [])
    run = done(name, tmp_path / "run", [*less, *changes, "tokens=20"])
    assert set(run.table("prompts")["status"].to_pylist()) == {"ok"}
    check_report(run, tmp_path / "run")
