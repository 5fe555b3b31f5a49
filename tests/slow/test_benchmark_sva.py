"""The default benchmark job, with fewer pairs: every structure, method, basis and baseline, and what it must find."""

from __future__ import annotations

from pathlib import Path

import pytest

import tracer
from tracer.runs import finish
from tracer.runs.jobs import BenchmarkJob, Combination, load_job
from tracer.runs.units.benchmark_report import BenchmarkResult

pytestmark = [pytest.mark.slow, pytest.mark.long]

DEFAULT = Path(__file__).parents[2] / "jobs" / "sva.yaml"


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> BenchmarkResult:
    job = load_job(DEFAULT, ["train=30", "test=12", "steps=2"])
    assert isinstance(job, BenchmarkJob)
    run = tracer.run(job, tmp_path_factory.mktemp("sva") / "out", workers=2)
    return finish.benchmark_result(job, run.folder, list(run.folder.commits()), run.folder.record() or {})


def test_every_combination_ends(result: BenchmarkResult) -> None:
    assert [one.combination for one in result.outcomes] == result.job.combinations()
    assert len(list((Path(result.folder) / "plots").glob("*.png"))) == 8
    assert (Path(result.folder) / "_SUCCESS.json").is_file()
    for outcome in result.outcomes:
        assert not outcome.skipped
        for curves in outcome.rankings.values():
            assert (curves.faithfulness.estimate[-1], curves.completeness.estimate[-1]) == (1.0, 0.0)


def test_paired_relp_needs_far_fewer_nodes_than_random_ones(result: BenchmarkResult) -> None:
    found = {one.combination: one for one in result.outcomes}
    for structure in result.job.structures:
        for basis in result.job.bases:
            relp = found[Combination(structure, "relp", basis, "counterfactual")].rankings["absolute"]
            random = found[Combination(structure, "random", basis, "none")].rankings["absolute"]
            sizes = [curves.sizes_for[0.8].estimate or curves.sizes[-1] for curves in (relp, random)]
            assert sizes[0] * 4 <= sizes[1]
            assert relp.cmd.estimate < random.cmd.estimate
