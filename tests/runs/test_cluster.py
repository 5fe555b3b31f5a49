"""Ray without a cluster: addresses, refusals, the journal, job output after a cut, and the files in jobs/clusters."""

from __future__ import annotations

import asyncio
import http.server
import importlib
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import requests
import yaml

from helpers import refused
from tracer.errors import JobError, RunError, described
from tracer.runs.workers.cluster import RayPool, connection, pool, status, submission, submit
from tracer.runs.workers.cluster.actors import Journal

ray: Any = pytest.importorskip("ray")

ROOT = Path(__file__).parents[2]
CLUSTERS = ROOT / "jobs" / "clusters"
RAY_UP = [ROOT / "cluster.yaml", *sorted(set(CLUSTERS.glob("*.yaml")) - {CLUSTERS / "kuberay-rayjob.yaml"})]
EVERY = [*RAY_UP, CLUSTERS / "kuberay-rayjob.yaml", CLUSTERS / "slurm.sh", CLUSTERS / "Dockerfile"]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "REACH", 1.0)
    monkeypatch.setattr(submission, "REACH", 1.0)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def closed() -> str:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{one.getsockname()[1]}"


@pytest.fixture
def silent() -> Iterator[str]:
    """A port that is open and says nothing."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        yield f"127.0.0.1:{one.getsockname()[1]}"


@pytest.fixture
def web() -> Iterator[Callable[[int, str], str]]:
    """Starts servers that answer one thing."""
    servers = []

    def start(code: int, text: str) -> str:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(code)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ray", "ray.exceptions"):
        monkeypatch.setitem(sys.modules, name, None)
    for call in (RayPool, lambda: status("http://127.0.0.1:1", "a")):
        with refused(JobError, "pip install 'neuron-tracer[ray]'"):
            call()


def test_importing_tracer_does_not_import_ray() -> None:
    script = "import sys, tracer.runs.workers.cluster.submission; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize(
    "address", ["", "head", "head:", ":6379", "http://head:8265", "head:6379/x", "a b:1", "locall"]
)
def test_what_is_no_address(address: str) -> None:
    with refused(JobError, "is not an address of a Ray cluster"):
        RayPool(address)


def test_addresses_where_nothing_answers(closed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for address in (closed, f"ray://{closed}", "127.0.0.1:99999"):
        with refused(RunError, f"--ray {address}", "no answer"):
            RayPool(address)
    monkeypatch.setenv("RAY_ADDRESS", closed)
    with refused(RunError, f"--ray {closed}", "no answer"):
        RayPool("auto")
    assert not ray.is_initialized()


def test_a_port_of_something_else(silent: str) -> None:
    with refused(RunError, "something else than Ray answers there"):
        RayPool(silent)


def test_the_journal_keeps_the_last_entry_of_each_worker() -> None:
    journal = Journal()
    journal.write("a", 1, ((1, 2), 0, "", 1, ""))
    journal.write("b", 2, ((5,), 3, "queued", 1, ""))
    journal.write("a", 3, ((7,), 1, "", 2, ""))
    assert journal.read([1, 2, 3, 4]) == {2: ((5,), 3, "queued", 1, ""), 3: ((7,), 1, "", 2, "")}


def test_an_exception_is_one_line() -> None:
    try:
        raise KeyError("first\nsecond " + "x" * 900)
    except KeyError as error:
        text = described(error)
    assert text.startswith("KeyError: 'first")
    assert "(in test_an_exception_is_one_line, test_cluster.py:" in text
    assert len(text) < 600
    assert "\n" not in text
    assert described(ValueError()) == "ValueError: ValueError"


def bare() -> RayPool:
    """A pool of no cluster."""
    one = object.__new__(RayPool)
    one._cluster = SimpleNamespace(lost=lambda sure: "")  # type: ignore[assignment]
    return one


def died(text: str, node: str = "n") -> tuple[str, bool]:
    one = bare()
    one._ray = SimpleNamespace(exceptions=ray.exceptions, nodes=lambda: [{"NodeID": "gone", "Alive": False}])
    error = ray.exceptions.ActorDiedError()
    error.error_msg = text
    return one._death(error, pool._Held(None, None, node=node))


def test_deaths_in_words() -> None:
    detail = "Worker exit type: SYSTEM_ERROR Worker exit detail: Worker"
    assert died(f"{detail} exits with an exit code 4.") == ("exited with code 4", True)
    assert died(f"{detail} exits with an exit code 1. The process receives a SIGTERM.") == ("ended by SIGTERM", True)
    assert died("it was killed by `ray.kill`.") == ("killed by the driver", True)
    assert died("The actor died because its node has died. Node Id: 0") == ("its node was lost", False)
    assert died(f"{detail} exits with an exit code 4.", node="gone") == ("its node was lost", False)
    assert died("first\n  something new\n") == ("something new", True)
    one = bare()
    one._ray = SimpleNamespace(exceptions=ray.exceptions, nodes=list)
    held = pool._Held(None, None)
    reason, blame = one._death(ray.exceptions.OutOfMemoryError("a page\nof text"), held)
    assert "no memory left" in reason
    assert blame
    assert not one._death(ray.exceptions.RaySystemError("lost"), held)[1]


JOB = "kind: dataset\nmodel: demo\ninput: {path: /shared/prompts.jsonl}\n"


def job(folder: Path, text: str = JOB) -> Path:
    path = folder / "job.yaml"
    path.write_text(text)
    return path


def send(path: Path, **fields: Any) -> None:
    submit(path, **({"address": "http://127.0.0.1:1", "out": "/shared/out", "log": print} | fields))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "holds nothing"),
        ("- a\n", "holds a list"),
        ("a: [", "is not YAML"),
        ("\x00", "is not YAML"),
        ("kind: dataset\ninput: {path: prompts.jsonl}\n", "'prompts.jsonl'"),
        ("kind: dataset\ninput: {path: [/shared/a, ./b]}\n", "'./b'"),
        ("kind: dataset\nevaluate: {test: {path: file.csv}}\n", "'file.csv'"),
        ("kind: dataset\nmodel: ./weights\n", "'./weights'"),
        ("kind: dataset\ninput: {dataset: ./builder}\n", "'./builder'"),
        ("input: {path: 's3://ID:SECRET@bucket/x'}\n", "secret"),
        ("a: " + "x" * 2**20, "is larger than"),
    ],
)
def test_jobs_that_would_mean_something_else_there(tmp_path: Path, text: str, part: str) -> None:
    with refused(JobError, part):
        send(job(tmp_path, text))


def test_job_files_that_cannot_be_read(tmp_path: Path) -> None:
    with refused(JobError, "cannot be read"):
        send(tmp_path / "none.yaml")
    with refused(JobError, "cannot be read"):
        send(tmp_path)
    (tmp_path / "job.yaml").write_bytes(b"a: \xff")
    with refused(JobError, "is not YAML"):
        send(tmp_path / "job.yaml")


@pytest.mark.parametrize("out", ["runs/x", "./x", "~/x", ""])
def test_a_run_folder_must_be_within_the_clusters_reach(tmp_path: Path, out: str) -> None:
    with refused(JobError, "--out", "is relative"):
        send(job(tmp_path), out=out)


def test_secrets_do_not_travel_in_the_command(tmp_path: Path) -> None:
    for fields in ({"out": "s3://ID:SECRET@bucket/x"}, {"options": ["--set", "x=hf_" + "a" * 30]}):
        with refused(JobError, "looks like a secret"):
            send(job(tmp_path), **fields)


@pytest.mark.parametrize(
    "address", ["head:8265", "ray://head:10001", "auto", "ftp://head", "http://", "http://u:p@head:8265", "http://a b"]
)
def test_what_is_no_job_server(address: str) -> None:
    with refused(JobError, "is not an address of a Ray job server", "http://HEAD:8265"):
        status(address, "a")


def test_job_servers_that_are_none(web: Callable[[int, str], str], closed: str, silent: str) -> None:
    for address in (f"http://{closed}", f"http://{silent}", web(200, "hello"), web(200, "[]"), web(200, "{}")):
        with refused(RunError, f"--address {address}", "no Ray job server answers"):
            status(address, "a")
    with refused(RunError, "HTTP 404"):
        status(web(404, ""), "a")


def test_names_of_submissions() -> None:
    assert re.fullmatch(r"tracer-my-run-1-\d{8}-\d{6}-[0-9a-f]{4}", submission._name("s3://bucket/my run_1/"))
    assert submission._name("/").startswith("tracer-run-")
    assert submission._name("/a") != submission._name("/a")


class Info(NamedTuple):
    status: str
    driver_exit_code: int | None = None
    message: str | None = None


class Cut:
    """A job server that cuts the connection twice, and sends the output from its beginning each time."""

    def __init__(self, *pieces: list[str]) -> None:
        self.pieces, self.ended = list(pieces), False

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        sent = self.pieces.pop(0)
        for text in sent:
            yield text
        if self.pieces:
            raise RuntimeError("closed")
        self.ended = True

    def get_job_info(self, name: str) -> Info:
        return Info("SUCCEEDED", 0, "fine\n") if self.ended else Info("RUNNING")


def test_output_after_a_cut_has_each_line_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission.time, "sleep", lambda seconds: None)
    lines: list[str] = []
    server = Cut(["one\ntw"], [], ["one\n", "two\nthr"], ["one\ntwo\nthree\nfo", "ur"])
    done = submission._followed(server, "a", "http://x", lines.append)
    assert lines == ["one", "two", "three", "four"]
    assert done == submission.Submission("a", "http://x", "SUCCEEDED", 0, "fine")


def test_a_server_that_stays_away_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(submission, "LOST", 0.0)
    with refused(RunError, "job-1 may still run", "ray job logs --follow"):
        submission._followed(Cut([], [], []), "job-1", "http://x", print)


class Mute(Cut):
    """A job server that is not there any more, though no connection was closed."""

    async def tail_job_logs(self, name: str) -> AsyncIterator[str]:
        yield "one\n"
        await asyncio.sleep(60)

    def get_job_info(self, name: str) -> Info:
        raise requests.ConnectTimeout("nobody")


def test_a_connection_that_is_cut_in_silence_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "QUIET", 0.05)
    monkeypatch.setattr(submission, "LOST", 0.0)
    monkeypatch.setattr(submission.time, "sleep", lambda seconds: None)
    lines: list[str] = []
    with refused(RunError, "job-1 may still run", "does not answer (nobody)"):
        submission._followed(Mute(), "job-1", "http://x", lines.append)
    assert lines == ["one"]


def test_a_job_server_that_never_answers_is_not_waited_for(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submission, "ANSWER", 0.2)
    client = submission._patient(importlib.import_module("ray.job_submission").JobSubmissionClient)
    one = object.__new__(client)
    one._address, one._cookies, one._headers, one._verify = f"http://{silent}", None, None, True
    with refused(RunError, "does not answer"):
        submission._asked(one, "a", f"http://{silent}")


def checked(content: dict[str, Any]) -> dict[str, Any]:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(content)
    validate_config(config)
    return config


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.name)
def test_ray_up_takes_the_file(path: Path) -> None:
    content = yaml.safe_load(path.read_text())
    config = checked(content)
    if config["provider"]["type"] != "local":
        head, worker = config["available_node_types"]["head"], config["available_node_types"]["gpu"]
        assert head["resources"] == {"CPU": 0}
        assert worker["resources"]["GPU"] >= 1
        assert 0 <= worker["min_workers"] <= worker["max_workers"] <= config["max_workers"]
    assert "--num-cpus=0" in config["head_start_ray_commands"][-1]
    assert any(".[ray,datasets]" in line for line in config["setup_commands"])
    for source in config["file_mounts"].values():
        assert (ROOT / source / "pyproject.toml").is_file()
    with pytest.raises(Exception, match="max_worker"):
        checked(yaml.safe_load(path.read_text()) | {"max_worker": 3})


def test_everything_names_the_ray_that_is_tested() -> None:
    (version,) = re.findall(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    for path in EVERY:
        named = re.findall(r"rayproject/ray:([\d.]+)|rayVersion: \"([\d.]+)\"|\bray==([\d.]+)", path.read_text())
        assert {"".join(one) for one in named} <= {version}, path
        assert named or path.name == "slurm.sh"


def test_no_file_holds_a_secret() -> None:
    for path in EVERY:
        assert not submission._SECRET.search(path.read_text()), path
        assert "env_vars" not in path.read_text()


def test_the_kubernetes_job() -> None:
    content = yaml.safe_load((CLUSTERS / "kuberay-rayjob.yaml").read_text())
    assert (content["apiVersion"], content["kind"]) == ("ray.io/v1", "RayJob")
    spec = content["spec"]
    # The fields of the RayJob, RayCluster and group specs of KubeRay 1.1 that a run needs.
    assert set(spec) <= {
        *("entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"),
        *("activeDeadlineSeconds", "submissionMode", "suspend"),
    }
    assert spec["entrypoint"].startswith("python -m tracer run /jobs/job.yaml --out s3://")
    cluster = spec["rayClusterSpec"]
    assert set(cluster) == {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
    head, (worker,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert set(head) == {"rayStartParams", "template"}
    assert set(worker) == {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert all(isinstance(value, str) for value in head["rayStartParams"].values())
    for group in (head, worker):
        (container,) = group["template"]["spec"]["containers"]
        assert set(container) <= {"name", "image", "ports", "envFrom", "resources", "volumeMounts"}
        limits, requests = container["resources"]["limits"], container["resources"]["requests"]
        assert limits == requests
        assert all(isinstance(value, str) for value in limits.values())
        volumes = {one["name"] for one in group["template"]["spec"].get("volumes", ())}
        assert {one["name"] for one in container.get("volumeMounts", ())} == volumes
    gpus = int(worker["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert f"--workers {worker['maxReplicas'] * gpus} " in spec["entrypoint"]


STUBS = {
    "scontrol": 'printf "node1\\nnode2\\n"',
    "srun": 'case "$*" in *hostname*) echo 192.0.2.7 192.0.2.8 ;; *) printf "<%s>" "$@" ;; esac',
}


@pytest.mark.parametrize("gpus", ["4", None])
def test_the_slurm_script(tmp_path: Path, gpus: str | None) -> None:
    script = CLUSTERS / "slurm.sh"
    assert os.access(script, os.X_OK)
    for name, text in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_ID": "123456",
        "VENV": str(tmp_path / "none"),
    } | ({"SLURM_GPUS_ON_NODE": gpus, "SLURM_CPUS_PER_TASK": "32"} if gpus else {})
    words = ["my job.yaml", "/shared/out", "--set", "a=b c"]
    done = subprocess.run(["bash", script, *words], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    share = ["--workers", "8", "--gpus-per-worker", "1"] if gpus else []
    start = "--nodes=2 --ntasks=2 --ntasks-per-node=1 ray symmetric-run --address 192.0.2.7:6835 --min-nodes 2 "
    start += "--num-cpus=32 --num-gpus=4" if gpus else "--num-cpus=1 --num-gpus=0"
    run = ["--", "python", "-m", "tracer", "run", "my job.yaml", "--out", "/shared/out", "--ray", "192.0.2.7:6835"]
    assert done.stdout == "".join(f"<{word}>" for word in [*start.split(), *run, *share, "--set", "a=b c"])
    bare = subprocess.run(["bash", script, "job.yaml"], env=environment, capture_output=True, text=True, check=False)
    assert bare.returncode != 0
    assert "usage: sbatch" in bare.stderr
