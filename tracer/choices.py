"""Closed choices: the values that an option, an argument or a key of a job may have, each list once.

Public signatures add ``| str``: an editor completes these, a name that comes from elsewhere is checked when it is used.
Knows names only, and imports nothing but `typing`, so that the command line reads them before anything is imported that
computes. Refuses to know what they do and which of them go together (settings.py).
"""

from __future__ import annotations

from typing import Literal

# ------------------------------------------------------------------------------------------- how a circuit is traced
Method = Literal["relp", "grad", "ig", "conductance", "ig-activation", "relp-ig", "exact", "delta", "random"]
"""How nodes are attributed."""
Baseline = Literal["zero", "mean", "counterfactual"]
"""What a node is compared with."""
SwapBaseline = Literal["zero", "counterfactual"]
"""Of a swap: what makes a neuron strong."""
Basis = Literal["activation", "output", "residual", "attention"]
"""What the nodes are."""
NeuronBasis = Literal["activation", "output"]
"""Bases whose nodes come of an MLP."""
MetricKind = Literal["auto", "logit", "difference", "topk", "share", "logprob", "centred", "neuron", "direction"]
"""The number that is explained, as a record names it."""
MetricName = Literal["auto", "logit", "difference", "topk", "share", "logprob", "centred"]
"""The metrics that are named: a neuron's and a direction's come with what they are of."""
Rule = Literal["norm", "attention", "activation", "product", "gate"]
"""Rules of RelP."""
RulesName = Literal["all", "no-half", "linear-gate"]
"""Sets of rules that have a name."""
PlainRule = Literal["norm", "attention", "activation", "product"]
"""Rules that are on by default, and can be switched off."""

# ----------------------------------------------------------------------------------------------- how it is tested
Ablation = Literal["zero", "mean", "counterfactual", "resample"]
"""What nodes outside a circuit are replaced by."""
SingleAblation = Literal["zero", "mean", "counterfactual"]
"""What a single node is replaced by."""
Ranking = Literal["absolute", "signed"]
"""In which order nodes are kept."""
Keep = Literal["correct", "preferred"]
"""Which prompts a model is kept to: those whose target it says, or prefers to the foil."""

# -------------------------------------------------------------------------------------------------- built-in prompts
Structure = Literal["simple", "nounpp", "rc", "within_rc"]
"""Sentences of the task sva."""
Opposites = Literal["english", "spanish", "shots"]
"""How the task opposites asks."""
Attribute = Literal["country", "gender", "occupation", "religion"]
"""What the task users asks about."""
PairStructure = Literal["simple", "nounpp", "rc", "within_rc", "english", "spanish", "shots"]
"""Structures of the tasks that have pairs."""
Paired = Literal["sva", "capitals", "states", "countries", "opposites", "indirect"]
"""Tasks of pairs of prompts."""
Unpaired = Literal["state-capitals", "addition", "antonyms", "users"]
"""Tasks of prompts alone."""
TaskSplit = Literal["train", "test"]
"""Which half of a task."""

# ---------------------------------------------------------------------------------------------------- how models load
Dtype = Literal["float32", "bfloat16", "float16", "float64", "int8", "nf4", "fp4"]
"""The numbers that weights are loaded as; the last three with bitsandbytes."""
Weights = Literal["local"]
"""Where a remote model's weights are besides."""
Wire = Literal["float32", "bfloat16"]
"""The numbers that travel from a server."""
AttentionKernel = Literal["eager", "sdpa"]
"""How attention is computed."""
Spread = Literal["auto", "balanced", "balanced_low_0", "sequential"]
"""How a model is spread over several devices."""

# ------------------------------------------------------------------------------------------------- what neurons mean
Clustering = Literal["spectral", "agglomerative"]
"""How neurons are put into groups."""
ValueAt = Literal["last", "mean", "max"]
"""Where in a prompt a neuron's value is taken."""

# ----------------------------------------------------------------------------------------------------------- formats
PlotKind = Literal["both", "positions", "nodes"]
"""What a circuit's figure shows."""
GraphFormat = Literal["neuronpedia", "mib", "graphml", "csv"]
"""Formats of other tools that a circuit is written in."""
Template = Literal["dataset", "sva", "exemplars", "revisions", "cases"]
"""Job files that are written to start from."""
JobKind = Literal["benchmark", "dataset", "exemplars", "revisions"]
"""Kinds of jobs."""
