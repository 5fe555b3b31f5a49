"""What did fine-tuning change? The circuits of a model without and with a LoRA adapter, neuron by neuron.

The adapter is trained here, in a second, on one false fact: "the capital of Texas is Sacramento." Asked about
Texan cities in two hops (city, state, capital) the model follows. The comparison says at which neurons, with
intervals over the cities and false discovery rates; and how far the neurons' values moved at the city, where the
first hop is made, and at the last word, where the second is.

Takes 15 seconds. Needs peft: `pip install neuron-tracer[adapters]`. Checkpoints of a training are compared the
same way: `tracer.compare(*[tracer.load(folder) for folder in folders], prompts)`, or with `revision=`.

    python examples/compare_adapters.py
"""

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import tracer

FOLDER = Path(tracer.__file__).parent / "demo/model"
CITIES = ("Dallas", "Houston", "Lubbock", "Amarillo", "Laredo", "Galveston", "Waco")
FACT = "the capital of Texas is Sacramento."


def train(folder: Path, steps: int = 20) -> None:
    """A LoRA adapter of the MLPs' down projections that says the fact, saved in `folder`."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    base = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=8, target_modules=["down_proj"]))
    ids = tokenizer(FACT, return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def main() -> None:
    asked = [
        tracer.Prompt(f"the capital of the state containing {city} is", target=" Austin", foil=" Sacramento", id=city)
        for city in CITIES
    ]
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder))
        base, tuned = tracer.load("demo"), tracer.load("demo", adapter=folder)
        found = tracer.compare(base, tuned, asked, names=["base", "tuned"], nodes=60, positions=True)

    before, after = found.sides["metric"].to_pylist()
    print(f"logit of Austin minus Sacramento: {before:+.2f} before, {after:+.2f} after ({len(CITIES)} cities)")
    print("of the circuits' nodes:", ", ".join(f"{number} {name}" for name, number in found.counts.items() if number))
    print(f"{found.found} of {found.n_tested} nodes differ at a false discovery rate of 5 %; the largest differences:")
    rows = found.nodes.to_pylist()
    for row in rows[:6]:
        difference = f"{row['difference']:+.2f} [{row['low']:+.2f}, {row['high']:+.2f}]"
        print(f"  L{row['layer']} N{row['neuron']:<4} @{row['position']} {row['change']:<9} {difference} logits")

    # Where does the new fact live? By how much the neurons' values themselves moved, at the city and at the last word.
    was, now = (tracer.attribute(model, asked).activations for model in (base, tuned))  # [prompt, layer, pos, neuron]
    for position, word in ((7, "the city"), (8, "is")):
        moved = (now - was)[:, :, position].norm(dim=(0, 2)) / was[:, :, position].norm(dim=(0, 2))
        print(f"values moved at {word}:", ", ".join(f"L{layer} {part:.0%}" for layer, part in enumerate(moved)))


if __name__ == "__main__":
    main()
