"""The axes of every tensor in tracer, as jaxtyping types; checked in tests only, by beartype.

    prompt    one prompt of the call              layer     block index, from 0
    pos       token index in the prompt, from 0   neuron    index into the chosen basis (d_mlp or d_model)
    column    position in a left-padded batch     vocab     token id
    d_model   coordinate of the residual stream   entry     one term of a metric

`pos` and `column` differ by the padding of a row; no tensor that leaves the library has a `column` axis.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

Nodes = Float[Tensor, "prompt layer pos neuron"]
PaddedNodes = Float[Tensor, "prompt layer column neuron"]
Embedded = Float[Tensor, "prompt column d_model"]
PerToken = Float[Tensor, "prompt pos"]
PerPrompt = Float[Tensor, " prompt"]
Logits = Float[Tensor, "prompt kept vocab"]
MeanValues = Float[Tensor, "layer pos neuron"]
