"""A process that forks while it computes: THREADS COUNT SCENARIO... For each scenario it prints, as a line of JSON,
what became of the forked ones: how many worked, said a line, gave other numbers, raised something, or had no end."""

from __future__ import annotations

import http.server
import json
import os
import random
import select
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

import tracer
from tracer.attribution.attribute import Reference
from tracer.ndif.server import Server

LIMIT = 15.0
count = int(sys.argv[2])
found: Counter[str] = Counter()
lines: set[str] = set()
prompt = tracer.Prompt("The secretaries near the car", " are", " is")


def numbers(model: tracer.Model) -> str:
    return tracer.trace(model, prompt, nodes=10, edges=False).nodes["attribution"].to_numpy().tobytes().hex()


def forked(work: Callable[[], bool]) -> None:
    """Do `work` in a forked process; whether it is right."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        signal.alarm(0)
        try:
            word = "worked" if work() else "silent"
        except tracer.TracerError as error:
            word = f"said {error}"
        except BaseException as error:  # noqa: BLE001 - the edge of a process
            word = f"traceback {error!r}"
        os.write(theirs, word.encode()[:4000])
        os._exit(0)
    os.close(theirs)
    if select.select([ours], [], [], LIMIT)[0]:
        kind, _, text = os.read(ours, 4000).decode().partition(" ")
    else:
        kind, text = "hung", ""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    os.close(ours)
    found[kind or "traceback"] += 1
    lines.update([text] if text else [])


def holding(lock: Any) -> Callable[[], None]:
    """Let another thread take a lock; what ends that."""
    taken, over = threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            taken.set()
            over.wait(60)

    threading.Thread(target=hold, daemon=True).start()
    assert taken.wait(60)
    return over.set


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        text = b'{"deployments": {}}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, format: str, *args: object) -> None:
        pass


def tracing() -> None:
    """At any moment of a pass; every second child uses a model that is not in use."""
    stopped = threading.Event()

    def trace() -> None:
        while not stopped.is_set():
            numbers(model)

    thread = threading.Thread(target=trace, daemon=True)
    thread.start()
    for turn in range(count):
        time.sleep(dice.random() * 0.05)
        chosen = model if turn % 2 else other
        forked(lambda: numbers(chosen) == wanted)  # noqa: B023 - forked at once
    stopped.set()
    thread.join(60)


def held() -> None:
    free = holding(model.lock)
    for _ in range(count):
        forked(lambda: numbers(model) == wanted)
        forked(lambda: numbers(other) == wanted)
    free()


def means() -> None:
    reference = Reference([tracer.Prompt("The key to the cabinets"), prompt])
    free = holding(reference._computing)
    for _ in range(count):
        forked(lambda: reference.means(other, 2, "activation", None).shape[1] == 2)
    free()


def threads() -> None:
    for _ in range(count):
        forked(lambda: len(numbers(model)) == len(wanted))


def threads_again() -> None:
    for _ in range(count):
        forked(lambda: torch.set_num_threads(2) or len(numbers(model)) == len(wanted))


def server() -> None:
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, args=(0.05,), daemon=True).start()
    ours = Server(f"http://127.0.0.1:{web.server_port}")
    assert ours.status() == {}
    free = holding(ours._http._count)
    for _ in range(ours.limits.in_flight):
        ours._slots.acquire()

    def asked() -> bool:
        with ours._slots, ours._http._count:
            return ours.status() == {}

    for _ in range(count):
        forked(asked)
        assert ours.status() == {}  # over the connection that was there before
    free()


torch.set_num_threads(int(sys.argv[1]))
model, other = tracer.load("demo"), tracer.load("demo")
wanted = numbers(model)
dice = random.Random(13)
for scenario in sys.argv[3:]:
    found.clear()
    lines.clear()
    globals()[scenario]()
    assert numbers(model) == wanted  # the parent goes on
    print(json.dumps(found | {"scenario": scenario, "lines": sorted(lines)}))
