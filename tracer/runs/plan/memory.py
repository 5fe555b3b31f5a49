"""How much memory tracing takes, counted from a model's config: no weight is read.

Every part is a count of tensors: what autograd saves for the backward pass, the float32 results, the sort that selects
nodes, the constants and matrices of the edges. The few constants are measurements, each said to be one. Knows what the
other modules allocate; refuses to know jobs and machines (runs/plan/planner.py).

The counts are of live tensors. glibc holds on to what was freed, so that a process can grow to twice as much, unless
`limit_malloc_retention` (runs/worker.py) was called in it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tracer.attribution.edges import MAX_AUTOGRAD_BYTES, MAX_REPLAY_BYTES
from tracer.attribution.methods import EXACT_ROWS, FORWARD_ONLY
from tracer.errors import JobError, quoted
from tracer.model import backend
from tracer.model import model as loading
from tracer.model.sizes import Shape
from tracer.settings import BASELINES, BASES, METHODS, METRICS, RULES, SUMS_OF_LOGITS

# Resident set of a worker that has traced one prompt of the demo: Python, torch, transformers, nnsight, pyarrow
# (measured on Linux with torch 2.13, CPU build).
RUNTIME = 500 * 2**20
# Of that the pages of libraries, which processes beside each other share (measured there too).
LIBRARIES = 150 * 2**20
# Of a fast tokenizer, per entry of its vocabulary, merges included (measured on one of 100,000 entries).
TOKENIZER = 700
# What a CUDA context and its libraries take of a GPU (the usual figure; not measured by us).
CUDA_CONTEXT = 2**29
# Selecting sorts |attribution|: two float32 copies, int64 ranks and the sort's own buffer (measured); `mass` adds
# running sums in float64.
SELECT, SELECT_MASS = 25, 40
# Of each edge between its weight and the pruned table: indices, weight, value, share, attribution, influence.
EDGE = 68


@dataclass(frozen=True)
class Memory:
    """Predicted bytes of one worker on one batch. Each part is of the phase in which it is largest; they do not add up.

    Attributes:
        runtime: interpreter, libraries and tokenizer. context: of CUDA. weights: of the model.
        loading: the checkpoint beside the weights while they are converted.
        attribution: activations, gradients and logits of the passes. results: float32 results and copies of them.
        selection: of the sort. edges: of one prompt's edges.
        host, device: the most on either; on a CPU all is on the host. peak: the most of both together.
        phase: in which the peak is: ``loading``, ``attribution``, ``selection`` or ``edges``.
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


@dataclass(frozen=True)
class _Phase:
    """Bytes beside runtime and weights: of the host, and of wherever the model is."""

    name: str
    host: int
    device: int = 0


