"""The columns of every table that a run leaves behind, as Arrow schemas.

Narrow tables, one row per prompt, node or edge; `prompt_id` is an integer key, the user's own id a column of the
prompts. Knows names and types only.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

SCHEMA_VERSION = "3"
READABLE = frozenset({"2", SCHEMA_VERSION})
"""Versions whose folders can still be read; only today's can be resumed."""
_RENAMED = {"residual": "unexplained", "remainder": "bias_share"}
"""Columns of version 2, and what they are called now."""
_ATTRIBUTED = {"attribution", "mean_attribution", "attribution_first"}
"""Tables of neurons that have one of these columns have a column ``expert`` too."""

_IDS = pa.list_(pa.int32())
_TEXTS = pa.list_(pa.string())
LABELS = pa.map_(pa.string(), pa.string())

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

INPUT = pa.schema(
    [
        ("prompt_id", pa.int64()),
        ("user_id", pa.string()),
        ("text", pa.string()),
        ("token_ids", _IDS),
        ("target", _TEXTS),
        ("target_ids", _IDS),
        ("foil", _TEXTS),
        ("foil_ids", _IDS),
        ("counterfactual", pa.string()),
        ("counterfactual_ids", _IDS),
        ("positions", _IDS),
        ("labels", LABELS),
        ("error", pa.string()),
        ("messages", _MESSAGES),
        ("seed", pa.string()),
        ("counterfactual_messages", _MESSAGES),
        ("answer", pa.string()),
    ]
)
"""The prompts as given: texts, ids and messages, whichever there were; `error` is what is wrong with a row as data. The
last four are not in older folders: read there as nothing."""

PROMPTS = pa.schema(
    [
        ("prompt_id", pa.int64()),
        ("user_id", pa.string()),
        ("text", pa.string()),
        ("token_ids", _IDS),
        ("target_ids", _IDS),
        ("foil_ids", _IDS),
        ("metric", pa.float32()),
        ("unexplained", pa.float32()),
        ("n_nodes", pa.int32()),
        ("n_edges", pa.int32()),
        ("status", pa.string()),
        ("error_type", pa.string()),
        ("error", pa.string()),
        ("attempts", pa.int32()),
        ("seconds", pa.float32()),
        ("labels", LABELS),
        ("answer", pa.string()),
    ]
)
"""`status` is ok, failed, quarantined, filtered (the model answers otherwise) or skipped (a built-in pair that its
tokenizer cannot be asked); `answer`, where a filter asks, the model's greedy next token."""
NODES = pa.schema(
    [
        ("prompt_id", pa.int64()),
        ("node_id", pa.int32()),
        ("kind", pa.string()),
        ("layer", pa.int16()),
        ("position", pa.int32()),
        ("neuron", pa.int32()),
        ("expert", pa.int32()),
        ("token", pa.string()),
        ("activation", pa.float32()),
        ("attribution", pa.float32()),
        ("gradient", pa.float32()),
        ("explained", pa.float32()),
        ("influence", pa.float32()),
        ("bias_share", pa.float32()),
    ]
)
"""`neuron` is the number in the layer, also of a neuron of an expert (tracer/experts.py); `expert` is null where there
is none: in a dense layer, of shared experts, of other kinds of nodes, and in folders of before there was the column."""
EDGES = pa.schema(
    [
        ("prompt_id", pa.int64()),
        ("source", pa.int32()),
        ("target", pa.int32()),
        ("weight", pa.float32()),
        ("share", pa.float32()),
        ("attribution", pa.float32()),
    ]
)
MEANS = pa.schema(
    [
        ("length", pa.int32()),
        ("layer", pa.int16()),
        ("position", pa.int32()),
        ("n_prompts", pa.int64()),
        ("sums", pa.list_(pa.float64())),
    ]
)
"""A shard's part of a dataset's circuit: attributions of every neuron of a layer at a position, summed over the prompts
of one length; length and position are -1 where both are summed over."""

