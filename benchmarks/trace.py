"""What a user's calls take, over one forward and backward of the bare model: time, memory, and where the time goes.

Both sides run in this process, in turn, with one thread on a CPU; ratios are medians over pairs. The bare side is plain
PyTorch: embeddings as a leaf, the logits of the last token, one backward to the embeddings. Memory is the growth over
the loaded model at its peak: on a CPU of the resident set, each call in a process of its own; on a GPU what the
allocator says. Figures of `trace_all` are per prompt; it is left out on a CPU where its prompts have over 4,096 tokens
together. Last come the operations of the edges' matrix products and how near they come to this machine's matrix rate.

    OMP_NUM_THREADS=1 python benchmarks/trace.py [--quick] [--shape gemma | --model FOLDER] [--json FILE]
    OMP_NUM_THREADS=1 python benchmarks/trace.py --quick --beside FILE    # an earlier --json, as further columns
    OMP_NUM_THREADS=1 python benchmarks/trace.py --peers                  # plain PyTorch hooks instead: see peers.py
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import common
import parts
import peers
import torch
from common import BARE, SHAPES, bare

import tracer
from tracer.attribution.trace import trace_all
from tracer.model.sizes import Shape
from tracer.runs.plan.memory import Workload, predict
from tracer.runs.plan.planner import Plan, plan
from tracer.runs.worker import limit_malloc_retention

TEXT = "The secretaries near the car that belongs to the old man are reading what the neighbours have written. "
MOST_TOKENS_ON_CPU = 4096
ROUNDS = 3
"""Runs from which shares come, at most."""
MOST_IN_BATCH = {"cuda": 256, "cpu": 4}
SPAN = 20.0
"""Seconds of batches behind a throughput on a GPU; one batch on a CPU."""

Prompts = Sequence[tracer.Prompt]


def every(model: tracer.Model, prompts: Prompts, nodes: int, edges: bool) -> None:
    for _ in trace_all(model, prompts, nodes=nodes, edges=edges):
        pass


CALLS: dict[str, Callable[[tracer.Model, Prompts, int], Any]] = {
    BARE: bare,
    "attribute": lambda model, prompts, nodes: tracer.attribute(model, prompts[:1]),
    "trace, edges=False": lambda model, prompts, nodes: tracer.trace(model, prompts[0], nodes, edges=False),
    "trace": lambda model, prompts, nodes: tracer.trace(model, prompts[0], nodes, edges=True),
    "trace_all, edges=False": partial(every, edges=False),
    "trace_all": partial(every, edges=True),
}
WHATEVER_NODES = (BARE, "attribute")
"""Calls that do not ask how many nodes are selected."""
ALONE = {"trace_all": "trace", "trace_all, edges=False": "trace, edges=False"}
"""What a call of many prompts is for each of them."""


@dataclass(frozen=True)
class Row:
    """Figures of one call; of a call of many prompts, seconds and ratio are per prompt.

    Attributes:
        nodes: None where they make no difference.
        ratio: of its seconds to the bare side's.
        to_alone: of its seconds to those of the prompts one by one; None for a call of one prompt.
        peak: bytes over the loaded model; None where it was not measured.
        shares: of its time by part; None for a part that is not known.
        gflop: billions of operations of the edges' matrix products. rate: of them a second. matrix_rate: billions of
            operations that this machine does a second, in matrices of a like size.
    """

    length: int
    nodes: int | None
    call: str
    seconds: float
    ratio: float
    to_alone: float | None = None
    peak: int | None = None
    shares: dict[str, float | None] = field(default_factory=dict)
    gflop: float | None = None
    rate: float | None = None
    matrix_rate: float | None = None


@dataclass(frozen=True)
class Throughput:
    """Prompts an hour at the planner's batch, and its prediction beside the peak, in bytes (of a CPU's process)."""

    length: int
    batch: int
    prompts_per_hour: float
    graphs_per_hour: float
    peak: int
    predicted: int


class Bench:
    """A loaded model with the options."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.device = options, str(options.device)
        if options.model:
            self.model = tracer.load(str(options.model), device=self.device)
        else:
            half = options.shape == "8b" and self.on_gpu  # slow on a CPU
            dtype = torch.bfloat16 if half else torch.float32
            self.model = common.random_model(SHAPES[options.shape], device=self.device, dtype=dtype)

    @property
    def on_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def prompts(self, length: int, count: int) -> list[tracer.Prompt]:
        """Random tokens; of a real model the text, repeated to length, each prompt beginning at another word."""
        if not self.options.model:
            return common.random_prompts(self.model, length, count)
        words = self.model.tokenizer(self.options.text, add_special_tokens=False)["input_ids"]
        first = [] if self.model.tokenizer.bos_token_id is None else [self.model.tokenizer.bos_token_id]
        made = []
        for i in range(count):
            at = i % len(words)
            ids = [*first, *(words[at:] + words[:at]) * length][:length]
            given = torch.tensor([ids], device=self.model.device)
            with torch.no_grad():
                logits = self.model.module(input_ids=given, use_cache=False, logits_to_keep=1).logits
            target, foil = logits[0, -1].topk(2).indices.tolist()
            made.append(tracer.Prompt(token_ids=ids, target=target, foil=foil))
        return made

    def row(self, call: str, length: int, nodes: int) -> Row:
        """All figures of one call."""
        pairs, limit, count = self.options.pairs, self.options.limit, self.options.batch if call in ALONE else 1
        prompts = self.prompts(length, count)
        run = partial(CALLS[call], self.model, prompts, nodes)
        known = None if call in WHATEVER_NODES else nodes
        seconds, _, ratio = common.in_turn(run, partial(bare, self.model, prompts, nodes), pairs, limit)
        figures: dict[str, Any] = {"seconds": seconds / count, "ratio": ratio / count}
        figures["peak"] = self.peak(call, length, nodes)
        if call != BARE:
            figures |= self.shares(run)
        if call in ALONE:
            alone = CALLS[ALONE[call]]
            each = lambda: [alone(self.model, [prompt], nodes) for prompt in prompts]  # noqa: E731
            figures["to_alone"] = common.in_turn(run, each, pairs, limit)[2]
        return Row(length, known, call, **figures)

    def shares(self, run: Callable[[], Any]) -> dict[str, Any]:
        """Where the time goes; and, where edges are traced, their operations and both rates."""
        meters, rates, started = list[parts.Meter](), list[float](), time.perf_counter()
        while len(meters) < ROUNDS and (not meters or time.perf_counter() - started < self.options.limit):
            rates.append(matrix_rate(self.model))
            meters.append(parts.metered(run))
        total = sum(sum(meter.seconds.values()) for meter in meters)
        spent = {part: sum(meter.seconds[part] for meter in meters) for part in (*parts.PARTS, parts.REST)}
        found = {part: part == parts.REST or parts.known(part) for part in spent}
        shares = {part: took / total if found[part] else None for part, took in spent.items()}
        gflop = parts.metered(run, operations=True).operations["edges"] / 1e9
        if not gflop:
            return {"shares": shares}
        rate = gflop / median(meter.seconds["edges"] for meter in meters)
        return {"shares": shares, "gflop": gflop, "rate": rate, "matrix_rate": median(rates)}

    def peak(self, call: str, length: int, nodes: int) -> int | None:
        """Bytes over the loaded model, on a CPU from a process of its own."""
        if self.on_gpu:
            return self.grown(call, length, nodes)
        if not sys.platform.startswith("linux"):
            return None
        options = self.options
        of = ["--model", str(options.model), "--text", options.text] if options.model else ["--shape", options.shape]
        what = ["--peak", call, str(length), str(nodes), "--batch", str(options.batch), "--device", self.device]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        told = subprocess.check_output([sys.executable, __file__, *of, *what], text=True, env=environment)
        return int(told.split()[-1])

    def grown(self, call: str, length: int, nodes: int) -> int:
        """Bytes by which this process grows; a short prompt comes first."""
        count = self.options.batch if call in ALONE else 1
        CALLS[call](self.model, self.prompts(4, count), 4)
        prompts = self.prompts(length, count)
        return common.grown(partial(CALLS[call], self.model, prompts, nodes), self.device)

    def planned(self, wanted: Workload) -> Plan:
        """The planner's choice for this machine; on a CPU as if it had 4 GiB."""
        memory = torch.cuda.get_device_properties(0).total_memory if self.on_gpu else None
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if self.on_gpu else 4 * 2**30
        return plan(Shape.of_model(self.model), wanted, self.options.lengths, host=host, device=memory,
                    n_devices=1 if self.on_gpu else 0)  # fmt: skip

    def throughput(self, planned: Plan, wanted: Workload, length: int) -> Throughput:
        """Prompts an hour and memory at one length."""
        nodes = wanted.nodes or 0
        most = MOST_IN_BATCH["cuda" if self.on_gpu else "cpu"]
        batch = min(next(one.prompts for one in planned.rows if one.length >= length), most)
        prompts = self.prompts(length, batch)

        def run(edges: bool) -> None:
            for _ in trace_all(self.model, prompts, nodes=nodes, edges=edges, memory=2**60):
                pass

        held = torch.cuda.memory_allocated() if self.on_gpu else common.begin_peak()
        peak = held + common.grown(partial(run, True), self.device)
        expected = predict(planned.shape, wanted, length, batch, gpu=planned.device)
        # The allocator does not count the context.
        predicted = expected.device - expected.context if self.on_gpu else expected.peak
        span = SPAN if self.on_gpu else 0.0
        return Throughput(length, batch, *(batch * per_hour(partial(run, edges), span) for edges in (False, True)),
                          peak=peak, predicted=predicted)  # fmt: skip


