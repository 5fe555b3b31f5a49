"""A user's defaults: which holds, where each comes from, and what is refused; no secret is shown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

import tracer
from loaded import loaded_by
from tracer.cli import config, defaults
from tracer.cli.app import app
from tracer.errors import JobError

KEYS = ["The keys near the cabinet", "--target", " are", "--no-edges", "--nodes", "5"]


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of defaults, where a user has it."""
    monkeypatch.delenv(defaults.CONFIG)
    monkeypatch.delenv("TRACER_FORMAT")  # of all tests
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path / "tracer.toml"


def run(*words: str) -> Result:
    return CliRunner().invoke(app, list(words))


def traced(*words: str) -> dict[str, object]:
    done = run("trace", *KEYS, *words)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_an_option_wins_over_a_variable_and_that_over_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text('format = "json"\ndtype = "float64"\nbos = true\n')
    assert traced()["model"]["dtype"] == "float64"  # type: ignore[index]
    monkeypatch.setenv("TRACER_DTYPE", "bfloat16")
    found = traced()
    assert found["model"]["dtype"] == "bfloat16"  # type: ignore[index]
    plain = tracer.trace(tracer.load("demo", dtype="bfloat16"), tracer.Prompt(KEYS[0], target=" are"), nodes=5)
    assert found["metric"] == plain.metric  # the demo's tokenizer puts its BOS itself
    assert traced("--dtype", "float32")["model"]["dtype"] == "float32"  # type: ignore[index]
    assert "Strongest nodes" in run("trace", *KEYS, "--format", "table").stdout


def test_a_circuits_own_model_goes_before_a_default(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("trace", *KEYS, "--out", str(tmp_path / "run")).exit_code == 0
    asked = []

    def load(name: str, **how: object) -> None:
        asked.append((name, how))
        raise JobError("stop", "here", "it is enough")

    monkeypatch.setattr(tracer, "load", load)
    file.write_text('model = "/nowhere"\ndtype = "bfloat16"\ndevice = "cpu"\n')
    for words in (["steer", KEYS[0], "--factor", "0", "--nodes", str(tmp_path / "run")], ["neuron", "1", "2"]):
        run(*words)
    (first, how), (second, other) = asked
    own = tracer.Circuit.load(tmp_path / "run").model
    assert (first, how["dtype"], how["device"]) == (own.name, own.dtype, "cpu")
    assert (second, other["dtype"], other["device"]) == ("/nowhere", "bfloat16", "cpu")


def test_job_files_say_all_of_what_decides_a_runs_numbers(file: Path) -> None:
    """No default of a user changes a job: of all, `run` and its like take only how many processes there
    are, and how results are printed."""
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    values = {"model": "x", "device": "cpu", "dtype": "float64", "bos": True, "format": "json", "rows": 3, "workers": 2}
    found = config.of_verbs(values, verbs)
    for name in ("run", "plan", "submit", "exemplars"):
        assert found[name].items() <= {"workers": 2, "style": "json", "rows": 3}.items()
        assert found[name]["workers"] == 2
    assert found["trace"] == {"model": "x", "bos": True, "style": "json", "rows": 3}
    assert found["steer"] == {"bos": True, "style": "json"}
    assert "form" not in found["export"]


@pytest.mark.parametrize(
    ("text", "variables", "expected"),
    [
        ('model = "demo"\ndtyp = "float64"\n', {}, ("key 'dtyp' in ", "tracer.toml, line 2", "did you mean 'dtype'?")),
        ('dtype = "flot32"\n', {}, ("dtype = 'flot32' of ", "tracer.toml, line 1", "did you mean 'float32'?")),
        ("rows = 0\n", {}, ("rows = 0", "line 1", "greater than or equal to 1")),
        ("rows = \n", {}, ("is not TOML", "line 1")),
        ("", {"TRACER_DEVCE": "cpu"}, ("variable TRACER_DEVCE: is not known", "did you mean 'TRACER_DEVICE'?")),
        ("", {"TRACER_BOS": "maybe"}, ("bos = 'maybe' of TRACER_BOS", "valid boolean")),
        ("", {"TRACER_CONFIG": "/nowhere.toml"}, ("TRACER_CONFIG=/nowhere.toml: is not there",)),
    ],
)
def test_what_cannot_be_is_named_with_its_place(
    file: Path, text: str, variables: dict[str, str], expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text(text)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    refused = run("trace", *KEYS)
    assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
    for part in expected:
        assert part in refused.stderr
    assert run("trace", "--help").exit_code == 0, "help is there all the same"


def test_config_says_where_each_comes_from_and_no_secret(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text('# mine\n\nmodel = "org/name"\n')
    monkeypatch.setenv("TRACER_DEVICE", "cpu")
    monkeypatch.setenv("TRACER_LLM_KEY", "hush-hush")
    monkeypatch.setenv("TRACER_LLM_URL", "https://me:hush-hush@host/v1")
    monkeypatch.setenv("NDIF_API_KEY", "hush-hush")
    text = run("config").output
    assert "hush" not in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert f"model org/name {file}, line 3" in " ".join(lines)
    assert "device cpu TRACER_DEVICE" in lines
    assert "TRACER_LLM_KEY set (not shown)" in lines
    assert "TRACER_LLM_URL https://...@host/v1" in lines
    assert run("config", "--path").stdout.strip() == str(file)


def test_without_defaults_nothing_is_imported_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRACER_FORMAT")
    assert {"pydantic_settings", "torch"} & loaded_by("trace", "--help") == set()


@pytest.mark.parametrize("words", [["-v", "show"], ["show", "-v"]])
def test_v_and_q_stand_before_the_verb_or_behind_it(
    words: list[str], file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("trace", *KEYS, "--out", str(tmp_path / "run")).exit_code == 0
    monkeypatch.setenv("TRACER_ROWS", "1")
    loud = run(*words, str(tmp_path / "run"))
    assert "info: default rows=1 from TRACER_ROWS" in loud.stderr or words[0] == "show"
    quiet = ["-q" if word == "-v" else word for word in words]
    assert run(*quiet, str(tmp_path / "run")).stderr == ""


def test_q_leaves_out_notes_and_progress_and_keeps_errors(tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("The keys\n")
    for words, there in (((), True), (("-q",), False)):
        done = run("trace", "The keys", "--top", "3", "--no-edges", "--nodes", "3", *words)
        assert ("note: --top is now --top-k" in done.stderr) is there
    refused = run("-q", "show", str(tmp_path))
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: ")


def test_v_shows_what_is_done() -> None:
    assert "info: loading demo\n" in run("neuron", "1", "2", "-v").stderr
    assert "info" not in run("neuron", "1", "2").stderr
