"""Neurons of experts have one number in their layer and one name, and both say the same neuron."""

from __future__ import annotations

import itertools

import pytest

from tracer.errors import JobError
from tracer.experts import Experts, Neuron, Numbering, by_shape, parse, parse_within
from tracer.settings import ModelRecord

MIXTURE = Experts(layers=(1, 2, 3), n_experts=4, d_expert=5, d_shared=3)
NUMBERING = Numbering([MIXTURE])
DENSE = {
    "name": "demo",
    "revision": None,
    "family": "llama",
    "fingerprint": "0" * 64,
    "dtype": "float32",
    "n_layers": 4,
    "d_model": 8,
    "d_mlp": 23,
    "n_heads": 2,
    "parallel": False,
}


def test_every_number_of_a_mixture_has_one_name_and_back() -> None:
    names = [NUMBERING.name(2, number) for number in range(MIXTURE.n_neurons)]
    assert len(set(names)) == MIXTURE.n_neurons == 23
    assert names[:2] + names[5:6] + names[-4:] == [
        "L2 E0 N0",
        "L2 E0 N1",
        "L2 E1 N0",
        "L2 E3 N4",
        "L2 N20",
        "L2 N21",
        "L2 N22",
    ]
    assert [NUMBERING.pair(parse(name)) for name in names] == [(2, number) for number in range(23)]
    assert NUMBERING.experts_of([2] * 23, range(23)) == [*itertools.chain(*([e] * 5 for e in range(4))), *[None] * 3]


def test_a_dense_layer_has_plain_numbers() -> None:
    assert NUMBERING.name(0, 17) == "L0 N17"
    assert Numbering().name(2, 17) == "L2 N17"
    assert NUMBERING.expert(0, 17) is None
    assert not Numbering()


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("3:45", (3, None, 45)),
        ("3/45", (3, None, 45)),
        ("L3 N45", (3, None, 45)),
        ("3:17:45", (3, 17, 45)),
        ("3/17/45", (3, 17, 45)),
        (" l3e17n45 ", (3, 17, 45)),
        ("L3 E17 N45", (3, 17, 45)),
    ],
)
def test_what_people_write_is_read(text: str, meant: tuple[int, int | None, int]) -> None:
    assert parse(text) == Neuron(*meant)


@pytest.mark.parametrize("text", ["", "3", "3:", ":3:4", "1:2:3:4", "L3 E1", "L3 N-1", "3:٣", "L3 N4 x", None, 3])
def test_what_is_no_neuron_is_refused(text: object) -> None:
    with pytest.raises(JobError, match="LAYER:NEURON or LAYER:EXPERT:NEURON"):
        parse(text)


def test_a_neuron_within_a_layer_is_read() -> None:
    assert [parse_within(3, text) for text in ("45", "N45", "17:45", "17/45", "E17 N45", "e17n45")] == [
        Neuron(3, None, 45),
        Neuron(3, None, 45),
        *[Neuron(3, 17, 45)] * 4,
    ]
    with pytest.raises(JobError, match="EXPERT:NEURON"):
        parse_within(3, "-1")


@pytest.mark.parametrize(
    ("given", "rule"),
    [
        (Neuron(0, 1, 1), "layer 0 has no experts; leave the expert out; layers with experts are 1 to 3"),
        (Neuron(2, 4, 1), "the layer has 4 experts; use E0 to E3"),
        (Neuron(2, 1, 15), "has 5 neurons; use N0 to N4"),
    ],
)
def test_a_neuron_that_the_model_lacks_is_refused(given: Neuron, rule: str) -> None:
    with pytest.raises(JobError, match=rule):
        NUMBERING.number(given)


def test_a_number_in_the_layer_may_stand_beside_its_expert() -> None:
    assert [NUMBERING.number(Neuron(2, 1, number)) for number in (2, 7)] == [7, 7]
    assert NUMBERING.of_parts((2, 1, 2)) == NUMBERING.of_parts((2, 7)) == (2, 7)


def test_layers_of_one_shape_are_kept_together() -> None:
    found = list(by_shape([(1, 4, 5, 0), (2, 8, 5, 0), (3, 4, 5, 0)]))
    assert [(one.layers, one.n_experts) for one in found] == [((1, 3), 4), ((2,), 8)]


def test_the_record_of_a_dense_model_is_what_it_was() -> None:
    dense = ModelRecord(**DENSE)
    assert dense.model_dump(mode="json") == DENSE
    assert not dense.numbering()


def test_the_record_of_a_mixture_says_its_experts_and_comes_back() -> None:
    record = ModelRecord(**DENSE, experts=(MIXTURE,))
    again = ModelRecord.model_validate_json(record.model_dump_json())
    assert again == record
    assert again.numbering().name(1, 7) == "L1 E1 N2"
    assert not again.numbering("output")
