"""Loading: what is complete and covered loads unchanged, everything else is refused on one line."""

from __future__ import annotations

import errno
import shutil
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import children
import tiny as t
import tracer
from helpers import Question, direct_logits, error, fresh, load, refused
from tracer import ModelError, demo
from tracer.model.model import Model
from truth import close, same_bits

ROWS = Question().ids()


@pytest.fixture(scope="session")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete Llama folder; copy it before breaking it."""
    return t.save(t.tiny("llama"), tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def folder(complete: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(complete, tmp_path / "model"))


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace weights by name (dots written as __), or drop them (None)."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    for name, value in changes.items():
        key = name.replace("__", ".")
        assert key in weights
        if value is None:
            del weights[key]
        else:
            weights[key] = value
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("family", t.FAMILIES)
def test_a_saved_folder_gives_the_same_logits_and_attributions(family: str, tmp_path: Path) -> None:
    here = load(family)
    there = tracer.load(t.save(t.tiny(family), tmp_path), attention="eager", device="cpu")
    assert close(direct_logits(there, ROWS), direct_logits(here, ROWS))
    prompts = Question().prompts()
    found = tracer.attribute(there, prompts).nodes
    assert close(found, tracer.attribute(here, prompts).nodes)
    again = tracer.load(tmp_path, attention="eager", device="cpu")
    assert same_bits(tracer.attribute(again, prompts).nodes, found)
    assert there.fingerprint == here.fingerprint
    assert there.tokenizer.decode([7]) == here.tokenizer.decode([7])


@pytest.mark.parametrize("family", t.FAMILIES)
def test_a_model_knows_its_sizes(family: str) -> None:
    model = load(family)
    assert (model.n_layers, model.d_model, model.d_mlp, model.vocab_size) == (3, 32, 48, t.VOCAB)
    assert model.context_length == 64
    assert model.n_neurons("activation") == 48
    assert model.n_neurons("output") == 32
    assert model.device == torch.device("cpu")
    assert model.dtype == torch.float32
    assert model.has_biases == (family not in t.BIAS_FREE)
    assert model.conserves == (family in t.BIAS_FREE)
    assert model.soft_cap == (2.0 if family in ("gemma2", "gemma3", "gemma4") else None)
    record = model.record()
    assert (record.n_layers, record.d_model, record.d_mlp, record.dtype) == (3, 32, 48, "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_a_dtype_is_loaded_as_asked(complete: Path, dtype: str) -> None:
    model = tracer.load(complete, dtype=dtype, device="cpu")
    assert model.dtype == getattr(torch, dtype)
    assert not model.conserves
    got = tracer.attribute(model, Question().prompts())
    assert got.nodes.dtype == torch.float32
    wanted = tracer.attribute(load("llama"), Question().prompts())
    assert error(got.nodes, wanted.nodes) < (1e-5 if dtype == "float64" else 0.1)


def test_a_loaded_model_is_frozen_and_in_evaluation_mode() -> None:
    module = t.tiny("gpt2").train().requires_grad_(True)
    model = tracer.load(module, tokenizer=t.tokenizer())
    assert model.module is module
    assert not any(part.training for part in module.modules())
    assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_kernel_is_as_asked(complete: Path, attention: str) -> None:
    model = tracer.load(complete, attention=attention)
    assert model.config._attn_implementation == attention


def test_the_fingerprint_changes_with_any_weight_and_with_nothing_else() -> None:
    model = fresh("llama")
    before = model.fingerprint
    assert fresh("llama").fingerprint == before
    other = fresh("llama")
    other.module.model.layers[2].mlp.down_proj.weight[3, 5] += 1e-3
    assert other.fingerprint != before
    assert fresh("llama", seed=1).fingerprint != before


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_a_weight_that_is_not_finite_is_refused(name: str, bad: float, folder: Path) -> None:
    module = t.tiny("llama")
    module.get_parameter(name).data.view(-1)[7] = bad
    with refused(ModelError, f"weight {name}", "NaN or infinity"):
        tracer.load(module, tokenizer=t.tokenizer())
    edit_weights(folder, **{name.replace(".", "__"): module.get_parameter(name).data})
    with refused(ModelError, f"weight {name}", "NaN or infinity"):
        tracer.load(folder)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_a_missing_weight_is_refused(name: str, folder: Path) -> None:
    edit_weights(folder, **{name.replace(".", "__"): None})
    with refused(ModelError, "1 weights are missing", name, "complete checkpoint"):
        tracer.load(folder)


def test_a_tied_head_is_not_missing(tmp_path: Path) -> None:
    module = t.tiny("llama", tie_word_embeddings=True)
    t.save(module, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = tracer.load(tmp_path)
    assert torch.equal(model.module.lm_head.weight, module.lm_head.weight)


def test_a_misshapen_weight_is_refused(folder: Path) -> None:
    edit_weights(folder, model__norm__weight=torch.ones(16))
    with refused(ModelError, "model.norm.weight"):
        tracer.load(folder)


def test_pickled_weights_are_never_read(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with refused(ModelError, "safetensors"):
        tracer.load(folder)


def test_code_in_a_folder_is_never_run(folder: Path) -> None:
    mark = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", None]}
    t.edit_config(folder, auto_map=auto)
    with pytest.warns(tracer.TracerWarning, match="evil.Model"):
        tracer.load(folder)
    assert not mark.exists()


@pytest.mark.parametrize("damage", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_file_is_refused(damage: str, folder: Path) -> None:
    (folder / damage).write_text("{ not what it was")
    with refused(ModelError, str(folder)[:20]):
        tracer.load(folder)


@pytest.mark.parametrize("gone", ["config.json", "model.safetensors"])
def test_a_folder_without_a_needed_file_is_refused(gone: str, folder: Path) -> None:
    (folder / gone).unlink()
    with refused(ModelError, str(folder)[:20]):
        tracer.load(folder)


def test_a_folder_without_a_tokenizer_is_refused(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with refused(ModelError, str(folder)[:20]):
        tracer.load(folder)


def test_a_folder_named_demo_is_not_the_shipped_model(
    complete: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with refused(ModelError, "does not exist"):
        tracer.load(Path("demo"))
    shutil.copytree(complete, tmp_path / "demo")
    shipped = tracer.load("demo")
    for name in (Path("./demo"), Path("demo"), "./demo"):
        model = tracer.load(name)
        assert model.d_mlp == 48 != shipped.d_mlp
        assert model.name == "./demo" != shipped.name


@pytest.mark.parametrize("damage", ["weights", "checksum", "gone"])
def test_a_damaged_shipped_model_is_refused(damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(demo.path(), tmp_path / "model"))
    monkeypatch.setattr(demo, "path", lambda: folder)
    assert tracer.load("demo").name == "demo"
    weights = folder / demo.WEIGHTS
    if damage == "weights":
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    elif damage == "checksum":
        (folder / demo.CHECKSUM).write_text("")
    else:
        (folder / demo.CHECKSUM).unlink()
    with refused(ModelError, "model 'demo'", "SHA-256", "reinstall"):
        tracer.load("demo")


def test_loading_is_silent_and_leaves_the_users_settings(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging

    edit_weights(folder, model__norm__weight=torch.ones(16))
    verbosity, hook = logging.get_verbosity(), logging.set_tqdm_hook(None)
    mine = lambda factory, args, kwargs: factory(*args, **kwargs)  # noqa: E731
    try:
        logging.set_verbosity_info()
        logging.set_tqdm_hook(mine)
        with pytest.raises(ModelError):
            tracer.load(folder)
        tracer.load("demo")
        assert logging.get_verbosity() == logging.INFO
        assert logging.set_tqdm_hook(None) is mine
    finally:
        logging.set_verbosity(verbosity)
        logging.set_tqdm_hook(hook)
    out, err = capfd.readouterr()
    assert out == ""
    assert "Loading weights" not in err
    assert "LOAD REPORT" not in err


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with refused(ModelError, str(tmp_path), "config.json", "Hugging Face"):
        tracer.load(tmp_path)
    with refused(ModelError, "nowhere", "does not exist"):
        tracer.load(tmp_path / "nowhere")
    with refused(ModelError, "notes.txt", "config.json"):
        tracer.load(tmp_path / "notes.txt")


@pytest.mark.parametrize("name", ["nobody/nothing-here-at-all", "no-such-model-anywhere"])
def test_an_id_that_cannot_be_reached_is_refused(name: str) -> None:
    with refused(ModelError, name, "Hugging Face", "demo"):
        tracer.load(name)


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As if there were a network; what is reached is set by the test, and proxies do not stand between."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("no_proxy", "*")
    return monkeypatch


@pytest.mark.parametrize("name", ["foo bar", "a b/c d", "a--b", "~nouser-at-all/x", "x" * 5000, "a\0b", "-x"])
def test_a_name_that_cannot_be_is_refused(name: str, online: pytest.MonkeyPatch) -> None:
    online.setattr("huggingface_hub.constants.ENDPOINT", "bogus")
    with refused(ModelError, "model '"):
        tracer.load(name)


def test_a_malformed_endpoint_is_refused(online: pytest.MonkeyPatch) -> None:
    for endpoint in ("bogus", "http://127.0.0.1:port", "http://a b"):
        online.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        with refused(ModelError, "nobody/nothing", "HF_ENDPOINT"):
            tracer.load("nobody/nothing")


def test_an_endpoint_that_hangs_up_is_refused(online: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(20)

        def hang_up() -> None:
            server.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        online.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        with refused(ModelError, "nobody/nothing", "could not be fetched"):
            tracer.load("nobody/nothing")
        thread.join(20)
        assert not thread.is_alive()


def test_an_endpoint_that_does_not_answer_in_time_is_refused(online: pytest.MonkeyPatch) -> None:
    def late(*_: Any, **__: Any) -> None:
        raise TimeoutError("timed out")

    online.setattr("urllib.request.urlopen", late)
    with refused(ModelError, "nobody/nothing", "timed out"):
        tracer.load("nobody/nothing")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"dtype": "float8"}, ("dtype='float8'", "float32", "bfloat16")),
        ({"dtype": "fp32"}, ("dtype='fp32'", "float32")),
        ({"device": "gpu"}, ("device='gpu'", "cpu", "cuda")),
        ({"device": "cuda:99"}, ("cuda:99", "GPUs")),
        ({"device": "cpu", "device_map": "auto"}, ("device='cpu'", "device_map")),
        ({"revision": "main"}, ("revision='main'", "no effect")),
        ({"attention": "magic"}, ("magic",)),
        ({"attention": "someone/kernel"}, ("attention=", "eager, sdpa")),
        ({"device_map": "everywhere"}, ("device_map='everywhere'", "auto", "balanced")),
        ({"device_map": "cuda:99"}, ("device_map='cuda:99'", "GPUs")),
        ({"device_map": "meta"}, ("device_map='meta'", "not a device")),
        ({"device_map": {}}, ("device_map={}", "dict")),
        ({"device_map": {"": 99}}, ("device_map='cuda:99'", "GPUs")),
        ({"device_map": {"": "disk"}}, ("device_map={'': 'disk'}", "begins on disk")),
        ({"device": "meta"}, ("device='meta'", "not a device", "cpu")),
        ({"device": "cpu:1"}, ("device='cpu:1'",)),
        ({"device": "xla"}, ("device='xla'", "not a device")),
        ({"device": ""}, ("device=''", "not a device")),
        ({"dtype": torch.int8}, ("dtype=torch.int8", "float32")),
    ],
)
def test_a_wrong_option_is_refused(complete: Path, options: dict[str, Any], parts: tuple[str, ...]) -> None:
    with refused(ModelError, *parts):
        tracer.load(complete, **options)


@pytest.mark.parametrize("dtype", ["int8", "nf4", "fp4"])
def test_a_quantized_dtype_without_its_package_says_what_to_install(
    complete: Path, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", None)
    with refused(ModelError, f"dtype={dtype!r}", "bitsandbytes", "pip install"):
        tracer.load(complete, dtype=dtype)


def test_a_device_that_the_machine_lacks_is_refused(complete: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    ways: list[dict[str, Any]] = [{"device": "mps"}, {"device_map": "mps"}]
    for options in ways:
        with refused(ModelError, "='mps'", "this machine has 0"):
            tracer.load(complete, **options)


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}])
def test_a_device_map_of_a_known_kind_is_taken(complete: Path, device_map: Any) -> None:
    assert tracer.load(complete, device_map=device_map).n_layers == 3


def test_an_attention_kernel_that_the_architecture_lacks_is_no_fault_of_the_folder(
    complete: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_supports_sdpa", False)
    with refused(ModelError, "attention='sdpa'"):
        tracer.load(complete, attention="sdpa")


@pytest.mark.parametrize(
    ("problem", "options", "parts"),
    [
        (ValueError("no device for model.norm"), {"device_map": {"": "cpu"}}, ("device_map={'': 'cpu'}: no device",)),
        (ImportError("needs sentencepiece"), {}, ("needs sentencepiece", "install the package")),
        (ValueError("Unrecognized model"), {}, ("model folder", "Unrecognized model", "complete")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_failure_names_what_is_to_blame(
    complete: Path,
    problem: Exception,
    options: dict[str, Any],
    parts: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from transformers import AutoModelForCausalLM

    def fail(*_: Any, **__: Any) -> None:
        raise problem

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with refused(ModelError, *parts):
        tracer.load(complete, **options)


@pytest.mark.parametrize(
    "problem",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_too_little_memory_is_no_fault_of_the_folder(
    complete: Path, problem: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    def fail(*_: Any, **__: Any) -> None:
        raise problem

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with refused(ModelError, "does not fit in memory", "smaller dtype", "device_map='auto'"):
        tracer.load(complete)


def test_a_dtype_of_torch_is_as_good_as_its_name(complete: Path) -> None:
    assert tracer.load(complete, dtype=torch.bfloat16, device="cpu").dtype == torch.bfloat16


def test_a_module_needs_its_tokenizer() -> None:
    with refused(ModelError, "tokenizer"):
        tracer.load(t.tiny("llama"))


@pytest.mark.parametrize(
    "options",
    [{"revision": "main"}, {"dtype": "bfloat16"}, {"device": "cpu"}, {"device_map": "auto"}, {"attention": "sdpa"}],
)
def test_a_loading_option_without_effect_on_a_module_is_refused(options: dict[str, Any]) -> None:
    with refused(ModelError, next(iter(options)), "effect"):
        tracer.load(t.tiny("llama"), tokenizer=t.tokenizer(), **options)


def test_a_tokenizer_without_effect_is_refused(complete: Path) -> None:
    with refused(ModelError, "tokenizer", "effect"):
        tracer.load(complete, tokenizer=t.tokenizer())


def test_a_module_that_is_no_language_model_is_refused() -> None:
    with refused(ModelError, "Linear"):
        tracer.load(nn.Linear(3, 3), tokenizer=t.tokenizer())


def test_the_budget_and_the_cost_of_a_token_are_positive_and_grow_with_the_model() -> None:
    small, large = load("llama"), load("llama", n_layers=6)
    assert small.budget() > 0
    assert 0 < small.bytes_per_token() < large.bytes_per_token()
    assert small.bytes_per_token(gradient=False) <= small.bytes_per_token()


def test_the_cost_of_a_token_counts_logits_and_the_length_read() -> None:
    small, large = load("llama"), load("llama", vocab_size=1101)
    assert large.bytes_per_token() - small.bytes_per_token() == 8 * 1000
    assert small.bytes_per_token(length=8) < small.bytes_per_token(length=64) == small.bytes_per_token(length=10**6)


@pytest.mark.process
def test_what_is_no_name_is_refused_without_the_test_suites_type_checks() -> None:
    """In a process of its own, since here beartype refuses it first."""
    done = subprocess.run(children.command("nameless"), capture_output=True, text=True, check=True, timeout=120)
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["model None", "model 5", "model b'demo'"]


def test_a_model_cannot_be_changed() -> None:
    model: Model = load("llama")
    with pytest.raises(AttributeError):
        model.name = "other"  # type: ignore[misc]


def test_a_program_that_listens_hears_what_is_loaded(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="tracer"):
        tracer.load("demo")
    assert any("loaded demo: llama, 4 layers of 384 neurons" in record.getMessage() for record in caplog.records)
