"""Held-out accuracies of a demo model, and where along the sentence its second hop happens.

Knows how to ask a model the held-out questions of `data` and to swap MLP neurons between two of its
runs. Refuses to know how a model was made, and never trains one. `python tools/demo/measure.py`
prints both tables for the shipped model or for another folder.
"""

import argparse
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerBase

from tracer import demo
from tracer.demo import data

BATCH = 512
AGREEMENT_COUNT = 1000
ACCURACIES = "accuracies.json"
# Row of accuracies -> least value the shipped model must reach.
THRESHOLDS = {
    **dict.fromkeys(data.STRUCTURES, 0.99),
    **{f"{structure}, top-1": 0.99 for structure in data.STRUCTURES},
    "two hops to the capital": 0.95,
    "two hops to the code": 0.95,
    "one hop": 0.99,
}


def load(folder: Path) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """A demo model and its tokenizer from a folder, in float32 on the CPU."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


# ------------------------------------------------------------------------------------- accuracies


@torch.no_grad()
def last_logits(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> Tensor:
    """The logits after each prompt, prompts by vocabulary."""
    ids, mask = _padded(tokenizer, prompts)
    found = []
    for rows in torch.arange(len(ids)).split(BATCH):
        logits = model(input_ids=ids[rows], attention_mask=mask[rows]).logits
        found.append(logits[torch.arange(len(rows)), mask[rows].sum(1) - 1])
    return torch.cat(found)


def _padded(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, padded on the right: causal attention then never sees the padding."""
    batch = tokenizer(list(texts), padding=True, padding_side="right")
    return torch.tensor(batch["input_ids"]), torch.tensor(batch["attention_mask"])


def _token(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    (token,) = tokenizer.encode(text, add_special_tokens=False)
    return token


def agreement_accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, examples: Sequence[data.Agreement]
) -> tuple[float, float]:
    """How often the right form beats the wrong one, and how often the top token has the right number."""
    logits = last_logits(model, tokenizer, [example.prompt for example in examples])
    answers = torch.tensor([_token(tokenizer, example.answer) for example in examples])
    foils = torch.tensor([_token(tokenizer, example.foil) for example in examples])
    rows = torch.arange(len(examples))
    beats = logits[rows, answers] > logits[rows, foils]
    forms = [
        {_token(tokenizer, f" {verb[number]}") for verb in data.MAIN_VERBS + data.CLAUSE_VERBS} for number in range(2)
    ]
    plural = [int(int(answer) in forms[1]) for answer in answers]
    top = [int(token) in forms[number] for token, number in zip(logits.argmax(-1), plural, strict=True)]
    return beats.float().mean().item(), sum(top) / len(top)


@torch.no_grad()
def exact_match(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, questions: Sequence[tuple[str, str]]
) -> float:
    """How often greedy decoding writes exactly the answer and its full stop.

    Greedy decoding writes a text exactly when each of its tokens is the top one after those before it,
    so one forward pass over prompt and answer decides it.
    """
    starts = torch.tensor([len(tokenizer.encode(prompt)) for prompt, _ in questions])
    ids, mask = _padded(tokenizer, [f"{prompt}{answer}." for prompt, answer in questions])
    right = []
    for rows in torch.arange(len(ids)).split(BATCH):
        top = model(input_ids=ids[rows], attention_mask=mask[rows]).logits[:, :-1].argmax(-1)
        position = torch.arange(1, ids.shape[1])
        asked = (position >= starts[rows, None]) & mask[rows, 1:].bool()
        right.append(((top == ids[rows, 1:]) | ~asked).all(1))
    return torch.cat(right).float().mean().item()


