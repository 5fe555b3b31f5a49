"""What goes over the network: where the key is sent, what is fetched again, and by when everything has ended."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import httpx
import pytest
import torch
from typer.testing import CliRunner

import tracer
from helpers import refused
from inline import InlinePool
from loopback import Loopback
from proxy import Answer, Proxy, between, cut
from tracer.cli.app import app
from tracer.errors import RemoteError, TracerWarning, surface
from tracer.model import passes
from tracer.ndif import connection, forms, payload
from tracer.ndif import server as ndif
from tracer.ndif.network import Deadline, bounded
from tracer.prompts import Batch

KEY = "0badc0de-5ec2-4e70-8a11-5ec2e7a11cee"
LIMITS = ndif.Limits(wait=10.0, patience=2.0, busy=2.0, lost=0.5)


@pytest.fixture
def proxy(server: Loopback, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    with between(server.host) as made:
        monkeypatch.setenv("NDIF_HOST", made.host)
        yield made


# --------------------------------------------------------------------------------------------------- the key


@pytest.mark.parametrize(
    ("url", "clear"),
    [
        ("https://api.ndif.us", False),
        ("http://api.ndif.us", True),
        ("http://10.0.0.7:5001", True),
        ("http://127.0.0.1:5001", False),
        ("http://127.8.9.1", False),
        ("http://[::1]:5001", False),
        ("http://[fe80::1]:5001", True),
        ("http://localhost:5001", False),
        ("http://localhost.lab.edu", True),
        ("http://127.0.0.1.lab.edu", True),
    ],
)
def test_what_others_can_read_on_its_way(url: str, clear: bool) -> None:
    assert connection.in_clear(url) == clear


def test_a_key_without_encryption_is_said_before_it_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httpx.Client, "stream", lambda *_, **__: pytest.fail("something was sent"))
    monkeypatch.setenv("NDIF_API_KEY", KEY)
    monkeypatch.setenv("NDIF_HOST", "http://gpu.lab.edu:5001")
    with pytest.warns(TracerWarning, match=r"^NDIF_HOST gpu\.lab\.edu:5001: .*unencrypted.*https://") as said:
        ndif.Server()
    assert KEY not in str(said[0].message)
    with pytest.warns(TracerWarning, match=r"^host= gpu"):
        ndif.Server("http://gpu.lab.edu")
    with surface("job"):
        assert ndif.unencrypted("http://gpu.lab.edu").startswith("host: gpu.lab.edu")
    monkeypatch.delenv("NDIF_API_KEY")
    assert ndif.unencrypted(None) == ""  # there is nothing to be read but what anybody may ask
    ndif.Server()


def test_the_command_and_a_run_say_it_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NDIF_API_KEY", KEY)
    monkeypatch.setenv("NDIF_HOST", "http://127.0.0.1:9")
    monkeypatch.setattr(ndif, "in_clear", lambda _: True)
    result = CliRunner().invoke(app, ["trace", "The parents", "--remote"])
    assert result.exit_code == 2
    assert "unencrypted" in result.stderr.splitlines()[0]
    job = {"kind": "dataset", "input": {"task": "sva", "structure": "simple", "count": 2}, "remote": True}
    notes: list[str] = []
    with refused(RemoteError, "cannot be reached"), pytest.warns(TracerWarning, match="unencrypted"):
        tracer.run(job, tmp_path / "run", pool=InlinePool(), note=notes.append)
    assert any("unencrypted" in note for note in notes)


def test_no_answer_leads_the_key_elsewhere(server: Loopback, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NDIF_API_KEY", KEY)
    with between(server.host) as thief:
        for status in (301, 302, 307, 308):

            def away(answer: Answer, status: int = status) -> None:
                answer.status, answer.headers, answer.body = status, {"location": f"{thief.host}/status"}, b""

            proxy.lie = away
            with refused(RemoteError, f"answered {status} and points to {thief.host}/status", "NDIF_HOST"):
                ndif.Server(limits=LIMITS).status()
        assert thief.heard == []


def test_the_store_of_results_does_not_see_the_key(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NDIF_API_KEY", KEY)
    tracer.load("demo", remote=True, limits=LIMITS)
    seen = {path.split("/")[1]: KEY in str(headers) for path, headers in proxy.heard}
    assert seen == {"status": True, "env": True, "request": True, "response": True, "result": False}


# ------------------------------------------------------------------------------------------------- downloads


def test_a_download_goes_on_where_it_stopped(proxy: Proxy) -> None:
    there = tracer.load("demo", remote=True, limits=LIMITS)
    assert there.remote is not None
    whole = passes.logits(there, Batch(((1, 2),)))
    left = [0.5, 0.5, 0.5]

    def lie(answer: Answer) -> None:
        if answer.kind == "result" and left:
            cut(left.pop())(answer)

    proxy.heard.clear()
    proxy.lie = lie
    traffic, before = there.remote.server.traffic, there.remote.server.traffic.received
    assert torch.equal(passes.logits(there, Batch(((1, 2),))), whole)
    asked = [headers.get("range") for path, headers in proxy.heard if path.startswith("/result")]
    size = traffic.received - before
    begun = [int(one.removeprefix("bytes=").rstrip("-")) for one in asked if one]
    assert asked[0] is None
    assert begun == sorted(begun)
    assert begun[0] == size // 2
    assert len(begun) == 3
    assert begun[-1] >= 0.85 * size


def test_a_store_without_ranges_is_asked_for_everything(proxy: Proxy) -> None:
    there = tracer.load("demo", remote=True, limits=LIMITS)
    whole = passes.logits(there, Batch(((1, 2),)))
    left = [0.5]

    def lie(answer: Answer) -> None:
        answer.headers.pop("etag", None)
        if answer.kind == "result" and left:
            cut(left.pop())(answer)

    proxy.heard.clear()
    proxy.lie = lie
    assert torch.equal(passes.logits(there, Batch(((1, 2),))), whole)
    asked = [headers for path, headers in proxy.heard if path.startswith("/result")]
    assert len(asked) == 2
    assert not any("Range" in headers or "range" in headers for headers in asked)


# ----------------------------------------------------------------------------------------------------- waiting


@pytest.mark.parametrize(
    ("header", "least", "most"),
    [
        ("", 0, 0),
        ("7", 7, 7),
        (" 7 ", 7, 7),
        ("-1", 0, 0),
        ("9" * 5000, 120, 120),
        ("\xb2", 0, 0),
        ("nan", 0, 0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 0),
        ("Wed, 21 Oct 2915 07:28:00 GMT", 120, 120),
        ("Wed, 21 Oct 99999 07:28:00 GMT", 0, 0),
    ],
)
def test_how_long_a_server_asks_for(header: str, least: float, most: float) -> None:
    assert least <= connection.retry_after(header) <= most


def test_a_date_that_a_server_asks_for() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    assert 30 <= connection.retry_after(soon) <= 100


def test_an_exchange_ends_however_slowly_it_comes(proxy: Proxy) -> None:
    deadline = Deadline()
    with bounded(httpx.Client(timeout=5.0), deadline) as client:
        proxy.lie = lambda answer: setattr(answer, "raw", slowly)

        def slowly(connected: object) -> None:
            while not proxy.over.wait(0.05):
                connected.sendall(b"H")  # type: ignore[attr-defined]

        with pytest.raises(httpx.TimeoutException), deadline.within(0.5):
            client.get(proxy.host + "/status")
        with pytest.raises(httpx.TimeoutException), deadline.within(-1.0):
            client.get(proxy.host + "/status")


def test_a_child_of_a_fork_has_connections_of_its_own(server: Loopback) -> None:
    """Four requests are under way in the parent's threads; the child neither waits for them nor takes their answers."""
    server.mode(queued=0.4)
    there = ndif.Server(server.host, LIMITS)
    model = tracer.load("demo", remote=True, limits=LIMITS)
    busy = [threading.Thread(target=passes.logits, args=(model, Batch(((1, 2 + i),)))) for i in range(4)]
    for thread in busy:
        thread.start()
    time.sleep(0.3)
    pid = os.fork()
    if pid == 0:
        try:
            known = "replica" not in str(there.status())
            assert model.remote is not None
            with model.remote.server._slot():
                os._exit(0 if known and model.remote.server.status() else 3)
        except BaseException:  # noqa: BLE001
            os._exit(4)
    ended, until = (0, 0), time.monotonic() + 30
    while ended[0] == 0 and time.monotonic() < until:
        ended = os.waitpid(pid, os.WNOHANG)
        time.sleep(0.05)
    if ended[0] == 0:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
    for thread in busy:
        thread.join()
    assert ended == (pid, 0)


