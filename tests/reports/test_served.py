"""The served page: who is answered, what is written where, and what is refused."""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from helpers import refused
from payloads import linked
from tracer import RunError
from tracer.circuit import supernodes_file
from tracer.circuit.notes import Notes
from tracer.reports.served import MOST_BYTES, PageServer, served

PIN = {"layer": 0, "position": 0, "neuron": 3, "polarity": 1}
MARKS = {"format": "tracer-supernodes", "version": 1, "circuit": None, "groups": [], "pinned": [PIN], "how": {}}


class Got(NamedTuple):
    status: int
    headers: dict[str, str]
    text: str


class Client:
    """Asks the server as whoever likes."""

    def __init__(self, server: PageServer, folder: Path) -> None:
        self.server, self.folder = server, folder
        self.port = int(server.origin.rpartition(":")[2])

    def ask(self, method: str, target: str, body: bytes | None = None, **headers: str) -> Got:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        try:
            connection.request(method, target, body, named)
            answer = connection.getresponse()
            return Got(answer.status, dict(answer.getheaders()), answer.read().decode())
        finally:
            connection.close()

    def own(self, method: str, body: bytes | None = None, **headers: str) -> Got:
        """As the page itself asks."""
        given = {"Authorization": f"Bearer {self.server.token}", "Origin": self.server.origin}
        if method == "PUT":
            given["Content_Type"] = "application/json"
        return self.ask(method, "/notes", body, **given | headers)

    def put(self, content: Any, version: str) -> Got:
        return self.own("PUT", json.dumps(content).encode(), If_Match=version)

    def version(self) -> str:
        return self.own("GET").headers["ETag"]

    def file(self) -> Path:
        return self.folder / "supernodes.json"


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    folder = tmp_path / "run"
    linked().save(folder)
    server = served(folder, linked())
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    yield Client(server, folder)
    server.stop()
    thread.join(10)


def test_the_page_is_given_to_whoever_has_the_token_alone(client: Client) -> None:
    page = client.ask("GET", client.server.url.removeprefix(client.server.origin))
    assert page.status == 200
    assert page.text.startswith("<!DOCTYPE html>")
    assert "connect-src 'self'" in page.text
    assert (page.headers["Cache-Control"], page.headers["Referrer-Policy"]) == ("no-store", "no-referrer")
    token = client.server.token
    wrong = ["", "?token=", f"?token={token}x", f"?token={token[:-1]}", "?token=%ff", f"?token={token}&token={token}"]
    for query in (*wrong, "?" + "a=b&" * 1000):
        got = client.ask("GET", f"/{query}")
        assert (got.status, token in got.text) == (403, False), query
    assert client.ask("GET", "/notes").status == 403
    assert client.ask("GET", f"/notes?token={token}").status == 403, (
        "an address is no header that other pages cannot set"
    )
    assert client.ask("GET", "/notes", Authorization="Bearer \xe9").status == 403


def test_it_listens_on_the_loopback_alone_and_logs_nothing(client: Client, capfd: pytest.CaptureFixture[str]) -> None:
    assert client.server.origin.startswith("http://127.0.0.1:")
    assert client.server._server.server_address[0] == "127.0.0.1"
    client.ask("GET", "/?token=wrong")
    client.own("GET")
    with socket.create_connection(("127.0.0.1", client.port), 20) as raw:
        raw.sendall(b"nonsense\r\n\r\n")
        raw.recv(1000)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost.evil.example", ""])
def test_another_host_is_refused(client: Client, host: str) -> None:
    assert client.own("GET", Host=host).status == 421
    assert client.own("GET", Host=f"LocalHost:{client.port}").status == 200


@pytest.mark.parametrize("origin", ["null", "https://evil.example", "http://127.0.0.1:1", "http://127.0.0.1"])
def test_another_origin_is_refused(client: Client, origin: str) -> None:
    got = client.own("PUT", b"{}", Origin=origin, If_Match='"none"')
    assert got.status == 403
    assert not client.file().exists()


@pytest.mark.parametrize(
    "target", ["/notes/", "/..", "/../run.json", "/run.json", "//run.json", "/%2e%2e/run.json", "*"]
)
def test_another_path_is_refused(client: Client, target: str) -> None:
    for method in ("GET", "PUT"):
        got = client.ask(method, target, Authorization=f"Bearer {client.server.token}")
        assert got.status == 404, target
    assert client.ask("GET", f"http://evil.example/?token={client.server.token}").status == 421


