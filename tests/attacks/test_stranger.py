"""A Ray of tracer's own, and somebody else on the machine or the network who reaches for it: nobody gets in, nothing of
it is open elsewhere, and no word of its token is written down."""

from __future__ import annotations

import http.client
import importlib
import os
import stat
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

import children
from tally import Attack
from tracer.runs.workers.cluster import RayPool
from tracer.runs.workers.messages import Setup, Started

ray: Any = pytest.importorskip("ray")
grpc: Any = pytest.importorskip("grpc")
pytestmark = [pytest.mark.slow, pytest.mark.long]

PATIENCE = 20.0  # seconds a stranger has; one that is let in needs 5
METHODS = (
    "NodeInfoGcsService/GetAllNodeInfo",
    "InternalKVGcsService/InternalKVKeys",
    "NodeManagerService/GetNodeStats",
)
NOBODY = 65534
WRONG = "0123456789abcdef" * 4
"""Another user's id, and another cluster's token."""


@pytest.fixture(scope="module", params=["", "disabled"], ids=["as-it-is", "told-to-be-open"])
def pool(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayPool]:
    """A pool on a cluster of its own, with a worker; whoever starts it may have told Ray to ask for no token."""
    with pytest.MonkeyPatch.context() as patch:
        yield from opened(patch, tmp_path_factory.mktemp("home"), request.param)


def opened(patch: pytest.MonkeyPatch, home: Path, mode: str = "") -> Iterator[RayPool]:
    if ray.is_initialized():
        ray.shutdown()
    patch.setenv("HOME", str(home))
    patch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "support"))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        patch.delenv(name, raising=False)
    if mode:
        patch.setenv("RAY_AUTH_MODE", mode)
    one = RayPool("local", num_cpus=1)
    try:
        one.start("a", Setup(folder="", job={"units": [["ok"]]}, factory="faulty:Worker"))
        assert isinstance(one.events(60.0)[0], Started)
        yield one
    finally:
        one.close()


def listening() -> list[tuple[psutil.Process, str, int]]:
    """Every address and port on which the cluster, of which this process is a part, can be reached."""
    me = psutil.Process()
    return [
        (process, link.laddr.ip.removeprefix("::ffff:"), link.laddr.port)
        for process in [me, *me.children(recursive=True)]
        for link in process.net_connections("inet")
        if link.status == psutil.CONN_LISTEN
    ]


def seen(pid: int, name: str) -> str:
    """A variable of another process of this user's."""
    words = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return next((word.partition("=")[2] for word in words if word.startswith(f"{name}=")), "")


def token() -> str:
    """The cluster's."""
    gcs = next(one for one in psutil.Process().children() if one.name() == "gcs_server")
    return seen(gcs.pid, "RAY_AUTH_TOKEN") or "none"


def test_nothing_listens_but_on_the_loopback(pool: RayPool, attack: Attack) -> None:
    with attack("ports of a local Ray") as tally:
        for process, address, port in listening():
            tally.tried += 1
            if address != "127.0.0.1":
                tally.marks += 1
                tally.worst = f"{process.name()} listens on {address}:{port}"


def test_a_stranger_runs_no_code(pool: RayPool, attack: Attack, tmp_path: Path) -> None:
    """Through Ray itself, by whoever has no token, wants none, or has another, or what the user's home has of Ray's."""
    sayings = ({}, {"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": WRONG})
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    address, marks = str(ray.get_runtime_context().gcs_address), [tmp_path / f"mark-{n}" for n in range(len(sayings))]
    with attack("strangers at a local Ray") as tally:
        strangers = [
            children.begin(children.command("stranger", address, mark), env=plain | said)
            for mark, said in zip(marks, sayings, strict=True)
        ]
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and any(one.poll() is None for one in strangers):
            time.sleep(0.2)  # Ray goes on asking; the cluster goes on refusing
        tally.tried += len(strangers)
        for mark, said in zip(marks, sayings, strict=True):
            if mark.exists():
                tally.marks += 1
                tally.worst = f"ran code with {said}"


