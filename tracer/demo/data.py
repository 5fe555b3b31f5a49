"""What the demo model is taught: sentences, their seeded generator, and which combinations are held out.

Knows the grammar, the facts and the splits. Refuses to know tokens, tensors or models, and needs none
of them. A *combination* is a (noun, verb) pair, a (head noun, other noun) pair or a city's two-hop
sentence; a held-out combination occurs in no training sentence, whatever the seed or the number of steps.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Literal, NamedTuple

from tracer.demo.words import (
    ADJECTIVES,
    CLAUSE_VERBS,
    MAIN_VERBS,
    PARTICIPLES,
    PEOPLE,
    PREPOSITIONS,
    STATES,
    THINGS,
    Noun,
    State,
    Verb,
)

Split = Literal["train", "held_out"]
Structure = Literal["simple", "nounpp", "rc", "within_rc"]
Relation = Literal["capital", "code"]

STRUCTURES: tuple[Structure, ...] = ("simple", "nounpp", "rc", "within_rc")
RELATIONS: tuple[Relation, ...] = ("capital", "code")
NOUNS = PEOPLE + THINGS
CITY_STATE: dict[str, State] = {city: state for state in STATES for city in state.cities}

_SPLIT_SEED = 20_240
_HELD_NOUN_SHARE = 4  # one combination in so many is held out
# The demo prompts whose combinations are always held out, and those that must be trained because the
# demo shows the verb itself (a verb never seen after a noun would be a dull first example).
_ALWAYS_HELD_NOUNS = {("secretary", "car"), ("key", "cabinet"), ("athlete", "manager")}
_ALWAYS_TRAINED_VERBS = {("secretary", "are"), ("parent", "are"), ("key", "are"), ("athlete", "are")}
_ALWAYS_HELD_CITY = "Dallas"

# What is drawn how often: agreement among all sentences, then two hops among the others (once they are
# taught at all), then states among what is left.
_AGREEMENT_SHARE = 0.2
_TWO_HOP_SHARE = 0.3
_STATE_SHARE = 0.25

_CITY_STARTS = (
    "the city of",
    "the state containing",
    "the history of the state containing",
    "the people of the state containing",
    "the state of the people in",
    "the history of the city of",
)
_STATE_STARTS = ("", "the state of ", "the state called ")


class Part(NamedTuple):
    """A stretch of a sentence, and whether it is an answer (full loss weight) or filler."""

    text: str
    is_answer: bool = False


Sentence = tuple[Part, ...]


def text_of(sentence: Sentence) -> str:
    """The sentence as plain text."""
    return "".join(part.text for part in sentence)


# ---------------------------------------------------------------------------------------- splits


def _held_noun_verbs() -> frozenset[tuple[str, str]]:
    rng = random.Random(f"{_SPLIT_SEED} noun-verb")
    main = [(noun.singular, verb.plural) for noun, verb in product(NOUNS, MAIN_VERBS)]
    clause = [(noun.singular, verb.plural) for noun, verb in product(PEOPLE, CLAUSE_VERBS)]
    held = {pair for pair in main + clause if rng.randrange(_HELD_NOUN_SHARE) == 0}
    return frozenset(held - _ALWAYS_TRAINED_VERBS)


def _held_noun_nouns() -> frozenset[tuple[str, str]]:
    rng = random.Random(f"{_SPLIT_SEED} noun-noun")
    pairs = [(head.singular, other.singular) for head, other in product(NOUNS, NOUNS)]
    return frozenset(pair for pair in pairs if rng.randrange(_HELD_NOUN_SHARE) == 0) | _ALWAYS_HELD_NOUNS


def _held_cities() -> frozenset[str]:
    """A third of the cities: two or three of every state's seven, so that each state is trained too."""
    rng = random.Random(f"{_SPLIT_SEED} cities")
    held: set[str] = set()
    for index, state in enumerate(STATES):
        cities = [city for city in state.cities if city != _ALWAYS_HELD_CITY]
        rng.shuffle(cities)
        always = [_ALWAYS_HELD_CITY] if _ALWAYS_HELD_CITY in state.cities else []
        held.update((always + cities)[: 2 if index % 3 else 3])
    return frozenset(held)


HELD_NOUN_VERBS = _held_noun_verbs()
"""Pairs (noun singular, verb plural) that no training sentence has as subject and verb."""
HELD_NOUN_NOUNS = _held_noun_nouns()
"""Pairs (head, other noun), both singular, that no training sentence has in a phrase or a clause."""
HELD_CITIES = _held_cities()
"""Cities of which no two-hop sentence (capital or code) is trained; their state is."""


