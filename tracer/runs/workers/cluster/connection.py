"""Reaching a Ray cluster: its addresses, and one line when nothing answers, or answers no longer.

Ray itself tries a dead address for minutes, so this asks first; and it ends the process of a driver whose cluster lost
its head, so this notices before. Knows nothing of actors and jobs.
"""

from __future__ import annotations

import importlib
import os
import queue
import re
import socket
import threading
import time
from typing import Any

from tracer.errors import JobError, RunError, quoted
from tracer.runs.workers.cluster import local

REACH = 5.0
"""Seconds an address has to answer."""
PROBE = 5.0
"""Seconds between two looks at a cluster's head."""
SILENT = 40.0
"""Seconds a head may be away, e.g. to be restarted; after 60 Ray ends the driver's process, without a word of ours."""


def last_line(text: object, limit: int = 200) -> str:
    """The last non-empty line, shortened: Ray puts the cause of an error last."""
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    line = lines[-1] if lines else type(text).__name__
    return line if len(line) <= limit else line[: limit - 3] + "..."


class Joined:
    """A cluster that somebody else started, and that this process uses."""

    def __init__(self, ray: Any) -> None:
        self._ray, self._looked, self._answered = ray, 0.0, time.monotonic()
        context = ray.get_runtime_context()
        self._node, client = context.get_node_id(), importlib.import_module("ray.util.client").ray.is_connected()
        # Through a Ray client neither can be seen from here; its calls say themselves that the connection is lost.
        self._head = None if client else str(context.gcs_address)

    def lost(self, sure: bool = False) -> str:
        """What of it is gone that a driver cannot do without; empty as long as all is there.

        Args:
            sure: look now, and wait for a head that does not answer: until it does, or counts as lost.
        """
        if self._head is None or (not sure and time.monotonic() - self._looked < PROBE):
            return ""
        host, _, port = self._head.rpartition(":")
        while True:
            self._looked = time.monotonic()
            try:
                socket.create_connection((host.strip("[]"), int(port)), timeout=1).close()
                nodes = self._nodes()
                break
            except OSError as error:
                away = self._looked - self._answered
                if away > SILENT:
                    return f"head at {self._head} ({last_line(error)}, for {away:.0f} s)"
                if not sure:
                    return ""
                time.sleep(1)
        self._answered = self._looked
        mine = [node["Alive"] for node in nodes if node["NodeID"] == self._node]
        return "" if all(mine) else "node of this machine"

    def _nodes(self) -> list[dict[str, Any]]:
        """The cluster's nodes. A head that dies while it is asked would be waited for until Ray ends this process.

        Raises:
            TimeoutError: it does not answer.
        """
        answers: queue.Queue[list[dict[str, Any]]] = queue.Queue()
        threading.Thread(target=lambda: answers.put(self._ray.nodes()), daemon=True).start()
        try:
            return answers.get(timeout=REACH)
        except queue.Empty:
            raise TimeoutError("no answer") from None

    def close(self) -> None:
        """Leave it."""
        self._ray.shutdown()


def load_ray() -> Any:
    """The package, or what to install."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray prints twenty lines to standard output for each process that dies; `Died` says it in one line.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    local.check_variables()
    try:
        importlib.import_module("ray.exceptions")
        return importlib.import_module("ray")
    except ImportError:
        raise JobError("--ray", "needs Ray", "pip install 'neuron-tracer[ray]'") from None


def connect(address: str, options: dict[str, Any]) -> local.LocalRay | Joined:
    """Start a local cluster, or join the one at `address` once it has answered; or use what this process has joined."""
    ray = load_ray()
    there = local.running()
    if ray.is_initialized():
        _check_same(ray, address, options)
        return there or Joined(ray)
    if there is not None:
        there.close()  # somebody called ray.shutdown()
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "CRITICAL"}
    if address == "local":
        small = {"include_dashboard": False, "object_store_memory": local.STORE}
        return local.LocalRay(ray, quiet | small | options)
    address = _reached(address)
    try:
        ray.init(address=address, **(quiet | options))
        return Joined(ray)
    except Exception as error:  # noqa: BLE001 - Ray raises whatever it likes, RpcError and AuthenticationError among it
        ray.shutdown()
        step = "is it the version of Ray that runs there, and its token?"
        raise RunError(f"--ray {address}", f"Ray did not start: {last_line(error)}", step) from None


def _reached(address: str) -> str:
    """The address of a cluster that answers; Ray itself would try a dead one for minutes."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS") or "auto"
    if address == "auto":
        services = importlib.import_module("ray._private.services")
        try:
            address = services.canonicalize_bootstrap_address("auto")
        except ConnectionError:
            raise RunError(
                "--ray auto", "no Ray cluster runs on this machine", "ray start --head, or give --ray local"
            ) from None
    match = re.fullmatch(r"(ray://)?(\[[0-9a-fA-F:]+\]|[^:/\s]+):(\d{1,5})", address)
    if match is None:
        rule = "is not an address of a Ray cluster"
        step = "give local, auto, HOST:6379 or ray://HOST:10001; http addresses are for tracer submit"
        raise JobError(f"--ray {quoted(address)}", rule, step)
    host, port = match[2].strip("[]"), int(match[3])
    try:
        socket.create_connection((host, port), timeout=REACH).close()
    except (OSError, OverflowError) as error:
        raise RunError(f"--ray {address}", f"no answer ({last_line(error)})", "is the cluster up?") from None
    _check_grpc(address, f"{match[2]}:{port}")
    return address


def _check_grpc(address: str, target: str) -> None:
    """Refuse a port that is open but not Ray's, such as the dashboard's 8265."""
    grpc = importlib.import_module("grpc")
    if os.environ.get("RAY_USE_TLS", "0") != "0":
        return
    with grpc.insecure_channel(target) as channel:
        try:
            grpc.channel_ready_future(channel).result(timeout=REACH)
        except grpc.FutureTimeoutError:
            rule = "something else than Ray answers there"
            raise RunError(f"--ray {address}", rule, "give HOST:6379, or ray://HOST:10001 from outside") from None


def _check_same(ray: Any, address: str, options: dict[str, Any]) -> None:
    """Refuse a second, different Ray connection in this process."""
    there = ray.get_runtime_context().gcs_address
    if options or not (address in ("local", "auto", there) or address.startswith("ray://")):
        rule = f"this process already uses Ray at {there}"
        raise RunError(f"--ray {address}", rule, "call ray.shutdown() first, or leave the address out")
