"""A loop-back server that speaks nnsight 0.8's NDIF protocol, for tests; not a security boundary.

Run in a process of its own, in which nothing can be imported that a real server does not have (absent.py): neither
``tracer`` nor what it is typed and tested with. python tests/support/ndif_server.py ID=FOLDER[@DTYPE] ... prints its
port. POST /_mode {"name": value, ...} sets how it behaves; see `MODES`.
"""

from __future__ import annotations

import absent  # noqa: F401  before all that looks for optional packages

# isort: split
import asyncio
import contextlib
import importlib.metadata
import io
import json
import linecache
import os
import queue
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterator
from typing import Any

import aiohttp.web as web  # before nnsight, which puts .save on every object
import torch
import zstandard
from greenlet import getcurrent
from nnsight import TransformersModel
from nnsight.intervention.batching import Batcher
from nnsight.intervention.interleaver import Mediator
from nnsight.schema.request import RequestModel
from nnsight.tracing.globals import BLOCKS, SOURCES
from nnsight.tracing.tracer import _saves, dec, inc
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoTokenizer

MODES: dict[str, Any] = {
    "keys": [],  # accepted; none: everyone is let in
    "locked_after": None,  # after so many requests every key is refused
    "sandboxed": False,  # every gradient fails, the body sees weights on meta
    "busy": 0,  # answer so many requests with 503
    "limited": 0,  # answer so many requests with 429
    "retry_after": 0,  # seconds that it then asks for
    "queued": 0.0,  # seconds a job waits in the queue
    "slow": 0.0,  # seconds a job runs before it computes
    "versions": {},  # packages that /env lists with another version
    "oom": 0,  # so many jobs run out of memory
    "oom_rows": 0,  # forwards of more rows than this run out of memory, each of a session's too
    "ignore": False,  # interventions are ignored
    "lose": 0,  # so many jobs are forgotten once accepted
    "cut": 0,  # cut the connection of so many polls
    "cut_result": 0,  # cut so many downloads short
    "scramble": False,  # gradients are doubled
    "evil": False,  # a result is a pickled call
    "die": False,  # end the process while a job runs
    "broken": "",  # answer /status with this text
}
INLINE = 8 * 2**20
KEY = "nnsight.modeling.transformers.TransformersModel:"