def matrix_rate(model: tracer.Model, span: float = 0.2) -> float:
    """Billions of operations a second of float32 products like the edges': 512 rows into attention's width."""
    rows, width, heads = 512, model.d_model, Shape.of_model(model).attention_width
    left, right = torch.randn(rows, width, device=model.device), torch.randn(heads, width, device=model.device)
    times, started = list[float](), time.perf_counter()
    while time.perf_counter() - started < span:
        times.append(common.seconds_of(lambda: left @ right.T))
    return 2e-9 * rows * width * heads / median(times)


def per_hour(run: Callable[[], Any], span: float) -> float:
    """Runs an hour, over at least this many seconds."""
    done, started = 0, time.perf_counter()
    while not done or time.perf_counter() - started < span:
        run()
        done += 1
    return done / (time.perf_counter() - started) * 3600


# What is printed.


def head(bench: Bench) -> str:
    """What is measured, where."""
    model, config = bench.model, bench.model.config
    name = bench.options.model.name if bench.options.model else f"{bench.options.shape} shape, random weights"
    size = sum(one.numel() * one.element_size() for one in model.module.parameters()) / 2**30
    sizes = f"{model.n_layers} layers, d_model {model.d_model}, d_mlp {model.d_mlp}, vocabulary {config.vocab_size:,}"
    gpu = torch.cuda.get_device_name(0) if bench.on_gpu else f"{platform.machine()} CPU, 1 thread"
    return f"{name} ({sizes}; {size:.2f} GiB of {str(model.dtype)[6:]}), {gpu}, torch {torch.__version__}"


