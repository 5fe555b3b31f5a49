"""Model folders whose files say what cannot be: each is a line, or loads; none builds for ever."""

from __future__ import annotations

import json
import random
import shutil
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

ODD: list[Any] = [None, "x", "", -1, 0, 2**63, 10**12, 1e30, 0.5, True, [], [1], {}, {"rope_type": "x"}, "/dev/zero"]
TEXTS = {
    "empty": "",
    "half": '{"model_type": "llama"',
    "a list": "[]",
    "a number": "7",
    "deep": "[" * 200_000,
    "deep object": '{"a":' * 200_000,
    "a long number": '{"model_type": "llama", "vocab_size": ' + "9" * 5000 + "}",
    "not text": "\udcff\udcfe\x00",
    "nan": '{"model_type": "llama", "hidden_size": NaN}',
    "twice": '{"model_type": "llama", "model_type": "gpt2"}',
}
WAYS: dict[str, Callable[[Path], Any]] = {
    "load": tracer.load,
    "shape": lambda folder: Shape.of(str(folder)),
    "skeleton": skeleton,
    "tokenizer": lambda folder: read_tokenizer(str(folder)),
}
FILES = ("config.json", "tokenizer_config.json", "tokenizer.json", "generation_config.json")


def changes(folder: Path) -> list[tuple[str, str, Callable[[Path], None]]]:
    """Every odd value of every key of the small files, and every odd text of each: file, what, and how it is made."""

    def with_value(file: str, key: str, value: Any) -> Callable[[Path], None]:
        def change(where: Path) -> None:
            content = json.loads((where / file).read_text())
            (where / file).write_text(json.dumps(content | {key: value}))

        return change

    def with_text(file: str, text: str) -> Callable[[Path], None]:
        def change(where: Path) -> None:
            (where / file).write_text(text, errors="surrogateescape")

        return change

    made = []
    for file in FILES:
        if file != "tokenizer.json":
            keys = json.loads((folder / file).read_text())
            made += [(file, f"{key}={odd!r}", with_value(file, key, odd)) for key in keys for odd in ODD]
        else:
            made += [
                (file, f"{key}={odd!r}", with_value(file, key, odd)) for key in ("model", "version") for odd in ODD
            ]
        made += [(file, name, with_text(file, text)) for name, text in TEXTS.items()]
    return made


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    t.save(t.tiny("llama"), folder)
    return folder


@pytest.mark.parametrize(
    "count", [60, pytest.param(None, marks=[pytest.mark.slow, pytest.mark.long], id="all of them")]
)
def test_an_odd_folder_is_a_line_or_loads(count: int | None, plain: Path, tmp_path: Path, attack: Attack) -> None:
    every = changes(plain)
    some = every if count is None else random.Random(0).sample(every, count)
    with attack("odd files of a model") as tally, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for file, what, change in some:
            shutil.rmtree(tmp_path / "model", ignore_errors=True)
            shutil.copytree(plain, tmp_path / "model")
            change(tmp_path / "model")
            for way, call in WAYS.items():
                tally.tried += 1
                try:
                    call(tmp_path / "model")
                except TracerError:
                    pass
                except Exception as error:  # noqa: BLE001
                    tally.tracebacks += 1
                    tally.worst = f"{way}, {file}, {what}: {type(error).__name__}: {str(error)[:200]}"