class Evil:
    """What a careless client would run when it reads a result."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("/tmp/tracer-was-here",)


class Server:
    """Models, jobs and modes."""

    def __init__(self, models: dict[str, str]) -> None:
        self.models: dict[str, TransformersModel] = {}
        for name, given in models.items():
            folder, _, dtype = given.partition("@")
            module: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "float32")
            module.eval().requires_grad_(False)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            self.models[name] = TransformersModel(module, task="text-generation", tokenizer=tokenizer)
        self.mode = dict(MODES)
        self.jobs: dict[str, dict[str, Any]] = {}
        self.results: dict[str, bytes] = {}
        self.sockets: dict[str, web.WebSocketResponse] = {}
        self.seen = {"requests": 0, "bytes": 0, "largest": 0, "running": 0, "most_open": 0, "garbage": 0}
        self.waiting: queue.Queue[tuple[str, dict[str, Any], bytes]] = queue.Queue()
        self.loop: asyncio.AbstractEventLoop | None = None
        threading.Thread(target=self.work, daemon=True).start()

    def key(self, name: str) -> str:
        return KEY + json.dumps({"repo_id": name, "revision": None, "task": "text-generation"})

    def once(self, name: str) -> bool:
        """Whether a mode that counts down still holds."""
        left = self.mode[name]
        self.mode[name] = max(0, left - 1)
        return left > 0

    def check_key(self, request: web.Request) -> None:
        """As the real server, which repeats a malformed key in its answer."""
        keys, given = self.mode["keys"], request.headers.get("ndif-api-key")
        last = self.mode["locked_after"]
        if last is not None and self.seen["requests"] >= last:
            raise web.HTTPForbidden(text=json.dumps({"detail": "Invalid API key."}))
        if not keys:
            return
        if not given:
            raise web.HTTPUnauthorized(text=json.dumps({"detail": "Missing or invalid API key."}))
        if "-" not in given:
            raise web.HTTPBadRequest(text=json.dumps({"detail": f"Invalid API key format: '{given}'."}))
        if given not in keys:
            raise web.HTTPForbidden(text=json.dumps({"detail": "Invalid API key."}))

    async def request(self, request: web.Request) -> web.Response:
        self.check_key(request)
        for name, status in (("busy", 503), ("limited", 429)):
            if self.once(name):
                asked = self.mode["retry_after"]
                headers = {"Retry-After": str(asked)} if asked else {}
                return web.json_response({"detail": "Service temporarily unavailable."}, status=status, headers=headers)
        form = await request.post()
        envelope, blob = json.loads(str(form["data"])), form["blob"].file.read()  # type: ignore[union-attr]
        self.seen["requests"] += 1
        self.seen["bytes"] += len(blob)
        self.seen["largest"] = max(self.seen["largest"], len(blob))
        self.seen["most_open"] = max(self.seen["most_open"], self.open() + 1)
        number = uuid.uuid4().hex
        envelope["id"] = number
        if self.once("lose"):
            return web.json_response({"id": number, "status": "RECEIVED", "description": "received"})
        self.jobs[number] = {"id": number, "status": "RECEIVED", "description": "received"}
        self.waiting.put((number, envelope, blob))
        return web.json_response(self.jobs[number])

    def open(self) -> int:
        return sum(job["status"] not in ("COMPLETED", "ERROR") for job in self.jobs.values())

    async def response(self, request: web.Request) -> web.Response:
        if self.once("cut"):
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        job = self.jobs.get(request.match_info["id"])
        if job is None:
            return web.json_response({"detail": "No response for request."}, status=404)
        return web.json_response(job)

    async def result(self, request: web.Request) -> web.StreamResponse:
        blob = self.results[request.match_info["id"]]
        if self.once("cut_result"):
            answer = web.StreamResponse(headers={"Content-Length": str(len(blob))})
            await answer.prepare(request)
            await answer.write(blob[: len(blob) // 2])
            assert request.transport is not None
            request.transport.abort()
            return answer
        return web.Response(body=blob)

    async def subscribe(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        session = uuid.uuid4().hex
        self.sockets[session] = socket
        await socket.send_json({"session_id": session})
        async for _ in socket:
            pass
        return socket

    async def status(self, request: web.Request) -> web.Response:
        if self.mode["broken"]:
            return web.Response(text=self.mode["broken"])
        deployments = {
            f"replica-{name}": {
                "model_key": self.key(name),
                "repo_id": name,
                "revision": None,
                "task": "text-generation",
                "deployment_level": "HOT",
                "application_state": "RUNNING",
            }
            for name in self.models
        }
        return web.json_response({"deployments": deployments})

    async def env(self, request: web.Request) -> web.Response:
        packages = {name: importlib.metadata.version(name) for name in ("nnsight", "torch", "transformers")}
        return web.json_response({"python_version": sys.version, "packages": packages | self.mode["versions"]})

    async def whoami(self, request: web.Request) -> web.Response:
        given = request.headers.get("ndif-api-key")
        known = not self.mode["keys"] or given in self.mode["keys"]
        return web.json_response({"email": "someone@lab.edu" if known else None, "tags": []})

    async def set_mode(self, request: web.Request) -> web.Response:
        self.mode = MODES | await request.json()
        self.seen = dict.fromkeys(self.seen, 0)
        return web.json_response({})

    async def get_seen(self, request: web.Request) -> web.Response:
        return web.json_response(self.seen)

    def say(self, envelope: dict[str, Any], status: str, description: str = "", data: Any = None) -> None:
        """Record a job's state, and tell it to who is subscribed."""
        number, session = envelope["id"], envelope.get("session_id")
        self.jobs[number] = {"id": number, "status": status, "description": description, "data": data}
        if session and self.loop is not None:
            text = json.dumps(self.jobs[number])
            asyncio.run_coroutine_threadsafe(self.sockets[session].send_str(text), self.loop).result(10)

    def work(self) -> None:
        torch.set_num_threads(1)
        while True:
            number, envelope, blob = self.waiting.get()
            self.say(envelope, "QUEUED", "Your job is 1st in the queue.")
            time.sleep(self.mode["queued"])
            self.say(envelope, "RUNNING", "Your job has started running.")
            time.sleep(self.mode["slow"])
            if self.mode["die"]:
                os._exit(1)
            try:
                if self.once("oom"):
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
                saved = {"saved": Evil()} if self.mode["evil"] else self.run(envelope, blob)
                self.results[number] = self.packed(saved, envelope["compress"])
                host = f"http://127.0.0.1:{PORT[0]}/result/{number}"
                self.say(envelope, "COMPLETED", "Your job has been completed.", host)
            except Exception as error:  # noqa: BLE001  as the real server: whatever a block raises is its user's
                self.say(envelope, "ERROR", "".join(traceback.format_exception(error)))

    def run(self, envelope: dict[str, Any], blob: bytes) -> dict[str, Any]:
        name = json.loads(envelope["model_key"].removeprefix(KEY))["repo_id"]
        model = self.models[name]
        model._remoteable_set_env(envelope["env"])
        with kept_caches(), limits(self.mode, self.seen):
            tracer = RequestModel.deserialize(blob, model._remoteable_persistent_objects(), envelope["compress"])
            inc()
            try:
                tracer.execute(tracer.info.code)
                saves = _saves()
                return {key: value for key, value in tracer.info.frame.f_locals.items() if id(value) in saves}
            finally:
                dec()

    @staticmethod
    def packed(saved: dict[str, Any], compress: bool) -> bytes:
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        return zstandard.ZstdCompressor().compress(buffer.getvalue()) if compress else buffer.getvalue()


