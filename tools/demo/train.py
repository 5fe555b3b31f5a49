"""Trains the demo model: `python tools/demo/train.py`; with `--save-every` it keeps checkpoints, to compare.

Knows the recipe (architecture, schedule, loss) and how to write the folder. Refuses to know the
sentences, which are `data`'s, and to judge the result, which is `measure`'s. The same seed, steps and
thread count give the same weights on the same machine; another machine may round differently.
"""

import argparse
import json
import math
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import vocabulary
from measure import ACCURACIES, accuracies, accuracy_table
from tracer import demo
from tracer.demo import data

CONTEXT = 128
STEPS = 500
BATCH = 224
LEARNING_RATE = 3e-3
WARMUP = 20
WEIGHT_DECAY = 2.0
FILLER_WEIGHT = 0.1
# No two-hop sentence before this share of the steps: the facts must be there to be composed, or the
# trained cities' answers are learnt by heart and nothing carries over to the held-out ones.
TWO_HOPS_FROM = 0.5
# From then on this many of the first layers are fixed, so that what they make of a city stays the same
# for the cities whose two-hop sentences are trained and for those whose are not.
FIXED_LAYERS = 1
# Cities are fixed random vectors, small beside what the MLPs add. A trainable embedding would hold the
# state itself, and there would be no first hop for neurons to make.
CITY_SCALE = 0.004


def new_model(seed: int) -> LlamaForCausalLM:
    """A freshly initialised Llama: no biases, RMSNorm, rotary positions, untied embeddings."""
    torch.manual_seed(seed)
    ids = vocabulary.vocabulary()
    config = LlamaConfig(
        vocab_size=len(ids),
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=ids[vocabulary.BOS],
        eos_token_id=ids[vocabulary.EOS],
        pad_token_id=ids[vocabulary.PAD],
        dtype="float32",
    )
    return LlamaForCausalLM(config)


class FixedCities:
    """The cities' rows of the embedding: random, and put back after every step."""

    def __init__(self, model: LlamaForCausalLM, seed: int) -> None:
        self._weight = model.get_parameter("model.embed_tokens.weight")
        ids = vocabulary.vocabulary()
        self._rows = torch.tensor([ids[vocabulary.SPACE + city] for city in data.CITY_STATE])
        source = torch.Generator().manual_seed(seed + 1)
        self._values = CITY_SCALE * torch.randn(len(self._rows), self._weight.shape[1], generator=source)
        self.restore()

    @torch.no_grad()
    def restore(self) -> None:
        """Undo what the optimizer, its weight decay included, did to them."""
        self._weight[self._rows] = self._values


