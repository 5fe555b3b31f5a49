"""The command line as a new user meets it: output, files, and one-line errors with exit code 2."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import s3
import tracer
from tracer.cli import terminal
from tracer.cli.app import VERBS, app
from tracer.store import one_prompt

KEYS = ["The keys near the cabinet", "--target", " are", "--foil", " is"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def traced(*arguments: str) -> Result:
    result = run("trace", *arguments)
    assert result.exit_code == 0, result.output
    return result


def test_table_shows_metric_conservation_tokens_and_nodes() -> None:
    text = traced(*KEYS, "--rows", "3", "--no-edges").stdout
    for part in ("logit difference ␣are minus ␣is", "holds (must be below 1e-3)", "␣cabinet", "model says", "relp"):
        assert part in text
    assert "197 more; --rows 200 shows all 200" in text


def test_json_is_the_circuit_of_the_library() -> None:
    found = json.loads(traced(*KEYS, "--format", "json", "--nodes", "50").stdout)
    circuit = tracer.trace(tracer.load("demo"), tracer.Prompt(KEYS[0], target=" are", foil=" is"), nodes=50)
    assert found["n_nodes"] == circuit.n_nodes <= 50
    assert len(found["edges"]) == circuit.n_edges > 0
    assert found["fingerprint"] == circuit.fingerprint
    assert found["nodes"] == circuit.nodes.drop_columns("prompt_id").to_pylist()
    assert found["metric"] == circuit.metric


def test_csv_has_a_row_per_node() -> None:
    rows = list(csv.DictReader(io.StringIO(traced(*KEYS, "--format", "csv", "--nodes", "7").stdout)))
    assert [row["kind"] for row in rows] == ["neuron"] * 7 + ["embedding"] * 6 + ["logit"] * 2


def test_saved_run_is_shown_again(tmp_path: Path) -> None:
    first = traced(*KEYS, "--out", str(tmp_path / "run"))
    again = run("show", str(tmp_path / "run"))
    assert again.exit_code == 0
    assert again.stdout.strip() == first.stdout.split("saved to")[0].strip()


def test_a_run_in_an_object_store_is_shown_viewed_and_exported(tmp_path: Path) -> None:
    with s3.server() as store:
        address = store.address()
        first = traced(*KEYS, "--nodes", "20", "--out", address)
        assert run("show", address).stdout.strip() == first.stdout.split("saved to")[0].strip()
        for verb, name in (("view", "graph.html"), ("export", "graph.json")):
            assert run(verb, address, "--out", str(tmp_path / name)).exit_code == 0
            assert (tmp_path / name).stat().st_size > 1000
            refused = run(verb, address)
            assert refused.exit_code == 2
            assert "with --out" in refused.stderr
        other = run("trace", *KEYS, "--nodes", "21", "--out", address)
        assert other.exit_code == 2
        assert "holds another run" in other.stderr


def test_same_trace_into_the_same_folder_again(tmp_path: Path) -> None:
    for _ in range(2):
        traced(*KEYS, "--out", str(tmp_path / "run"))
    assert len(list((tmp_path / "run" / "nodes").iterdir())) == 1


def test_another_trace_into_a_used_folder_is_refused_then_allowed(tmp_path: Path) -> None:
    traced(*KEYS, "--out", str(tmp_path))
    for words in (("The parents",), (*KEYS, "--nodes", "21"), (*KEYS, "--method", "grad")):
        refused = run("trace", *words, "--out", str(tmp_path))
        assert refused.exit_code == 2
        assert "--overwrite" in refused.stderr
        assert refused.stdout == "", "nothing may be computed first"
    traced("The parents", "--out", str(tmp_path), "--overwrite")


def test_what_was_computed_is_saved_even_if_its_folder_was_taken_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    traced(*KEYS, "--out", str(tmp_path / "run"))
    monkeypatch.setattr(one_prompt, "check_writable", lambda *_: None)
    saved = run("trace", "The parents", "--out", str(tmp_path / "run"))
    assert saved.exit_code == 0
    assert "holds another run" in saved.stderr
    assert f"saved to {tmp_path / 'run'}-2" in " ".join(saved.stdout.split())
    assert run("show", f"{tmp_path / 'run'}-2").exit_code == 0


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--method", "RelP"], "--method RelP"),
        (["--baseline", "none"], "--baseline none"),
        (["--baseline", "counterfactual"], "needs a counterfactual"),
        (["--baseline", "mean"], "reference"),
        (["--metric", "difference"], "needs a foil"),
        (["--foil", " is", "--metric", "logit"], "leave out the foil"),
        (["--metric", "logprob", "--edges"], "edges lead into single logits"),
        (["--steps", "0", "--method", "ig"], "--steps 0"),
        (["--edge-share", "5"], "from 0 to 1"),
        (["--nodes", "0"], "at least one"),
        (["--exclude", "x"], "LAYER:NEURON"),
        (["--out", "/proc/nowhere/run"], "cannot be written"),
    ],
)
def test_options_are_checked_before_a_model_is_loaded(
    words: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tracer.load", lambda *_, **__: pytest.fail("a model was loaded"), raising=False)
    refused = run("trace", "The keys", "--target", " are", *words)
    assert refused.exit_code == 2, refused.output
    assert expected in refused.stderr


def test_top_traces_the_sum_of_the_top_logits() -> None:
    found = json.loads(traced("The parents", "--top-k", "5", "--format", "json").stdout)
    logits = [node for node in found["nodes"] if node["kind"] == "logit"]
    assert len(logits) == 5
    assert found["metric"] == pytest.approx(sum(node["activation"] for node in logits), rel=1e-5)


def test_without_target_the_own_top_token_is_traced() -> None:
    found = json.loads(traced("the capital of the state containing Dallas is", "--format", "json").stdout)
    assert found["target_ids"] == [found["predictions"][0]["token_id"]]
    assert found["predictions"][0]["token"] == " Austin"


def test_counterfactual_sets_the_baseline() -> None:
    found = json.loads(traced(*KEYS, "--counterfactual", "The key near the cabinet", "--format", "json").stdout)
    assert found["settings"]["baseline"] == "counterfactual"
    pair = (*KEYS, "--counterfactual", "The key near the cabinet", "--baseline", "zero", "--format", "json")
    plain, paired = json.loads(traced(*KEYS, "--format", "json").stdout), json.loads(traced(*pair).stdout)
    assert paired["settings"]["baseline"] == "zero"
    assert paired["counterfactual_ids"] is not None
    assert paired["nodes"] == plain["nodes"]


def test_reference_file_gives_the_mean_baseline(tmp_path: Path) -> None:
    (tmp_path / "reference.txt").write_text("The dogs near the car\nThe key near the cabinet\n")
    found = traced(*KEYS, "--baseline", "mean", "--reference", str(tmp_path / "reference.txt"), "--format", "json")
    assert json.loads(found.stdout)["settings"]["baseline"] == "mean"


def test_rules_can_be_switched_off() -> None:
    found = json.loads(traced(*KEYS, "--without-rule", "product", "--format", "json").stdout)
    assert found["settings"]["rules"] == ["activation", "attention", "norm"]
    assert abs(found["unexplained"]) > 0.1
    assert not found["conserves"]
    named = json.loads(traced(*KEYS, "--rules", "no-half", "--format", "json").stdout)
    assert (named["nodes"], named["settings"]) == (found["nodes"], found["settings"])


def test_a_linear_gate_conserves_and_is_named() -> None:
    found = json.loads(traced(*KEYS, "--rules", "linear-gate", "--format", "json").stdout)
    assert found["settings"]["rules"] == ["activation", "attention", "gate", "norm"]
    assert abs(found["unexplained"]) < 1e-3
    assert found["conserves"]
    assert "rules linear-gate" in traced(*KEYS, "--rules", "activation+norm+attention+gate").stdout


def test_doctor_measures_the_identities() -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("ok  ") == 6
    assert "FAILED" not in result.stdout


def test_doctor_fails_where_an_identity_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from tracer.model import rules

    monkeypatch.setitem(rules.RULE_OF, "product", ("product", lambda envoy: None))
    result = run("doctor")
    assert result.exit_code == 1
    assert "FAILED" in result.stdout


BAD = {
    "empty prompt": ([""], "prompt ''"),
    "target of several tokens": (["The keys", "--target", " arent"], "one is needed"),
    "target without its space": (["The keys", "--target", "are"], "did you mean ' are'"),
    "target equal to foil": (["The keys", "--target", " are", "--foil", " are"], "both target and foil"),
    "foil alone": (["The keys", "--foil", " are"], "give a target"),
    "counterfactual of another length": (["The keys", "--counterfactual", "The key near"], "equally long"),
    "unknown method": (["The keys", "--method", "magic"], "must be one of relp, grad"),
    "unknown baseline": (["The keys", "--baseline", "median"], "did you mean 'mean'?"),
    "unknown metric": (["The keys", "--metric", "loss"], "logit, difference"),
    "no nodes": (["The keys", "--nodes", "0"], "at least one"),
    "token id out of vocabulary": (["--token-ids", "1,2,99999"], "vocabulary"),
    "token ids that are no numbers": (["--token-ids", "1,two"], "whole numbers"),
    "text and ids": (["The keys", "--token-ids", "1,2"], "give one of them"),
    "no prompt at all": ([], "give one of them"),
    "position outside": (["The keys", "--positions", "7"], "3 tokens"),
    "a folder that is no model": (["The keys", "--model", "."], "config.json"),
    "a folder that is not there": (["The keys", "--model", "./nowhere"], "does not exist"),
    "an id that cannot be reached": (["The keys", "--model", "nobody/nothing"], "Hugging Face"),
    "a device that is not there": (["The keys", "--device", "cuda:77"], "GPU"),
    "a device that is none": (["The keys", "--device", "quantum"], "is not a device"),
    "unknown dtype": (["The keys", "--dtype", "float3"], "float32"),
    "beyond the context": (["The " * 500], "at most"),
    "unwritable folder": (["The keys", "--out", "/proc/nowhere/run"], "cannot be written"),
    "steps without effect": (["The keys", "--steps", "3"], "no"),
    "rule without effect": (["The keys", "--method", "grad", "--without-rule", "norm"], "no effect"),
    "unknown rule": (["The keys", "--without-rule", "softmax"], "must be one of"),
    "unknown rules": (["The keys", "--rules", "half"], "must be all, no-half, linear-gate"),
    "rules that do not go together": (["The keys", "--rules", "product+gate"], "'product' and 'gate'"),
    "rules twice": (["The keys", "--rules", "all", "--without-rule", "norm"], "no effect with --without-rule"),
    "rules of another method": (["The keys", "--rules", "linear-gate", "--method", "grad"], "no effect with method"),
    "top with a target": (["The keys", "--top-k", "5", "--target", " are"], "no effect"),
    "top with a metric": (["The keys", "--top-k", "5", "--metric", "logit"], "no effect"),
    "too large a top": (["The keys", "--top-k", "100000"], "vocabulary"),
    "mean without a reference": (["The keys", "--baseline", "mean"], "reference"),
    "reference that is not there": (["The keys", "--baseline", "mean", "--reference", "nowhere.txt"], "cannot be read"),
    "excluded neuron outside": (["The keys", "--exclude", "99/1"], "layers"),
    "excluded neuron misspelt": (["The keys", "--exclude", "3-1-2"], "LAYER:NEURON"),
    "mass above one": (["The keys", "--mass", "2"], "at most 1"),
    "pruning without edges": (["The keys", "--no-edges", "--top-edges", "5"], "no effect"),
    "edges into a log-probability": (["The keys", "--metric", "logprob", "--edges"], "single logits"),
    "the prompt as its own counterfactual": (["The keys", "--counterfactual", "The keys"], "the prompt itself"),
    "a threshold that keeps nothing": (["The keys", "--threshold", "100"], "no node is kept"),
    "negative threshold": (["The keys", "--threshold", "-1"], "0 or more"),
    "revision of the demo": (["The keys", "--revision", "main"], "no effect"),
}


def python_words(verb: str, said: str) -> list[str]:
    """Arguments that a message names as Python does, where the verb has options for them."""
    options = terminal._options(next(one for one in VERBS if one.__name__.rstrip("_") == verb))
    return [name for name in options if re.search(rf"(?<![\w.'-]){re.escape(name)}=", said)]


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_with_code_2(case: str) -> None:
    arguments, expected = BAD[case]
    result = run("trace", *arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert expected in result.stderr
    assert "; " in result.stderr, "no next step"
    assert result.stdout == ""
    assert python_words("trace", result.stderr) == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["trace", "x", "--nodes", "abc"], "--nodes 'abc': must be a whole number; see tracer trace --help"),
        (["trac"], "trac: is no verb of tracer; did you mean 'trace'?"),
        (["trace", "x", "--format", "jsn"], "did you mean 'json'?"),
        (["trace", "x", "--format", "xml"], "must be one of auto, table, tsv, csv, json"),
        (["trace", "x", "--rows", "0"], "--rows 0: must be at least 1; change it"),
        (["trace", "x", "--targett", "y"], "--targett: is no option of tracer trace; did you mean '--target'?"),
        (["trace", "x", "y"], "see tracer trace --help"),
        (["trace", "x", "--target"], "see tracer trace --help"),
        (["view"], "tracer view: needs the argument SOURCES; see tracer view --help"),
    ],
)
def test_misspelt_calls_are_one_line_with_code_2(words: list[str], expected: str) -> None:
    result = subprocess.run([sys.executable, "-m", "tracer", *words], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert expected in result.stderr


def test_version_and_help() -> None:
    for words, expected in ((["--version"], tracer.__version__), ([], "trace"), (["trace", "--help"], "--target")):
        result = subprocess.run([sys.executable, "-m", "tracer", *words], capture_output=True, text=True, check=False)
        assert expected in result.stdout


def test_a_users_text_is_printed_as_it_is() -> None:
    assert "The :car: key [bold]x" in traced("The :car: key [bold]x", "--no-edges").stdout


def test_a_refused_trace_leaves_no_folder(tmp_path: Path) -> None:
    assert run("trace", "The keys", "--target", "no such", "--out", str(tmp_path / "a" / "b")).exit_code == 2
    assert not (tmp_path / "a").exists()
    (tmp_path / "mine.txt").write_text("x")
    refused = run("trace", "The keys", "--out", str(tmp_path))
    assert refused.exit_code == 2
    assert refused.stdout == "", "refused before the work"


@pytest.mark.parametrize("rule", [["--mass", "0.97"], ["--threshold", "0.0005"]])
def test_mass_and_threshold_are_not_capped(rule: list[str]) -> None:
    found = json.loads(traced(*KEYS, *rule, "--no-edges", "--format", "json").stdout)
    assert found["n_nodes"] > 200
    if rule[0] == "--mass":
        assert found["kept_mass"] >= 0.97


@pytest.mark.parametrize("method", ["relp", "random", "delta"])
def test_as_many_nodes_as_asked_for_whatever_the_edges(method: str) -> None:
    assert json.loads(traced(*KEYS, "--method", method, "--nodes", "20", "--format", "json").stdout)["n_nodes"] == 20


def test_the_residual_of_a_path_names_where_it_begins() -> None:
    text = traced(*KEYS, "--counterfactual", "The key near the cabinet", "--method", "ig", "--steps", "50").stdout
    assert "is the metric where the path begins" in " ".join(text.split())


def alike(one: str, other: str) -> bool:
    """Whether two lines are the same but for the last digits, which differ between processors."""
    numeric = re.compile(r"[+-]?\d+\.\d+")
    if [numeric.sub("#", word) for word in one.split()] != [numeric.sub("#", word) for word in other.split()]:
        return False
    pairs = zip(numeric.findall(one), numeric.findall(other), strict=True)
    return all(float(a) == pytest.approx(float(b), abs=0.11) for a, b in pairs)


def test_the_readmes_example_is_what_is_printed() -> None:
    readme = Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")
    printed = traced("The secretaries near the car", "--target", " are", "--foil", " is").stdout.splitlines()
    block = "metric " + readme.split("```\nmetric ")[1].split("```")[0]
    for line in block.splitlines():
        if line.strip() and not line.startswith("conservation"):
            assert any(alike(line, one) for one in printed), line


def test_show_refuses_a_folder_without_a_run(tmp_path: Path) -> None:
    result = run("show", str(tmp_path))
    assert result.exit_code == 2
    assert "run.json" in result.stderr


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    traced(*KEYS, "--out", str(folder))
    return folder


def test_table_shows_edges_and_paths() -> None:
    text = traced(*KEYS).stdout
    for part in ("Strongest edges", "Strongest paths", "explained", "edges kept of", "embedding ␣keys @2"):
        assert part in text


def test_view_writes_a_page(saved: Path, tmp_path: Path) -> None:
    assert run("view", str(saved)).exit_code == 0
    page = (saved / "graph.html").read_text(encoding="utf-8")
    assert "The keys near the cabinet" in page
    assert run("view", str(saved), "--out", str(tmp_path / "deep" / "page.html")).exit_code == 0
    assert (tmp_path / "deep" / "page.html").stat().st_size > 100_000


def test_export_and_import_give_the_same_circuit(saved: Path, tmp_path: Path) -> None:
    done = run("export", str(saved))
    assert done.exit_code == 0
    assert "left out: share" in done.stdout
    back = run("import", str(saved / "neuronpedia.json"), "--out", str(tmp_path / "back"))
    assert back.exit_code == 0, back.output
    assert tracer.Circuit.load(tmp_path / "back") == tracer.Circuit.load(saved)
    assert run("view", str(saved / "neuronpedia.json")).exit_code == 0


@pytest.mark.parametrize("form", ["mib", "graphml", "csv"])
def test_other_formats(saved: Path, tmp_path: Path, form: str) -> None:
    done = run("export", str(saved), "--format", form, "--out", str(tmp_path / f"x.{form}"))
    assert done.exit_code == 0
    assert list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["export", "RUN", "--format", "svg"], "neuronpedia"),
        (["export", "nowhere"], "no run"),
        (["export", "RUN", "--format", "csv", "--groups", "x.json"], "no effect"),
        (["export", "RUN", "--groups", "nowhere.json"], "cannot be read"),
        (["import", "RUN/run.json"], "schema"),
        (["import", "nowhere.json"], "cannot be read"),
        (["view", "nowhere"], "no run"),
        (["view", "RUN", "--out", "/proc/x/y.html"], "cannot be written"),
        (["trace", "The keys", "--edge-share", "-1"], "from 0 to 1"),
        (["trace", "The keys", "--top-edges", "0"], "1 or more"),
        (["trace", "The keys", "--node-influence", "2"], "at most 1"),
    ],
)
def test_bad_input_of_graphs(saved: Path, arguments: list[str], expected: str) -> None:
    result = run(*(argument.replace("RUN", str(saved)) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1
    assert expected in result.stderr
    assert python_words(arguments[0], result.stderr) == []


def test_view_of_a_circuit_without_edges_shows_its_nodes(tmp_path: Path) -> None:
    traced(*KEYS, "--no-edges", "--out", str(tmp_path / "run"))
    result = run("view", str(tmp_path / "run"))
    assert result.exit_code == 0
    assert "no edges" in result.stderr
    assert "The keys near the cabinet" in (tmp_path / "run" / "graph.html").read_text(encoding="utf-8")


def test_evaluate_says_whether_a_circuit_holds(saved: Path) -> None:
    result = run("evaluate", str(saved), "--structure", "nounpp", "--count", "10", "--sizes", "5,50")
    assert result.exit_code == 0, result.output
    text = " ".join(result.stdout.split())
    for part in ("faithfulness", "completeness", "random nodes", "not reached", "10 test prompts", "Pearson"):
        assert part in text
    content = json.loads((saved / "evaluation.json").read_text())
    assert content["sizes"] == [5, 50]
    assert len(content["whole"]) == 10
    assert (saved / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    assert "<html" in (saved / "report.html").read_text(encoding="utf-8")


def marks(path: Path, *prefixes: str) -> Path:
    keys = ("clean_prefix", "patch_prefix", "clean_answer", "patch_answer", "case")
    items = [dict(zip(keys, (one, one.replace("keys", "key"), " are", " is", "x"), strict=True)) for one in prefixes]
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return path


def test_a_circuit_is_not_tested_on_its_own_prompt_unless_that_is_allowed(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = marks(tmp_path / "pairs.json", *[KEYS[0]] * 2, "The keys near the car")
    with monkeypatch.context() as patch:
        patch.setattr(tracer, "load", lambda *_, **__: pytest.fail("loaded"))
        refused = run("evaluate", str(saved), "--pairs", str(pairs))
    assert refused.exit_code == 2
    assert "2 of 3 test prompts" in refused.stderr
    assert "--allow-overlap" in refused.stderr
    done = run("evaluate", str(saved), "--pairs", str(pairs), "--allow-overlap", "--sizes", "5,50")
    assert done.exit_code == 0, done.output
    assert "3 test prompts (2 of them prompts that the circuit was found on)" in " ".join(done.stdout.split())
    assert json.loads((saved / "evaluation.json").read_text())["n_shared"] == 2
    assert "(2 of them prompts that the circuit was found on)" in (saved / "report.html").read_text(encoding="utf-8")
    apart = run("evaluate", str(saved), "--pairs", str(marks(pairs, "The keys near the car", "The keys near the door")))
    assert apart.exit_code == 0, apart.output
    assert json.loads((saved / "evaluation.json").read_text())["n_shared"] == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["evaluate", "RUN", "--pairs", "x", "--structure", "simple"], "--structure"),
        (["evaluate", "RUN", "--structure", "haiku"], "nounpp"),
        (["evaluate", "RUN", "--structure", "simple"], "tokens"),
        (["evaluate", "RUN", "--structure", "nounpp", "--sizes", "5,9999"], "at most"),
        (["evaluate", "RUN", "--structure", "nounpp", "--ablation", "median"], "zero, mean"),
        (["evaluate", "RUN", "--pairs", "nowhere.jsonl"], "nowhere.jsonl"),
        (["evaluate", "nowhere", "--structure", "nounpp"], "no run"),
        (["steer", "The keys"], "factor"),
        (["steer", "The keys", "--factor", "0", "--add", "1"], "one"),
        (["steer", "The keys", "--factor", "0", "--nodes", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_bad_input_of_evaluate_and_steer(saved: Path, arguments: list[str], expected: str) -> None:
    result = run(*(argument.replace("RUN", str(saved)) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1
    assert expected in result.stderr


def test_steering_turns_the_plural_into_the_singular() -> None:
    words = ["The secretaries near the car", "--target", " are", "--foil", " is", "--top", "10", "--factor", "-1"]
    result = run("steer", *words, "--everywhere")
    assert result.exit_code == 0, result.output
    assert "steered ␣is" in " ".join(result.stdout.split())
    assert "The most probable token changed; it did with 0 of 5 random draws." in " ".join(result.stdout.split())


def test_run_of_a_small_job_and_its_table(tmp_path: Path) -> None:
    job = str(Path(__file__).parents[2] / "jobs" / "sva.yaml")
    changes = [
        "structures=[within_rc]",
        "methods=[relp]",
        "bases=[activation]",
        "baselines=[zero]",
        "train=6",
        "test=6",
    ]
    words = [word for change in changes for word in ("--set", change)]
    result = run("run", job, "--out", str(tmp_path / "run"), *words)
    assert result.exit_code == 0, result.output
    assert "within_rc" in result.stdout
    again = run("run", job, "--out", str(tmp_path / "run"), *words)
    assert "1 of 1 units were there already" in " ".join(again.stdout.split())


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere.yaml"], "nowhere.yaml"),
        (["JOB", "--set", "colour=red"], "colour"),
        (["JOB", "--set", "test"], "key=value"),
    ],
)
def test_bad_input_of_run(tmp_path: Path, words: list[str], expected: str) -> None:
    job = str(Path(__file__).parents[2] / "jobs" / "sva.yaml")
    result = run("run", *(job if word == "JOB" else word for word in words), "--out", str(tmp_path / "run"))
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1
    assert expected in result.stderr