# ------------------------------------------------------------------------- subject-verb agreement


@dataclass(frozen=True)
class Agreement:
    """A prompt that ends before a verb, the verb's right form, its wrong one, and the other number.

    `other` is the same prompt with the number of the noun the verb agrees with changed, so the right
    and the wrong form change places; it has as many words as `prompt`. `combinations` are the pairs
    that decide the split.
    """

    structure: Structure
    prompt: str
    answer: str
    foil: str
    other: str
    combinations: tuple[tuple[str, str], ...]

    @property
    def is_held_out(self) -> bool:
        """Whether any of its pairs is held out."""
        return any(pair in HELD_NOUN_VERBS or pair in HELD_NOUN_NOUNS for pair in self.combinations)


class _Slots(NamedTuple):
    """What fills an agreement sentence. Unused slots are ignored."""

    head: Noun
    head_number: int
    noun: Noun
    noun_number: int
    link: str
    clause_verb: Verb
    main_verb: Verb


def _prompt(structure: Structure, s: _Slots) -> str:
    start = f"The {s.head[s.head_number]}"
    match structure:
        case "simple":
            return start
        case "nounpp":
            return f"{start} {s.link} the {s.noun[s.noun_number]}"
        case "within_rc":
            return f"{start} that the {s.noun[s.noun_number]}"
        case "rc":
            return f"{start} that the {s.noun[s.noun_number]} {s.clause_verb[s.noun_number]}"


def _combinations(structure: Structure, s: _Slots) -> tuple[tuple[str, str], ...]:
    main = (s.head.singular, s.main_verb.plural)
    nouns = (s.head.singular, s.noun.singular)
    clause = (s.noun.singular, s.clause_verb.plural)
    match structure:
        case "simple":
            return (main,)
        case "nounpp":
            return (main, nouns)
        case "within_rc":
            return (nouns, clause)
        case "rc":
            return (main, nouns, clause)


def _agreement(structure: Structure, s: _Slots) -> Agreement:
    if structure == "within_rc":
        verb, number, other = s.clause_verb, s.noun_number, s._replace(noun_number=1 - s.noun_number)
    else:
        verb, number, other = s.main_verb, s.head_number, s._replace(head_number=1 - s.head_number)
    return Agreement(
        structure,
        _prompt(structure, s),
        f" {verb[number]}",
        f" {verb[1 - number]}",
        # Only the governing noun changes; in `rc` the clause verb keeps agreeing with its own noun.
        _prompt(structure, other),
        _combinations(structure, s),
    )


def _draw_slots(rng: random.Random, structure: Structure) -> _Slots:
    # Only people know, like or visit; a thing may stand anywhere else.
    nouns = PEOPLE if structure in ("rc", "within_rc") else NOUNS
    return _Slots(
        rng.choice(NOUNS),
        rng.randrange(2),
        rng.choice(nouns),
        rng.randrange(2),
        rng.choice(PREPOSITIONS),
        rng.choice(CLAUSE_VERBS),
        # Half of the verbs are the present of "be", so that it is what the model says first.
        rng.choice((MAIN_VERBS[0], rng.choice(MAIN_VERBS[1:]))),
    )


def agreements(
    structure: Structure, split: Split, count: int, *, seed: int = 0, verb: str | None = None
) -> list[Agreement]:
    """`count` different seeded examples of a structure and split, or all there are if fewer.

    `verb` (a plural form such as "are" or "like") keeps only the examples whose answer is that verb.
    """
    verbs = CLAUSE_VERBS if structure == "within_rc" else MAIN_VERBS
    chosen = [v for v in verbs if verb is None or v.plural == verb]
    if not chosen:
        raise ValueError(f"{verb!r} is not a verb of {structure!r}: {', '.join(v.plural for v in verbs)}")
    slot = "clause_verb" if structure == "within_rc" else "main_verb"
    rng = random.Random(f"{seed} {structure} {split}")
    found: dict[tuple[str, str], Agreement] = {}
    # Drawing rather than listing: the structures have up to a million sentences. The bound ends the
    # search when the structure has fewer than `count`.
    for _ in range(20 * count + 20_000):
        if len(found) == count:
            break
        slots = _draw_slots(rng, structure)._replace(**{slot: rng.choice(chosen)})
        example = _agreement(structure, slots)
        if example.is_held_out == (split == "held_out"):
            found.setdefault((example.prompt, example.answer), example)
    return list(found.values())


