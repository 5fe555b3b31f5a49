"""Run a real NDIF server on this machine, run a command against it, and end all of it.

python tools/ndif/serve.py [ID=FOLDER | FOLDER ...] [-- COMMAND ...]

The server is PyPI's ndif in an environment of its own under .ndif/ (made at the first run; tracer is not in it), with
redis, moto for S3, Ray and one actor per model on the CPU. The command sees NDIF_HOST, NDIF_API_KEY (a trusted key) and
NDIF_SANDBOXED_KEY; without a command the server stays until Ctrl-C. Models are folders in Hugging Face format, known
to clients by the ID or by their absolute path; without any, tracer's own is served as `demo`.

Made to share a machine: every port is free, asked for and on 127.0.0.1, Ray has its own address and folder, and only
processes that descend from this one are ended. `ndif stop` and `ray stop` end every Ray of the machine by name instead.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
HOME = ROOT / ".ndif"
BIN = HOME / "venv" / "bin"
LOOPBACK = "127.0.0.1"
KEY = "nnsight.modeling.transformers.TransformersModel:"
START = 240.0
"""Seconds until every model must be deployed."""
KEPT = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "TMPDIR")
"""All that the server inherits: no PYTHONPATH with tracer on it, no RAY_ADDRESS of another cluster, no keys."""


def fail(what: str, step: str) -> SystemExit:
    return SystemExit(f"test-ndif: {what}; {step}")


def interpreter() -> str:
    """A Python for the server. ndif 0.1.2 asks for 3.12 or 3.13; it was seen to run on 3.11."""
    pyenv = map(str, sorted(Path.home().glob(".pyenv/versions/3.1[23].*/bin/python")))
    for candidate in (os.environ.get("NDIF_PYTHON"), "python3.12", "python3.13", *pyenv, "python3.11"):
        check = "import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))"
        with contextlib.suppress(OSError):
            if candidate and subprocess.run([candidate, "-c", check], capture_output=True, check=False).returncode == 0:
                return candidate
    raise fail("no Python 3.11 to 3.13 with venv was found", "install one, or name one in NDIF_PYTHON")


def install() -> None:
    """Make the server's environment, once per requirements.txt."""
    wanted, marker = (HERE / "requirements.txt").read_text(), HOME / "installed.txt"
    if not marker.is_file() or marker.read_text() != wanted:
        python = interpreter()
        print(
            f"making .ndif/venv with {Path(python).name} (1.7 GB, or 6 GB where pip brings torch for CUDA)", flush=True
        )
        marker.unlink(missing_ok=True)
        HOME.mkdir(exist_ok=True)
        pip = [str(BIN / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        steps = [
            [python, "-m", "venv", "--clear", str(HOME / "venv")],
            # Its exact version lets pip take a CPU wheel where its settings know of one.
            [*pip, "torch==2.13.0"],
            # Its dependencies are in requirements.txt; the version of Python that it asks for is not needed.
            [*pip, "--no-deps", "--ignore-requires-python", "ndif==0.1.2"],
            [*pip, "torch==2.13.0", "-r", str(HERE / "requirements.txt")],
        ]
        with (HOME / "install.log").open("w") as log:
            for step in steps:
                if subprocess.run(step, stdout=log, stderr=log, check=False).returncode:
                    raise fail(f"{' '.join(step[:4])} ... failed", "read .ndif/install.log")
        marker.write_text(wanted)
    if shutil.which("redis-server") is None:
        apt = shutil.which("apt-get")
        if apt is None or os.geteuid():
            raise fail("redis-server is missing", "install it (Debian: apt-get install redis-server)")
        for step in (["update"], ["install", "-y", "--no-install-recommends", "redis-server"]):
            environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
            if subprocess.run([apt, "-qq", *step], env=environment, stdout=subprocess.DEVNULL, check=False).returncode:
                raise fail("apt-get could not install redis-server", "install it by hand")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for held in sockets:
            held.bind((LOOPBACK, 0))
        return [held.getsockname()[1] for held in sockets]


def adopt_orphans() -> None:
    """Become the parent of what our children leave behind (Linux), so that it can be found and ended."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def end_descendants() -> None:
    """Ask every process that descends from this one to end, then make it; again for what was born meanwhile."""
    for patience in (10, 3, 3):
        left = psutil.Process().children(recursive=True)
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        for process in psutil.wait_procs(left, timeout=patience)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=3)


class Services:
    """The processes of a server, each with a log under .ndif/logs."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self.environment, self.folder = environment, folder
        self.logs = HOME / "logs"
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir(parents=True)
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C reaches us alone, and we end them in order.
        with (self.logs / f"{name}.log").open("wb") as log:
            self.running[name] = subprocess.Popen(
                command,
                env=self.environment | environment,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self.running[name]

    def check(self) -> None:
        for name, process in self.running.items():
            if process.poll() is not None:
                raise fail(f"{name} ended with status {process.returncode}", f"read .ndif/logs/{name}.log")

    def wait_for_port(self, name: str, port: int, limit: float = 60) -> None:
        until = time.monotonic() + limit
        while time.monotonic() < until:
            self.check()
            with socket.socket() as probe:
                probe.settimeout(1)
                if probe.connect_ex((LOOPBACK, port)) == 0:
                    return
            time.sleep(0.2)
        raise fail(f"{name} does not answer on port {port} after {limit:.0f} s", f"read .ndif/logs/{name}.log")


def ask(url: str, timeout: float = 30) -> Any:
    with urllib.request.urlopen(url, timeout=timeout) as answer:
        return json.load(answer)


def wait_for_models(services: Services, host: str, models: dict[str, str]) -> dict[str, Any]:
    """The server's status once every model runs."""
    until, last = time.monotonic() + START, "no answer"
    while time.monotonic() < until:
        services.check()
        try:
            entries = list(ask(f"{host}/status")["deployments"].values())
            states = {entry.get("repo_id"): entry.get("application_state") for entry in entries}
            if all(states.get(name) == "RUNNING" for name in models):
                return {entry["repo_id"]: entry for entry in entries}
            last = str(states)
        except (OSError, ValueError, KeyError) as error:  # 503 until the queue has found Ray
            last = str(error)
        time.sleep(1)
    raise fail(f"models are not deployed after {START:.0f} s ({last})", "read .ndif/logs and .ndif/logs/ray")


@contextlib.contextmanager
def served(models: dict[str, str]) -> Iterator[dict[str, str]]:
    """A running server; yields the settings of a client."""
    api, redis, store, gcs, client, objects, nodes, board, agent, grpc, runtime, *metrics = free_ports(14)
    temporary = Path(tempfile.mkdtemp(prefix="ndif-"))  # short: Ray puts sockets in it, whose paths are limited
    work = temporary / "work"
    work.mkdir()
    for name, folder in models.items():
        if Path(name).is_absolute():
            continue
        # The server finds a model by a path relative to where it runs; the client says the name alone.
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).symlink_to(Path(folder).resolve(strict=True), target_is_directory=True)
    keys = [KEY + json.dumps({"repo_id": name, "revision": None, "task": "text-generation"}) for name in models]
    sandboxed = str(uuid.uuid4())
    environment = {name: os.environ[name] for name in KEPT if name in os.environ} | {
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(HERE),  # actor.py
        "NDIF_MODEL_IMPORT_PATH": "actor.CPUModelActor",
        "NDIF_DEPLOYMENTS": "|".join(keys),
        "NDIF_DEFAULT_DTYPE": "float32",
        "NDIF_DEFAULT_PADDING_BIAS": "0",  # room on the GPU, which is made up
        "NDIF_SANDBOX_POOL_SIZE": "1",  # warm processes for untrusted requests, 0.5 GB each
        "NDIF_SANDBOXED_KEY": sandboxed,
        "NDIF_REDIS_URL": f"redis://{LOOPBACK}:{redis}",
        "NDIF_RAY_ADDRESS": f"{LOOPBACK}:{gcs}",  # a driver: no Ray client, which needs one more server per client
        "RAY_ADDRESS": f"{LOOPBACK}:{gcs}",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Linux too: or Ray turns 127.0.0.1 into the machine's address
        "RAY_USAGE_STATS_ENABLED": "0",
        "NDIF_OBJECT_STORE_URL": f"http://{LOOPBACK}:{store}",
        "NDIF_OBJECT_STORE_ACCESS_KEY": "test",
        "NDIF_OBJECT_STORE_SECRET_KEY": "test",
        "NDIF_API_PORT": str(api),
        "HF_ENDPOINT": f"http://{LOOPBACK}:9",  # nobody: models come from folders, and this says so at once
        "HF_HOME": str(temporary / "hf"),
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
    }
    services = Services(environment, work)
    try:
        services.start(
            "redis", "redis-server", "--port", str(redis), "--bind", LOOPBACK, "--save", "", "--appendonly", "no"
        )
        services.start("moto", str(BIN / "moto_server"), "-H", LOOPBACK, "-p", str(store))
        # `ray start` itself, not ndif's start.sh: that one listens on every address and cannot make up a GPU.
        services.start(
            "ray",
            *(str(BIN / "ray"), "start", "--head", "--block", f"--node-ip-address={LOOPBACK}", f"--port={gcs}"),
            *(f"--ray-client-server-port={client}", f"--object-manager-port={objects}"),
            *(f"--node-manager-port={nodes}", "--min-worker-port=0", "--max-worker-port=0"),
            *(f"--dashboard-host={LOOPBACK}", f"--dashboard-port={board}", f"--dashboard-agent-listen-port={agent}"),
            *(f"--dashboard-agent-grpc-port={grpc}", f"--runtime-env-agent-port={runtime}"),
            *(f"--metrics-export-port={metrics[0]}", f"--temp-dir={temporary / 'ray'}", "--include-log-monitor=false"),
            *("--disable-usage-stats", "--object-store-memory=100000000", f"--num-cpus={len(models) + 1}"),
            # ndif places models on GPUs only. A GPU of 8 GiB that is not there; the actor ignores it.
            *(
                "--num-gpus=1",
                f"--resources={json.dumps({'head': 10, 'cuda_memory_bytes': 2**33, 'cpu_memory_bytes': 2**33})}",
            ),
            GRPC_ENABLE_FORK_SUPPORT="0",
            DASHBOARD_METRIC_PORT=str(metrics[1]),  # fixed ones by default, which another Ray may have
            AUTOSCALER_METRIC_PORT=str(metrics[2]),
        )
        for name, port in (("redis", redis), ("moto", store), ("ray", gcs), ("ray", board)):
            services.wait_for_port(name, port)
        controller = services.start(
            "controller", str(BIN / "python"), "-m", "ndif.services.ray.deployments.controller.controller"
        )
        if controller.wait(120):
            services.check()
        del services.running["controller"]  # it has started a Ray actor and is done
        # The address on the command line wins over the 0.0.0.0 in ndif's settings.
        services.start(
            "api",
            *(str(BIN / "gunicorn"), "--config", "python:ndif.services.api.gunicorn_conf"),
            *("--bind", f"{LOOPBACK}:{api}", "ndif.services.api.app:app"),
        )
        services.wait_for_port("api", api)
        host = f"http://{LOOPBACK}:{api}"
        wait_for_models(services, host, models)
        versions = ask(f"{host}/env")
        names = ("nnsight", "transformers", "torch", "ray")
        said = ", ".join(f"{name} {versions['packages'].get(name)}" for name in names)
        print(f"server: Python {versions['python_version'].split()[0]}, {said}", flush=True)
        if "tracer" in versions["packages"]:
            raise fail("tracer is importable on the server", "clean .ndif: tests must not depend on it")
        yield {"NDIF_HOST": host, "NDIF_API_KEY": str(uuid.uuid4()), "NDIF_SANDBOXED_KEY": sandboxed}
        services.check()
    finally:
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not leave half behind
        end_descendants()
        logs = temporary / "ray" / "session_latest" / "logs"
        with contextlib.suppress(OSError, shutil.Error):
            shutil.copytree(logs.resolve(), HOME / "logs" / "ray", ignore_dangling_symlinks=True)
        shutil.rmtree(temporary, ignore_errors=True)
        signal.signal(signal.SIGINT, previous)


def main(arguments: list[str]) -> int:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    command = arguments[split + 1 :]
    models = {}
    for argument in arguments[:split]:
        name, _, folder = argument.rpartition("=")
        models[name or str(Path(folder).resolve())] = folder
    models = models or {"demo": str(ROOT / "tracer" / "demo" / "model")}
    for folder in models.values():
        if not (Path(folder) / "config.json").is_file():
            raise fail(f"{folder} is not a folder with a config.json", "give a model in Hugging Face format")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    adopt_orphans()
    install()
    started = time.monotonic()
    with served(models) as settings:
        print(
            f"serving {', '.join(Path(name).name for name in models)} after {time.monotonic() - started:.0f} s",
            flush=True,
        )
        try:
            if command:
                return subprocess.run(command, env=os.environ | settings, check=False).returncode
            print("\n".join(f"export {name}={value}" for name, value in settings.items()), flush=True)
            signal.pause()
        except KeyboardInterrupt:
            print("ending the server", flush=True)
            return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
