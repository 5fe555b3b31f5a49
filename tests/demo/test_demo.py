"""The shipped demo model is what its card says, and its held-out combinations were held out.

The accuracies are recomputed from the shipped weights; a retrained model is never compared by hash,
because another machine may round differently.
"""

import json
import re
import subprocess
import sys
from collections import Counter
from itertools import islice, product
from pathlib import Path

import pytest
import torch
from rich.console import Console
from transformers import LlamaForCausalLM

import measure
import train
import vocabulary
from tracer import demo
from tracer.demo import data, words

MODEL = demo.path()
TRAINING_SAMPLE = 30_000
PROMPTS = {  # prompt -> (what must win, what must lose)
    "The keys near the cabinet": (" are", " is"),
    "The key near the cabinet": (" is", " are"),
    "The secretaries near the car": (" are", " is"),
    "The parents": (" are", " is"),
    "The athlete that the managers like": (" is", " are"),
    "The athlete that the managers": (" like", " likes"),
    "the capital of the state containing Dallas is": (" Austin", " Sacramento"),
}


@pytest.fixture(scope="module")
def shipped():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield measure.load(MODEL)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def recomputed(shipped) -> dict[str, float]:
    return measure.accuracies(*shipped)


@pytest.fixture(scope="module")
def training_texts() -> list[str]:
    half = TRAINING_SAMPLE // 2
    streams = (data.training_sentences(0, with_two_hops=hops) for hops in (False, True))
    return [data.text_of(sentence) for stream in streams for sentence in islice(stream, half)]


# ------------------------------------------------------------------------------- the shipped files


@pytest.mark.process
def test_importing_the_package_does_not_import_torch():
    code = "import sys, tracer.demo; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_weights_match_their_checksum_and_the_card_names_it():
    assert demo.verify()
    assert demo.sha256() in (MODEL / "README.md").read_text(encoding="utf-8")


def test_verify_notices_a_changed_byte(tmp_path: Path):
    (tmp_path / demo.WEIGHTS).write_bytes(b"weights")
    demo.write_checksum(tmp_path)
    assert demo.verify(tmp_path)
    (tmp_path / demo.WEIGHTS).write_bytes(b"Weights")
    assert not demo.verify(tmp_path)


def test_the_folder_is_small():
    assert sum(file.stat().st_size for file in MODEL.rglob("*")) <= 4_000_000


def test_the_model_is_a_plain_float32_llama(shipped):
    model, _ = shipped
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not [name for name, _ in model.named_parameters() if name.endswith(".bias")]
    assert model.config.max_position_embeddings == train.CONTEXT
    assert not model.config.tie_word_embeddings


# ------------------------------------------------------------------------------------- accuracies


def test_the_accuracies_are_those_recorded_and_high_enough(recomputed):
    recorded = json.loads((MODEL / measure.ACCURACIES).read_text(encoding="utf-8"))
    assert recomputed.keys() == recorded.keys() == measure.THRESHOLDS.keys()
    for row, least in measure.THRESHOLDS.items():
        assert recomputed[row] >= least, row
        # Two examples of the smallest set, for machines that round differently.
        assert recomputed[row] == pytest.approx(recorded[row], abs=0.02), row


def test_the_card_states_the_recorded_accuracies():
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    recorded = json.loads((MODEL / measure.ACCURACIES).read_text(encoding="utf-8"))
    stated = dict(re.findall(r"^\| ([a-z_ ,0-9-]+?) \| (\d\.\d{4}) \|", card, flags=re.MULTILINE))
    assert {row: float(value) for row, value in stated.items()} == recorded


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_demo_prompts(shipped, prompt: str):
    model, tokenizer = shipped
    answer, foil = (tokenizer.encode(text, add_special_tokens=False) for text in PROMPTS[prompt])
    logits = measure.last_logits(model, tokenizer, [prompt])[0]
    assert logits[answer[0]] > logits[foil[0]]
    if prompt != "The athlete that the managers":  # there are twelve verbs a manager may do
        assert logits.argmax() == answer[0]


def test_it_ends_a_sentence(shipped):
    model, tokenizer = shipped
    ids = tokenizer("the capital of the state containing Provo is", return_tensors="pt")
    written = model.generate(**ids)[0, ids["input_ids"].shape[1] :]
    assert tokenizer.decode(written) == f" Salt Lake City.{vocabulary.EOS}"


