"""Workers as actors of a Ray cluster: started, given units, and reported when they die.

Knows what each of Ray's errors means, and whether the prompts a worker had begun may be the cause. Refuses to
know what a worker does.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tracer.errors import JobError, RunError
from tracer.runs.workers.cluster.actors import NOTHING, Actor, Entry, Journal
from tracer.runs.workers.cluster.connection import connect, last_line, load_ray
from tracer.runs.workers.cluster.local import LOOK
from tracer.runs.workers.messages import (
    Began,
    Broke,
    Died,
    Done,
    Event,
    Part,
    Refused,
    Report,
    Setup,
    Stage,
    Started,
    Task,
)
from tracer.version import VERSION

POLL = 0.1
"""Seconds between two looks at the journal, at least."""
ANSWER = 15.0
"""Seconds the journal has to answer after a death."""
GRACE = 30.0
"""Seconds until a worker that neither answers nor is known to be dead counts as lost; Ray takes 12 for a node."""

_KILLED = "killed by the driver"
_UNKNOWN = "killed or crashed: a signal, an exit or no memory left, Ray does not say which"
_MEANINGS = (
    (r"killed by `ray\.kill`", _KILLED),
    (r"exit code (\d+)\. The process receives a SIGTERM", "ended by SIGTERM"),
    (r"exit code (\d+)", r"exited with code \1"),
    (r"connection error code 2", _UNKNOWN),
)


class RayPool:
    """Workers on Ray, one actor each (runs/workers/messages.py's `Pool`).

    A process that already uses Ray keeps its connection: the pool uses that one and leaves it open.

    Args:
        address: ``local`` (a cluster of this process), ``auto`` (the one this machine belongs to), ``HOST:PORT`` or
            ``ray://HOST:PORT``.
        options: of ``ray.init``, e.g. ``num_cpus`` with ``local``.

    Raises:
        JobError: Ray is not installed, or the address is malformed.
        RunError: no cluster answers there, or none starts.
    """

    def __init__(self, address: str = "local", **options: Any) -> None:
        self._ray = load_ray()
        self._own = not self._ray.is_initialized()
        self._cluster = connect(address, options)
        self._gone, self._turn = False, 0
        self._workers: dict[str, _Held] = {}
        self._poll: Any = None
        self._next_poll = 0.0
        self._actor = self._ray.remote(Actor)
        here = self._ray.get_runtime_context().get_node_id()
        affinity = importlib.import_module("ray.util.scheduling_strategies").NodeAffinitySchedulingStrategy
        # Ray's memory monitor may end it first; the driver's own copy then replaces it.
        lasting = {"max_restarts": -1, "max_task_retries": -1, "num_cpus": 0}
        journal = self._ray.remote(Journal).options(**lasting, scheduling_strategy=affinity(here, soft=False))
        self._journal = journal.remote()

    def start(self, worker: str, setup: Setup) -> None:
        """Ask for an actor; while the cluster has no room for it, nothing follows."""
        if worker in self._workers:
            raise ValueError(f"there is a worker {worker!r} already")
        self._check_there(sure=True)
        if setup.gpus > 1 and setup.gpus != int(setup.gpus):
            raise JobError(f"{setup.gpus} GPUs per worker", "only one GPU can be shared", "give a whole number, or < 1")
        threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        variables = {"TOKENIZERS_PARALLELISM": "false"} | {name: str(setup.threads) for name in threads}
        if not setup.gpus:  # Ray leaves all of a node's GPUs visible to those it gave none
            variables["CUDA_VISIBLE_DEVICES"] = ""
        actor = self._actor.options(
            num_cpus=setup.cpus,
            num_gpus=setup.gpus,
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": variables},
        ).remote(worker, VERSION, setup.model_dump_json(), self._journal)
        self._workers[worker] = _Held(actor, actor.ready.remote())

    def give(self, worker: str, task: Task) -> None:
        """Give a unit to an actor that has none."""
        held = self._workers[worker]
        if held.call is not None:
            raise ValueError(f"worker {worker!r} has not answered yet")
        self._turn += 1
        held.turn, held.began = self._turn, NOTHING
        held.call = held.actor.work.remote(self._turn, task.model_dump_json())

    def kill(self, worker: str) -> None:
        """End an actor's process; `Died` follows."""
        self._check_there(sure=True)
        held = self._workers[worker]
        held.killed, held.limit = True, time.monotonic() + GRACE
        self._ray.kill(held.actor, no_restart=True)
        if held.call is None:
            held.call = held.actor.ping.remote()

    def events(self, timeout: float) -> Sequence[Event]:
        """What happened since the last call.

        Raises:
            RunError: the cluster, or the connection to it, is gone.
        """
        end = time.monotonic() + timeout
        try:
            while True:
                self._check_there()
                events = self._look(max(0.0, min(LOOK, end - time.monotonic())))
                if events or time.monotonic() >= end:
                    return events
        except (ConnectionError, self._ray.exceptions.RayError) as error:
            self._check_there()
            raise _lost(f"connection ({last_line(error)})") from None

    def describe(self) -> str:
        """Nodes, CPUs and GPUs of the cluster, and how many are free at the moment."""
        self._check_there(sure=True)
        nodes = sum(1 for node in self._ray.nodes() if node["Alive"])
        there, free = self._ray.cluster_resources(), self._ray.available_resources()
        kinds = [f"{there.get(kind, 0):g} {kind}s ({free.get(kind, 0):g} free)" for kind in ("CPU", "GPU")]
        return f"Ray with {nodes} node{'s' * (nodes != 1)}, {', '.join(kinds)}"

    def capacity(self) -> tuple[float, float]:
        """CPUs and GPUs of the cluster as it is now; one that grows may have more later."""
        there = self._ray.cluster_resources()
        return float(there.get("CPU", 0)), float(there.get("GPU", 0))

    def close(self) -> None:
        """End the pool's actors, and the connection if it is the pool's own."""
        actors = [*(held.actor for held in self._workers.values()), self._journal]
        self._workers.clear()
        if self._ray.is_initialized() and not self._gone and not self._cluster.lost():
            with contextlib.suppress(ConnectionError):  # the cluster may be gone before its workers
                for actor in actors:
                    self._ray.kill(actor, no_restart=True)
        if self._own:
            self._cluster.close()

    def _check_there(self, sure: bool = False) -> None:
        """Refuse to go on without the cluster: Ray itself would wait, and end this process after a minute.

        Args:
            sure: what follows asks the cluster, and so would wait.
        """
        if gone := self._cluster.lost(sure):
            self._gone = True
            raise _lost(gone)

    def _look(self, wait: float) -> list[Event]:
        """Wait for the next answer, journal entry or time limit; the resulting events."""
        now = time.monotonic()
        turns = [held.turn for held in self._workers.values() if held.turn]
        if turns and self._poll is None and now >= self._next_poll:
            self._poll, self._next_poll = self._journal.read.remote(turns), now + POLL
        if turns and self._poll is None:
            wait = min(wait, self._next_poll - now)
        limits = [held.limit - now for held in self._workers.values() if held.limit]
        wait = max(0.0, min([wait, *limits]))
        calls = [held.call for held in self._workers.values() if held.call is not None]
        calls += [self._poll] if self._poll is not None else []
        if not calls:
            time.sleep(wait)
            return []
        ready, _ = self._ray.wait(calls, num_returns=1, timeout=wait)
        if ready:
            ready, _ = self._ray.wait(calls, num_returns=len(calls), timeout=0)
        events = self._news() if self._poll is not None and self._poll in ready else []
        for name, held in list(self._workers.items()):
            if held.call is not None and held.call in ready:
                events += self._answer(name, held)
            elif held.limit and time.monotonic() >= held.limit:
                reason = _KILLED if held.killed else "no answer from its node"
                events.append(self._died(name, reason, blame=held.killed))
        return events

    def _news(self) -> list[Event]:
        """What the workers began since the last look."""
        poll, self._poll = self._poll, None
        try:
            entries = self._ray.get(poll, timeout=ANSWER)
        except self._ray.exceptions.RayError:  # it is being restarted; the next look finds it
            return []
        events: list[Event] = []
        for name, held in self._workers.items():
            entry = entries.get(held.turn, NOTHING)
            if entry not in (NOTHING, held.began):
                held.began = entry
                at = Stage.model_validate_json(entry[4]) if entry[4] else None
                events.append(Began(worker=name, prompts=entry[0], done=entry[1], note=entry[2], at=at))
        return events

    def _answer(self, name: str, held: _Held) -> list[Event]:
        """The events of a worker's answered call."""
        errors = self._ray.exceptions
        call, held.call = held.call, None
        try:
            kind, *said = self._ray.get(call, timeout=ANSWER)
        except errors.ActorUnavailableError:
            # Cut off, or dead and Ray does not know the cause yet: its next answer says whether prompts are to blame.
            held.limit = held.limit or time.monotonic() + GRACE
            held.call = held.actor.ping.remote()
            return []
        except errors.RayError as error:
            if "No module named 'tracer'" in str(error):
                step = "install this version of neuron-tracer on every node (see cluster.yaml)"
                return self._refused(name, "RunError", "a node of the cluster", "has no tracer installed", step)
            reason, blame = self._death(error, held)
            starved = blame and not held.killed and "memory" in reason
            return [self._died(name, _KILLED if held.killed else reason, blame or held.killed, starved)]
        if kind == "pong":
            reason = _KILLED if held.killed else "the connection to it was cut"
            return [self._died(name, reason, blame=held.killed)]
        return self._said(name, held, kind, said)

    def _said(self, name: str, held: _Held, kind: str, said: list[Any]) -> list[Event]:
        """An answer as events; a worker that was killed meanwhile still owes its `Died`."""
        held.turn = 0
        if held.killed:
            held.call = held.actor.ping.remote()
        if kind == "refused":
            return self._refused(name, *said)
        if kind == "failed":
            return [self._died(name, f"did not start: {said[0]}", blame=True)]
        if kind == "started":
            record, held.node = Started.model_validate_json(said[0]), said[1]
            return [record]
        if kind == "broke":
            return [Broke(worker=name, error=said[0])]
        return [Done(worker=name, report=Report.model_validate_json(said[0]))]

    def _refused(self, name: str, kind: str, value: str, rule: str, step: str) -> list[Event]:
        return [Refused(worker=name, kind=kind, value=value, rule=rule, next_step=step)]

    def _death(self, error: Exception, held: _Held) -> tuple[str, bool]:
        """Why an actor died, in words, and whether its prompts may be the cause."""
        self._check_there(sure=True)
        errors, text = self._ray.exceptions, str(error)
        if isinstance(error, errors.OutOfMemoryError):
            return "ended by Ray's memory monitor: its node had no memory left", True
        lost = {node["NodeID"] for node in self._ray.nodes() if not node["Alive"]}
        if "its node has died" in text or getattr(error, "preempted", False) or held.node in lost:
            return "its node was lost", False
        for pattern, words in _MEANINGS:
            if match := re.search(pattern, text):
                return match.expand(words), True
        return last_line(text), isinstance(error, errors.ActorDiedError)

    def _died(self, name: str, reason: str, blame: bool, starved: bool = False) -> Died:
        """The death of a worker, with the prompts it had begun and what it had kept."""
        self._check_there(sure=True)
        held = self._workers.pop(name)
        self._ray.kill(held.actor, no_restart=True)
        prompts, kept = held.began[0], list[str]()
        if held.turn:
            try:
                entries = self._ray.get(self._journal.read.remote([held.turn]), timeout=ANSWER)
                prompts = entries[held.turn][0] if held.turn in entries else prompts
                kept = self._ray.get(self._journal.parts.remote(held.turn), timeout=ANSWER)
            except self._ray.exceptions.RayError:  # its last known entry is the best available
                pass
        return Died(
            worker=name,
            prompts=tuple(prompts) if held.turn else (),
            reason=reason,
            blame=blame,
            starved=starved,
            parts=tuple(map(Part.model_validate_json, kept)),
        )


def _lost(what: str) -> RunError:
    return RunError("the Ray cluster", f"has lost its {what}", "repeat the command: what is committed is kept")


@dataclass
class _Held:
    """What the pool knows of a worker: its call under way, unit (a turn), node, and time limit if it is in doubt."""

    actor: Any
    call: Any
    turn: int = 0
    began: Entry = NOTHING
    node: str = ""
    killed: bool = False
    limit: float = 0.0