def test_another_method_is_refused(client: Client) -> None:
    for method in ("POST", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE"):
        got = client.own(method)
        assert (got.status, got.headers["Allow"]) == (405, "GET, PUT"), method
    assert client.ask("PUT", f"/?token={client.server.token}", b"x").status == 405
    assert client.own("BREW").status == 501


def test_a_body_must_be_json_of_a_length_that_is_bounded(client: Client) -> None:
    none = {"If_Match": '"none"'}
    for length in (str(MOST_BYTES + 1), "9" * 40):
        assert client.own("PUT", None, Content_Length=length, **none).status == 413
    for length in ("-1", "1e3", "\xb2"):
        assert client.own("PUT", None, Content_Length=length, **none).status == 411
    assert client.own("PUT", b"0\r\n\r\n", Transfer_Encoding="chunked", **none).status == 411
    assert client.own("PUT", b"{}", Content_Type="text/plain", **none).status == 415
    assert client.own("PUT", b"{}").status == 428
    assert not client.file().exists()


def test_what_is_no_file_of_this_graph_is_not_written(client: Client) -> None:
    elsewhere = MARKS | {"pinned": [PIN | {"neuron": 5}]}
    deep = b"[" * 200_000
    for content in (b"", b"{", b"[]", b"\xff", deep, b'{"a": NaN}', *(json.dumps(c).encode() for c in (
        {}, MARKS | {"version": 9}, MARKS | {"more": 1}, MARKS | {"pinned": [{}]}, elsewhere,
        MARKS | {"notes": [PIN]}, MARKS | {"notes": [PIN | {"note": "x" * 10_001}]}, MARKS | {"circuit": 3},
    ))):  # fmt: skip
        got = client.own("PUT", content, If_Match='"none"')
        assert got.status == 422, content[:80]
        assert "Traceback" not in got.text
        assert "\n" not in got.text.strip()
    assert not client.file().exists()


def test_notes_are_saved_into_the_run_folder_and_on_the_page_then(client: Client) -> None:
    before = {path.name for path in client.folder.iterdir()}
    note = PIN | {"name": "verb </script>", "note": "says\nso"}
    group = {"name": "all", "description": "", "nodes": [PIN, {"layer": 0, "position": 1, "neuron": 4, "polarity": -1}]}
    got = client.put(MARKS | {"version": 2, "notes": [note], "groups": [group]}, client.version())
    assert (got.status, got.headers["ETag"]) == (200, client.version())
    assert {path.name for path in client.folder.iterdir()} == before | {"supernodes.json"}
    file = supernodes_file.read(client.folder)
    assert [(one.name, one.note) for one in file.notes] == [("verb </script>", "says\nso")]
    shown = supernodes_file.apply(file, linked())
    assert (shown.called, shown.remarks, shown.pins) == ({0: "verb </script>"}, {0: "says\nso"}, (0,))
    page = client.ask("GET", f"/?token={client.server.token}").text
    assert '"called":[[0,"verb \\u003c/script\\u003e"]]' in page
    assert client.server.told().startswith("notes were saved once")


def test_two_tabs_do_not_overwrite_each_other(client: Client) -> None:
    first = client.version()
    assert client.put(MARKS, first).status == 200
    late = client.put(MARKS | {"pinned": []}, first)
    assert (late.status, late.headers["ETag"]) == (409, client.version())
    assert supernodes_file.parsed(late.text.encode()) == supernodes_file.read(client.folder)
    assert len(supernodes_file.read(client.folder).pinned) == 1
    assert client.put(MARKS | {"pinned": []}, late.headers["ETag"]).status == 200
    with ThreadPoolExecutor(8) as pool:
        version = client.version()
        texts = [MARKS | {"version": 2, "notes": [PIN | {"name": str(i)}]} for i in range(8)]
        statuses = list(pool.map(lambda content: client.put(content, version).status, texts))
    assert sorted(statuses) == [200] + [409] * 7


def test_what_a_page_does_not_hold_stays_in_the_file(client: Client) -> None:
    member = {name: PIN[name] for name in PIN}
    made = {"groups": [{"name": "a", "description": "by hand", "nodes": [member]}], "how": {"method": "spectral"}}
    client.file().write_text(json.dumps(MARKS | made))
    client.put(MARKS | {"groups": [{"name": "a", "nodes": [member]}]}, client.version())
    file = supernodes_file.read(client.folder)
    assert (file.groups[0].description, file.how) == ("by hand", {"method": "spectral"})


def test_a_link_is_neither_read_nor_followed(client: Client, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(json.dumps(MARKS))
    version = client.version()
    client.file().symlink_to(other)
    for got in (client.own("GET"), client.put(MARKS, version), client.ask("GET", f"/?token={client.server.token}")):
        assert got.status == 422
        assert "is a link" in got.text
    assert json.loads(other.read_text()) == MARKS
    with refused(RunError, "is a link"):
        Notes(client.folder, linked())


def test_a_file_that_cannot_be_written_leaves_the_old_one(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    client.put(MARKS, client.version())
    kept = client.file().read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    got = client.put(MARKS | {"pinned": []}, client.version())
    assert got.status == 500
    assert "No space left" in got.text
    assert client.file().read_bytes() == kept
    assert [path.name for path in client.folder.iterdir() if path.name.startswith(".supernodes")] == []


def test_the_report_of_the_folder_runs_nothing(tmp_path: Path) -> None:
    linked().save(tmp_path / "run")
    (tmp_path / "run" / "report.html").write_text("<script>1</script>")
    server = served(tmp_path / "run", linked())
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        client = Client(server, tmp_path / "run")
        got = client.ask("GET", f"/report.html?token={server.token}")
        assert got.headers["Content-Security-Policy"].startswith("sandbox; default-src 'none'")
        assert client.ask("GET", "/report.html").status == 403
    finally:
        server.stop()
        thread.join(10)


def test_a_connection_that_says_nothing_holds_up_no_other(client: Client) -> None:
    with socket.create_connection(("127.0.0.1", client.port), 20) as raw:
        raw.sendall(b"GET /")
        assert client.own("GET").status == 200