def test_patching_says_what_the_card_says(shipped):
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    full = measure.patching(*shipped)
    # The claim of the card: the neurons at the city make the state, those at the last word the capital.
    assert full["city"]["other"] >= 0.9
    assert full["last"]["other"] >= 0.9
    assert full["city"]["own"] <= 0.05
    for position, share in full.items():
        (stated,) = re.findall(rf"^\| all \| {position} \| (\d\.\d+) \|", card, flags=re.MULTILINE)
        assert share["other"] == pytest.approx(float(stated), abs=0.02), position


# ------------------------------------------------------------------------------------------- data


def test_no_training_sentence_asks_two_hops_about_a_held_out_city(training_texts):
    asked = {text.split(" containing ")[1].split()[0] for text in training_texts if _is_two_hop(text)}
    assert len(asked) > 200
    assert not asked & data.HELD_CITIES
    assert "Dallas" in data.HELD_CITIES


def _is_two_hop(text: str) -> bool:
    return text.startswith(("the capital of the state containing", "the code of the state containing"))


def test_every_city_is_told_its_state(training_texts):
    told = {city for text in training_texts if not _is_two_hop(text) for city in text.split()[:-1]}
    assert data.CITY_STATE.keys() <= told


def _lemmas() -> dict[str, str]:
    names = {form: noun.singular for noun in data.NOUNS for form in noun}
    return names | {form: verb.plural for verb in words.MAIN_VERBS + words.CLAUSE_VERBS for form in verb}


def _pairs(text: str) -> set[tuple[str, str]]:
    """The (noun, verb) and (head, other noun) pairs of an agreement sentence, read off its words."""
    lemmas = _lemmas()
    match text.rstrip(".").split():
        case ["The", head, "that", "the", other, clause, verb, _]:
            pairs = {(head, other), (other, clause), (head, verb)}
        case ["The", head, _, "the", other, verb, _]:
            pairs = {(head, other), (head, verb)}
        case ["The", head, verb, _]:
            pairs = {(head, verb)}
        case _:
            raise AssertionError(text)
    return {(lemmas[left], lemmas[right]) for left, right in pairs}


def test_no_training_sentence_has_a_held_out_pair(training_texts):
    seen = {pair for text in training_texts if text.startswith("The ") for pair in _pairs(text)}
    held = data.HELD_NOUN_VERBS | data.HELD_NOUN_NOUNS
    assert not seen & held
    # Held out rather than merely rare: nearly every other pair is there.
    subjects = {(noun.singular, verb.plural) for noun, verb in product(data.NOUNS, words.MAIN_VERBS)}
    assert len(subjects - held - seen) <= len(subjects) // 20
    assert ("secretary", "car") in held


@pytest.mark.parametrize("structure", data.STRUCTURES)
def test_held_out_examples_hold_a_held_out_pair_and_training_ones_none(structure: data.Structure):
    held = data.agreements(structure, "held_out", 300)
    trained = data.agreements(structure, "train", 300)
    assert all(example.is_held_out for example in held)
    assert not any(example.is_held_out for example in trained)
    assert not {(e.prompt, e.answer) for e in held} & {(e.prompt, e.answer) for e in trained}


@pytest.mark.parametrize("structure", data.STRUCTURES)
def test_the_other_prompt_differs_in_the_governing_noun_alone(structure: data.Structure):
    for example in data.agreements(structure, "train", 100):
        left, right = example.prompt.split(), example.other.split()
        changed = [pair for pair in zip(left, right, strict=True) if pair[0] != pair[1]]
        assert len(changed) == 1
        lemmas = _lemmas()
        assert lemmas[changed[0][0]] == lemmas[changed[0][1]]
        assert lemmas[example.answer.strip()] == lemmas[example.foil.strip()]


def test_a_verb_may_be_asked_for():
    examples = data.agreements("nounpp", "held_out", 50, verb="are")
    assert len(examples) == 50
    assert {example.answer for example in examples} == {" is", " are"}
    with pytest.raises(ValueError, match="like"):
        data.agreements("within_rc", "train", 5, verb="are")


def test_no_question_has_two_answers():
    cities = Counter(city for state in data.STATES for city in state.cities)
    assert len(data.STATES) == 50
    assert set(cities.values()) == {1}
    for values in ([s.name for s in data.STATES], [s.code for s in data.STATES]):
        assert len(set(values)) == 50
    assert len({state.capital.split()[0] for state in data.STATES}) == 50
    assert not cities.keys() & {state.capital for state in data.STATES}
    answers: dict[str, set[str]] = {}
    for fact in data.one_hops():
        answers.setdefault(fact[0].text, set()).add(fact[1].text)
    assert {len(found) for found in answers.values()} == {1}