@dataclass(frozen=True)
class _Case:
    """One batch of prompts of one length, and what is done with it."""

    shape: Shape
    method: str
    basis: str
    baseline: str
    nodes: int
    edges: bool
    metric: str
    length: int
    batch: int
    eager: bool
    padded: bool
    whole: bool
    top_k: int
    positions: int
    mass: bool
    max_bytes: int | None
    cuda: bool

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def nodes_of_token(self) -> int:
        return self.shape.n_layers * self.shape.n_neurons(self.basis)

    @property
    def single(self) -> int:
        """A float32 of every node of one prompt."""
        return 4 * self.nodes_of_token * self.length

    @property
    def result(self) -> int:
        """A float32 of every node of the batch."""
        return self.single * self.batch

    @property
    def gradient_of_everything(self) -> bool:
        """Whether the backward also runs through norms, patterns and activations: RelP with all rules is linear."""
        return self.method != "relp" or not self.whole

    # The pass.

    def saved(self) -> int:
        """Bytes that one block saves for the backward, per token; linear maps nothing: weights have no gradient."""
        shape, size, full = self.shape, self.shape.itemsize, self.gradient_of_everything
        inner = shape.saved_by_activation if full else 1
        mlp = inner + (3 if shape.gated else 1)  # then its result, and the other factor and the product
        neurons = shape.d_mlp * (mlp - (self.basis == "output")) + shape.d_model * (self.basis == "output")
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

    def passing(self, forward_only: bool = False, tokens: int | None = None, kept_neurons: bool = True) -> int:
        """Bytes of one pass over `tokens`: what is saved of all blocks, and what the block at work holds beside it."""
        shape, size = self.shape, self.shape.itemsize
        tokens = self.tokens if tokens is None else tokens
        patterns = shape.n_heads * self.length if self.eager else 0
        block = 3 * shape.d_mlp + 4 * shape.d_model
        if forward_only:
            saved = shape.n_layers * shape.n_neurons(self.basis) * size if kept_neurons else 0
            return tokens * (saved + size * max(block, 3 * patterns + 4 * shape.attention_width))
        # During attention's own backward the MLP of that block is already freed.
        scores = 3 * patterns - 5 * shape.d_mlp if self.gradient_of_everything else 2 * patterns - 4 * shape.d_mlp
        at_work = max(tokens * size * max(block, scores), self._logits())
        return tokens * shape.n_layers * self.saved() + at_work

    def _logits(self) -> int:
        """Logits where they are read and their gradient, and each entry's row of them in float32, twice."""
        entries = {"difference": 2, "auto": 2, "topk": self.top_k}.get(self.metric, 1) * self.positions
        rows = 2 * self.shape.itemsize * self.positions + 8 * entries * (2 if self.metric == "logprob" else 1)
        return self.batch * rows * self.shape.vocab_size

    @property
    def results(self) -> int:
        """What is kept of all nodes for a circuit, each float32: attributions, values, gradients, baselines."""
        gradients = self.edges or self.method not in FORWARD_ONLY
        baselines = self.baseline != "zero" or self.method in ("ig", "conductance")
        return 2 + gradients + (gradients and baselines)

    # The phases.

    def attribution(self) -> list[_Phase]:
        """The method's passes and what it holds meanwhile, then the assembly of its results."""
        kept = {"counterfactual": self.result, "mean": self.single + self.padded * self.result}.get(self.baseline, 0)
        held = {"relp": 0, "grad": 0, "delta": 0, "random": 0, "exact": 3, "conductance": 6}.get(self.method, 5)
        held = kept + held * self.result
        made = 2 * min(self.results, 3) + (self.results > 3) + self.padded
        phases = [_Phase("attribution", kept + made * self.result)]
        if self.baseline == "mean":  # float64 sums, and a batch of the reference in float32 and float64
            phases.append(_Phase("attribution", 3 * self.single + 4 * self.result))
        if self.method == "exact":
            return [*phases, *self._ablations(held)]
        if self.method in ("delta", "random"):
            return [*phases, _Phase("attribution", held, self.passing(forward_only=True))]
        neurons = 2 * self.tokens * self.nodes_of_token * self.shape.itemsize
        collected = _Phase("attribution", held + (3 if self.cuda else 2) * self.result, neurons)
        return [*phases, collected, _Phase("attribution", held, self.passing())]

    def _ablations(self, held: int) -> list[_Phase]:
        """exact: as many rows as `max_bytes` allows, one of each node's ablation; then a row per token."""
        max_bytes = self.max_bytes or backend.BUDGET_WITHOUT_GPU
        each = self.shape.bytes_per_token(gradient=False, length=self.length) * self.length
        rows = min(max(2, max_bytes // each), EXACT_ROWS + 1, self.length * self.shape.n_neurons(self.basis) + 1)
        logits = (rows + self.length) * self.positions * self.shape.vocab_size * 12
        square = (self.length + 1) * self.length
        return [
            _Phase("attribution", held, self.passing(True, rows * self.length) + logits),
            _Phase(
                "attribution",
                held + 4 * 2 * square * self.shape.d_model,
                self.passing(True, square, kept_neurons=False) + square * self.shape.d_model * 4 + logits,
            ),
        ]

    def selection(self) -> _Phase:
        """The results, and one prompt's nodes being sorted."""
        return _Phase(
            "selection", self.results * self.result + self.single // 4 * (SELECT_MASS if self.mass else SELECT)
        )

    def graph(self) -> list[_Phase]:
        """One prompt's edges beside the batch's results."""
        shape, length, n = self.shape, self.length, min(self.nodes, self.nodes_of_token * self.length)
        logits = {"difference": 2, "auto": 2, "topk": self.top_k}.get(self.metric, 1) * self.positions
        sources, targets, results = n + length, n + logits, self.results * self.result
        dense = 4 * sources * targets
        # A neuron has direct edges to layers above it alone: at most half of the pairs.
        many = EDGE * (n * n // 2 + n * length + logits * sources) + 4 * 8 * (n + length)
        phases = [_Phase("edges", results + dense + many)]
        if not shape.replays or (self.method == "relp" and not self.whole):
            return [*phases, self._by_autograd(results + dense)]
        square, float_copy = shape.n_heads * length**2, shape.itemsize != 4
        patterns, stream = 4 * shape.n_layers * square, 4 * shape.n_layers * length * shape.d_model
        picked = 8 * n * (shape.d_mlp if self.basis == "output" else 1)
        freezing = patterns + stream + picked + shape.itemsize * square * (5 if self.eager else 3)
        ends = 4 * shape.d_model * (sources + targets)
        width = shape.d_model + shape.attention_width
        walking = patterns + 2 * stream + picked + max(MAX_REPLAY_BYTES, 16 * length * width) + 4 * square
        matrices = 4 * shape.d_model * (shape.attention_width + shape.value_width) if float_copy else 0
        if self.basis == "output":
            matrices = max(matrices, 8 * n * shape.d_mlp + 4 * shape.d_model * shape.d_mlp * float_copy)
        return [
            *phases,
            _Phase("edges", results, freezing),
            _Phase("edges", results + dense + ends, walking + matrices),
        ]

    def _by_autograd(self, host: int) -> _Phase:
        """Batched backwards through the linearised model, with detached MLPs: gradients of every MLP's output, once per
        target of a chunk, and of one layer's neurons at a time."""
        shape, size, length = self.shape, self.shape.itemsize, self.length
        written, widest = length * shape.n_layers * shape.d_model, length * shape.n_neurons(self.basis)
        chunk = max(1, min(64, MAX_AUTOGRAD_BYTES // (4 * (written + 2 * widest))))
        slopes = chunk * (written + length * shape.d_model) * size
        layer = chunk * widest * (size + 4)
        work = chunk * length * size * 4 * shape.d_model
        leaves = size * (written + length * self.nodes_of_token)
        saved = length * shape.n_layers * self.saved()
        return _Phase("edges", host, saved + leaves + slopes + max(layer, work))


def predict(
    shape: Shape,
    *,
    method: str = "relp",
    basis: str = "activation",
    baseline: str = "zero",
    nodes: int | None = 200,
    edges: bool = True,
    metric: str = "auto",
    length: int,
    batch: int = 1,
    attention: str | None = None,
    rules: Iterable[str] | None = None,
    top_k: int = 5,
    positions: int = 1,
    padded: bool = False,
    mass: bool = False,
    max_bytes: int | None = None,
    cuda: bool = False,
) -> Memory:
    """Predict the memory of a worker that traces one batch of prompts.

    Args:
        method, basis, baseline, metric, rules, top_k: as in `tracer.attribute`.
        nodes: kept for each prompt; None (a threshold or a mass alone decides) counts as 2,000.
        edges: trace the edges among them.
        length: tokens of each prompt, or of the longest. batch: prompts that are attributed together.
        attention: the kernel, ``eager`` or ``sdpa``; the shape's own if None.
        positions: how many of the last positions logits are read at.
        padded: whether prompts differ in length, so that they are padded and masked.
        mass: whether nodes are selected by `mass`.
        max_bytes: bytes that one batch may use, for ``exact``; a GiB if None.
        cuda: whether the model is on GPUs. Nothing was measured there.

    Raises:
        JobError: an unknown name, or a number below 1.
    """
    known = {"method": (method, METHODS), "basis": (basis, BASES), "baseline": (baseline, BASELINES)}
    known |= {"metric": (metric, METRICS), "attention": (attention, (None, *loading.KERNELS))}
    for name, (value, allowed) in known.items():
        if value not in allowed:
            raise JobError(f"{name}={quoted(value)}", f"must be one of {', '.join(map(str, allowed))}", "choose one")
    for name, number in {"length": length, "batch": batch, "positions": positions, "top_k": top_k}.items():
        if number < 1:
            raise JobError(f"{name}={number}", "must be 1 or more", "change it")
    case = _Case(
        shape,
        method,
        basis,
        baseline,
        2000 if nodes is None else nodes,
        edges and metric in SUMS_OF_LOGITS | {"auto"},
        metric,
        length,
        batch,
        (attention or shape.attention) == "eager",
        padded and batch > 1,
        rules is None or frozenset(rules) == RULES,
        top_k,
        min(positions, length),
        mass,
        max_bytes,
        cuda,
    )
    return _memory(case)


def _memory(case: _Case) -> Memory:
    shape, cuda = case.shape, case.cuda
    runtime, context = RUNTIME + TOKENIZER * shape.vocab_size, CUDA_CONTEXT if cuda else 0
    loading_ = 0 if cuda else shape.checkpoint_bytes  # pages of a file, which the system can reclaim
    attribution = case.attribution()
    phases = [_Phase("loading", loading_), *attribution, case.selection(), *(case.graph() if case.edges else ())]
    most = max(phases, key=lambda phase: phase.host + phase.device)
    host = max(phase.host + (0 if cuda else phase.device) for phase in phases)
    device = max(phase.device for phase in phases)
    graph = [phase.host + phase.device - 2 * case.result for phase in phases if phase.name == "edges"]
    return Memory(
        runtime=runtime,
        context=context,
        weights=shape.weight_bytes,
        loading=loading_,
        attribution=max(phase.device for phase in attribution),
        results=max(phase.host for phase in attribution),
        selection=case.selection().host - 2 * case.result,
        edges=max(graph, default=0),
        host=runtime + host + (0 if cuda else shape.weight_bytes),
        device=context + shape.weight_bytes + device if cuda else 0,
        peak=runtime + context + shape.weight_bytes + most.host + most.device,
        phase=most.name,
    )