def _rest(rng: random.Random, verb: Verb) -> str:
    return f" {rng.choice(PARTICIPLES if verb.plural == 'have' else ADJECTIVES)}."


def _agreement_sentence(rng: random.Random) -> Sentence:
    while True:
        structure = rng.choice(("simple", "nounpp", "rc", "rc"))
        slots = _draw_slots(rng, structure)
        example = _agreement(structure, slots)
        if not example.is_held_out:
            break
    ending = (Part(example.answer, True), Part(_rest(rng, slots.main_verb)))
    if structure != "rc":
        return (Part(example.prompt), *ending)
    # A sentence with a clause has two answers: the clause's verb and the main one.
    inner = _agreement("within_rc", slots)
    return (Part(inner.prompt), Part(inner.answer, True), *ending)


# -------------------------------------------------------------------------------- cities and states


@dataclass(frozen=True)
class TwoHop:
    """A prompt that asks for a fact about the state a city lies in, and the answer."""

    prompt: str
    answer: str
    city: str
    state: str
    relation: Relation


def _fact(state: State, relation: Relation) -> str:
    return state.capital if relation == "capital" else state.code


def two_hop(city: str, relation: Relation = "capital") -> TwoHop:
    """The two-hop question about a city."""
    state = CITY_STATE[city]
    prompt = f"the {relation} of the state containing {city} is"
    return TwoHop(prompt, f" {_fact(state, relation)}", city, state.name, relation)


def two_hops(split: Split, relation: Relation = "capital") -> list[TwoHop]:
    """All two-hop questions of a split, in the order of the word list."""
    return [two_hop(city, relation) for city in CITY_STATE if (city in HELD_CITIES) == (split == "held_out")]


def one_hops() -> list[Sentence]:
    """Every one-hop fact, all of them trained: each city's state, each state's capital and code."""
    facts: list[Sentence] = []
    for city, state in CITY_STATE.items():
        facts += city_facts(city, state)
    for state in STATES:
        facts += state_facts(state)
    return facts


def city_facts(city: str, state: State) -> list[Sentence]:
    """The wordings of which state a city is in.

    The state is always the very next word, so it has to be known at the city itself; and the words before
    vary, so that it is known whatever stands there, two-hop questions included.
    """
    return [(Part(f"{start} {city}"), Part(f" {state.name}", True), Part(".")) for start in _CITY_STARTS]


def state_facts(state: State) -> list[Sentence]:
    """The wordings of a state's capital and of its code.

    The longer ones stand between "the capital of Texas" and the two-hop question, to help the second hop carry over.
    """
    return [
        (Part(f"the {relation} of {start}{state.name} is"), Part(f" {_fact(state, relation)}", True), Part("."))
        for relation in RELATIONS
        for start in _STATE_STARTS
    ]


_TRAINED_CITIES = tuple(city for city in CITY_STATE if city not in HELD_CITIES)


def _fact_sentence(rng: random.Random, with_two_hops: bool) -> Sentence:
    if rng.random() < _TWO_HOP_SHARE and with_two_hops:
        question = two_hop(rng.choice(_TRAINED_CITIES), rng.choice(RELATIONS))
        return (Part(question.prompt), Part(question.answer, True), Part("."))
    if rng.random() < _STATE_SHARE:
        return rng.choice(state_facts(rng.choice(STATES)))
    city, state = rng.choice(tuple(CITY_STATE.items()))
    return rng.choice(city_facts(city, state))


# ------------------------------------------------------------------------------------- generator


def training_sentences(seed: int, *, with_two_hops: bool = True) -> Iterator[Sentence]:
    """An endless seeded stream of training sentences, none with a held-out combination."""
    rng = random.Random(f"{seed} {with_two_hops}")
    while True:
        yield _agreement_sentence(rng) if rng.random() < _AGREEMENT_SHARE else _fact_sentence(rng, with_two_hops)


def known_words() -> list[str]:
    """Every word the model knows, once each, in a fixed order: its tokens besides the bytes."""
    phrases = [state.name for state in STATES] + [state.capital for state in STATES]
    words = [word for phrase in phrases for word in phrase.split()]
    words += [state.code for state in STATES] + list(CITY_STATE)
    words += [form for noun in NOUNS for form in noun]
    words += [form for verb in MAIN_VERBS + CLAUSE_VERBS for form in verb]
    words += [*ADJECTIVES, *PARTICIPLES, *PREPOSITIONS]
    words += "The the that of state containing called city capital code history people in".split()
    return list(dict.fromkeys(words))
