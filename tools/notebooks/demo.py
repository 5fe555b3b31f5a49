# %% [markdown]
# # From a prompt to a circuit that holds
#
# tracer finds which MLP neurons, at which token positions, make a language model say what it says. This
# notebook runs on the demo model that comes with it: no GPU, no network, about 20 seconds. For a model of
# your own put its name (a folder, a `.gguf` file, a Hugging Face id) in the place of `"demo"`.
#
# ## 1. A circuit
#
# Why are " are" and not " is"? The prompt is paired with the same sentence about one secretary (its
# *counterfactual*), so that only what differs between the two counts. The metric is the logit of the target
# minus that of the foil.

# %%
import tracer

circuit = tracer.trace(
    "demo",
    "The secretaries near the car",
    target=" are",
    foil=" is",
    counterfactual="The secretary near the car",
    nodes=200,
)
circuit

# %% [markdown]
# **attribution** is how far the metric would fall, to first order, were the neuron at its value on the
# counterfactual. **conservation** is a check of the arithmetic: RelP hands the metric down to the
# embeddings, and what is left over must be roundings.
#
# Where is it? Summed over neurons, at the last token; and the strongest nodes one by one.

# %%
circuit.plot()

# %% [markdown]
# By which ways does the subject reach the answer? A path's attribution is what the token's embedding
# carries that way alone.

# %%
for path in circuit.paths(5):
    print(path)

# %% [markdown]
# Tables are pandas frames (`to_pandas`), Arrow tables (`circuit.nodes`, `circuit.edges`) and a networkx
# graph. The page, `circuit.view()`, draws the graph in the notebook; this one writes it to a file, which
# keeps the notebook small.

# %%
nodes, edges = circuit.to_pandas()
page = circuit.view("runs/examples/secretaries.html")
nodes[nodes["kind"] == "neuron"].groupby("layer")["attribution"].agg(["count", "sum"]).round(3)

# %% [markdown]
# What do its strongest neurons write, and what drives them? From the weights alone: the tokens whose logits
# a neuron raises, and those whose embeddings activate it. All three promote verbs of one number.

# %%
strongest = [(row["layer"], row["neuron"], 1 if row["activation"] > 0 else -1) for row in circuit.rows("neuron")[:3]]
for one in tracer.neuron_tokens("demo", strongest):
    print(one)

# %% [markdown]
# ## 2. Does it hold?
#
# Attribution ranks; ablation tests. On sentences that the circuit was not found on, everything outside it
# is set to its mean over the counterfactuals. *Faithfulness* is the share of the metric that is left (1 is
# all), *completeness* what is left when the circuit is ablated instead (0 is nothing), *control* what as
# many random neurons keep.

# %%
nouns = [("key", "keys"), ("athlete", "athletes"), ("author", "authors"), ("child", "children"), ("box", "boxes")]
tests = [
    tracer.Prompt(
        f"The {plural} near the {other}", target=" are", foil=" is", counterfactual=f"The {one} near the {other}"
    )
    for one, plural in nouns
    for other in ("cabinet", "table", "house")
]
evaluation = tracer.evaluate("demo", circuit, tests, sizes=[1, 2, 5, 10, 20, 50, 100, 200])
evaluation

# %%
evaluation.plot()

# %% [markdown]
# ## 3. What are its parts?
#
# A circuit of two hops: Dallas is in Texas, whose capital is Austin. With `profiles=True` each neuron keeps
# what every token does to it and what it does to every answer; neurons with like profiles are a
# *supernode*, named by the tokens they promote.

# %%
question = "the capital of the state containing Dallas is"
dallas = tracer.trace("demo", question, metric="topk", profiles=True, nodes=60)
dallas = tracer.with_tokens("demo", dallas)
groups = tracer.supernodes(dallas, clusters=4, method="agglomerative", tokens=dallas.neuron_tokens)
groups.to_pandas()[["name", "members", "attribution", "share"]].round(3)

# %% [markdown]
# Multiply each group's values by -1, beside random neurons: as many in each layer, at the same positions.

# %%
asked = tracer.Prompt(question, target=" Austin")
swept = tracer.sweep("demo", groups.graph, [asked], factors=[-1], random=20)
for one in swept.responses():
    if one.role == "target":
        change, control = one.change.estimate.item(), one.control.estimate.item()
        print(f"{one.group:<24} p( Austin) {one.before:.2f} {change:+.2f}   random neurons {control:+.2f}")

# %% [markdown]
# The group that promotes " Texas" decides: turned around it leaves nothing of the answer. What does the model
# say then?

# %%
first = groups.graph.groups[groups.rows()[0].name]
table = dallas.nodes.to_pylist()
members = [(table[node]["layer"], table[node]["position"], table[node]["neuron"]) for node in first]
steering = tracer.steer("demo", members, asked, factor=-1, max_new_tokens=2)
print(f"{steering.unsteered.text!r} becomes {steering.steered.text!r}")
steering.plot()

# %% [markdown]
# ## 4. Keep it
#
# A saved circuit is a folder of Parquet tables and a record of how it was made. It reads back equal, and
# the command line takes it: `tracer show runs/examples/dallas`, `tracer view`, `tracer export` (for
# Neuronpedia).

# %%
groups.graph.save("runs/examples/dallas", overwrite=True)
run = tracer.open_run("runs/examples/dallas")
print("the same circuit:", run.circuit().fingerprint == dallas.fingerprint)
run.sizes

# %% [markdown]
# Next: many prompts at once (`examples/dataset.py`), a pretrained model (`real_model.ipynb`), and what
# every number means (`docs/method.md`).
