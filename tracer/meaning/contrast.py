"""Which neurons tell one set of prompts from another by their values alone, without any target token.

A column is a (layer, neuron, polarity): how far its value is on that side of 0, at the last position of a prompt, or on
average, or at most, over all. Knows prompts and one forward of each, here or on a server; values wait in a temporary
file. How columns are chosen, scored and tested is meaning/separation.py.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, get_args

import numpy as np
from torch import Tensor

from tracer.attribution.attribute import notes, split
from tracer.choices import Basis, ValueAt
from tracer.errors import JobError, option, say, writing
from tracer.meaning.concepts import Concepts, table_of
from tracer.meaning.labels import Question
from tracer.meaning.separation import LEAST, Array, Block, Design, Labels, lacking, separate
from tracer.model import passes
from tracer.model.model import Model
from tracer.model.named import AnyModel, model_of
from tracer.model.state import undisturbed
from tracer.prompts import Asked, Batch, as_prompts, encode
from tracer.settings import BASES
from tracer.system import bars

LABEL, POSITIVE, NEGATIVE = "set", "positive", "negative"
"""What the table calls the two sets."""
_COLUMNS = 2048  # neurons whose values on all prompts are in memory at once


@undisturbed()
def contrast(
    model: AnyModel,
    positive: Sequence[Asked],
    negative: Sequence[Asked],
    *,
    position: ValueAt | str = "last",
    paired: bool = False,
    basis: Basis | str = "activation",
    candidates: int = 50,
    permutations: int = 10_000,
    seed: int = 0,
    memory: int | None = None,
    progress: bars.Report | bool | None = None,
) -> Concepts:
    """Find the neurons whose values tell two sets of prompts apart, without any target token.

    For every (layer, neuron, polarity) the area under the ROC curve of how far its value is on that side of 0:
    P(farther on a positive prompt than on a negative one) + P(equal) / 2. The `candidates` farthest from .5 on one half
    of the prompts are scored on the other half, with a 95 % interval, a permutation p-value in the direction of the
    first half, and Benjamini and Hochberg's q over all candidates.

    Args:
        model: from `tracer.load`, or the name of a model (``"demo"``, a folder, a Hugging Face id), which is loaded and
            kept until a call names another.
        positive, negative: the prompts; what they ask about has no effect. A prompt that comes again in its set, or a
            pair, is left out: it would be in both halves.
        position: ``last``, or ``mean`` or ``max`` over all positions of a prompt.
        paired: prompt i of one set belongs to prompt i of the other, as in minimal pairs: pairs stay in one half of the
            prompts, and which of a pair is positive is what is permuted.
        basis: ``activation`` (d_mlp neurons a layer), or with d_model: ``output`` (of the MLP), ``residual`` or
            ``attention``.
        candidates: neurons tested. permutations, seed: of the test.
        memory: bytes one batch may use. Values wait in a temporary file of 8 bytes per neuron and prompt.
        progress: a bar appears on a terminal and in a notebook after half a second; False for none, or a function
            that is called with (done, total) prompts.

    Returns:
        The neurons that were tested, with their areas, p and q.

    Raises:
        JobError: a prompt or a setting is wrong, or there are too few prompts.
        RunError: there is no room for the temporary file. RemoteError: a server fails.
    """
    design, given = Design(candidates, permutations, seed), [as_prompts(part) for part in (positive, negative)]
    checked(len(given[0]), len(given[1]), position, paired, basis, design)
    model = model_of(model)
    encoded = [[encode(one, model) for one in part] for part in given]
    yes, no = _once(*([one.token_ids for one in part] for part in encoded), paired=paired)
    ids, labels = [*yes, *no], checked(len(yes), len(no), position, paired, basis, design)
    said = notes(itertools.chain(*encoded), model)
    if left := sum(map(len, given)) - len(ids):
        where = "as pairs" if paired else "in their set"
        said += (f"{left:,} of {left + len(ids):,} prompts came before {where}: left out",)
    say(said)
    with _temporary() as file, bars.shown(progress, "prompts") as report:
        for part, values in _values(model, ids, position, basis, memory):
            with _room():
                file.write(values.numpy().tobytes())
            if report is not None:
                report(part.stop, len(ids))
        with _room():
            file.flush()
        shape = len(ids), model.n_layers, 2, model.n_neurons(basis)
        scores, count = separate(_blocks(np.memmap(file, np.float32, "r", shape=shape)), labels, design)
    question = Question(LABEL, np.arange(len(ids)), labels, (POSITIVE,), NEGATIVE, ())
    table, told = table_of(question, scores, count)
    return Concepts(table, tuple(told), said, design, "pairs" if paired else None)


def checked(n_positive: int, n_negative: int, position: str, paired: bool, basis: str, design: Design) -> Labels:
    """The two sets as labels of prompts, positive ones first; known before a model is.

    Raises:
        JobError: a setting that is none, or too few prompts.
    """
    for name, value, known in (("position", position, get_args(ValueAt)), ("basis", basis, BASES)):
        if value not in known:
            raise JobError(option(name, value), f"must be {', '.join(known)}", f"the default is {known[0]}")
    design.check()
    counts = f"{n_positive:,} positive and {n_negative:,} negative prompts"
    if paired and n_positive != n_negative:
        raise JobError(counts, "are not pairs", f"give as many of either, or leave out {option('paired', True)}")
    codes = np.repeat([1, 0], [n_positive, n_negative])
    pairs = np.concatenate([np.arange(n_positive), np.arange(n_negative)]) if paired else None
    labels = Labels(codes, (1,), pairs)
    if lacking(labels, 1, design) is not None:
        raise JobError(counts, f"are too few: {LEAST} of either are needed, for two halves", "give more")
    return labels


def _once(
    positive: Sequence[tuple[int, ...]], negative: Sequence[tuple[int, ...]], *, paired: bool
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Token ids of positive and negative prompts, each once in its set, or each pair once."""
    if not paired:
        return list(dict.fromkeys(positive)), list(dict.fromkeys(negative))
    pairs = dict.fromkeys(zip(positive, negative, strict=True))
    return [one for one, _ in pairs], [other for _, other in pairs]


def _room() -> AbstractContextManager[None]:
    return writing(tempfile.gettempdir(), "a temporary file in", "make room for it, or set TMPDIR")


def _temporary() -> Any:
    with _room():
        return tempfile.TemporaryFile(prefix="tracer-contrast-")


def _values(
    model: Model, ids: Sequence[tuple[int, ...]], position: str, basis: str, memory: int | None
) -> Iterator[tuple[range, Tensor]]:
    """The prompts of each batch, and their values [prompt, layer, side, neuron]."""

    def batch(part: range) -> tuple[range, Tensor]:
        some = Batch(tuple(ids[i] for i in part))
        return part, passes.pooled(model, some, position, basis=basis)

    yield from model.stream(batch, list(split(model, [len(one) for one in ids], memory)))


def _blocks(held: Any) -> Iterator[Block]:
    """The columns, in the order of layer, neuron and polarity, positive first."""
    from scipy.sparse import csc_array

    n_prompts, n_layers, _, n_neurons = held.shape
    for layer in range(n_layers):
        for start in range(0, n_neurons, _COLUMNS):
            values: Array = held[:, layer, :, start : start + _COLUMNS].transpose(0, 2, 1).reshape(n_prompts, -1)
            neurons = np.repeat(np.arange(start, start + values.shape[1] // 2), 2)
            polarity = np.tile([1, -1], values.shape[1] // 2)
            yield Block(np.stack([np.full_like(neurons, layer), neurons, polarity], axis=1), csc_array(values))