def title(beside: bool) -> str:
    names = (*parts.PARTS, parts.REST)
    before = f"{'x before':>10}{'MiB before':>12}" if beside else ""
    return (
        f"{'tokens':>7}{'nodes':>7}  {'call':<23}{'seconds':>9}{'x bare':>8}{'x alone':>9}{'MiB':>7}"
        + "".join(f"{name:>10}" for name in names) + before
    )  # fmt: skip


def number(value: float | None, width: int, digits: int, unit: float = 1) -> str:
    return " " * width if value is None else f"{value / unit:>{width}.{digits}f}"


def line(row: Row, before: Row | None) -> str:
    """A row, and the figures that it had before, if they are known."""
    nodes = "" if row.nodes is None else row.nodes
    told = f"{row.length:>7}{nodes:>7}  {row.call:<23}{row.seconds:>9.3f}{row.ratio:>8.2f}"
    told += number(row.to_alone, 9, 2) + number(row.peak, 7, 0, 2**20)
    told += "".join(number(row.shares.get(part), 10, 2) for part in (*parts.PARTS, parts.REST))
    told += "" if before is None else number(before.ratio, 10, 2) + number(before.peak, 12, 0, 2**20)
    return told.rstrip()


def print_edges(rows: Sequence[Row], earlier: dict[tuple[Any, ...], Row]) -> None:
    """The edges' matrix products beside the machine's rate."""
    print(f"\n{'tokens':>7}{'nodes':>7}  {'edges of':<23}{'GFLOP':>9}{'GFLOP/s':>9}{'matrix rate':>13}{'share':>7}"
          + (f"{'share before':>14}{'GFLOP before':>14}" if earlier else ""))  # fmt: skip
    for row in rows:
        if row.gflop is None or row.rate is None or row.matrix_rate is None:
            continue
        told = f"{row.length:>7}{row.nodes:>7}  {row.call:<23}{row.gflop:>9.1f}{row.rate:>9.1f}"
        told += f"{row.matrix_rate:>13.1f}{row.rate / row.matrix_rate:>7.2f}"
        before = earlier.get((row.length, row.nodes, row.call))
        if before is not None and before.rate and before.matrix_rate:
            told += f"{before.rate / before.matrix_rate:>14.2f}{before.gflop:>14.1f}"
        print(told)


