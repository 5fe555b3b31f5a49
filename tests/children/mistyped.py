"""Encode prompts of wrong types, without the type checks of the test suite."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from tracer.errors import JobError
from tracer.prompts import Prompt, encode

tokenizer = SimpleNamespace(decode=lambda *_, **__: "x", encode=lambda *_, **__: [1])
words: Any = SimpleNamespace(vocab_size=101, context_length=12, tokenizer=tokenizer)
WRONG: list[dict[str, Any]] = [
    {"token_ids": [1, 2.5]},
    {"token_ids": [1, "a"]},
    {"token_ids": [1, 5], "positions": [0.5]},
    {"token_ids": [1, None]},
    {"token_ids": [1, 5], "target": 2.5},
    {"text": 55},
    {"token_ids": 56},
    {"token_ids": [1, 5], "positions": 1.5},
    {"token_ids": [1, 5], "counterfactual": 57},
    {"token_ids": "58"},
    {"token_ids": b"59"},
    {"token_ids": {60}},
    {"text": "The", "id": 61},
    {"token_ids": [1, 5], "positions": "62"},
    {"token_ids": [1, np.float32(63)]},
]
for wrong in WRONG:
    try:
        encode(Prompt(**wrong), words)
    except JobError as problem:
        print(type(problem).__name__, problem)
