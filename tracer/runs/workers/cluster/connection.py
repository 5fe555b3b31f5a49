"""Reaching a Ray cluster: its addresses, and one line when nothing answers.

Ray itself tries a dead address for minutes, so this asks first. Knows nothing of actors and jobs.
"""

from __future__ import annotations

import importlib
import os
import re
import socket
from typing import Any

from tracer.errors import JobError, RunError, quoted

REACH = 5.0
"""Seconds an address has to answer."""
STORE = 75 * 2**20
"""Bytes of the object store of a local cluster: Ray's minimum; only short texts go through it."""


def last_line(text: object, limit: int = 200) -> str:
    """The last non-empty line, shortened: Ray puts the cause of an error last."""
    lines = [line.strip() for line in str(text).splitlines() if line.strip()]
    line = lines[-1] if lines else type(text).__name__
    return line if len(line) <= limit else line[: limit - 3] + "..."


def load_ray() -> Any:
    """The package, or what to install."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray prints twenty lines to standard output for each process that dies; `Died` says it in one line.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")
    try:
        importlib.import_module("ray.exceptions")
        return importlib.import_module("ray")
    except ImportError:
        raise JobError("--ray", "needs Ray", "pip install 'neuron-tracer[ray]'") from None


def connect(address: str, options: dict[str, Any]) -> None:
    """Start a local cluster, or join the one at `address` once it has answered."""
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "CRITICAL"}
    if address == "local":
        quiet |= {"include_dashboard": False, "object_store_memory": STORE}
    else:
        address = _reached(address)
    ray = load_ray()
    try:
        ray.init(address=address, **(quiet | options))
    except (OSError, RuntimeError, ValueError) as error:  # ConnectionError is an OSError
        ray.shutdown()  # what it had started of a local cluster
        step = "fix that, or run without --ray" if address == "local" else "is it the version of Ray that runs there?"
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


def check_same(address: str, options: dict[str, Any]) -> None:
    """Refuse a second, different Ray connection in this process."""
    there = load_ray().get_runtime_context().gcs_address
    if options or not (address in ("local", "auto", there) or address.startswith("ray://")):
        rule = f"this process already uses Ray at {there}"
        raise RunError(f"--ray {address}", rule, "call ray.shutdown() first, or leave the address out")