@contextlib.contextmanager
def kept_caches() -> Iterator[None]:
    """What one request registers of its sources must not reach the next."""
    kept = [(cache, dict(cache)) for cache in (linecache.cache, SOURCES, BLOCKS)]
    try:
        yield
    finally:
        for cache, before in kept:
            cache.clear()  # type: ignore[attr-defined]
            cache.update(before)  # type: ignore[attr-defined]


def _no_gradient(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("element 0 of tensors does not require grad and does not have a grad_fn")


class Garbage(TorchFunctionMode):
    """Counts what computes with a hidden weight and comes back as if it were a number, as torch lets it."""

    def __init__(self, seen: dict[str, int]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given, made = (
            [leaf.is_meta for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
            for tree in ((args, kwargs), out)
        )
        self.seen["garbage"] += any(given) and not all(made)
        return out


@contextlib.contextmanager
def limits(mode: dict[str, Any], counts: dict[str, int]) -> Iterator[None]:
    """What the mode takes from a job: gradients and weights (a sandbox), memory, or the truth."""
    get, grad, swap, named = nn.Module.__getattr__, torch.autograd.grad, Mediator.swap, nn.Module.named_parameters
    assemble = Batcher.assemble

    def assembled(self: Batcher, fn: Any) -> tuple[Any, ...]:
        """What any forward is called with: a trace's own, a session's, or that of several invokes."""
        given = assemble(self, fn)
        rows = [leaf.shape[0] for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor) and leaf.ndim]
        if max(rows, default=0) > mode["oom_rows"]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return given

    def seen(value: Any) -> Any:
        in_body = getcurrent().parent is not None
        return value.to("meta") if in_body and isinstance(value, nn.Parameter) else value

    def doubled(*args: Any, **kwargs: Any) -> Any:
        return tuple(2 * slope for slope in grad(*args, **kwargs))

    try:
        if mode["oom_rows"]:
            Batcher.assemble = assembled  # type: ignore[method-assign]
        if mode["sandboxed"]:
            nn.Module.__getattr__ = lambda self, name: seen(get(self, name))  # type: ignore[method-assign]
            nn.Module.named_parameters = lambda self, *a, **k: (  # type: ignore[method-assign]
                (name, seen(value)) for name, value in named(self, *a, **k)
            )
            torch.autograd.grad = _no_gradient  # type: ignore[assignment]
        if mode["scramble"]:
            torch.autograd.grad = doubled  # type: ignore[assignment]
        if mode["ignore"]:
            Mediator.swap = classmethod(lambda cls, location, value: None)  # type: ignore[assignment]
        with Garbage(counts) if mode["sandboxed"] else contextlib.nullcontext():
            yield
    finally:
        Batcher.assemble = assemble  # type: ignore[method-assign]
        nn.Module.__getattr__, torch.autograd.grad = get, grad  # type: ignore[method-assign]
        Mediator.swap, nn.Module.named_parameters = swap, named  # type: ignore[method-assign]


PORT = [0]


async def main(models: dict[str, str]) -> None:
    server = Server(models)
    server.loop = asyncio.get_running_loop()
    app = web.Application(client_max_size=2**30)
    for path in ("status", "env", "whoami", "subscribe"):
        app.router.add_get(f"/{path}", getattr(server, path))
    app.router.add_post("/request", server.request)
    app.router.add_get("/response/{id}", server.response)
    app.router.add_get("/result/{id}", server.result)
    app.router.add_post("/_mode", server.set_mode)
    app.router.add_get("/_seen", server.get_seen)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    PORT[0] = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
    sys.stdout.write(f"{PORT[0]}\n")
    sys.stdout.flush()
    parent = os.getppid()
    while os.getppid() == parent:  # ends with the test process, however that ends
        await asyncio.sleep(1)


if __name__ == "__main__":
    asyncio.run(main(dict(argument.split("=", 1) for argument in sys.argv[1:])))