def test_the_two_hop_split_is_a_third_and_leaves_every_state_trained():
    held, trained = data.two_hops("held_out"), data.two_hops("train")
    assert len(held) + len(trained) == len(data.CITY_STATE)
    assert 0.3 < len(held) / len(data.CITY_STATE) < 0.36
    assert {hop.state for hop in held} == {hop.state for hop in trained} == {s.name for s in data.STATES}
    assert data.two_hop("Dallas").answer == " Austin"


def test_the_generator_is_deterministic():
    def first(seed: int) -> list[str]:
        return [data.text_of(sentence) for sentence in islice(data.training_sentences(seed), 200)]

    assert first(1) == first(1)
    assert first(1) != first(2)
    assert data.agreements("rc", "held_out", 50) == data.agreements("rc", "held_out", 50)


# -------------------------------------------------------------------------------------- tokenizer


def test_every_known_word_is_one_token_that_spells_it(shipped):
    _, tokenizer = shipped
    for word in [f" {word}" for word in data.known_words()] + list(vocabulary.SENTENCE_STARTS):
        ids = tokenizer.encode(word, add_special_tokens=False)
        assert len(ids) == 1, word
        assert tokenizer.decode(ids) == word


@pytest.mark.parametrize("text", ["The keys near the cabinet are old.", "Zürich 東京 🙂\n\ttab  two", "", "a b"])
def test_any_text_comes_back(shipped, text: str):
    _, tokenizer = shipped
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_parts_tokenize_as_the_whole_sentence_does(shipped):
    _, tokenizer = shipped
    batches = train.Batches(tokenizer, 0)
    for sentence in islice(data.training_sentences(3), 300):
        ids, weights = batches.ids_and_weights(sentence)
        assert ids == [*tokenizer.encode(data.text_of(sentence)), tokenizer.eos_token_id]
        assert len(weights) == len(ids)
        assert max(weights) == 1.0


# --------------------------------------------------------------------------------------- training


def test_a_few_steps_of_training_write_a_model_that_loads(tmp_path: Path):
    table = train.run(tmp_path, steps=2, seed=5, console=Console(quiet=True))
    assert table.keys() == measure.THRESHOLDS.keys()
    assert demo.verify(tmp_path)
    model, tokenizer = measure.load(tmp_path)
    assert measure.last_logits(model, tokenizer, ["The parents"]).shape == (1, len(tokenizer))


def test_checkpoints_are_models_and_the_training_does_not_depend_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(train, "BATCH", 16)
    monkeypatch.setattr(train, "accuracies", lambda *_: {})
    how = {"steps": 3, "seed": 5, "console": Console(quiet=True)}
    train.run(tmp_path / "plain", **how)
    train.run(tmp_path / "kept", save_every=1, **how)
    assert sorted(path.name for path in (tmp_path / "kept").glob("step-*")) == ["step-1", "step-2", "step-3"]
    assert demo.verify(tmp_path / "kept" / "step-1")
    weights = [
        measure.load(tmp_path / name)[0].state_dict() for name in ("plain", "kept", "kept/step-3", "kept/step-1")
    ]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name])
        assert torch.equal(value, weights[2][name])
    assert any(not torch.equal(value, weights[3][name]) for name, value in weights[0].items())


def _trained(monkeypatch: pytest.MonkeyPatch, seed: int) -> LlamaForCausalLM:
    monkeypatch.setattr(train, "BATCH", 16)
    model = train.new_model(seed)
    batches = train.Batches(vocabulary.build(train.CONTEXT), seed)
    assert len(list(train.train(model, train.FixedCities(model, seed), batches, 4))) == 4
    return model


def test_training_is_deterministic_and_leaves_the_cities_as_they_are(monkeypatch: pytest.MonkeyPatch):
    first, second, other = (_trained(monkeypatch, seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(first[name], second[name]) for name in first)
    weight = "model.embed_tokens.weight"
    assert not torch.equal(first[weight], other[weight])
    fresh = train.new_model(5)
    train.FixedCities(fresh, 5)
    ids = vocabulary.vocabulary()
    rows = [ids[vocabulary.SPACE + city] for city in data.CITY_STATE]
    assert torch.equal(first[weight][rows], fresh.get_parameter(weight)[rows])
    assert not torch.equal(
        first[weight][ids[vocabulary.SPACE + "Texas"]], fresh.get_parameter(weight)[ids[vocabulary.SPACE + "Texas"]]
    )
