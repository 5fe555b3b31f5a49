"""Job records: what is refused, overrides, and that a job survives being written as its numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from helpers import refused
from tracer.attribution.pruning import Pruning
from tracer.errors import JobError
from tracer.runs.jobs import ROW_FIELDS, WITHOUT_EFFECT, BenchmarkJob, Combination, DatasetJob, Source, load_job
from tracer.settings import LINEAR_GATE, METRICS, RULES, SUMS_OF_TARGETS, settings

JOBS = Path(__file__).parents[2] / "jobs"
SVA, DATASET = JOBS / "sva.yaml", JOBS / "dataset.yaml"
TASK = {"task": "sva", "structure": "nounpp", "count": 64}
TEST = {"task": "sva", "structure": "nounpp", "count": 8, "split": "test"}


def dataset(*overrides: str, **keys: Any) -> DatasetJob:
    job = load_job({"kind": "dataset", "input": TASK, **keys}, overrides)
    assert isinstance(job, DatasetJob)
    return job


def bench(*overrides: str) -> BenchmarkJob:
    job = load_job(SVA, overrides)
    assert isinstance(job, BenchmarkJob)
    return job


# ------------------------------------------------------------------------------------------- the benchmark job


def test_the_default_job_is_the_benchmark_of_the_paper() -> None:
    job = bench()
    assert (job.train, job.test, job.ablation) == (300, 40, "mean")
    assert job.structures == ("simple", "nounpp", "rc", "within_rc")
    # 5 methods on 3 baselines and random once, in 2 bases, on 4 structures
    assert len(job.combinations()) == len(set(job.combinations())) == 4 * 2 * (5 * 3 + 1)
    assert Combination("rc", "random", "output", "none") in job.combinations()


def test_variants_of_the_rules_are_an_axis_of_relp_alone() -> None:
    job = bench("methods=[grad, relp]", "bases=output", "structures=rc", "rules=[all, [attention, norm], linear-gate]")
    names = [str(one) for one in job.combinations() if one.baseline == "zero"]
    assert names == ["rc/grad/output/zero", "rc/relp/output/zero", "rc/relp/output/zero/norm+attention",
                     "rc/relp/output/zero/linear-gate"]  # fmt: skip
    assert load_job(job.model_dump()) == job == load_job(json.loads(job.model_dump_json()))
    assert job.numbers()["rules"] == ["all", "norm+attention", "linear-gate"]
    assert "rules" not in bench().numbers()
    assert bench("rules=all") == bench("rules=[[norm, attention, activation, product]]")
    assert bench("rules=[[]]").rules == ("none",)


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("half", "must be all, no-half, linear-gate, none, or some of norm"),
        ("[norm, softmax]", "not 'softmax'"),
        ("[[norm, norm]]", "each once"),
        ("[[product, gate]]", "'product' and 'gate'"),
        ("[no-half, [norm, attention, activation]]", "rules must name at least one, each once"),
        ("[]", "rules must name at least one"),
        ("3", "rules must be a list"),
    ],
)
def test_variants_that_are_none_are_refused(value: str, part: str) -> None:
    with refused(JobError, part):
        bench(f"rules={value}")


def test_variants_without_relp_have_no_effect() -> None:
    with refused(JobError, "rules only have an effect with method relp"):
        bench("methods=[grad, random]", "rules=no-half")


def test_a_dataset_job_takes_a_variant_by_its_name() -> None:
    assert dataset("rules=linear-gate").settings().rules == LINEAR_GATE
    with refused(JobError, "'product' and 'gate'"):
        dataset("rules=[product, gate]")


def test_overrides_are_yaml_values_and_win() -> None:
    job = bench("train=7", "methods=[relp, delta]", "baselines=mean", "train=8", " seed =3", "model=a b")
    assert (job.train, job.methods, job.baselines, job.seed) == (8, ("relp", "delta"), ("mean",), 3)
    assert job.model == "a b"
    assert load_job(SVA) == load_job(str(SVA), [])


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("train", "key=value"),
        ("trian=3", "structures, train"),
        ("=3", "not known"),
        ("input.limit=3", "not known"),
        ("train=[", "not YAML"),
        ("train=0", "greater than or equal to 1"),
        ("train=yes", "valid integer"),
        ("train='7'", "valid integer"),
        ("train=7.0", "valid integer"),
        ("test=1", "greater than or equal to 2"),
        ("methods=[relp, magic]", "relp"),
        ("methods=[]", "at least one"),
        ("methods=[relp, relp]", "each once"),
        ("bases=logits", "activation"),
        ("sizes=[5, 3]", "rise"),
        ("sizes=[3, 3]", "each once"),
        ("sizes=[]", "at least one"),
        ("sizes=[0, 3]", "sizes.0=0"),
        ("rankings=weird", "absolute"),
        ("task=capitals", "sva"),
        ("kind=trace", "benchmark or dataset"),
        ("kind=[benchmark]", "benchmark or dataset"),
        ("train=", "integer"),
        ("model=", "string"),
        ("seed=-1", "greater than or equal to 0"),
        ("attention=flash", "sdpa"),
        ("device_map.x=auto", "valid string"),
    ],
)
def test_bad_overrides_are_refused(override: str, part: str) -> None:
    with refused(JobError, part):
        load_job(SVA, [override])


def test_settings_without_effect_are_refused() -> None:
    with refused(JobError, "steps"):
        load_job(SVA, ["methods=relp", "steps=5"])
    with refused(JobError, "conductance"):
        load_job(SVA, ["methods=conductance", "baselines=mean"])
    with refused(JobError, "device_map"):
        load_job(SVA, ["device=cpu", "device_map=auto"])


def test_what_a_model_is_loaded_with() -> None:
    assert bench().loading() == {}
    options = bench("dtype=bfloat16", "device=cuda", "revision='1'", "attention=eager").loading()
    assert options == {"dtype": "bfloat16", "device": "cuda", "revision": "1", "attention": "eager"}
    assert dataset("device_map=auto").loading() == {"device_map": "auto"}


# -------------------------------------------------------------------------------------------------- reading


def test_kinds_are_told_apart() -> None:
    assert isinstance(load_job(SVA), BenchmarkJob)
    assert isinstance(load_job(DATASET), DatasetJob)
    with refused(JobError, "has no kind", "benchmark", "dataset"):
        load_job({"input": TASK})
    with refused(JobError, "kind='trace'", "benchmark", "dataset"):
        load_job({"kind": "trace"})


def test_bad_files_are_refused(tmp_path: Path) -> None:
    def file(text: str) -> Path:
        path = tmp_path / "job.yaml"
        path.write_text(text)
        return path

    with refused(JobError, "none.yaml", "check the path"):
        load_job(tmp_path / "none.yaml")
    with refused(JobError, "is there twice"):
        load_job(file(SVA.read_text() + "\ntrain: 3\n"))
    with refused(JobError, "job.yaml", "has no kind"):
        load_job(file("{}"))
    with refused(JobError, "job.yaml", "has no methods"):
        load_job(file("kind: benchmark"))
    with refused(JobError, "job.yaml", "has no input"):
        load_job(file("kind: dataset"))
    with refused(JobError, "'colour'", "not known to a benchmark job"):
        load_job(file(SVA.read_text() + "\ncolour: red\n"))


def test_a_mapping_and_a_record_are_jobs_too() -> None:
    content: dict[str, Any] = {"kind": "dataset", "input": dict(TASK)}
    job = load_job(content, ["input.count=3", "nodes=7"])
    assert isinstance(job, DatasetJob)
    assert (job.input.count, job.nodes) == (3, 7)
    assert content == {"kind": "dataset", "input": TASK}  # the caller's own is left alone
    assert load_job(job) is job
    again = load_job(job, ["input.count=4"])
    assert again == load_job(content, ["input.count=4", "nodes=7"])
    made = DatasetJob.model_validate({"input": Source(task="capitals", count=3)})
    assert load_job({"kind": "dataset", "input": made.input}, ["input.seed=2"]).numbers()["input"]["seed"] == 2
    assert load_job(made, "nodes=5") == made.model_copy(update={"nodes": 5})


def test_dotted_overrides_reach_nested_records() -> None:
    job = dataset("input={path: a.jsonl}", "input.columns.text=prompt", "input.limit=100", "pruning.top=5")
    assert (job.input.columns, job.input.limit) == ({"text": "prompt"}, 100)
    assert job.pruning_rules() == Pruning(top=5)
    job = dataset("circuit=free", "evaluate.sizes=[1, 2]", f"evaluate.test={json.dumps(TEST)}", "evaluate.test.count=5")
    assert job.evaluate is not None
    assert (job.evaluate.test.count, job.evaluate.sizes) == (5, (1, 2))


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("input.colour=1", ("'input.colour'", "use path, dataset")),
        ("input.columns.prompt=1", ("'input.columns.prompt'", "text, token_ids, target")),
        ("evaluate.test.colour=1", ("'evaluate.test.colour'", "use path")),
        ("evaluate.colour=1", ("'evaluate.colour'", "use test, ablation")),
        ("reference.colour=1", ("'reference.colour'",)),
        ("pruning.colour=1", ("'pruning.colour'", "share, attribution, top")),
        ("structures=simple", ("'structures'", "shard_size")),
        ("input.count.x=1", ("holds 64",)),
    ],
)
def test_unknown_keys_are_named_with_the_known_ones(override: str, parts: tuple[str, ...]) -> None:
    with refused(JobError, *parts):
        dataset(override)


# ---------------------------------------------------------------------------------------------- where prompts are


@pytest.mark.parametrize(
    ("source", "part"),
    [
        ({}, "not from none of them"),
        ({"path": "a", "task": "sva"}, "path and task"),
        ({"path": "a", "dataset": "b"}, "path and dataset"),
        ({"path": []}, "at least one file"),
        ({"path": ""}, "at least 1 character"),
        ({"path": 5}, "path"),
        ({"path": "a", "config": "c"}, "config has no effect with path"),
        ({"path": "a", "split": "test"}, "split has no effect with path"),
        ({"path": "a", "revision": "r"}, "revision has no effect with path"),
        ({"path": "a", "structure": "rc"}, "structure has no effect with path"),
        ({"path": "a", "count": 3}, "count has no effect with path"),
        ({"path": "a", "seed": 3}, "seed has no effect with path"),
        ({"dataset": "a", "structure": "rc"}, "structure has no effect with dataset"),
        ({"dataset": "a", "count": 3}, "count has no effect with dataset"),
        ({"dataset": "a", "seed": 3}, "seed has no effect with dataset"),
        (TASK | {"config": "c"}, "config has no effect with task"),
        (TASK | {"revision": "c"}, "revision has no effect with task"),
        (TASK | {"columns": {"text": "c"}}, "columns has no effect with task"),
        (TASK | {"labels": ["c"]}, "labels has no effect with task"),
        (TASK | {"split": "validation"}, "train or test"),
        (TASK | {"structure": None}, "needs a structure"),
        (TASK | {"structure": "deep"}, "within_rc"),
        (TASK | {"count": None}, "needs a count"),
        (TASK | {"count": 0}, "greater than or equal to 1"),
        (TASK | {"task": "capitals"}, "has no structure"),
        (TASK | {"task": "ioi"}, "capitals"),
        ({"path": "a", "columns": {"text": ""}}, "at least 1 character"),
        ({"path": "a", "columns": ["text"]}, "dictionary"),
        ({"path": "a", "labels": ["x", "x"]}, "each column once"),
        ({"path": "a", "limit": 0}, "greater than or equal to 1"),
        ({"path": "a", "limit": True}, "valid integer"),
        ("a.jsonl", "dictionary"),
    ],
)
def test_sources_that_cannot_be_are_refused(source: Any, part: str) -> None:
    with refused(JobError, "input", part):
        load_job({"kind": "dataset", "input": source})
    with refused(JobError, "evaluate.test", part):
        load_job({"kind": "dataset", "input": TASK, "circuit": "free", "evaluate": {"test": source, "sizes": [1]}})


def test_sources_are_kept_as_they_are_written() -> None:
    assert dataset(input={"path": "../a/*.jsonl"}).input.path == ("../a/*.jsonl",)
    assert dataset(input={"path": [Path("b"), "~/a.csv.gz"]}).input.path == ("b", "~/a.csv.gz")
    source = dataset(input={"dataset": "some/set", "config": "c", "revision": "r", "labels": "topic"}).input
    assert (source.split, source.labels, source.columns) == ("train", ("topic",), {})
    assert dataset(input={"task": "capitals", "count": 5, "split": "test", "seed": 2}).input.seed == 2


def test_the_jobs_limit_is_its_inputs() -> None:
    assert dataset("limit=3").source == dataset("input.limit=3").source
    assert dataset().source == dataset().input
    assert (dataset("limit=3").source.most, dataset().source.most, Source(path=("a",)).most) == (3, 64, None)
    with refused(JobError, "limit and input.limit"):
        dataset("limit=3", "input.limit=3")


# -------------------------------------------------------------------------------------------- the dataset job


@pytest.mark.parametrize(
    ("keys", "part"),
    [
        ({"method": "magic"}, "relp"),
        ({"method": "grad", "rules": ["norm"]}, "rules only have an effect"),
        ({"rules": ["magic"]}, "attention"),
        ({"rules": ["norm", "norm"]}, "each once"),
        ({"steps": 5}, "steps only have an effect"),
        ({"top_k": 3}, "top_k only has an effect"),
        ({"seed": 3}, "seed only has an effect"),
        ({"method": "random", "baseline": "counterfactual"}, "baseline has no effect"),
        ({"method": "conductance", "baseline": "mean", "reference": TEST}, "conductance"),
        ({"baseline": "mean"}, "needs reference"),
        ({"reference": TEST}, "reference has no effect with baseline 'zero'"),
        ({"nodes": 0}, "greater than or equal to 1"),
        ({"nodes": True}, "valid integer"),
        ({"threshold": -1}, "0 or more"),
        ({"threshold": float("nan")}, "finite"),
        ({"threshold": float("inf")}, "finite"),
        ({"threshold": True}, "must be a number"),
        ({"mass": 0}, "above 0"),
        ({"mass": 1.5}, "at most 1"),
        ({"skip_first": 5}, "boolean"),
        ({"exclude": ["3-120"]}, "LAYER/NEURON"),
        ({"exclude": [3, 120]}, "LAYER/NEURON"),
        ({"exclude": [[3, -1]]}, "greater than or equal to 0"),
        ({"exclude": [[3, True]]}, "valid integer"),
        ({"exclude": ["3/120", [3, 120]]}, "each neuron once"),
        ({"metric": "logprob", "edges": True}, "single logits"),
        ({"metric": "centred", "pruning": {"top": 3}}, "pruning has no effect"),
        ({"edges": False, "pruning": {}}, "pruning has no effect"),
        ({"edges": None}, "boolean"),
        ({"pruning": {"share": -1}}, "from 0 to 1"),
        ({"pruning": {"top": 0}}, "pruning.top"),
        ({"pruning": {"node_influence": 2}}, "at most 1"),
        ({"pruning": {"edge_influence": "many"}}, "pruning.edge_influence"),
        ({"pruning": {"drop_dangling": "often"}}, "boolean"),
        ({"circuit": "some"}, "aligned"),
        ({"evaluate": {"test": TEST, "sizes": [1]}}, "no effect without a circuit"),
        ({"circuit": "free", "evaluate": {"test": TASK, "sizes": [1]}}, "other prompts than input"),
        ({"circuit": "free", "evaluate": {"test": TASK | {"count": 3}, "sizes": [1]}}, "other prompts than input"),
        ({"circuit": "free", "evaluate": {"sizes": [1]}}, "has no evaluate.test"),
        ({"circuit": "free", "evaluate": {"test": TEST}}, "has no evaluate.sizes"),
        ({"circuit": "free", "evaluate": {"test": TEST, "sizes": [2, 1]}}, "rise"),
        ({"circuit": "free", "evaluate": {"test": TEST, "sizes": []}}, "at least one"),
        ({"circuit": "free", "evaluate": {"test": TEST | {"count": 1}, "sizes": [1]}}, "at least 2"),
        ({"circuit": "free", "evaluate": {"test": TEST, "sizes": [1], "ablation": "median"}}, "resample"),
        ({"circuit": "free", "evaluate": {"test": TEST, "sizes": [1], "seed": -1}}, "greater than or equal to 0"),
        (
            {"circuit": "free", "evaluate": {"test": TEST, "sizes": [1], "ablation": "zero", "reference": TASK}},
            "reference has no effect with ablation 'zero'",
        ),
        ({"quality": -1}, "greater than or equal to 0"),
        ({"limit": 0}, "greater than or equal to 1"),
        ({"shard_size": 0}, "greater than or equal to 1"),
        ({"batch": 0}, "greater than or equal to 1"),
        ({"prompt_timeout": 0}, "greater than 0"),
        ({"prompt_timeout": float("inf")}, "finite"),
        ({"retries": -1}, "greater than or equal to 0"),
        ({"max_error_rate": 1.5}, "less than or equal to 1"),
        ({"device": "cpu", "device_map": "auto"}, "device_map"),
        ({"model": ""}, "at least 1 character"),
        ({"revision": 5}, "valid string"),
    ],
)
def test_what_cannot_be_or_has_no_effect_is_refused(keys: dict[str, Any], part: str) -> None:
    with refused(JobError, part):
        dataset(**keys)


def test_a_job_becomes_arguments() -> None:
    job = dataset("method=ig", "steps=3", "threshold=1e-3", "exclude=[3/120, [0, 2]]", "skip_first=true")
    assert job.settings() == settings(method="ig", steps=3)
    assert dataset().settings().rules == RULES
    assert dataset("rules=norm").settings().rules == {"norm"}
    assert dataset("rules=[]").settings().rules == frozenset()
    assert job.selection() == {
        "nodes": None,
        "threshold": 0.001,
        "mass": None,
        "skip_first": True,
        "exclude": ((3, 120), (0, 2)),
    }
    assert dataset().pruning_rules() is None
    assert dataset("pruning={}").pruning_rules() == Pruning()
    rules = {"share": 0.1, "attribution": 1.0, "top": 4, "node_influence": 0.5, "edge_influence": 1.0}
    assert dataset(pruning=rules | {"drop_dangling": True}).pruning_rules() == Pruning(**rules, drop_dangling=True)


ALONE = tuple(metric for metric in METRICS if metric not in ("share", "neuron", "direction"))
"""Metrics that need nothing beside their name."""


@pytest.mark.parametrize("metric", ALONE)
def test_edges_are_traced_where_they_can_be(metric: str) -> None:
    job = dataset(metric=metric)
    assert job.edges is (metric in SUMS_OF_TARGETS | {"auto"})
    assert dataset(metric=metric, edges=False).edges is False
    # What a default became is no choice of the user's: another metric may still be set.
    for other in ALONE:
        assert load_job(job, [f"metric={other}"]) == dataset(metric=other)


def test_the_default_dataset_job_runs_on_the_demo_model() -> None:
    job = load_job(DATASET)
    assert isinstance(job, DatasetJob)
    assert (job.model, job.input.task, job.input.structure, job.input.count) == ("demo", "sva", "nounpp", 64)
    assert job.evaluate is not None
    assert job.evaluate.test.split == "test"


# ------------------------------------------------------------------------------------------------ its numbers


def some(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | strategy


WORDS = st.text(min_size=1, max_size=8)
COUNTS = st.integers(1, 99)
SOURCES = st.one_of(
    st.fixed_dictionaries(
        {"path": WORDS | st.lists(WORDS, min_size=1, max_size=3)},
        optional={
            "columns": st.dictionaries(st.sampled_from(ROW_FIELDS), WORDS, max_size=4),
            "labels": st.lists(WORDS, max_size=3, unique=True),
            "limit": some(st.integers(2, 99)),
        },
    ),
    st.fixed_dictionaries(
        {"dataset": WORDS}, optional={"config": some(WORDS), "split": WORDS, "revision": some(WORDS)}
    ),
    st.fixed_dictionaries(
        {"task": st.just("sva"), "structure": st.sampled_from(["simple", "rc"]), "count": st.integers(2, 9)},
        optional={"seed": st.integers(0, 9), "split": st.sampled_from(["train", "test"])},
    ),
)
SIZES = st.sets(COUNTS, min_size=1, max_size=5).map(sorted)
SHARES = st.floats(0.01, 1)
DATASETS = st.fixed_dictionaries(
    {"kind": st.just("dataset"), "input": SOURCES},
    optional={
        "model": WORDS,
        "revision": some(WORDS),
        "dtype": some(WORDS),
        "attention": st.sampled_from([None, "eager"]),
        "shard_size": COUNTS,
        "basis": st.sampled_from(["activation", "output"]),
        "baseline": st.sampled_from(["zero", "counterfactual"]),
        "rules": some(st.lists(st.sampled_from(sorted(RULES)), unique=True)),
        "metric": st.sampled_from(["auto", "logit", "logprob", "centred"]),
        "nodes": some(COUNTS),
        "threshold": some(st.floats(0, 2)),
        "mass": some(SHARES),
        "skip_first": st.booleans(),
        "exclude": st.lists(st.tuples(COUNTS, COUNTS), unique=True, max_size=3),
        "circuit": st.sampled_from(["none", "aligned", "free"]),
        "quality": st.integers(0, 5),
        "batch": some(COUNTS),
    },
)


def _source(keys: dict[str, Any]) -> Source:
    return Source.model_validate(keys)


@given(DATASETS, some(SOURCES), SIZES, some(st.fixed_dictionaries({}, optional={"share": SHARES, "top": COUNTS})))
def test_numbers_make_the_same_job(
    keys: dict[str, Any], test: dict[str, Any] | None, sizes: list[int], pruning: dict[str, Any] | None
) -> None:
    """A job, its numbers as JSON, the job again: equal, and with equal numbers, whatever does not decide them."""
    if pruning is not None and keys.get("metric", "auto") in ("auto", "logit"):
        keys["pruning"] = pruning
    if test is not None:
        keys |= {"circuit": "aligned", "evaluate": {"test": test, "sizes": sizes}}
    assume(test is None or _source(test).origin != _source(keys["input"]).origin)
    job = load_job(keys)
    numbers = json.loads(json.dumps(job.numbers()))
    again = load_job(numbers)
    assert again == job
    assert again.numbers() == job.numbers() == numbers
    changed = load_job(job, ["retries=9", "prompt_timeout=5", "max_error_rate=1", "device=cpu"])
    assert changed != job
    assert changed.numbers() == numbers
    assert load_job(job, ["quality=77"]).numbers() != numbers
    assert load_job(job.model_dump(mode="json")) == job


@pytest.mark.parametrize("path", [SVA, DATASET])
def test_numbers_are_everything_that_decides_them(path: Path) -> None:
    job = load_job(path)
    new = {"adapter", "gguf_file", "always_on", "concepts", "filter", "profiles", "steering", "supernodes", "tokens"}
    new |= {"share", "of", "values"}
    without = WITHOUT_EFFECT | new  # left out where there are none
    without |= {"rules"} if isinstance(job, BenchmarkJob) else set()  # left out where it is the default
    assert set(type(job).model_fields) - set(job.numbers()) == without & set(type(job).model_fields)
    assert load_job(job.numbers()) == job
    assert load_job(job, ["device=cpu"]).numbers() == job.numbers()
    assert load_job(job, ["dtype=bfloat16"]).numbers() != job.numbers()


@pytest.mark.parametrize(
    ("changes", "source"),
    [
        (["input.path=x.jsonl"], {"path": ("x.jsonl",)}),
        (["input.path=x.jsonl", "input.limit=5"], {"path": ("x.jsonl",), "limit": 5}),
        (["input.dataset=some/set"], {"dataset": "some/set"}),
        (["input.task=capitals", "input.count=9", "input.structure=null"], {"task": "capitals", "count": 9}),
    ],
)
def test_a_change_of_source_on_the_shipped_job_is_that_source(changes: list[str], source: dict[str, Any]) -> None:
    job = load_job(JOBS / "dataset.yaml", changes)
    assert isinstance(job, DatasetJob)
    assert job.input.model_dump(exclude_none=True, exclude_defaults=True) == source


def test_two_sources_in_one_change_are_still_refused() -> None:
    with refused(JobError, "one of path, dataset and task"):
        load_job(JOBS / "dataset.yaml", ["input.path=x.jsonl", "input.task=sva"])