def accuracies(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Every row of the model card's table: held-out combinations, but for one hops, all trained."""
    table: dict[str, float] = {}
    for structure in data.STRUCTURES:
        examples = data.agreements(structure, "held_out", AGREEMENT_COUNT)
        table[structure], table[f"{structure}, top-1"] = agreement_accuracy(model, tokenizer, examples)
    for relation in data.RELATIONS:
        questions = [(hop.prompt, hop.answer) for hop in data.two_hops("held_out", relation)]
        table[f"two hops to the {relation}"] = exact_match(model, tokenizer, questions)
    facts = [(fact[0].text, fact[1].text) for fact in data.one_hops()]
    table["one hop"] = exact_match(model, tokenizer, facts)
    return {row: round(value, 4) for row, value in table.items()}


# --------------------------------------------------------------------------------------- patching


def _down_projections(model: LlamaForCausalLM) -> list[nn.Module]:
    return [model.get_submodule(f"model.layers.{layer}.mlp.down_proj") for layer in range(len(model.model.layers))]


@contextmanager
def _recorded(model: LlamaForCausalLM) -> Iterator[dict[int, Tensor]]:
    """Record every layer's MLP neurons (the inputs of `down_proj`) of the runs inside."""
    neurons: dict[int, Tensor] = {}

    def record(layer: int):
        def hook(_module, inputs):
            neurons[layer] = inputs[0].detach()

        return hook

    handles = [module.register_forward_pre_hook(record(layer)) for layer, module in enumerate(_down_projections(model))]
    try:
        yield neurons
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _swapped(model: LlamaForCausalLM, source: dict[int, Tensor], positions: list[int]) -> Iterator[None]:
    """Put the recorded neurons in place of the run's own at some positions, in the recorded layers."""

    def swap(layer: int):
        def hook(_module, inputs):
            neurons = inputs[0].clone()
            neurons[:, positions] = source[layer][:, positions]
            return (neurons,)

        return hook

    modules = _down_projections(model)
    handles = [modules[layer].register_forward_pre_hook(swap(layer)) for layer in source]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _city_pairs(count: int, seed: int) -> list[tuple[data.TwoHop, data.TwoHop]]:
    rng = random.Random(f"{seed} patching")
    questions = data.two_hops("held_out")
    pairs = [(a, b) for a in questions for b in questions if a.state != b.state]
    return rng.sample(pairs, count)


@torch.no_grad()
def patching(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int = 500,
    seed: int = 0,
    layers: Sequence[int] | None = None,
) -> dict[str, dict[str, float]]:
    """What the answer becomes when MLP neurons are taken from another city's prompt, by position.

    Held-out two-hop prompts only, of one length, both answered right unpatched; `layers` are those
    whose neurons are swapped (all by default). The share that says the other state's capital
    ("other"), and that still says its own ("own").
    """
    pairs = _city_pairs(count, seed)
    clean = torch.tensor([tokenizer.encode(a.prompt) for a, _ in pairs])
    source = torch.tensor([tokenizer.encode(b.prompt) for _, b in pairs])
    own = torch.tensor([tokenizer.encode(a.answer, add_special_tokens=False)[0] for a, _ in pairs])
    other = torch.tensor([tokenizer.encode(b.answer, add_special_tokens=False)[0] for _, b in pairs])
    (city,) = (clean != source).any(0).nonzero()[:, 0].tolist()
    with _recorded(model) as neurons:
        source_top = model(input_ids=source).logits[:, -1].argmax(-1)
    clean_top = model(input_ids=clean).logits[:, -1].argmax(-1)
    kept = (clean_top == own) & (source_top == other)
    chosen = {layer: neurons[layer] for layer in layers or range(len(neurons))}
    last = clean.shape[1] - 1
    places = {"city": [city], "between": list(range(city + 1, last)), "last": [last]}
    places["city and last"] = [city, last]
    table: dict[str, dict[str, float]] = {}
    for name, positions in places.items():
        if positions:
            with _swapped(model, chosen, positions):
                top = model(input_ids=clean).logits[:, -1].argmax(-1)
            table[name] = {
                "other": (top == other)[kept].float().mean().item(),
                "own": (top == own)[kept].float().mean().item(),
            }
    return table


# ----------------------------------------------------------------------------------------- tables


def accuracy_table(table: dict[str, float]) -> Table:
    """The accuracies beside what they must reach."""
    shown = Table("held-out", "accuracy", "at least")
    for row, value in table.items():
        shown.add_row(row, f"{value:.4f}", f"{THRESHOLDS[row]:.2f}", style="" if value >= THRESHOLDS[row] else "red")
    return shown


def patching_table(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase) -> Table:
    """Where swapping MLP neurons changes the answer, for all layers and for each alone."""
    shown = Table("layers", "position", "other capital", "own capital")
    count = model.config.num_hidden_layers
    for layers in [list(range(count)), *([layer] for layer in range(count))]:
        for position, shares in patching(model, tokenizer, layers=layers).items():
            name = "all" if len(layers) == count else str(layers[0])
            shown.add_row(name, position, f"{shares['other']:.3f}", f"{shares['own']:.3f}")
    return shown


def main() -> None:
    """Print a model's held-out accuracies and where its second hop happens."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", type=Path, default=demo.path(), help="model folder (default: the shipped)")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = load(arguments.model)
    console = Console()
    console.print(accuracy_table(accuracies(model, tokenizer)))
    console.print(patching_table(model, tokenizer))


if __name__ == "__main__":
    main()
