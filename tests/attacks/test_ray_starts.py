"""A Ray of tracer's own that cannot start, whatever the reason: a line, no process, no file."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

import children
from tally import Attack

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.long]

IN_MOUNTS, IN_NETWORK = "unshare --mount sh -c", "unshare --net sh -c"
"""A child of its own file systems, or of its own network: for root."""
TWO_PORTS = "ip link set lo up; echo 40000 40001 >/proc/sys/net/ipv4/ip_local_port_range;"
STARTS = "is no error: Ray starts all the same"
CASES: dict[str, tuple[dict[str, Any], dict[str, str], str, str]] = {
    # options, environment, what is around the command, what must be said
    "a store that is too small": ({"object_store_memory": 1}, {}, "", "minimum allowed"),
    "no cores": ({"num_cpus": -1}, {}, "", "nonnegative"),
    "a word for a number": ({}, {"RAY_health_check_period_ms": "abc"}, "", "RAY_health_check_period_ms"),
    "a hook that is not there": ({}, {"RAY_RUNTIME_ENV_HOOK": "nothing.there"}, "", "No module named 'nothing'"),
    "no certificates": ({}, {"RAY_USE_TLS": "1"}, "", "Failed to start the grpc server"),
    "a database of somebody else": ({}, {"RAY_REDIS_ADDRESS": "127.0.0.1:1"}, "", STARTS),
    "another token": ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/nowhere"}, "", STARTS),
    "no temporary folder": ({}, {"TMPDIR": "/nowhere", "RAY_TMPDIR": "/proc/x"}, "", "set TMPDIR"),
    "a long temporary folder": ({}, {"RAY_TMPDIR": "/tmp/" + 100 * "x"}, "", STARTS),
    "few open files": ({"files": 24}, {}, "", "Too many open files"),
    "no network": ({}, {}, f"{IN_NETWORK} ''", "no connection to 127.0.0.1"),
    "no ports": ({}, {}, f"{IN_NETWORK} '{TWO_PORTS}'", ""),
    "a full /dev/shm": ({}, {}, f"{IN_MOUNTS} 'mount -t tmpfs -o size=64k tmpfs /dev/shm;'", STARTS),
    "a /dev/shm to be read": ({}, {}, f"{IN_MOUNTS} 'mount -t tmpfs -o ro tmpfs /dev/shm;'", "Read-only file system"),
    "a full disk": ({}, {"RAY_TMPDIR": "/mnt"}, f"{IN_MOUNTS} 'mount -t tmpfs -o size=64k tmpfs /mnt;'", ""),
    "a disk to be read": (
        {},
        {"RAY_TMPDIR": "/mnt"},
        f"{IN_MOUNTS} 'mount -t tmpfs -o ro tmpfs /mnt;'",
        "needs a folder",
    ),
}


@pytest.fixture
def short() -> Iterator[str]:
    """A folder with a path that is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        yield folder


@pytest.mark.parametrize("name", CASES)
def test_a_start_that_fails_is_a_line(attack: Attack, name: str, short: str) -> None:
    options, more, around, wanted = CASES[name]
    if around and (os.getuid() != 0 or shutil.which("unshare") is None):
        pytest.skip("only root can take the network or a file system away")
    command = children.command("ray_start", json.dumps(options), warnings="ignore")
    if around:
        *words, first = shlex.split(around)
        command = [*words, f"{first} {shlex.join(command)}"]
    with attack("a Ray that cannot start") as tally:
        tally.tried += 1
        child = children.begin(command, stderr=subprocess.PIPE, env=os.environ | {"RAY_TMPDIR": short} | more)
        try:
            said, complaint = child.communicate(timeout=200)
        except subprocess.TimeoutExpired:
            tally.hung += 1
            return
        if child.returncode:
            tally.tracebacks += 1
            tally.worst = f"{name}: {child.returncode} {complaint[-300:]}"
            return
        found = json.loads(said.splitlines()[-1])
        tally.marks += len(found["left"])
        tally.worst = f"{name}: {found}"
        assert (found["line"] == "") == (wanted == STARTS), found
        if wanted != STARTS:
            assert wanted in found["line"], found
            assert "\n" not in found["line"]


def test_a_start_that_is_stopped(attack: Attack, tmp_path: Any) -> None:
    """By SIGTERM, while Ray starts: the run says that it was stopped, with the signal's exit code, and no process."""
    (tmp_path / "rows.jsonl").write_text('{"text": "a prompt of three", "target": " words"}\n' * 4)
    made = {"kind": "dataset", "input": {"path": str(tmp_path / "rows.jsonl")}, "circuit": "none"}
    words = json.dumps([made, str(tmp_path / "run"), {"ray": "local", "factory": "fake_runs:Tiny"}])
    with attack("a Ray that cannot start") as tally:
        child = children.start("driver", words)
        end, gcs = time.monotonic() + 60, list[psutil.Process]()
        while not gcs and time.monotonic() < end:
            time.sleep(0.01)
            gcs = [one for one in psutil.Process(child.pid).children() if one.name() == "gcs_server"]
        begun = psutil.Process(child.pid).children(recursive=True)
        child.send_signal(signal.SIGTERM)
        said, _ = child.communicate(timeout=90)
        tally.tried += 1
        tally.tracebacks += "Traceback" in said
        gone, left = psutil.wait_procs(begun, timeout=15)
        tally.marks += len(left)
        tally.worst = said[-400:]
        assert child.returncode == 128 + signal.SIGTERM, said
        assert "stopped" in said
        assert gone
