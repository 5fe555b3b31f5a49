"""What a server may say instead of the truth: one line each, or the right result all the same."""

from __future__ import annotations

import gzip
import io
import json
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import zstandard

import tracer
from loopback import Loopback
from proxy import HELD, Answer, Lie, Proxy, between, cut, honest, raw, refuse
from tally import Attack, Tally
from tracer.attribution.edges import direct_edges
from tracer.attribution.trace import trace_all
from tracer.ndif import server as ndif

KEY = "0badc0de-5ec2-4e70-8a11-5ec2e7a11cee"
OTHER = tracer.Prompt("The parents near the cars", target=" are", foil=" is")
"""As long as the other, whose form its result has."""
PROMPT = tracer.Prompt("The secretaries near the car", target=" are", foil=" is")
LIMITS = ndif.Limits(wait=3.0, patience=0.6, busy=0.6, lost=0.3, attempts=2, quiet=0.0, result=64 * 2**20)
END = 60.0
"""Seconds after which something has no end. The limits add up to a few."""
DIRT = "\x1b[2J\x1b]0;owned\x07\r\n\u202e\x9b"
BRACKETS = b"[" * 200_000


def traced(model: tracer.Model) -> Any:
    circuit = tracer.trace(model, PROMPT, nodes=10)
    return circuit.metric, circuit.nodes.to_pylist(), None if circuit.links is None else circuit.links.to_pylist()


# ------------------------------------------------------------------------------------------ how an answer is changed


def once(kind: str, lie: Lie, times: int = 1) -> Lie:
    """Of the first answers of a kind."""
    left = [times]

    def some(answer: Answer) -> None:
        if answer.kind == kind and left[0] > 0:
            left[0] -= 1
            lie(answer)

    return some


def always(kind: str, lie: Lie) -> Lie:
    return once(kind, lie, 10**6)


def body(content: bytes | str, **headers: str) -> Lie:
    return refuse(200, content.encode() if isinstance(content, str) else content, **headers)


def in_json(change: Callable[[dict[str, Any]], Any]) -> Lie:
    """Changes what an answer says, or says what is returned."""

    def lie(answer: Answer) -> None:
        said = json.loads(answer.body)
        answer.body = json.dumps(change(said) or said).encode()

    return lie


def field(**values: Any) -> Lie:
    return in_json(lambda said: said.update(values))


def when_done(lie: Lie) -> Lie:
    """Of a poll that says that the job is done."""
    return lambda answer: lie(answer) if b'"COMPLETED"' in answer.body else None


