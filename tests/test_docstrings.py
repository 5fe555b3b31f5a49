"""`help()` stands alone: what the public interface says of itself needs no other page, and leaves no argument out."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

import pytest

import tracer
from tracer import choices, settings

ELSEWHERE = {
    "another docstring": re.compile(
        r"\bas (?:in|of|for|by) `|(?<!such )\bas `\w+`(?! (?:has|and|make|take|is))|\bArgs: as\b"
    ),
    "a page of ours": re.compile(r"\b\w+\.md\b|\bdocs/|\bmethod\.md|\bsection \d"),
    "a module": re.compile(r"\w/\w+\.py\b|\bsee this module\b|`(?:schemas|statistics|selection|descriptions)\.\w"),
    "an inner class": re.compile(r"`Encoded`|`Traced`|`Said`"),
}
"""What says nothing to whoever has the package and not the repository."""
CITED = re.compile(r"^Source: .*arXiv(?:.|\n)*?(?:\n\n|\Z)", re.MULTILINE)
"""Where the paper is meant."""
PLAIN = ("Raises", "Returns", "Source", "Yields", "Attributes", "Args")


def public() -> Iterator[tuple[str, Any]]:
    """Every public function and class, and every method and property of these that is ours."""
    for name in tracer.__all__:
        found = getattr(tracer, name)
        yield name, found
        if not inspect.isclass(found) or issubclass(found, BaseException):
            continue
        for attribute in dir(found):
            member = inspect.getattr_static(found, attribute)
            plain = member.__func__ if isinstance(member, classmethod | staticmethod) else member
            plain = member.fget if isinstance(member, property) else plain
            ours = callable(plain) and (getattr(plain, "__module__", None) or "").startswith("tracer.")
            if ours and not attribute.startswith("_"):
                yield f"{name}.{attribute}", member if isinstance(member, property) else plain


def documented(doc: str) -> set[str]:
    """Names that a docstring's Args and Attributes explain: ``one, two: what they are. three: ...``."""
    text = "\n".join(part for title, part in sections(doc) if title in ("Args", "Attributes"))
    return {name for group in re.findall(r"((?:\w+,\s+)*\w+): ", text) for name in re.split(r",\s+", group)}


def sections(doc: str) -> Iterator[tuple[str, str]]:
    """A docstring's sections by title."""
    parts = re.split(rf"^({'|'.join(PLAIN)}):", doc, flags=re.MULTILINE)
    yield "", parts[0]
    yield from zip(parts[1::2], parts[2::2], strict=True)


def parameters(name: str, found: Any) -> set[str]:
    """What a public function takes, and what a public record holds."""
    if isinstance(found, property) or (inspect.isclass(found) and issubclass(found, BaseException | Warning)):
        return set()
    if inspect.isclass(found):
        if dataclasses.is_dataclass(found):
            return {field.name for field in dataclasses.fields(found)}
        return set(getattr(found, "model_fields", {}))
    taken = inspect.signature(found).parameters
    return {one for one in taken if one not in ("self", "cls")}


def test_nothing_refers_to_what_only_the_repository_has() -> None:
    found = {
        (name, what, hit[0])
        for name, one in public()
        for what, pattern in ELSEWHERE.items()
        if (hit := pattern.search(CITED.sub("", inspect.getdoc(one) or "")))
    }
    assert found == set()


def test_every_argument_and_field_is_explained() -> None:
    found = {}
    for name, one in public():
        doc = inspect.getdoc(one)
        assert doc, f"{name} says nothing"
        said = documented(doc)
        if "." in name and not said and len(parameters(name, one)) <= 1 and not isinstance(one, property):
            continue  # a method of one argument may explain it in its sentence
        if missing := parameters(name, one) - said:
            found[name] = sorted(missing)
    assert found == {}


def test_public_functions_say_what_they_return() -> None:
    silent = [
        name
        for name, one in public()
        if inspect.isfunction(one) and "." not in name and "Returns" not in dict(sections(inspect.getdoc(one) or ""))
    ]
    assert silent == []


@pytest.mark.parametrize(
    ("function", "argument", "known"),
    [
        ("trace", "method", choices.Method),
        ("trace", "baseline", choices.Baseline),
        ("trace", "basis", choices.Basis),
        ("attribute", "metric", choices.MetricKind),
        ("evaluate", "ablation", choices.Ablation),
        ("estimate_quality", "ablation", choices.SingleAblation),
        ("export", "format", choices.GraphFormat),
        ("load", "dtype", choices.Dtype),
        ("load", "attention", choices.AttentionKernel),
        ("swap", "baseline", choices.SwapBaseline),
    ],
)
def test_editors_know_the_choices(function: str, argument: str, known: Any) -> None:
    hint = get_type_hints(getattr(tracer, function))[argument]
    assert set(get_args(known)) <= {value for part in get_args(hint) for value in get_args(part)}


def test_the_choices_are_those_that_are_checked() -> None:
    from tracer.circuit.exchange import FORMATS
    from tracer.model.model import DTYPES, QUANTIZED

    assert set(get_args(choices.GraphFormat)) == set(FORMATS)
    assert set(get_args(choices.Dtype)) == {*DTYPES, *QUANTIZED}
    assert set(get_args(choices.RulesName)) == set(settings.VARIANTS)
