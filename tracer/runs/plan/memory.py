"""How much memory tracing takes, counted from a model's config: no weight is read.

Every part is a count of tensors: what autograd saves for the backward pass, the values and gradients of all nodes, one
layer of them while nodes are selected, one piece of the vocabulary, the constants and matrices of the edges. The few
constants are measurements, each said to be one. Knows what the other modules allocate; refuses to know jobs and
machines (runs/plan/planner.py).

The counts are of live tensors. glibc holds on to what was freed, so that a process can grow to twice as much, unless
`limit_malloc_retention` (runs/worker.py) was called in it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from tracer.attribution.edges import AUTOGRAD_WORKSPACE, LEAST_WORKSPACE, SHARE_OF_BUDGET
from tracer.attribution.exact import EXACT_ROWS, FORWARD_ONLY
from tracer.attribution.replay import CPU_ROWS, GPU_ROWS
from tracer.errors import JobError, quoted
from tracer.model import backend
from tracer.model import model as loading
from tracer.model.head import PIECE
from tracer.model.sizes import Shape
from tracer.settings import (
    BASELINES,
    BASES,
    EDGE_BASES,
    LINEARISED,
    METHODS,
    METRICS,
    PATH_METHODS,
    RULED_METHODS,
    RULES,
    SUMS_OF_TARGETS,
)

# Resident set of a worker that has traced one prompt of the demo: Python, torch, transformers, nnsight, pyarrow
# (measured on Linux with torch 2.13, CPU build).
RUNTIME = 500 * 2**20
# Of that the pages of libraries, which processes beside each other share (measured there too).
LIBRARIES = 150 * 2**20
# Of a fast tokenizer, per entry of its vocabulary, merges included (measured on one of 100,000 entries).
TOKENIZER = 700
# What a batch adds in many small pieces: code first run, tables, what the heap keeps (measured).
SMALL = 32 * 2**20
# What a CUDA context and its libraries take of a GPU (the usual figure; not measured by us).
CUDA_CONTEXT = 2**29
# Of each node that may be among the strongest, where it is and where these are sorted: place, number, value.
CANDIDATE, SORTED = 36, 88
# Nodes of a layer that are looked at first where a mass decides how many are kept.
FIRST_OF_MASS = 4096
# Of each node of one prompt in one layer, for the largest of them: PyTorch's pairs of value and index.
LARGEST = 16
# Of each logit while probabilities are summed in float64.
SUMMED = 24
# Of each logit where a metric is of all of them (measured).
WEIGHED = 36
# States of a token that are held for each expert it goes to: what enters it, leaves it, and both in another order.
ROUTED = 4
# Of each edge between its weight and the pruned table: indices, weight, value, share, attribution, influence.
EDGE = 68


SHARED = 10
"""Tokens that are taken to hold the share of probability that a metric is of."""


@dataclass(frozen=True)
class Workload:
    """What is done with each prompt.

    Attributes:
        method, basis, baseline, metric, rules, top_k: as in `tracer.attribute`.
        nodes: kept for each prompt; None (a threshold or a mass alone decides) counts as 2,000.
        edges: trace the edges among them. profiles: and their attribution profiles.
        mass: whether nodes are selected by `mass`.
        positions: how many of the last positions logits are read at.
        whole: whether the attributions of all nodes are wanted too. circuits: False where they alone are, as of
            `tracer.attribute`.
        attention: the kernel, ``eager`` or ``sdpa``; the shape's own if None.
        batch: prompts computed at once, if that is settled.

    Raises:
        JobError: an unknown name, or a number below 1.
    """

    method: str = "relp"
    basis: str = "activation"
    baseline: str = "zero"
    metric: str = "auto"
    nodes: int | None = 200
    edges: bool = True
    rules: frozenset[str] = RULES
    top_k: int = 5
    mass: bool = False
    positions: int = 1
    whole: bool = False
    circuits: bool = True
    attention: str | None = None
    batch: int | None = None
    profiles: bool = False

    def __post_init__(self) -> None:
        known = {"method": METHODS, "basis": BASES, "baseline": BASELINES, "metric": METRICS}
        for name, allowed in (known | {"attention": (None, *loading.KERNELS)}).items():
            if (value := getattr(self, name)) not in allowed:
                raise JobError(
                    f"{name}={quoted(value)}", f"must be one of {', '.join(map(str, allowed))}", "choose one"
                )
        _check_positive(
            {"positions": self.positions, "top_k": self.top_k, "batch": 1 if self.batch is None else self.batch}
        )

    @property
    def kept(self) -> int:
        """Nodes of a prompt's circuit."""
        return 2000 if self.nodes is None else self.nodes

    @property
    def links(self) -> bool:
        """Whether edges are traced: they lead into single targets, between nodes of some bases."""
        may = self.metric in SUMS_OF_TARGETS | {"auto"} and self.basis in EDGE_BASES
        return self.edges and self.circuits and may

    @property
    def profiled(self) -> bool:
        """Whether attribution profiles are kept."""
        return self.profiles and self.circuits

    @property
    def linearised(self) -> bool:
        """Whether anything of the RelP linearisation is worked out beside the attributions."""
        return self.links or self.profiled

    @property
    def logits(self) -> int:
        """Of a prompt's metric."""
        return {"difference": 2, "auto": 2, "topk": self.top_k, "share": SHARED}.get(self.metric, 1) * self.positions


