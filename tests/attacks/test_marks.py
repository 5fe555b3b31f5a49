"""Code that a model folder brings along is never run, whatever is answered to a question that nobody may ask."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny as t
import tracer
from tally import Attack
from tracer.errors import TracerError
from tracer.model.model import read_tokenizer, skeleton
from tracer.model.sizes import Shape

CLASSES = ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer", "AutoProcessor", "AutoFeatureExtractor")


def edit(folder: Path, file: str, **changes: Any) -> None:
    path = folder / file
    there = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(there | changes))


def auto(module: str) -> dict[str, Any]:
    return {name: [f"{module}.Mine", None] if name == "AutoTokenizer" else f"{module}.Mine" for name in CLASSES}


class _Pickled:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def pickled(folder: Path, mark: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Pickled(mark)))


def adapter(folder: Path, mark: Path) -> None:
    mapping = {"base_model_class": "Mine", "parent_library": "custom"}
    edit(folder, "adapter_config.json", peft_type="LORA", auto_mapping=mapping, auto_map=auto("custom"), r=2)
    shutil.copy(folder / "model.safetensors", folder / "adapter_model.safetensors")


FOLDERS: dict[str, Callable[[Path, Path], None]] = {
    "a known type": lambda folder, _: edit(folder, "config.json", auto_map=auto("custom")),
    "an unknown type": lambda folder, _: edit(folder, "config.json", auto_map=auto("custom"), model_type="mine"),
    "no type": lambda folder, _: edit(folder, "config.json", auto_map=auto("custom"), model_type=None),
    "another's code": lambda folder, _: edit(folder, "config.json", auto_map=auto("someone/else--custom")),
    "a tokenizer": lambda folder, _: edit(
        folder, "tokenizer_config.json", auto_map=auto("custom"), tokenizer_class="Mine"
    ),
    "a processor": lambda folder, _: edit(folder, "processor_config.json", auto_map=auto("custom")),
    "a preprocessor": lambda folder, _: edit(folder, "preprocessor_config.json", auto_map=auto("custom")),
    "a pipeline": lambda folder, _: edit(
        folder, "config.json", custom_pipelines={"text-generation": {"impl": "custom.Mine", "pt": ["AutoModel"]}}
    ),
    "generation": lambda folder, _: edit(folder, "generation_config.json", custom_generate="custom"),
    "a kernel": lambda folder, _: edit(folder, "config.json", _attn_implementation="someone/kernel"),
    "another kernel": lambda folder, _: edit(folder, "config.json", attn_implementation="someone/kernel"),
    "quantisation": lambda folder, _: edit(folder, "config.json", quantization_config={"quant_method": "custom"}),
    "a template": lambda folder, mark: edit(
        folder, "tokenizer_config.json", chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}"
    ),
    "pickled weights": pickled,
    "an adapter": adapter,
}


def ways(folder: Path) -> dict[str, Callable[[], Any]]:
    job = {"kind": "dataset", "model": str(folder), "input": {"path": str(folder / "prompts.jsonl")}}
    return {
        "load": lambda: tracer.trace(tracer.load(folder), tracer.Prompt(token_ids=(1, 5, 9), target=7, foil=8)),
        "shape": lambda: Shape.of(str(folder)),
        "sdpa": lambda: Shape.of(str(folder), attention="sdpa"),
        "skeleton": lambda: skeleton(folder),
        "tokenizer": lambda: read_tokenizer(str(folder)),
        "plan": lambda: tracer.plan(job) if hasattr(tracer, "plan") else None,
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    t.save(t.tiny("llama"), folder)
    return folder


def test_no_code_of_a_folder_is_run(
    attack: Attack, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    with attack("code in a model folder") as tally, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, (name, change) in enumerate(FOLDERS.items()):
            folder, mark = tmp_path / str(number), tmp_path / f"mark{number}"
            shutil.copytree(plain, folder)
            code = f"from pathlib import Path\nPath({str(mark)!r}).touch()\n"
            for file in ("custom.py", "custom_generate/generate.py", "someone/kernel.py", "__init__.py"):
                (folder / file).parent.mkdir(exist_ok=True)
                (folder / file).write_text(code)
            (folder / "prompts.jsonl").write_text('{"text": "w5 w6", "target": "w7", "foil": "w8"}\n')
            change(folder, mark)
            for way, call in ways(folder).items():
                monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 50))
                tally.tried += 1
                try:
                    call()
                except TracerError:
                    pass
                except Exception as error:  # noqa: BLE001
                    tally.tracebacks += 1
                    tally.worst = f"{name}, {way}: {type(error).__name__}: {error}"
                if mark.exists() or "y/N" in "".join(capfd.readouterr()):
                    tally.marks += 1
                    tally.worst = f"{name}, {way}: was run, or asked for"


SHADOWS = ("torch", "json", "yaml", "tokenize", "transformers", "numpy", "nnsight", "pyarrow", "typing", "queue")


@pytest.mark.slow
@pytest.mark.long
def test_no_code_of_the_folder_one_stands_in_is_run(attack: Attack, tmp_path: Path) -> None:
    """``python -m`` would look there first: a dataset's folder with a queue.py in it broke every worker."""
    (tmp_path / "prompts.jsonl").write_text('{"text": "The key", "target": " is", "foil": " are"}\n')
    for name in SHADOWS:
        (tmp_path / f"{name}.py").write_text("from pathlib import Path\nPath(__file__).with_suffix('.mark').touch()\n")
    job = {"kind": "dataset", "model": "demo", "input": {"path": "prompts.jsonl"}, "edges": False}
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    with attack("code in the folder one stands in") as tally:
        tally.tried = len(SHADOWS)
        script = Path(sys.executable).parent / "tracer"
        command = [script, "run", "job.yaml", "--out", "run"]
        ran = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        tally.marks = len(list(tmp_path.glob("*.mark")))
        tally.tracebacks = ran.stderr.count("Traceback")
        tally.lost = int(ran.returncode != 0)
        tally.worst = ran.stderr[-500:]
