"""Jobs on a real head node: sent, followed, stopped; and pools that attach to a cluster that is not theirs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

import children
from helpers import refused
from tracer.errors import RunError
from tracer.runs.workers.cluster import RayPool, status, stop, submit

pytest.importorskip("ray")
pytestmark = [pytest.mark.slow, pytest.mark.long]
TESTS = Path(__file__).parents[1] / "support"
# Stands for `python -m tracer run`: says how it was called and does what the job file's "does" says.
STUB = r"""#!/bin/sh
printf '<%s>' "$@"; echo
test "$RAY_ADDRESS" && echo attached
eval "$(sed -n 's/^does: //p' "$4")"
"""


TOKEN = "of-these-tests-alone-and-long-enough"
AUTH = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
SLOW = {"RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": "120"}  # two cores that are shared


@dataclass
class Head:
    address: str
    gcs: str
    client: str


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


@contextmanager
def running(stub: Path) -> Iterator[Head]:
    """A head node of this test's own; `ray stop` would end everyone's."""
    gcs, dashboard, client, agent = free_ports(4)
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # a socket's path has 107 characters at most
    command = [
        str(Path(sys.executable).with_name("ray")),
        *"start --head --block --node-ip-address=127.0.0.1 --num-cpus=2 --disable-usage-stats".split(),
        *f"--port={gcs} --dashboard-port={dashboard} --ray-client-server-port={client} --temp-dir={folder}".split(),
        # Ray's usual ports would let two heads on one machine meet.
        f"--dashboard-agent-listen-port={agent}",
        *f"--object-store-memory={75 * 2**20} --min-worker-port=0 --max-worker-port=0".split(),
    ]
    path = f"{stub.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | AUTH | SLOW | {"PATH": path, "PYTHONPATH": str(TESTS)}
    said = Path(folder) / "said"
    with said.open("wb") as output:
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True, cwd=folder
        )
    address = f"http://127.0.0.1:{dashboard}"
    try:
        end = time.monotonic() + 120
        while not (answers(f"{address}/api/version") and listens(client)):
            assert process.poll() is None, said.read_text()
            assert time.monotonic() < end, said.read_text()
            time.sleep(0.3)
        yield Head(address, f"127.0.0.1:{gcs}", f"ray://127.0.0.1:{client}")
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(5)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)


@pytest.fixture(scope="module")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bin") / "python"
    path.write_text(STUB)
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def head(stub: Path) -> Iterator[Head]:
    with running(stub) as one:
        yield one


def listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("127.0.0.1", port)) == 0


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2).close()
    except urllib.error.HTTPError as error:
        return error.code == 401  # it is there and wants a token
    except OSError:
        return False
    return True


def job(folder: Path, does: str) -> Path:
    path = folder / "a job.yaml"
    path.write_text(f"kind: dataset\ndoes: {does}\n")
    return path


def test_a_job_is_followed_to_its_own_exit_code(head: Head, tmp_path: Path) -> None:
    lines: list[str] = []
    does = "echo begin; sleep 1; echo end >&2; printf rest; exit 7"
    options = ["--set", "note=it's $HOME", "--workers", "2"]
    done = submit(job(tmp_path, does), head.address, out="/shared/out dir", options=options, log=lines.append)
    assert (done.state, done.exit_code, done.address) == ("FAILED", 7, head.address)
    assert re.fullmatch(r"tracer-out-dir-\d{8}-\d{6}-[0-9a-f]{4}", done.id)
    assert lines[0] == f"submitted {done.id} to {head.address}"
    words = ["-m", "tracer", "run", "a job.yaml", "--out", "/shared/out dir", "--ray", "auto", *options]
    said = [line for line in lines[1:] if not re.match(r"\d{4}-\d\d-\d\d |Running entrypoint", line)]  # Ray's own
    assert said == ["".join(f"<{word}>" for word in words), "attached", "begin", "end", "rest"]
    assert status(head.address, done.id) == done


def test_success_and_the_same_name_twice(head: Head, tmp_path: Path) -> None:
    path, name = job(tmp_path, "true"), f"once-{os.getpid()}"
    done = submit(path, head.address, out="s3://bucket/x", submission_id=name, log=lambda line: None)
    assert (done.id, done.state, done.exit_code) == (name, "SUCCEEDED", 0)
    with pytest.raises(RunError, match="submitted before; leave --submission-id out"):
        submit(path, head.address, out="s3://bucket/x", submission_id=name, log=lambda line: None)


def test_a_running_job_is_asked_about_and_stopped(head: Head, tmp_path: Path) -> None:
    path = job(tmp_path, "echo started; sleep 300")
    sent = submit(path, head.address, out="/shared/out", wait=False, log=lambda line: None)
    assert sent.state in ("PENDING", "RUNNING")
    assert sent.exit_code is None
    end = time.monotonic() + 30
    while status(head.address, sent.id).state != "RUNNING":
        assert time.monotonic() < end
        time.sleep(0.2)
    assert stop(head.address, sent.id).state == "STOPPED"
    for verb in (status, stop):
        with refused(RunError, "knows no such job"):
            verb(head.address, "nobody")


def test_interrupting_leaves_the_job(head: Head, tmp_path: Path) -> None:
    path = job(tmp_path, "echo here; sleep 300")
    command = children.command("follow", path, head.address, warnings="error")
    # RAY_ADDRESS must not win over the address that was given.
    environment = os.environ | {"RAY_ADDRESS": "http://127.0.0.1:1"}
    process = children.begin(command, stderr=subprocess.PIPE, env=environment)
    while children.line(process) != "here\n":
        pass
    process.send_signal(signal.SIGINT)
    said, complaint = process.communicate(timeout=60)
    assert (process.returncode, complaint) == (0, "")
    *told, last = said.splitlines()
    state, name = last.split()
    assert state == "RUNNING"
    assert f"ray job logs --follow --address {head.address} {name}" in told[0]
    assert f"ray job stop --address {head.address} {name}" in told[1]
    assert status(head.address, name).state == "RUNNING"
    assert stop(head.address, name).state == "STOPPED"


def test_other_ports_of_ray_are_told_from_the_right_one(head: Head, tmp_path: Path) -> None:
    path = job(tmp_path, "true")
    wrong = f"http://{head.gcs}"
    with refused(RunError, f"--address {wrong}: no Ray job server answers", "6379"):
        submit(path, wrong, out="/shared/out", log=lambda line: None)
    dashboard = head.address.removeprefix("http://")
    begin = time.monotonic()
    with refused(RunError, "something else than Ray answers there", "6379"):
        RayPool(dashboard)
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("kind", ["client", "auto"])
def test_pools_attach_one_after_another(head: Head, kind: str, tmp_path: Path) -> None:
    environment = os.environ | AUTH | {"PYTHONPATH": str(TESTS), "RAY_ADDRESS": head.gcs}
    address = kind if kind == "auto" else getattr(head, kind)
    command = children.command("attach_twice", address, warnings="error")
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.isdigit()] == ["1", "2"] * 2
    assert lines[2].startswith("Ray with 1 node, 2 CPUs (")
    assert shlex.split(lines[2])[-2:] == ["(0", "free)"]


def test_a_token_is_found_where_ray_keeps_it(head: Head, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("HOME", str(tmp_path))
    with refused(RunError, f"--address {head.address}: refuses", "RAY_AUTH_TOKEN"):
        status(head.address, "nobody")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(f"{TOKEN}\n")
    with refused(RunError, "knows no such job"):
        status(head.address, "nobody")