CIRCUIT = pa.schema(
    [
        ("node_id", pa.int32()),
        ("layer", pa.int16()),
        ("position", pa.int32()),
        ("neuron", pa.int32()),
        ("expert", pa.int32()),
        ("mean_attribution", pa.float64()),
        ("n_prompts", pa.int64()),
    ]
)
"""A dataset's own circuit, strongest mean first; position -1 where attributions are summed over positions."""

CIRCUIT_NODES = pa.schema(
    [
        ("node_id", pa.int32()),
        ("kind", pa.string()),
        ("layer", pa.int16()),
        ("position", pa.int32()),
        ("neuron", pa.int32()),
        ("expert", pa.int32()),
        ("mean_activation", pa.float64()),
        ("mean_attribution", pa.float64()),
        ("explained", pa.float32()),
        ("influence", pa.float32()),
        ("bias_share", pa.float32()),
        ("n_prompts", pa.int64()),
    ]
)
"""A dataset's circuit as a graph: its neurons that edges left, strongest first; the embedding of each position, or of
all (-1), whose neuron is -1; and the metric's target (-1) and foil (-2), each the mean of a prompt's such tokens."""
CIRCUIT_EDGES = pa.schema(
    [
        ("source", pa.int32()),
        ("target", pa.int32()),
        ("mean_weight", pa.float64()),
        ("share", pa.float64()),
        ("mean_attribution", pa.float64()),
        ("standard_error", pa.float64()),
        ("n_prompts", pa.int64()),
    ]
)
"""Its edges, strongest mean first; source and target are node_ids of `CIRCUIT_NODES`. Means are over prompts of an
edge's weight and attribution (of a free circuit summed over positions); ``share`` is the mean weight over the target's
mean activation, ``standard_error`` that of the mean attribution over prompts (null of one prompt)."""

_NEURON = [("layer", pa.int16()), ("neuron", pa.int32()), ("polarity", pa.int8())]
_VALUES = pa.list_(pa.float32())

