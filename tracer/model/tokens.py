"""The tokenizer of a model's folder or id: the one that its files define, whatever transformers makes of them.

Knows that transformers builds some tokenizers by their class, so that they split text otherwise than the tokenizer.json
they were trained with, and an empty one where there are no files. Refuses to know what texts become of it (prompts.py).
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from tracer.errors import ModelError
from tracer.model import folder, gguf
from tracer.system import jsontext, wholefile

_WHOLE = ("tokenizer.json", "tokenizer.model", "tekken.json", "spiece.model", "sentencepiece.bpe.model", "vocab.txt")
_PARTS = ("vocab.json", "merges.txt")
"""Files that are a tokenizer: any of the first, or both of these."""
_TEMPLATE = "chat_template.json"
_PROBE = (
    "The keys near the cabinet weren't 2023, 650841823 or 3.14\n\n  They'RE\tHERE, aren't they?\r\n"
    "stra\u00dfe caf\u00e9 cafe\u0301 \ufb01ne \uff21 \u65e5\u672c\u8a9e \U0001f600 def f(x):\n    return x[0]  # !!  "
)
"""Text on which tokenizers of one vocabulary differ: digits, contractions, spaces, line ends, other scripts."""


def read_tokenizer(source: folder.Source) -> tuple[Any, tuple[str, ...]]:
    """The tokenizer, and a sentence where it is not the one that AutoTokenizer makes.

    Raises:
        ModelError: there are no files of one, or what transformers makes of them splits text otherwise than they say.
        OSError, ValueError: they cannot be read.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if source.gguf is not None:
        return _of_gguf(source.gguf), ()
    where, options = source.where, {"revision": source.revision, "trust_remote_code": False}
    if not any(folder.path_of(source, name) for name in _WHOLE) and not all(
        folder.path_of(source, name) for name in _PARTS
    ):
        known = ", ".join((_WHOLE[0], _WHOLE[1], " and ".join(_PARTS)))
        raise ModelError(source.shown, f"holds no tokenizer ({known})", "put the files of its tokenizer there")
    made = AutoTokenizer.from_pretrained(where, **options)
    _give_template(made, source)
    own = folder.path_of(source, _WHOLE[0])
    if own is None or not made.is_fast or _agrees(made, wanted := _split(Tokenizer.from_file(own))):
        return made, ()
    plain = PreTrainedTokenizerFast.from_pretrained(where, **options)
    _give_template(plain, source)
    if not _agrees(plain, wanted):
        rule = f"its tokenizer.json splits text otherwise than the tokenizer that transformers makes ({_name(made)})"
        raise ModelError(source.shown, rule, "save the tokenizer that it was trained with into it")
    said = (
        f"texts are split as the tokenizer.json of {source.shown} says; transformers' {_name(made)} does it otherwise"
    )
    return plain, (said,)


def _give_template(tokenizer: Any, source: folder.Source) -> None:
    """Give a tokenizer the chat template that older models for images have beside it, for their processor."""
    if not source.has_text_part or getattr(tokenizer, "chat_template", None):
        return
    if path := folder.path_of(source, _TEMPLATE):
        content = jsontext.parse(wholefile.read(path))
        if isinstance(content, dict) and isinstance(content.get("chat_template"), str):
            tokenizer.chat_template = content["chat_template"]


def _of_gguf(header: gguf.Header) -> Any:
    """The tokenizer of a GGUF file, as transformers builds it from the file alone; it puts no special token first."""
    from transformers import PreTrainedTokenizerFast

    if "tokenizer.ggml.tokens" not in header.values:
        raise ModelError(header.name, "holds no tokenizer (tokenizer.ggml.tokens)", "convert the model again")
    with tempfile.TemporaryDirectory() as alone:
        (Path(alone) / header.path.name).symlink_to(header.path.resolve())
        return PreTrainedTokenizerFast.from_pretrained(alone, gguf_file=header.path.name)


def _split(own: Tokenizer) -> list[int]:
    own.no_padding()
    own.no_truncation()
    return own.encode(_PROBE, add_special_tokens=False).ids


def _agrees(made: Any, wanted: list[int]) -> bool:
    return list(made.encode(_PROBE, add_special_tokens=False)) == wanted


def _name(made: Any) -> str:
    return type(made).__name__