def packed(saved: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(saved, buffer)
    return zstandard.ZstdCompressor().compress(buffer.getvalue())


def unpacked(content: bytes) -> Any:
    whole = zstandard.ZstdDecompressor().decompress(content)
    return torch.load(io.BytesIO(whole), weights_only=True)


def saved(change: Callable[[dict[str, Any]], Any]) -> Lie:
    """Changes what was saved, or is what is returned."""

    def lie(answer: Answer) -> None:
        values = unpacked(answer.body)
        answer.body = packed(change(values) or values)
        answer.headers.pop("etag", None)

    return lie


def circuit(change: Callable[[dict[str, Any]], Any]) -> Lie:
    """Changes the first prompt's part of a circuit."""
    return saved(lambda values: change(values["result"][0]) and None)


def zipped(change: Callable[[str, bytes], bytes], method: int = zipfile.ZIP_STORED, more: bytes = b"") -> Lie:
    """Changes records of a result."""

    def lie(answer: Answer) -> None:
        buffer = io.BytesIO()
        whole = zipfile.ZipFile(io.BytesIO(zstandard.ZstdDecompressor().decompress(answer.body)))
        with zipfile.ZipFile(buffer, "w", method) as made:
            for name in whole.namelist():
                made.writestr(name, change(name, whole.read(name)))
        answer.body = zstandard.ZstdCompressor().compress(buffer.getvalue() + more)

    return lie


def flipped(answer: Answer) -> None:
    """One bit of a tensor, on a way without checks."""
    whole = bytearray(zstandard.ZstdDecompressor().decompress(answer.body))
    record = next(one for one in zipfile.ZipFile(io.BytesIO(whole)).infolist() if one.filename.endswith("/data/1"))
    begin = record.header_offset
    lengths = (
        int.from_bytes(whole[begin + 26 : begin + 28], "little"),
        int.from_bytes(whole[begin + 28 : begin + 30], "little"),
    )
    whole[begin + 30 + sum(lengths)] ^= 4
    answer.body = zstandard.ZstdCompressor().compress(bytes(whole))


def call(module: str, name: str, argument: bytes) -> Lie:
    """A pickle that calls a function."""
    pickle = b"\x80\x02c" + f"{module}\n{name}\n".encode() + argument + b"\x85R."
    return zipped(lambda path, content: pickle if path.endswith("data.pkl") else content)


def laughs(values: dict[str, Any]) -> None:
    """A list of the same list of the same list: 10^40 items in some hundred bytes."""
    inner: Any = [0]
    for _ in range(40):
        inner = [inner] * 10
    values["result"][0]["nodes"] = inner


def deep(values: dict[str, Any]) -> None:
    inner: Any = []
    for _ in range(300):
        inner = [inner]
    values["result"] = inner


def frames(size: int, declared: bool) -> bytes:
    """Zeros, in frames that say how many, or do not."""
    zeros, made = bytes(2**20), io.BytesIO()
    for _ in range(size // 2**26):
        if declared:
            made.write(zstandard.ZstdCompressor().compress(zeros * 64))
        else:
            writer = zstandard.ZstdCompressor().compressobj()
            made.write(b"".join(writer.compress(zeros) for _ in range(64)) + writer.flush())
    return made.getvalue()


def larger(content: bytes) -> bytes:
    """A frame that says that it is 64 GiB."""
    size = (64 * 2**30).to_bytes(8, "little")
    return content[:4] + bytes([0xE0]) + size + content[4 + 1 + 4 :]


def other(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda values: values.update(changes)


def nodes(change: Callable[[torch.Tensor], torch.Tensor]) -> Lie:
    return circuit(lambda values: values.update(nodes=change(values["nodes"])))


def stale(proxy: Proxy) -> Lie:
    """The result of a request before."""
    return always("result", body(proxy.kept["result"]))


def part(**headers: str) -> Lie:
    """Half of a result, and then another part than was asked for."""

    def lie(answer: Answer) -> None:
        if answer.status == 206:
            answer.headers |= {name.replace("_", "-"): value for name, value in headers.items()}
        else:
            cut(0.5)(answer)

    return lie


def first_of(*numbers: int) -> torch.Tensor:
    return torch.tensor([numbers], dtype=torch.int32)


# --------------------------------------------------------------------------------------------------- the lies

BEGINNING: dict[str, Callable[[Proxy], Lie]] = {
    # what is said before there is a model
    "a page instead of a status": lambda _: always("status", body("<html>hello</html>")),
    "a list instead of a status": lambda _: always("status", body("[]")),
    "brackets without end": lambda _: always("status", body(BRACKETS)),
    "brackets in a status": lambda _: always("status", body(b'{"deployments": ' + BRACKETS)),
    "a number of 5,000 digits": lambda _: always("status", body('{"deployments": ' + "9" * 5000 + "}")),
    "a status of 40 MB": lambda _: always("status", body(b'{"a": "' + b"x" * 40_000_000 + b'"}')),
    "a status that is not text": lambda _: always("status", body(b"\xff\xfe{}")),
    "a compressed bomb": lambda _: always("status", body(gzip.compress(bytes(2**26)), content_encoding="gzip")),
    "a zstd bomb": lambda _: always("status", body(frames(2**28, True), content_encoding="zstd")),
    "no deployments": lambda _: always("status", field(deployments=[1, 2])),
    "deployments that are none": lambda _: always("status", field(deployments={"a": 3, "b": None, "c": [{}]})),
    "dirt in names": lambda _: always("status", field(deployments={"a": deployed(repo_id=DIRT * 50)})),
    "a model that is a dict": lambda _: always("status", field(deployments={"a": deployed(repo_id={}, model_key=[])})),
    "dirt as a revision": lambda _: always("status", field(deployments={"a": deployed(revision=DIRT)})),
    "a version that is a command": lambda _: always("env", field(packages={"nnsight": "0.9'; touch /tmp/owned; '"})),
    "versions that are none": lambda _: always("env", field(packages={"nnsight": [1], "torch": None})),
    "packages that are a list": lambda _: always("env", field(packages=[DIRT])),
    "no environment": lambda _: always("env", body("null")),
    "dirt and the key in a refusal": lambda _: always(
        "status", refuse(401, json.dumps({"detail": f"{DIRT}{KEY}{DIRT}"}).encode())
    ),
    "a refusal of brackets": lambda _: always("status", refuse(403, BRACKETS)),
    "a refusal of 40 MB": lambda _: always("status", refuse(500, b"x" * 40_000_000)),
    "a way to elsewhere": lambda proxy: always("status", refuse(307, b"", location=f"{proxy.host}/stolen")),
    "nothing": lambda proxy: always("status", raw(over=proxy.over)),
    "no HTTP": lambda proxy: always("status", raw(b"SSH-2.0-OpenSSH_9.6\r\n", over=proxy.over)),
    "a byte now and then": lambda proxy: always("status", raw(b"H", every=0.2, over=proxy.over)),
    "headers without end": lambda proxy: always(
        "status", raw(b"HTTP/1.1 200 OK\r\n", b"x-more: yes\r\n", every=0.2, over=proxy.over)
    ),
    "a body without end": lambda proxy: always(
        "status",
        raw(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n", b"1\r\n \r\n", every=0.2, over=proxy.over),
    ),
    "patience asked for without end": lambda proxy: always(
        "status", raw(b"HTTP/1.1 102 Processing\r\n\r\n", every=0.2, over=proxy.over)
    ),
    "a probe that is not a number": lambda _: once("result", saved(nans)),
    "a probe of other words": lambda _: once(
        "result", saved(lambda all_: all_.update(saved=(*all_["saved"][:3], DIRT, (1, 2, DIRT))))
    ),
    "a fingerprint of dirt": lambda _: once(
        "result", saved(lambda all_: all_.update(saved=(*all_["saved"][:4], (True, True, DIRT))))
    ),
    "a probe of other rows": lambda _: once(
        "result", saved(lambda all_: all_.update(saved=(all_["saved"][0][:3], *all_["saved"][1:])))
    ),
}

ASKING: dict[str, Callable[[Proxy], Lie]] = {
    # what is said of a request
    "a number that is a path": lambda _: once("request", field(id="../status?")),
    "a number that is another host": lambda _: once("request", field(id="/127.0.0.2:1/stolen")),
    "a number of dirt": lambda _: once("request", field(id=DIRT)),
    "a number of another kind": lambda _: once("request", field(id=7)),
    "no number": lambda _: once("request", in_json(lambda said: {"status": "RECEIVED"})),
    "500 for ever": lambda _: always("request", refuse(500)),
    "too large": lambda _: always("request", refuse(413)),
    "a version with dirt": lambda _: always("request", refuse(422, json.dumps({"detail": f"version {DIRT}"}).encode())),
    "years of patience": lambda _: always("request", refuse(503, retry_after="9" * 400)),
    "a second that is none": lambda _: once("request", refuse(503, retry_after="\xb2")),
    "a date to come back": lambda _: once("request", refuse(429, retry_after="Wed, 21 Oct 2015 07:28:00 GMT")),
    "a state that is none": lambda _: always("response", field(status="OWNED")),
    "words of another kind": lambda _: always("response", field(description=[DIRT])),
    "dirt and the key in a state": lambda _: always(
        "response", field(status="RUNNING", description=f"{DIRT}{KEY}" * 30)
    ),
    "dirt and the key in a failure": lambda _: always(
        "response", field(status="ERROR", description=f"Traceback:\n  File x\nValueError: {DIRT}{KEY}")
    ),
    "another job": lambda _: always("response", field(id="0" * 32)),
    "for ever running": lambda _: always("response", field(status="RUNNING", description="soon")),
    "never heard of": lambda _: always("response", refuse(404)),
    "more brackets": lambda _: always("response", field(meta=json.loads("[" * 500 + "]" * 500))),
    "no place of a result": lambda _: always("response", when_done(field(data=None))),
    "a place that is a file": lambda _: always("response", when_done(field(data="file:///etc/passwd"))),
    "a place that is none": lambda _: always("response", when_done(field(data="http://[owned"))),
    "a place without a port": lambda _: always("response", when_done(field(data="http://127.0.0.1:99999/a"))),
    "a place of dirt": lambda _: always("response", when_done(field(data=f"http://127.0.0.1:1/{DIRT}"))),
    "a place that is a list": lambda _: always("response", when_done(field(data=["http://127.0.0.1:1/"]))),
    "a place where nobody is": lambda _: always("response", when_done(field(data="http://127.0.0.1:9/result"))),
}

RESULTS: dict[str, Callable[[Proxy], Lie]] = {
    # what comes as a result
    "busy": lambda _: once("result", refuse(503), 2),
    "too many": lambda _: once("result", refuse(429, retry_after="1")),
    "gone": lambda _: once("result", refuse(404)),
    "gone for ever": lambda _: always("result", refuse(410)),
    "forbidden, with dirt and the key": lambda _: always(
        "result", refuse(403, json.dumps({"detail": f"{DIRT}{KEY}"}).encode())
    ),
    "cut short": lambda _: once("result", cut(0.4)),
    "cut short, again and again": lambda _: once("result", cut(0.2), 4),
    "always cut at nothing": lambda _: always("result", cut(0.0)),
    "nothing at all": lambda _: always("result", body(b"")),
    "a page": lambda _: always("result", body(b"<html>captive portal</html>")),
    "a result elsewhere": lambda proxy: always("result", refuse(302, b"", location=f"{proxy.host}/stolen")),
    "a length of a petabyte": lambda proxy: always(
        "result", raw(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000000000\r\n\r\n", over=proxy.over)
    ),
    "a result now and then": lambda proxy: always(
        "result", raw(b"HTTP/1.1 200 OK\r\ncontent-length: 90000\r\n\r\n", b"x", every=0.2, over=proxy.over)
    ),
    "another part": lambda _: once("result", part(content_range="bytes 5-10/11"), 2),
    "a part of something else": lambda _: once("result", part(etag='"other"'), 2),
    "a part of no range": lambda _: once("result", part(content_range=DIRT.encode("unicode_escape").decode()), 2),
    "64 GiB, it says": lambda _: always("result", lambda answer: setattr(answer, "body", larger(answer.body))),
    "frames of 256 MiB": lambda _: always("result", body(frames(2**28, True))),
    "frames that do not say": lambda _: always("result", body(frames(2**28, False))),
    "a frame that is cut": lambda _: always("result", lambda answer: setattr(answer, "body", answer.body[:-9])),
    "a compressed zip": lambda _: always("result", zipped(lambda _, content: content, zipfile.ZIP_DEFLATED)),
    "records of zeros": lambda _: always(
        "result", zipped(lambda path, content: bytes(2**27) if "data/0" in path else content, zipfile.ZIP_DEFLATED)
    ),
    "more than a zip": lambda _: always("result", zipped(lambda _, content: content, more=b"PK" + bytes(100))),
    "code": lambda _: always("result", call("os", "mkdir", b"X\x0e\x00\x00\x00/tmp/owned-ndif")),
    "a terabyte of bytes": lambda _: always("result", call("__builtin__", "bytearray", b"\x8a\x06\0\0\0\0\0\x01")),
    "a terabyte of floats": lambda _: always("result", call("torch", "FloatTensor", b"\x8a\x05\0\0\0\0\x40")),
    "a flipped bit, once": lambda _: once("result", flipped),
    "a flipped bit": lambda _: always("result", flipped),
    "no names": lambda _: always("result", saved(lambda _: [1, 2])),
    "other names": lambda _: always("result", saved(lambda _: {"model": 1})),
    "more names": lambda _: always("result", saved(lambda all_: all_.update(model=None, nn=1, ask={}, form=2))),
    "no value": lambda _: always("result", saved(lambda all_: all_.pop("result") and None)),
    "the result of another request": stale,
    "no receipt": lambda _: always(
        "result", saved(lambda all_: {name: value for name, value in all_.items() if name == "result"})
    ),
    "a billion laughs": lambda _: always("result", saved(laughs)),
    "lists in lists": lambda _: always("result", saved(deep)),
    "no prompts": lambda _: always("result", saved(lambda all_: all_.update(result=[]))),
    "more prompts": lambda _: always("result", saved(lambda all_: all_.update(result=all_["result"] * 2))),
    "another prompt's tokens": lambda _: always("result", circuit(other(embeddings=torch.zeros(3)))),
    "half of the numbers": lambda _: always("result", circuit(other(attributions=torch.zeros(5)))),
    "other precision": lambda _: always("result", circuit(other(attributions=torch.zeros(10).double()))),
    "a number for a tensor": lambda _: always("result", circuit(other(activations=3.0))),
    "a tensor for a number": lambda _: always("result", circuit(other(metric=torch.tensor(1.0)))),
    "a metric that is no number": lambda _: always("result", circuit(other(metric=float("nan")))),
    "no numbers": lambda _: always("result", circuit(other(embeddings=torch.full((6,), float("nan"))))),
    "a node without a number": lambda _: always(
        "result", circuit(lambda one: one["attributions"].__setitem__(3, float("nan")))
    ),
    "an edge without a number": lambda _: always(
        "result", circuit(lambda one: one["edges"][0].__setitem__((0, 0), float("nan")))
    ),
    "infinitely many": lambda _: always("result", circuit(other(total=float("inf")))),
    "nodes of another model": lambda _: always("result", nodes(lambda at: at + first_of(99, 0, 0))),
    "nodes of a longer prompt": lambda _: always("result", nodes(lambda at: at + first_of(0, 7, 0))),
    "nodes before the first": lambda _: always("result", nodes(lambda at: at - first_of(0, 0, 400))),
    "a node twice": lambda _: always("result", nodes(lambda at: at[[0, 0, *range(2, len(at))]])),
    "tokens that are none": lambda _: always("result", circuit(other(top=torch.full((5,), 10**9)))),
    "a tensor that asks for gradients": lambda _: always(
        "result", circuit(other(embeddings=torch.zeros(6, requires_grad=True)))
    ),
    "a number for an edge": lambda _: always("result", circuit(other(edges=1))),
    "edges of other nodes": lambda _: always(
        "result", circuit(lambda one: one.update(edges=(one["edges"][0][:, :3], *one["edges"][1:])))
    ),
}


BY_HAND = frozenset(
    {
        "a byte now and then",
        "a body without end",
        "patience asked for without end",
        "nothing",
        "for ever running",
        "dirt and the key in a state",
        "records of zeros",
        "no rows",
        "an axis more",
        "another dtype",
        "a list",
        "nothing for a tensor",
    }
)


def deployed(**changes: Any) -> dict[str, Any]:
    up = {"repo_id": "demo", "task": "text-generation", "deployment_level": "HOT", "application_state": "RUNNING"}
    return up | changes


def nans(values: dict[str, Any]) -> None:
    read, *rest = values["saved"]
    values["saved"] = (read * float("nan"), *rest)


# --------------------------------------------------------------------------------------------------- what comes of them


@dataclass
class Honest:
    """A server behind a proxy, a model there, and what it says of a prompt."""

    proxy: Proxy
    model: tracer.Model
    reports: list[str]
    wanted: Any


@pytest.fixture(scope="module")
def there(running: Loopback) -> Iterator[Honest]:
    with pytest.MonkeyPatch.context() as patch, between(running.host) as proxy:
        running.mode()
        patch.setenv("NDIF_API_KEY", KEY)
        patch.setenv("NDIF_HOST", proxy.host)
        reports: list[str] = []
        model = tracer.load("demo", remote=True, limits=LIMITS, report=reports.append)
        wanted = traced(model)
        tracer.trace(model, OTHER, nodes=10)
        yield Honest(proxy, model, reports, wanted)


def tried(tally: Tally, name: str, lie: Lie, there: Honest, act: Callable[[], Any]) -> None:
    """One lie."""
    came: list[Any] = []

    def attempt() -> None:
        try:
            came.append(act())
        except BaseException as error:  # noqa: BLE001  that is what is counted
            came.append(error)

    there.reports.clear()
    there.proxy.heard.clear()
    there.proxy.over.clear()
    there.proxy.lie = lie
    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(END)
    there.proxy.over.set()
    there.proxy.lie = honest
    tally.tried += 1
    before = tally.harm
    if not came:
        tally.hung += 1
    elif isinstance(came[0], tracer.TracerError):
        texts = [str(came[0]), came[0].rule, *there.reports]
        tally.marks += any(not text.isprintable() or KEY in text or len(text) > 1000 for text in texts)
    elif isinstance(came[0], BaseException):
        tally.tracebacks += 1
    else:
        tally.silent += came[0] != there.wanted
    # The key goes to the service alone.
    leaked = [path for path, headers in there.proxy.heard if path[:7] in ("/result", "/stolen") and KEY in str(headers)]
    tally.marks += bool(leaked) + Path("/tmp/owned-ndif").exists()
    if tally.harm > before:
        tally.worst += f"; {name}: {came[0] if came else 'no end'!r}"[:300]
    if not came:
        thread.join(2 * HELD)


def by_hand(names: Iterable[str]) -> list[Any]:
    """Those that take long are tried by hand, but for some of each kind."""
    slow = [pytest.mark.slow, pytest.mark.long]
    return [pytest.param(name, marks=slow) if name in BY_HAND else name for name in names]


@pytest.mark.parametrize("name", by_hand(BEGINNING))
def test_lies_before_there_is_a_model(
    server: Loopback, there: Honest, monkeypatch: pytest.MonkeyPatch, attack: Attack, name: str
) -> None:
    def act() -> Any:
        return traced(tracer.load("demo", remote=True, limits=LIMITS, report=there.reports.append))

    monkeypatch.setenv("NDIF_API_KEY", KEY)
    monkeypatch.setenv("NDIF_HOST", there.proxy.host)
    with attack("44 lies of a server") as tally:
        tried(tally, name, BEGINNING[name](there.proxy), there, act)


@pytest.mark.parametrize("name", by_hand([*ASKING, *RESULTS]))
def test_lies_about_a_job(server: Loopback, there: Honest, attack: Attack, name: str) -> None:
    with attack("44 lies of a server") as tally:
        tried(tally, name, (ASKING | RESULTS)[name](there.proxy), there, lambda: traced(there.model))


# ----------------------------------------------------------------------------------------- every pass checks its answer

PATH = {"method": "ig", "steps": 2}
WORK: dict[str, Callable[[tracer.Model, Any], Any]] = {
    "all nodes": lambda model, _: tracer.attribute(model, [PROMPT, OTHER]),
    "a path": lambda model, _: tracer.attribute(model, [PROMPT], **PATH),
    "exact effects": lambda model, _: tracer.attribute(model, [tracer.Prompt(token_ids=[1], target=7)], "exact"),
    "circuits": lambda model, _: list(trace_all(model, [PROMPT, OTHER], nodes=10)),
    "edges alone": lambda model, _: direct_edges(
        model, (1, 30, 45), torch.tensor([[0, 1, 3]]), torch.tensor([[2, 7]]), engine="autograd"
    ),
    "an evaluation": lambda model, circuit: tracer.evaluate(model, circuit, [PROMPT, OTHER], "mean", [5]),
    "steering": lambda model, _: tracer.steer(model, [(0, 1, 3)], PROMPT, factor=0.0, max_new_tokens=0),
    "new tokens": lambda model, _: tracer.steer(model, [(0, 1, 3)], PROMPT, factor=0.0, max_new_tokens=2),
}


def everywhere(change: Callable[[torch.Tensor], Any]) -> Lie:
    """Changes every tensor of a result."""

    def of(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return change(value)
        if isinstance(value, dict):
            return {name: of(one) for name, one in value.items()}
        return type(value)(map(of, value)) if isinstance(value, list | tuple) else value

    return always("result", saved(of))


CHANGES: dict[str, Callable[[torch.Tensor], Any]] = {
    "rows twice": lambda value: torch.cat([value, value]) if value.dim() else value.expand(2),
    "no rows": lambda value: value[:0] if value.dim() else value.double(),
    "an axis more": lambda value: value[None],
    "another dtype": lambda value: value.double() if value.dtype != torch.float64 else value.float(),
    "no number": lambda value: value * float("nan") if value.is_floating_point() else value + 2**30,
    "a list": lambda value: value.tolist(),
    "nothing for a tensor": lambda _: None,
}


@pytest.mark.parametrize("change", by_hand(CHANGES))
def test_every_pass_checks_its_answer(server: Loopback, there: Honest, attack: Attack, change: str) -> None:
    made = tracer.trace(there.model, PROMPT, nodes=10)
    honestly = replace(there, wanted=object())  # whatever is returned is another number
    with attack("44 lies of a server") as tally:
        for name, work in WORK.items():
            act = partial(work, there.model, made)
            tried(tally, f"{name}: {change}", everywhere(CHANGES[change]), honestly, act)