TOKENS = pa.schema(
    [
        *_NEURON,
        ("promoted", _TEXTS),
        ("promoted_ids", _IDS),
        ("promoted_values", _VALUES),
        ("suppressed", _TEXTS),
        ("suppressed_ids", _IDS),
        ("suppressed_values", _VALUES),
        ("driven_by", _TEXTS),
        ("driven_by_ids", _IDS),
        ("driven_by_values", _VALUES),
    ]
)
"""What the weights alone say of a neuron, strongest first; polarity is 1 or -1, the sign of its value. Promoted and
suppressed: how far a logit moves per unit of |value|, through the final norm's weight and the unembedding. Driven by:
tokens whose embeddings give the neuron a value of that sign, and the value."""
DESCRIPTIONS = pa.schema([*_NEURON, ("description", pa.string()), ("score", pa.float32()), ("source", pa.string())])
"""What a neuron does, in words: by a language model or from a file, which `source` names; the score is the correlation
of simulated with true activations on held-out exemplars, null where it was not measured."""
EXEMPLARS = pa.schema(
    [
        *_NEURON,
        ("kind", pa.string()),
        ("rank", pa.int32()),
        ("value", pa.float32()),
        ("document", pa.int64()),
        ("position", pa.int32()),
        ("start", pa.int32()),
        ("tokens", _TEXTS),
        ("values", _VALUES),
    ]
)
"""Pieces of text where a neuron's value is largest (kind ``top``), and at each quantile of its values (``q50`` ..),
with the value at each token; `position` and `start` (of the first token shown) count tokens of the document."""
DENSITIES = pa.schema(
    [
        ("layer", pa.int16()),
        ("neuron", pa.int32()),
        ("n_tokens", pa.int64()),
        ("mean", pa.float64()),
        ("std", pa.float64()),
        ("smallest", pa.float32()),
        ("largest", pa.float32()),
        ("threshold", pa.float32()),
        ("density_positive", pa.float64()),
        ("density_negative", pa.float64()),
        ("edges", _VALUES),
        ("counts", pa.list_(pa.int64())),
    ]
)
"""A neuron's values over all tokens of a corpus: moments, the shares of tokens at which it is at least `threshold`, or
at most minus that, and a histogram: `counts` between `edges`, the first and last of which are infinite."""
CANDIDATES = pa.schema(
    [
        *_NEURON,
        ("value", pa.float32()),
        ("document", pa.int64()),
        ("position", pa.int32()),
        ("stratum", pa.int16()),
        ("key", pa.uint64()),
        ("start", pa.int32()),
        ("tokens", _TEXTS),
        ("values", _VALUES),
    ]
)
"""A shard's part of `EXEMPLARS`: documents at a neuron's peak that may be among them; `stratum` is the bin of the
peak's size, and of the documents of a stratum those of the smallest `key` are a random sample."""
COUNTS = pa.schema(
    [
        ("layer", pa.int16()),
        ("neuron", pa.int32()),
        ("n_tokens", pa.int64()),
        ("n_documents", pa.int64()),
        ("sum", pa.string()),
        ("squares", pa.string()),
        ("smallest", pa.float32()),
        ("largest", pa.float32()),
        ("counts", pa.list_(pa.int64())),
        ("peaks", pa.list_(pa.int64())),
        ("above", pa.list_(pa.int64())),
    ]
)
"""A shard's part of `DENSITIES`, which adds up exactly (meaning/densities.py); sums are hexadecimal whole numbers."""
PROFILES = pa.schema([("prompt_id", pa.int64()), ("node_id", pa.int32()), ("input", _VALUES), ("output", _VALUES)])
"""Attribution profiles of neuron nodes, total effects in the linearised model: `input`, of the embedding at each source
position on the node's value, one for each token of the prompt (0 where no path leads); `output`, of the node on each
target logit, in the order of the logit nodes. Both are effects of distances from the baseline."""
CONCEPTS = pa.schema(
    [
        *_NEURON,
        ("label", pa.string()),
        ("value", pa.string()),
        ("auroc", pa.float64()),
        ("auroc_chosen_on", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("p", pa.float64()),
        ("q", pa.float64()),
        ("n_positive", pa.int64()),
        ("n_negative", pa.int64()),
    ]
)
"""How a neuron's attribution tells prompts with one value of a label from others: AUROC on the half that it was not
chosen on with its interval, on the half that it was, permutation p-value, and that after Benjamini-Hochberg."""

STEERING = pa.schema(
    [
        ("prompt_id", pa.int64()),
        ("text", pa.string()),
        ("group", pa.string()),
        ("n_nodes", pa.int32()),
        ("factor", pa.float64()),
        ("draw", pa.int32()),
        ("token", pa.string()),
        ("token_id", pa.int32()),
        ("role", pa.string()),
        ("probability_before", pa.float32()),
        ("probability_after", pa.float32()),
        ("logit_before", pa.float32()),
        ("logit_after", pa.float32()),
        ("greedy_before", pa.string()),
        ("greedy_after", pa.string()),
        ("changed", pa.bool_()),
        ("kl", pa.float32()),
    ]
)
"""What multiplying a group of nodes did to a next token on a prompt: draw -1 is the group, 0 and up are random ones of
the same size. `n_nodes`: (position, neuron) pairs acted on. The role is target, foil, asked or top (the unsteered
model's greedy token). Of the row's group, factor and draw as a whole: the greedy token, whether it is another one, and
KL(unsteered, steered) over the vocabulary, in nats."""
STEERING_GROUPS = pa.schema(
    [
        ("prompt_id", pa.int64()),
        ("group", pa.string()),
        ("factor", pa.float64()),
        ("draw", pa.int32()),
        ("other", pa.string()),
        ("kept", pa.float32()),
    ]
)
"""What it did to another group's activations: `kept` is the mean over that group's nodes of value steered / value
unsteered, weighted by the square of the latter: 1 as before, 0 gone; null where all of them are 0."""

VALUES = pa.schema([("prompt_id", pa.int64()), ("layer", pa.int16()), ("attributions", _VALUES)])
"""The attribution of every neuron of a layer on a prompt, kept or not, by its number and summed over positions."""

COMPARISON = pa.schema(
    [
        ("layer", pa.int16()),
        ("position", pa.int32()),
        ("neuron", pa.int32()),
        ("expert", pa.int32()),
        ("change", pa.string()),
        ("attribution_first", pa.float64()),
        ("attribution_last", pa.float64()),
        ("difference", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("p", pa.float64()),
        ("q", pa.float64()),
        ("n_first", pa.int64()),
        ("n_last", pa.int64()),
        ("activation_first", pa.float64()),
        ("activation_last", pa.float64()),
    ]
)
"""The first and the last side of a comparison, a row for each node that a prompt of either keeps, largest difference
first; position -1 where positions are summed over. Attributions are means over the prompts compared; the difference is
last minus first, with its 95 % interval over prompts, p-value and q (null where a side has one prompt, or the node was
not tested). `n_first`, `n_last`: prompts that keep the node; activations are means where it is kept, null of none.
`change`: ``appeared`` (in the circuit of the last side alone), ``vanished`` (of the first alone), ``sign`` (in both,
with attributions of opposite signs), ``both`` or ``neither``."""
COMPARED = pa.schema(
    [
        ("side", pa.int32()),
        ("name", pa.string()),
        ("model", pa.string()),
        ("n_prompts", pa.int64()),
        ("metric", pa.float64()),
        ("metric_low", pa.float64()),
        ("metric_high", pa.float64()),
        ("n_nodes", pa.int64()),
        ("faithfulness_size", pa.float64()),
        ("faithfulness", pa.float64()),
        ("faithfulness_low", pa.float64()),
        ("faithfulness_high", pa.float64()),
        ("appeared", pa.int64()),
        ("vanished", pa.int64()),
        ("changed_sign", pa.int64()),
        ("overlap", pa.float64()),
        ("weighted_overlap", pa.float64()),
        ("overlap_last", pa.float64()),
        ("weighted_overlap_last", pa.float64()),
        ("pearson", pa.float64()),
        ("spearman", pa.float64()),
        ("pearson_all", pa.float64()),
        ("spearman_all", pa.float64()),
    ]
)
"""The sides of a comparison in their order: the mean metric over prompts with its interval, the size of the circuit,
faithfulness at the largest size that was tested, and what the circuit has in common with that of the side before (null
of the first): nodes that appeared, vanished, or changed the sign of their attribution; Jaccard's overlap of the two and
that of signed attributions; correlations of attributions over the nodes of either circuit, and over all neurons where
they are known. ``_last``: overlaps with the last side."""
COURSES = pa.schema(
    [
        ("side", pa.int32()),
        ("name", pa.string()),
        ("group", pa.string()),
        ("layer", pa.int16()),
        ("position", pa.int32()),
        ("neuron", pa.int32()),
        ("expert", pa.int32()),
        ("attribution", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("in_circuit", pa.bool_()),
    ]
)
"""How the nodes of any side's circuit, and groups of them, fare over the sides: the mean attribution over prompts with
its interval, and whether the side's circuit has the node (any of the group). A row is of a node, or of a group, whose
layer, position, neuron and expert are null."""

TARGET, FOIL = -1, -2
"""The ``neuron`` of the metric's two logit nodes there, which are other tokens for other prompts."""

SCHEMAS: dict[str, pa.Schema] = {
    "prompts": PROMPTS,
    "nodes": NODES,
    "edges": EDGES,
    "profiles": PROFILES,
    "values": VALUES,
}
"""The tables of single prompts; edges, profiles and values are there where they were asked for."""


def stored_names(stored: Sequence[str]) -> dict[str, str | None]:
    """Today's columns of a table file, and what each is called in the file; None for one that it lacks (all null).

    Args:
        stored: the file's own column names. Only a nodes table of version 2 has a column ``remainder``; tables of
            attributed neurons had no ``expert`` at first.
    """
    names: dict[str, str | None] = {_RENAMED.get(name, name): name for name in stored}
    if "remainder" in stored:
        return {name: names.get(name) for name in NODES.names}
    if "expert" not in names and "neuron" in names and _ATTRIBUTED & names.keys():
        after = [*names].index("neuron") + 1
        return {name: names.get(name) for name in (*[*names][:after], "expert", *[*names][after:])}
    return names