class Batches:
    """Turns sentences into ids and loss weights, remembering the parts already tokenized."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
        self._encode = partial(tokenizer.encode, add_special_tokens=False)
        ids = vocabulary.vocabulary()
        self._bos, self._eos, self._pad = ids[vocabulary.BOS], ids[vocabulary.EOS], ids[vocabulary.PAD]
        self._known: dict[str, list[int]] = {}
        self._streams = {hops: data.training_sentences(seed, with_two_hops=hops) for hops in (False, True)}

    def ids_and_weights(self, sentence: data.Sentence) -> tuple[list[int], list[float]]:
        """A sentence with BOS and EOS, and how much each of its tokens counts as a target."""
        ids, weights = [self._bos], [0.0]
        for part in sentence:
            piece = self._known.get(part.text)
            if piece is None:
                piece = self._known[part.text] = self._encode(part.text)
            ids += piece
            weights += [1.0 if part.is_answer else FILLER_WEIGHT] * len(piece)
        return [*ids, self._eos], [*weights, FILLER_WEIGHT]

    def next(self, size: int, *, with_two_hops: bool) -> tuple[Tensor, Tensor]:
        """The next batch, padded on the right (causal attention keeps padding out of sight)."""
        rows = [self.ids_and_weights(s) for s in islice(self._streams[with_two_hops], size)]
        width = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([row + [self._pad] * (width - len(row)) for row, _ in rows])
        weights = torch.tensor([row + [0.0] * (width - len(row)) for _, row in rows])
        return ids, weights


def loss_of(model: LlamaForCausalLM, ids: Tensor, weights: Tensor) -> Tensor:
    """The weighted next-token loss."""
    logits = model(input_ids=ids[:, :-1]).logits
    losses = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    targets = weights[:, 1:].flatten()
    return (losses * targets).sum() / targets.sum()


def _optimizer(model: LlamaForCausalLM) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))


def _rate(step: int, steps: int) -> float:
    """One cosine for each half: the first layers have to have settled when they are fixed."""
    switch = math.ceil(TWO_HOPS_FROM * steps)
    start, end = (0, switch) if step < switch else (switch, steps)
    done = (step - start) / max(1, end - start)
    return min(1.0, (step + 1) / WARMUP) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def _fix_first_layers(model: LlamaForCausalLM) -> None:
    for block in model.model.layers[:FIXED_LAYERS]:
        for parameter in block.parameters():
            # Without a gradient AdamW leaves a parameter alone, weight decay included.
            parameter.requires_grad_(False).grad = None


def train(model: LlamaForCausalLM, cities: FixedCities, batches: Batches, steps: int) -> Iterator[float]:
    """Train in place, yielding each step's loss when the step is done."""
    optimizer = _optimizer(model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_rate, steps=steps))
    model.train()
    for step in range(steps):
        with_two_hops = step >= TWO_HOPS_FROM * steps
        if with_two_hops:
            _fix_first_layers(model)
        loss = loss_of(model, *batches.next(BATCH, with_two_hops=with_two_hops))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        cities.restore()
        schedule.step()
        yield loss.item()
    model.eval().requires_grad_(True)


def write(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Write the model folder, its checksum and its accuracies; return the accuracies."""
    folder.mkdir(parents=True, exist_ok=True)
    ids, training = vocabulary.vocabulary(), model.training
    model.eval().generation_config = GenerationConfig(
        bos_token_id=ids[vocabulary.BOS],
        eos_token_id=ids[vocabulary.EOS],
        pad_token_id=ids[vocabulary.PAD],
        do_sample=False,
        max_new_tokens=16,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # Saved readable by its owner alone, which a package that ships the file must not be.
    (folder / demo.WEIGHTS).chmod(0o644)
    demo.write_checksum(folder)
    table = accuracies(model, tokenizer)
    (folder / ACCURACIES).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    model.train(training)
    return table


def run(folder: Path, *, steps: int, seed: int, console: Console, save_every: int | None = None) -> dict[str, float]:
    """Train a model from nothing and write it.

    Args:
        save_every: also write the model after every so many steps, beneath the folder: ``step-100``. The training does
            not depend on it.
    """
    tokenizer = vocabulary.build(CONTEXT)
    model = new_model(seed)
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("training", total=steps, loss=math.nan)
        cities = FixedCities(model, seed)
        for step, loss in enumerate(train(model, cities, Batches(tokenizer, seed), steps), start=1):
            progress.update(task, advance=1, loss=loss)
            if save_every is not None and step % save_every == 0:
                write(folder / f"step-{step}", model, tokenizer)
    return write(folder, model, tokenizer)


def main() -> None:
    """Train the demo model and print its held-out accuracies."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=demo.path(), help="folder to write (default: the shipped)")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--save-every", type=int, metavar="STEPS", help="keep a checkpoint OUT/step-N this often")
    arguments = parser.parse_args()
    if arguments.save_every is not None and (arguments.save_every < 1 or arguments.out == demo.path()):
        parser.error("--save-every needs a number of steps, and --out: no checkpoint goes into the package")
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(True)
    console = Console()
    how = {"steps": arguments.steps, "seed": arguments.seed, "save_every": arguments.save_every}
    table = run(arguments.out, **how, console=console)
    console.print(accuracy_table(table))
    console.print(f"wrote {arguments.out}")


if __name__ == "__main__":
    main()