def test_every_port_wants_the_token(pool: RayPool, attack: Attack) -> None:
    """Without it there are pages of metrics, and nothing else."""
    with attack("ports of a local Ray") as tally:
        for process, _, port in listening():
            for header in ((), (("authorization", f"Bearer {WRONG}"),)):
                for method in METHODS:
                    tally.tried += 1
                    if answered(port, method, header):
                        tally.marks += 1
                        tally.worst = f"{process.name()} answers {method}"
                tally.tried += 1
                if taken(port, dict(header)):
                    tally.marks += 1
                    tally.worst = f"{process.name()} takes jobs"


def answered(port: int, method: str, header: tuple[tuple[str, str], ...]) -> bool:
    """Whether a port serves one of Ray's calls."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = channel.unary_unary(f"/ray.rpc.{method}", lambda content: content, lambda content: content)
        try:
            call(b"", timeout=2, metadata=header)
        except grpc.RpcError:
            return False
        return True


def taken(port: int, header: dict[str, str]) -> bool:
    """Whether a port takes a job, or a runtime environment to be made."""
    for path in ("api/job_agent/jobs/", "get_or_create_runtime_env"):
        request = urllib.request.Request(f"http://127.0.0.1:{port}/{path}", b'{"entrypoint": "true"}', header)
        try:
            with urllib.request.urlopen(request, timeout=2) as answer:
                if "text/plain" not in answer.headers.get("Content-Type", ""):  # metrics, whatever is asked
                    return True
        except urllib.error.HTTPError as error:
            error.close()
            if error.code not in (401, 403, 404, 405):
                return True
        except (OSError, http.client.HTTPException):  # it speaks another protocol
            pass
    return False


@pytest.mark.skipif(os.getuid() != 0, reason="only root can be somebody else")
def test_another_user_reaches_no_socket_and_no_file(pool: RayPool, attack: Attack) -> None:
    with attack("files of a local Ray") as tally:
        folder = session()
        for path in [folder, *folder.rglob("*")]:
            mode = path.lstat().st_mode
            if stat.S_ISSOCK(mode) or stat.S_ISDIR(mode):
                tally.tried += 1
                if subprocess.run(["test", "-r", str(path)], user=NOBODY, group=NOBODY, check=False).returncode == 0:
                    tally.marks += 1
                    tally.worst = f"{path.name} can be entered by anybody"


def session() -> Path:
    """Where the cluster keeps its sockets and logs: the folder of its GCS's log."""
    gcs = next(one for one in psutil.Process().children() if one.name() == "gcs_server")
    logs = next(word for word in gcs.cmdline() if word.startswith("--log_dir="))
    return Path(logs.removeprefix("--log_dir=")).resolve().parent


def test_the_token_is_written_nowhere(pool: RayPool, attack: Attack) -> None:
    with attack("a token that is written down") as tally:
        mine = token()
        for path in [*session().rglob("*"), *Path.home().rglob("*")]:
            if path.is_file():
                tally.tried += 1
                if mine.encode() in path.read_bytes():
                    tally.marks += 1
                    tally.worst = f"it is in {path.name}"
        for process in psutil.Process().children(recursive=True):
            tally.tried += 1
            tally.marks += mine in " ".join(process.cmdline())
        tally.tried += 1  # what this process starts later is no part of the cluster
        tally.marks += mine == "none" or mine in os.environ.values()


def test_nothing_stays(attack: Attack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a cluster that has ended: no process, no file, and no token that would be shown to the next one."""
    raylet = importlib.import_module("ray._raylet")
    with attack("what a local Ray leaves") as tally:
        before = os.environ | {"HOME": str(tmp_path), "RAY_AUTH_MODE": "disabled"}
        for one in opened(monkeypatch, tmp_path, "disabled"):
            there, folder = living(), session()
            tally.marks += raylet.get_authentication_mode() != raylet.AuthenticationMode.TOKEN
            one.close()
            tally.tried += len(there) + 4
            tally.marks += len(living()) + folder.exists() + (tmp_path / ".ray").exists()
        asked = os.environ["RAY_AUTH_MODE"], raylet.get_authentication_mode()
        tally.marks += asked != ("disabled", raylet.AuthenticationMode.DISABLED)
        assert {name for name in before if os.environ.get(name) != before[name]} <= {"PYTHONPATH"}


def living() -> list[psutil.Process]:
    return [one for one in psutil.Process().children(recursive=True) if one.status() != psutil.STATUS_ZOMBIE]