# ------------------------------------------------------------------------------------------- what a block sends back


def test_names_that_a_block_saves() -> None:
    import ast

    source = """
with nn.trace(1) as tracer:
    a = nnsight.save(x)
    b = y.save()
    c, d = save(z), 1
    outer.save()
    if yes:
        e = nnsight.save(1)
    with tracer.invoke(2):
        f = nnsight.save(g)
"""
    node = ast.parse(source).body[0]
    assert isinstance(node, ast.With)
    may, must = payload.saved_names(node)
    assert must == {"a", "b", "f"}
    assert may == {"a", "b", "c", "d", "e", "f", "g", "x", "y", "z", "outer"}


def test_forms_of_answers() -> None:
    of, maybe = forms.Of, forms.Maybe
    two = torch.zeros(2, 3)
    assert forms.wrong((two, 1.0, None), (of((2, 3)), float, maybe(float))) == ""
    assert forms.wrong([two, torch.zeros(5)], [of(("n", None)), of((("n", 3),))]) == ""
    assert "float32 of 2 x 3, not float32 of 2 x (n + 2)" in forms.wrong([two[0], two], [of(("n",)), of((2, ("n", 2)))])
    assert forms.wrong(two, of((range(1, 3), ...))) == ""
    assert "not float32 of range(3, 9) x ..." in forms.wrong(two, of((range(3, 9), ...)))
    assert "is bool, not float" in forms.wrong(True, float)
    assert "points outside" in forms.wrong(torch.tensor([[1, 5]]), of((None, 2), torch.int64, (2, 5)))
    assert "points outside" in forms.wrong(torch.tensor([-1]), of((None,), torch.int64, 2))
    assert forms.wrong(torch.zeros(0, dtype=torch.int64), of((None,), torch.int64, 2)) == ""
    assert "not finite" in forms.wrong(torch.tensor([float("inf")]), of((1,), finite=True))
    assert "dict of 'b'" in forms.wrong({"b": 1.0}, {"a": float})
    assert "no plain tensor" in forms.wrong(two.clone().requires_grad_(), of((2, 3)))
    two.sum = None  # type: ignore[assignment]
    assert "no plain tensor" in forms.wrong(two, of((2, 3)))


def test_a_block_of_several_invokes_comes_back(server: Loopback) -> None:
    import nnsight  # after beartype, which its .save on every object breaks

    model = server.load("demo")
    nn, first, second = model.nn, torch.tensor([[1, 2]]), torch.tensor([[1, 3]])
    with nn.trace(backend=model.backend.trace()) as work:
        with work.invoke(first):
            one = nnsight.save(nn.output.logits)
        with work.invoke(second):
            other = nnsight.save(nn.output.logits)
    for ids, got in ((1, 2), one), ((1, 3), other):
        assert torch.allclose(got[:, -1:], passes.logits(model, Batch((ids,))), atol=1e-4)
