"""JSON as data: the one way to read what came from outside, which says in a line what is wrong with it.

A key that is given twice, a number of more digits than any machine's, bytes that are not UTF-8 and a document nested
like a bomb are refused. Knows text. Refuses to know files, and what the content means.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

MOST_DEPTH = 100
"""Of lists and objects in one another: no file of ours or of other tools has a fifth of it."""
MOST_DIGITS = 64
"""Of a whole number; 20 hold every integer of 64 bits."""


class JsonError(ValueError):
    """A text that is no JSON of ours, as a phrase: ``is not UTF-8 text``."""


class TwiceError(JsonError):
    """A key that an object has twice."""


def parse(content: str | bytes, constants: bool = True) -> Any:
    """What a JSON document holds.

    Args:
        constants: take NaN and the infinities, which are not JSON, as Python writes them; else they are refused, and
            so are numbers that become one (1e999).

    Raises:
        JsonError: it is not JSON, or one of the traps above.
    """
    if isinstance(content, bytes):
        try:
            content = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise JsonError("is not UTF-8 text") from error
    real, constant = (None, None) if constants else (_finite, _refused)
    try:
        found = json.loads(
            content, object_pairs_hook=_unique, parse_int=_integer, parse_float=real, parse_constant=constant
        )
    except RecursionError as error:
        raise JsonError("is nested too deeply") from error
    except JsonError:
        raise
    except ValueError as error:
        raise JsonError(f"is not JSON ({error})") from error
    if content.count("[") + content.count("{") > MOST_DEPTH and _is_deep(found):
        raise JsonError("is nested too deeply")
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of a repeated key the last value would win, silently."""
    content = dict(pairs)
    if len(content) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise TwiceError(f"has the key {key[:60]!r} twice")
    return content


def _integer(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise JsonError(f"holds a whole number of {len(text)} digits")
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise JsonError(f"holds {text[:60]}, which no number of 64 bits is")
    return value


def _refused(name: str) -> None:
    raise JsonError(f"holds {name}, which is not a JSON number")


def _is_deep(content: Any) -> bool:
    """Whether lists and objects lie in one another too often: level by level, without recursion."""
    level = [content]
    for _ in range(MOST_DEPTH):
        level = [
            inner
            for one in level
            for inner in (one.values() if isinstance(one, dict) else one if isinstance(one, list) else ())
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True