def measure(bench: Bench) -> dict[str, Any]:
    """Measure and print all that was asked for, and return it for --json."""
    options, rows = bench.options, list[Row]()
    earlier = {}
    if options.beside:
        told = [Row(**one) for one in json.loads(options.beside.read_text())["rows"]]
        earlier = {(row.length, row.nodes, row.call): row for row in told}
    print(f"{head(bench)}\n{title(bool(earlier))}")
    for length in options.lengths:
        for i, nodes in enumerate(options.nodes):
            for call in options.calls:
                too_long = call in ALONE and not bench.on_gpu and options.batch * length > MOST_TOKENS_ON_CPU
                if too_long or (call in WHATEVER_NODES and i):
                    continue
                rows.append(bench.row(call, length, nodes))
                print(line(rows[-1], earlier.get((length, rows[-1].nodes, call))), flush=True)
    print_edges(rows, earlier)
    found: dict[str, Any] = {"head": head(bench), "rows": [asdict(row) for row in rows]}
    if options.throughput or bench.on_gpu:
        found["throughput"] = [asdict(one) for one in print_throughput(bench)]
    return found


def print_throughput(bench: Bench) -> list[Throughput]:
    """Prompts an hour at each length, with the most nodes that were asked for."""
    limit_malloc_retention()
    wanted = Workload(metric="difference", nodes=max(bench.options.nodes))
    planned = bench.planned(wanted)
    print(f"\n{'tokens':>7}{'batch':>7}{'nodes/h':>10}{'graphs/h':>10}{'peak MiB':>10}{'predicted':>11}")
    found = []
    for length in bench.options.lengths:
        one = bench.throughput(planned, wanted, length)
        found.append(one)
        print(f"{one.length:>7}{one.batch:>7}{one.prompts_per_hour:>10.0f}{one.graphs_per_hour:>10.0f}"
              f"{one.peak / 2**20:>10.0f}{one.predicted / 2**20:>11.0f}", flush=True)  # fmt: skip
    return found


SHAPE_HELP = "of the random model: a small Llama, Gemma 3 270M's, Llama 3.1 8B's (bfloat16 on a GPU, and the default)"


def arguments() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b" if gpu else "llama", help=SHAPE_HELP)
    parser.add_argument("--model", type=Path, help="a folder with a real model instead")
    parser.add_argument("--text", default=TEXT, help="what its prompts repeat")
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 64, 256, 1024], help="tokens of a prompt")
    parser.add_argument("--nodes", type=int, nargs="+", default=[100, 1000], help="nodes of a circuit")
    parser.add_argument("--calls", nargs="+", choices=list(CALLS), default=list(CALLS), metavar="CALL",
                        help=f"some of: {'; '.join(CALLS)}")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="64 tokens and 1,000 nodes only")
    parser.add_argument("--batch", type=int, default=16, help="prompts of trace_all")
    parser.add_argument("--pairs", type=int, default=10, help="timed pairs of each call")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds after which no more pairs are begun")
    parser.add_argument("--cpu-time", action="store_true", help="count this process's seconds, on a CPU that is shared")
    parser.add_argument("--device", default="cuda" if gpu else "cpu", help="a GPU by default, where there is one")
    parser.add_argument("--throughput", action="store_true", help="also prompts an hour, as always on a GPU")
    parser.add_argument("--peers", action="store_true", help="compare with plain PyTorch hooks instead (peers.py)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--beside", type=Path, help="print the figures of this earlier --json beside")
    parser.add_argument("--toy", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--peak", nargs=3, metavar=("CALL", "TOKENS", "NODES"), help=argparse.SUPPRESS)
    return parser


def parsed(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, those that stand for others resolved."""
    options = arguments().parse_args(given)
    if options.quick:
        options.lengths, options.nodes = [64], [1000]
    if options.toy:
        options.shape, options.lengths, options.nodes, options.pairs, options.batch = "toy", [8], [10], 1, 2
    if options.cpu_time:
        common.clock.count_cpu()
    return options


def main() -> None:
    options = parsed()
    warnings.simplefilter("ignore", tracer.TracerWarning)  # of random models and texts
    torch.set_num_threads(1)
    if options.peers:
        peers.compare(options.pairs, options.limit)
    elif options.peak:
        call, length, nodes = options.peak
        limit_malloc_retention()
        print(Bench(options).grown(call, int(length), int(nodes)))
    else:
        found = measure(Bench(options))
        if options.json:
            options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
