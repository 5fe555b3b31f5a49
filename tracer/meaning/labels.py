"""What is asked of prompts' labels: which values are told from which others, and whether enough prompts have them.

Knows labels as text. Refuses to know neurons, and where prompts come from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from tracer.errors import JobError, option, quoted
from tracer.meaning.separation import LEAST, Array, Design, Labels, lacking
from tracer.records import is_list

_SHOWN = 20  # of labels and values that an error names


@dataclass(frozen=True)
class Asked:
    """What is asked of prompts' labels.

    Attributes:
        labels: which are scored. values: of them; all if there are none, and of two values the last alone.
        group: a label whose values are prompts that belong together: none of them is cut apart by the halves.
        design: how neurons are chosen and tested.
    """

    labels: tuple[str, ...]
    values: tuple[str, ...] = ()
    group: str | None = None
    design: Design = field(default_factory=Design)


@dataclass(frozen=True)
class Labelled:
    """Prompts: what each is, whatever tells it from others that are not the same, and its labels."""

    prompts: Sequence[Hashable]
    labels: Sequence[Mapping[str, str]]


@dataclass(frozen=True)
class Question:
    """One label: the rows among all prompts that have it, what they are, and what was left out, in sentences.

    `values` are the names of `rest.asked`; `against` is the other value, where there are two.
    """

    label: str
    rows: Array
    rest: Labels
    values: tuple[str, ...]
    against: str | None
    left_out: tuple[str, ...]


def asked_of(
    label: str | Sequence[str],
    values: str | Sequence[str] | None,
    group: str | None,
    candidates: int,
    permutations: int,
    seed: int,
) -> Asked:
    """Arguments as a record.

    Raises:
        JobError: values that do not go together.
    """
    labels = tuple(label) if is_list(label) else (str(label),)
    chosen = () if values is None else tuple(values) if is_list(values) else (str(values),)
    if chosen and len(labels) > 1:
        step = f"give one label, or leave out {option('values')}"
        raise JobError(f"values {quoted(list(chosen))}", f"are of one label, and there are {len(labels)}", step)
    if not labels or len(set(labels)) < len(labels) or group in labels:
        raise JobError(f"label {quoted(list(labels))}", "must be one or more, each once, and not the group", "choose")
    design = Design(candidates, permutations, seed)
    design.check()
    return Asked(labels, chosen, group, design)


def questions_of(given: Labelled, asked: Asked, strict: bool = True) -> tuple[list[Question], list[str]]:
    """What each label asks of the prompts, and what is left out, in sentences.

    Args:
        given: the prompts.
        strict: refuse a label that is not there, or has no value that can be scored; else leave it out.

    Raises:
        JobError: that.
    """
    questions, left_out = [], list[str]()
    for label in asked.labels:
        try:
            one = _question(given, label, asked, strict)
        except JobError as error:
            if strict:
                raise
            left_out.append(f"{error.value}: {error.rule}")
        else:
            questions.append(one)
            left_out += one.left_out
    return questions, left_out


def _question(prompts: Labelled, label: str, asked: Asked, strict: bool) -> Question:
    labels = prompts.labels
    _check_known(labels, label, "label")
    if asked.group is not None:
        _check_known(labels, asked.group, "group")
    rows = np.array([i for i, one in enumerate(labels) if label in one and (asked.group or label) in one], np.int64)
    given = [labels[i][label] for i in rows]
    there = _in_order(set(given))
    _check_values(label, there, len(given), asked.values)
    place = {value: number for number, value in enumerate(there)}
    same = [(prompts.prompts[i], labels[i][label]) if asked.group is None else labels[i][asked.group] for i in rows]
    rest = Labels(np.array([place[value] for value in given]), (), numbered(same))
    kept, said = [], [f"{len(labels) - len(rows):,} prompts have no label {label!r}"] * (len(rows) < len(labels))
    short: list[str] = []
    for value in asked.values or (there if len(there) > 2 else there[-1:]):
        why = lacking(rest, place[value], asked.design)
        if why is None:
            kept.append(value)
        elif asked.values and strict:
            raise JobError(f"value {quoted(value)} of label {quoted(label)}", why, "give more prompts, or other values")
        else:
            short.append(f"value {value!r} of label {label!r} {why}")
    if short:
        others = f"; so it is with {len(short) - 1} other values, which are not scored either" if short[1:] else ""
        said.append(short[0] + others)
    if not kept:
        counts = ", ".join(f"{quoted(value)} {count:,}" for value, count in Counter(given).most_common(5))
        rule = f"has no value that can be told from the others: {LEAST} prompts or more on both sides are needed"
        raise JobError(f"label {quoted(label)} ({counts})", rule, "give more prompts, or another label")
    against = next(value for value in there if value != kept[0]) if len(there) == 2 else None
    return Question(
        label, rows, replace(rest, asked=tuple(place[value] for value in kept)), tuple(kept), against, tuple(said)
    )


def _check_values(label: str, there: Sequence[str], count: int, values: Iterable[str]) -> None:
    """Refuse a label of one value, and values that are not there."""
    if len(there) < 2:
        which = (
            f"has one value, {quoted(there[0])}, on all {count:,} prompts with it" if there else "is on none of them"
        )
        raise JobError(f"label {quoted(label)}", which, "choose a label that prompts differ in")
    for value in values:
        if value not in there:
            known = ", ".join(map(quoted, there[:_SHOWN])) + (", ..." if len(there) > _SHOWN else "")
            raise JobError(f"value {quoted(value)}", f"is none of label {quoted(label)}", f"use one of {known}")


def numbered(names: Sequence[Hashable]) -> Array:
    """Equal names as equal whole numbers."""
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(name, len(known)) for name in names], np.int64)


def _check_known(labels: Iterable[Mapping[str, str]], name: str, what: str) -> None:
    known = sorted({label for one in labels for label in one})
    if name in known:
        return
    step = f"use one of {', '.join(map(quoted, known[:_SHOWN]))}"
    if not known:
        step = "keep columns as labels when the prompts are run (labels: of the job's input)"
    raise JobError(f"{what} {quoted(name)}", "is no label of these prompts", step)


def _in_order(values: Iterable[str]) -> tuple[str, ...]:
    """Values by their number where all are numbers, else as text."""
    values = sorted(values)
    try:
        return tuple(sorted(values, key=float))
    except ValueError:
        return tuple(values)