def _check_positive(numbers: dict[str, int]) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise JobError(f"{name}={number}", "must be 1 or more", "change it")


@dataclass(frozen=True)
class Memory:
    """Predicted bytes of one worker on one batch. Each part is of the phase in which it is largest; they do not add up.

    Attributes:
        runtime: interpreter, libraries and tokenizer. context: of CUDA. weights: of the model.
        loading: the checkpoint beside the weights while they are converted.
        attribution: activations, gradients and logits of the passes. results: of them what leaves the device.
        selection: values and gradients of all nodes, and those of one layer while the strongest are found.
        edges: of the batch's edges, with the constants of its linearisation. profiles: of its attribution profiles.
        host, device: the most on either; on a CPU all is on the host. peak: the most of both together.
        phase: in which the peak is: ``loading``, ``attribution``, ``selection``, ``profiles`` or ``edges``.
    """

    runtime: int
    context: int
    weights: int
    loading: int
    attribution: int
    results: int
    selection: int
    edges: int
    host: int
    device: int
    peak: int
    phase: str
    profiles: int = 0


@dataclass(frozen=True)
class _Phase:
    """Bytes beside runtime and weights: of the host, and of wherever the model is."""

    name: str
    host: int
    device: int = 0


@dataclass(frozen=True)
class _Case:
    """One batch of prompts of one length, and what is done with it; arguments as of `predict`."""

    shape: Shape
    work: Workload
    length: int
    batch: int = 1
    padded: bool = False
    max_bytes: int | None = None
    gpu: int | None = None

    # Sizes.

    @property
    def eager(self) -> bool:
        return (self.work.attention or self.shape.attention) == "eager"

    @property
    def positions(self) -> int:
        """At which a prompt's logits are read."""
        return min(self.work.positions, self.length)

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def layer(self) -> int:
        """Nodes of one layer of the batch."""
        return self.tokens * self.shape.n_neurons(self.work.basis)

    @property
    def single(self) -> int:
        """A float32 of every node of one prompt."""
        return self.result // self.batch

    @property
    def result(self) -> int:
        """A float32 of every node of the batch, by its number: of experts that did not run too."""
        return 4 * self.shape.n_layers * self.tokens * self.shape.n_numbered(self.work.basis)

    @property
    def values(self) -> int:
        """Every node of the batch in the model's dtype."""
        return self.shape.itemsize * self.shape.n_layers * self.layer

    @property
    def pattern(self) -> int:
        """The attention pattern of one layer of the batch, float32."""
        return 4 * self.shape.n_heads * self.length * self.tokens

    @property
    def budget(self) -> int:
        """`Model.budget`."""
        return backend.BUDGET_WITHOUT_GPU if self.gpu is None else self.gpu // 4

    # What is done.

    @property
    def there(self) -> bool:
        """Whether the circuit is worked out beside the model, without results for all nodes; see `trace.can_ask`."""
        return self.work.circuits and self.work.method != "exact"

    @property
    def linear(self) -> bool:
        """Whether the backward is RelP's with all rules, and so does not run through norms, patterns, activations."""
        return self.work.method in ("relp", *FORWARD_ONLY) and self.edge_rules

    @property
    def edge_rules(self) -> bool:
        """Whether the linearisation of edges has all rules."""
        return self.work.method not in RULED_METHODS or self.work.rules in LINEARISED

    @property
    def backward(self) -> bool:
        return self.work.method not in FORWARD_ONLY or self.work.linearised

    @property
    def replays(self) -> bool:
        """Whether edges and profiles come from the replay."""
        return self.work.linearised and self.shape.replays and self.edge_rules

    # The passes.

    def saved(self) -> int:
        """Bytes that one block saves for the backward, per token; linear maps nothing: weights have no gradient."""
        shape, size, full = self.shape, self.shape.itemsize, not self.linear
        inner = shape.saved_by_activation if full else 1
        mlp = inner + (3 if shape.gated else 1)  # then its result, and the other factor and the product
        output = self.work.basis != "activation"
        neurons = shape.d_mlp * (mlp - output) + shape.d_model * output
        norms = shape.norm_itemsize * shape.d_model * shape.norms if full else 0
        if full and shape.qk_norms:
            norms += shape.norm_itemsize * (shape.attention_width + shape.value_width)
        return neurons * size + norms + self._saved_by_attention(full)

    def _saved_by_attention(self, full: bool) -> int:
        shape, size, width = self.shape, self.shape.itemsize, self.shape.attention_width
        if not self.eager:  # query and output, key, value; a mask is kept, and makes the kernel repeat keys and values
            masked = self.padded or (shape.window is not None and self.length >= shape.window)
            if (masked and shape.value_width < width) or shape.head_dim > 256:
                return size * (4 * width + self.length * masked)
            values = width + 2 * shape.value_width if shape.fused_values else shape.value_width
            return size * (2 * width + shape.value_width + values + self.length * masked)
        patterns = shape.n_heads * self.length
        if not full:
            return size * (patterns + width)
        softmax = patterns * (4 if size == 4 else 4 + size)
        return softmax + size * (3 * width + patterns * shape.soft_cap)

    def passing(self) -> int:
        """Bytes of a forward and backward: what is saved of all blocks, and what the block at work holds besides."""
        shape, size = self.shape, self.shape.itemsize
        patterns = shape.n_heads * self.length if self.eager else 0
        # During attention's own backward the MLP of that block is already freed.
        scores = 2 * patterns - 4 * shape.d_mlp if self.linear else 3 * patterns - 5 * shape.d_mlp
        at_work = self.tokens * size * max(3 * shape.d_mlp + (4 + ROUTED * shape.routed) * shape.d_model, scores)
        return self.tokens * shape.n_layers * self.saved() + max(at_work, self._scored())

    def forward(self, tokens: int | None = None, kept: bool = True) -> int:
        """Bytes of a forward over `tokens`, which keeps the values of all nodes or none."""
        shape, tokens = self.shape, self.tokens if tokens is None else tokens
        patterns = shape.n_heads * self.length if self.eager else 0
        values = shape.n_layers * shape.n_neurons(self.work.basis) if kept else 0
        mlp = 3 * shape.d_mlp + (4 + ROUTED * shape.routed) * shape.d_model
        at_work = max(mlp, 3 * patterns + 4 * shape.attention_width)
        return tokens * shape.itemsize * (values + at_work)

    def constants(self, saved: bool) -> int:
        """Bytes of the constants of the linearisation, beside values of all nodes: of every block the activation's
        input, the other factor and, where nodes are outputs, the product; the MLP's output and the pattern in float32.

        Args:
            saved: of those only what autograd does not save anyhow.
        """
        if not self.replays:
            return 0
        shape, size = self.shape, self.shape.itemsize
        output = self.work.basis == "output"
        factors = (self.linear if saved else 1 + shape.gated) + output
        wide = factors * shape.d_mlp * size + 4 * shape.d_model * (not output or size != 4) + 4 * shape.norms
        pattern = 0 if saved and self.eager and size == 4 else self.pattern
        return shape.n_layers * (self.tokens * wide + pattern)

    def _scored(self) -> int:
        """Logits beside a pass: one piece of the vocabulary at a time, for the model's own tokens or a metric of all of
        them; where rows of the head cannot be read, those of the last positions, which the model makes."""
        shape, rows = self.shape, self.batch * self.positions
        if not shape.replays:
            each = 2 * shape.itemsize + 8 * self.work.logits * (1 + (self.work.metric == "logprob"))
            return rows * shape.vocab_size * each
        if self.work.metric not in ("logprob", "centred"):
            return min(PIECE, rows * shape.vocab_size) * (4 + shape.itemsize) + LARGEST * shape.vocab_size
        tokens = min(shape.vocab_size, PIECE // (2 * rows))
        return tokens * (WEIGHED * rows + 4 * shape.d_model * (shape.itemsize != 4))

    def _said(self) -> int:
        """Probabilities of the metric's tokens and the likeliest, one piece of the vocabulary at a time."""
        rows, width = self.batch * self.positions, max(1, self.work.logits // self.positions)
        return min(PIECE // width, rows * self.shape.vocab_size) * (SUMMED + 4 * width)

    # The phases.

    def phases(self) -> list[_Phase]:
        """All, in their order."""
        loading_ = 0 if self.gpu is not None else self.shape.checkpoint_bytes  # of a file, which can be reclaimed
        results = [] if self.there else self._results()
        selection = [self._selection()] if self.work.circuits else []
        profiles = self._profiles() if self.work.profiled else []
        edges = self._edges() if self.work.links else []
        done = [*results, *selection, *profiles, *edges]
        return [_Phase("loading", loading_), *self._reference(), *self._passes(), *done]

    @property
    def _means(self) -> int:
        return self.single if self.work.baseline == "mean" else 0

    def _reference(self) -> list[_Phase]:
        """Of the mean: float64 sums, and a batch of the reference in float32 and float64."""
        if self.work.baseline != "mean":
            return []
        return [_Phase("attribution", 3 * self.single + 4 * self.result), _Phase("attribution", 0, self.forward())]

    def _passes(self) -> list[_Phase]:
        """The method's passes, beside what it holds meanwhile."""
        method, paired = self.work.method, self.work.baseline == "counterfactual"
        if method == "exact":
            return self._ablations()
        if method in PATH_METHODS:  # beside its sums, values and gradients of the step before, and what a layer adds
            step = 2 * self.values + 16 * self.layer
            return [_Phase("attribution", self._means, self.found() + step + self.passing())]
        one = self.passing() + self.constants(saved=True) if self.backward else self.forward()
        phases = [_Phase("attribution", self._means, one)]
        if paired:
            phases.append(_Phase("attribution", self._means, self.found() + self.forward(kept=False)))
        if method == "random":  # noise, and a prompt's part of it as it is drawn
            noise = self.result + self.single * (self.shape.n_layers + 1) // self.shape.n_layers
            phases.append(_Phase("attribution", noise, self.found()))
        return phases

    def found(self) -> int:
        """Bytes that the method's passes leave where the model is: values, gradients or sums of all nodes, those that
        they are compared with, and the constants."""
        method, paired = self.work.method, self.work.baseline == "counterfactual"
        own = self.constants(saved=False)
        if method in PATH_METHODS:
            begun = self.values * (1 + (paired or method != "ig-activation"))
            return begun + self.result * (1 + (method == "conductance")) + own
        return self.values * (1 + self.backward + paired) + own

    def _ablations(self) -> list[_Phase]:
        """exact: as many rows as `max_bytes` allows, one of each node's ablation; then a row per token."""
        shape, length = self.shape, self.length
        held = self._means + (3 + (self.work.baseline != "zero")) * self.result
        each = shape.bytes_per_token(gradient=False, length=length) * length
        rows = min(
            max(2, (self.max_bytes or self.budget) // each),
            EXACT_ROWS + 1,
            length * shape.n_neurons(self.work.basis) + 1,
        )
        logits = (rows + length) * self.positions * shape.vocab_size * 12
        square = (length + 1) * length
        of_embeddings = self.forward(square, kept=False) + square * shape.d_model * 4 + logits
        return [
            _Phase("attribution", held, self.forward(rows * length) + logits),
            _Phase("attribution", held + 4 * 2 * square * shape.d_model, of_embeddings),
        ]

    def _results(self) -> list[_Phase]:
        """The results of all nodes as they leave the device, and as they are put together."""
        work, kept, exact = self.work, self._kept, self.work.method == "exact"
        given = 2 + (work.baseline != "zero") + exact  # values, gradients or attributions, baselines
        made = given + kept + (work.method in ("relp", "grad")) + self.padded
        copied = self.gpu is not None or self.shape.itemsize != 4
        leaving = _Phase("attribution", self._means + (given + copied) * self.result, 0 if exact else self.found())
        return [leaving, _Phase("attribution", self._means + made * self.result)]

    @property
    def _kept(self) -> int:
        """What is kept of all nodes, each float32: attributions, values, gradients, baselines."""
        gradients = self.work.links
        return 2 + gradients + (gradients and self.work.baseline != "zero")

    @property
    def _before(self) -> _Phase:
        """What is held of all nodes while circuits are made."""
        if not self.there:
            return _Phase("selection", self._kept * self.result)
        noise = self.result if self.work.method == "random" else 0
        return _Phase("selection", self._means + noise, self.found())

    def _selection(self) -> _Phase:
        """One layer's attributions, and of all layers those nodes that may be among the strongest; or one piece of the
        vocabulary."""
        work, one, prompts = self.work, self.layer // self.batch, self.batch if self.there else 1
        limit = FIRST_OF_MASS if work.mass and work.nodes is None else work.kept
        many = prompts * self.shape.n_layers * min(one, limit)
        copies = 1 + 2 * (self.shape.itemsize != 4) + 2 * (work.baseline != "zero")
        layer = prompts * one * max(4 * copies, 9) + LARGEST * one * (limit < one)
        host = SORTED * many + (self.result + self.single) * work.whole
        at_work = max(layer + CANDIDATE * many, self._said())
        return _Phase("selection", self._before.host + host, self._before.device + at_work)

    def _profiles(self) -> list[_Phase]:
        """The profiles of all prompts of the batch, or of one prompt after the other."""
        work, shape, case = self.work, self.shape, self if self.there else replace(self, batch=1)
        n = min(work.kept, shape.n_layers * shape.n_neurons(work.basis) * self.length)
        found = case.batch * 4 * n * (self.length + work.logits)
        kept = 0 if self.there else case.values + case.constants(saved=False)
        device = (self._before.device if self.there else kept) + found
        if not self.replays:
            return [_Phase("profiles", self._before.host + found, device + case._effects())]
        return [_Phase("profiles", self._before.host + found, device + case._rising())]

    def _rising(self) -> int:
        """Bytes of residual streams, matrices and one piece of an MLP while sources are walked up together, each from
        its own position on; logits are fewer."""
        shape, width = self.shape, 4 * self.shape.d_model
        most = max(LEAST_WORKSPACE, self.budget // SHARE_OF_BUDGET)
        rows = min(self.batch * self.length * (self.length + 1) // 2, most // width + self.length)
        piece = min(rows, CPU_ROWS if self.gpu is None else GPU_ROWS, max(1, most // (12 * shape.d_mlp)))
        copied = shape.itemsize != 4
        maps = (
            4 * shape.d_model * ((2 + shape.gated) * shape.d_mlp * copied + shape.attention_width + shape.value_width)
        )
        # Streams, what flows, values of whole squares of positions, and what their heads mix.
        states = rows * (3 * width + 4 * 2 * (shape.attention_width + shape.value_width))
        factors = 4 * (1 + shape.gated) * 2 * self.tokens * shape.d_mlp
        return states + maps + factors + 12 * piece * shape.d_mlp + self.pattern // self.batch

    def _effects(self) -> int:
        """Batched backwards through the whole linearised model: of each of a chunk, what a layer holds at work, and
        gradients to all nodes for logits."""
        shape, size = self.shape, self.shape.itemsize
        chunk = max(1, min(64, AUTOGRAD_WORKSPACE // (4 * (self.tokens * shape.d_model + 3 * self.layer))))
        work = chunk * self.tokens * size * (3 * shape.d_mlp + 4 * shape.d_model)
        slopes = min(self.work.logits, max(1, AUTOGRAD_WORKSPACE // self.result)) * self.values
        return self.tokens * shape.n_layers * self.saved() + max(work, slopes)

    def _edges(self) -> list[_Phase]:
        """The edges of all prompts of the batch, or of one prompt after the other, and then each one's graph."""
        work, shape, case = self.work, self.shape, self if self.there else replace(self, batch=1)
        n = min(work.kept, shape.n_layers * shape.n_neurons(work.basis) * self.length)
        sources, targets, moved = n + self.length, n + work.logits, work.baseline != "zero"
        found = case.batch * 4 * targets * (sources + moved * self.length)
        answers = case.batch * 4 * targets * sources * (1 + moved)
        # A neuron has direct edges to layers above it alone: at most half of the pairs.
        many = EDGE * (n * n // 2 + n * self.length + work.logits * sources) + 4 * 8 * (n + self.length)
        host = 0 if self.there else self._before.host
        graph = _Phase("edges", host + answers + many)
        before = self._before if self.there else _Phase("edges", host, case.values + case.constants(saved=False))
        if not self.replays:
            return [graph, _Phase("edges", before.host + answers, before.device + case._by_autograd(moved))]
        ends = case.batch * 4 * shape.d_model * (sources + targets + moved * self.length)
        picked = case.batch * 8 * n * shape.d_mlp if work.basis == "output" else 0
        device = before.device + found + ends + picked
        walked = device + case._walking(sources, n)
        return [graph, _Phase("edges", before.host, walked), _Phase("edges", before.host + answers, device)]

    def _walking(self, sources: int, n: int) -> int:
        """Bytes of residual streams and matrices while sources are walked up, all prompts together."""
        shape = self.shape
        width, both = 4 * shape.d_model, shape.attention_width + shape.value_width
        # A source is carried from its position on: half of the positions, where they lie anyhow.
        carried = self.batch * (sources * (self.length + 1) // 2 + self.length)
        rows = min(carried, max(CPU_ROWS if self.gpu is None else GPU_ROWS, self.length))
        most = max(LEAST_WORKSPACE, self.budget // SHARE_OF_BUDGET)
        states = width * min(carried, max(most // width, rows))
        copied = shape.itemsize != 4
        maps = width * both * 2 + width * max(shape.attention_width, shape.value_width) * copied
        if self.work.basis == "output":
            maps = max(maps, 8 * n * shape.d_mlp + 4 * shape.d_model * shape.d_mlp * copied)
        return states + maps + self.pattern + self.pattern // self.batch + 8 * rows * both

    def _by_autograd(self, moved: bool) -> int:
        """Batched backwards through the linearised model, with detached MLPs: gradients of every MLP's output, once per
        target of a chunk, and of one layer's neurons at a time."""
        shape, size = self.shape, self.shape.itemsize
        written = self.tokens * shape.n_layers * shape.d_model
        chunk = max(1, min(64, AUTOGRAD_WORKSPACE // (4 * (written + (2 + moved) * self.layer))))
        slopes = chunk * (written + self.tokens * shape.d_model) * size
        work = chunk * max(self.layer * (size + 4), self.tokens * size * 4 * shape.d_model)
        leaves = size * written + self.values * (self.work.basis == "activation")
        return self.tokens * shape.n_layers * self.saved() + leaves + slopes + work


def predict(
    shape: Shape,
    work: Workload,
    length: int,
    batch: int = 1,
    *,
    padded: bool = False,
    max_bytes: int | None = None,
    gpu: int | None = None,
) -> Memory:
    """Predict the memory of a worker that traces one batch of prompts.

    Args:
        length: tokens of each prompt, or of the longest. batch: prompts that are attributed together.
        padded: whether prompts differ in length, so that they are padded and masked.
        max_bytes: bytes that one batch may use, for ``exact``; by default a GiB, or a quarter of a GPU.
        gpu: bytes of one GPU; None for a CPU. Nothing was measured on one.

    Raises:
        JobError: a number below 1.
    """
    _check_positive({"length": length, "batch": batch})
    phases = _Case(shape, work, length, batch, padded and batch > 1, max_bytes, gpu).phases()
    runtime, context = RUNTIME + TOKENIZER * shape.vocab_size, 0 if gpu is None else CUDA_CONTEXT
    device = max(phase.device for phase in phases)
    host = max(phase.host + (phase.device if gpu is None else 0) for phase in phases)
    most = max(phases, key=lambda phase: phase.host + phase.device)

    def largest(name: str) -> int:
        return max((phase.host + phase.device for phase in phases if phase.name == name), default=0)

    return Memory(
        runtime=runtime,
        context=context,
        weights=shape.weight_bytes,
        loading=largest("loading"),
        attribution=largest("attribution"),
        results=max(phase.host for phase in phases if phase.name == "attribution"),
        selection=largest("selection"),
        edges=largest("edges"),
        profiles=largest("profiles"),
        host=runtime + SMALL + host + (shape.weight_bytes if gpu is None else 0),
        device=0 if gpu is None else context + shape.weight_bytes + device,
        peak=runtime + context + shape.weight_bytes + SMALL + most.host + most.device,
        phase=most.name,
    )
