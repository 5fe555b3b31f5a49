"""Places: whole files or none, one driver at a time; on this machine and on an S3 of our own."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import children
import s3
from helpers import refused
from tracer.errors import RunError
from tracer.store import storage
from tracer.store.storage import LEASE_FILE, LOCK, Found, Storage, is_remote


@pytest.fixture(scope="module")
def store() -> Iterator[s3.Store]:
    with s3.server() as made:
        yield made


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    if request.param == "local":
        return Storage(tmp_path / "run")
    return Storage(request.getfixturevalue("store").address())


# ----------------------------------------------------------------------------------------------- addresses


def test_an_address_is_a_path_unless_it_names_an_object_store() -> None:
    assert [is_remote(one) for one in ("s3://a/b", "gs://a", "gcs://a")] == [True] * 3
    assert [is_remote(one) for one in ("runs/x", "/s3/x", "file.s3", Path("s3:/a"), "C:/x", "http-runs")] == [False] * 6


@pytest.mark.parametrize(
    "address",
    ["s3://key:secret@bucket/x", "s3://bucket/x?secret_key=abc&access_key=def", "gs://token@bucket/x"],
)
def test_keys_are_no_part_of_an_address_and_are_not_repeated(address: str) -> None:
    with pytest.raises(RunError, match="holds a key") as caught:
        Storage(address)
    assert "secret" not in str(caught.value).partition(";")[0]
    assert "abc" not in str(caught.value)


def test_an_address_that_cannot_be_meant_is_refused() -> None:
    with refused(RunError, "s3://", "not an address"):
        Storage("s3://bucket/x?no_such_option=1")


def test_the_name_of_a_place_leaves_its_options_out(store: s3.Store) -> None:
    assert "?" not in str(Storage(store.address()))


# --------------------------------------------------------------------------------------------------- files


def test_files_are_written_read_listed_and_removed(place: Storage) -> None:
    assert (place.exists(), place.files(), place.size("a.json")) == (False, [], None)
    place.write_json("a.json", {"x": 1.5, "y": [1, "ä"]})
    place.write("deep/er/b.bin", b"123")
    place.write("deep/er/b.bin", b"12345")
    assert place.read_json("a.json") == {"x": 1.5, "y": [1, "ä"]}
    assert (place.read("deep/er/b.bin"), place.size("deep/er/b.bin")) == (b"12345", 5)
    assert place.files("deep/er") == [Found("deep/er/b.bin", 5)]
    assert [name for name, _ in place.files(recursive=True)] == ["a.json", "deep/er/b.bin"]
    assert place.exists()
    assert place.exists("deep/er/b.bin")
    place.remove("a.json")
    place.remove("a.json")
    place.remove("never/was")
    assert not place.exists("a.json")


def test_what_fails_in_the_middle_leaves_what_was_there(place: Storage) -> None:
    place.write("a", b"before")

    def fail() -> None:
        with place.writing("a") as file:
            file.write(b"half of it")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        fail()
    assert place.read("a") == b"before"
    assert [name for name, _ in place.files(recursive=True)] == ["a"]


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    place, stop, seen = Storage(tmp_path), threading.Event(), set[int]()
    place.write("a", b"0" * 100_000)

    def read() -> None:
        while not stop.is_set():
            found = place.read("a")
            assert len(found) == 100_000
            assert len(set(found)) == 1
            seen.add(found[0])

    thread = threading.Thread(target=read)
    thread.start()
    for number in range(60):
        place.write("a", str(number % 10).encode() * 100_000)
    stop.set()
    thread.join()
    assert len(seen) > 1


def test_parquet_is_written_in_parts_and_read_by_arrow(place: Storage) -> None:
    table = pa.table({"a": [1, 2, 3]})
    with place.writing("t.parquet") as file, pq.ParquetWriter(file, table.schema) as writer:
        writer.write_table(table)
        writer.write_table(table)
    assert pq.read_table(place.path("t.parquet"), filesystem=place.fs).num_rows == 6


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe"])
def test_json_that_is_none_is_an_error_in_one_line(place: Storage, content: bytes) -> None:
    place.write("a.json", content)
    with refused(RunError, "a.json"):
        place.read_json("a.json")
    with refused(RunError, "b.json"):
        place.read_json("b.json")


def test_a_number_that_json_has_not_is_a_bug_and_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        Storage(tmp_path).write_json("a.json", {"x": float("nan")})
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- locks


def test_a_second_driver_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    first = children.start("hold", tmp_path)
    assert children.line(first) == "held\n"
    with refused(RunError, f"process {first.pid} on"), Storage(tmp_path).locked():
        pass
    assert first.poll() is None
    children.end(first)
    with Storage(tmp_path).locked() as lease:
        assert lease.mine()
        lease.renew()


def test_a_lock_is_given_back_whatever_ends_the_block(place: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage.time, "sleep", lambda _seconds: None)

    def fail() -> None:
        with place.locked():
            with refused(RunError, f"process {os.getpid()}"), place.locked():
                pass
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            fail()
    assert {name for name, _ in place.files()} <= {LOCK}


def test_a_lock_on_a_file_system_without_locks_is_a_lease(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_file: object, _how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(storage.fcntl, "flock", none)
    monkeypatch.setattr(storage.time, "sleep", lambda _seconds: None)
    place = Storage(tmp_path)
    with place.locked():
        assert (tmp_path / LEASE_FILE).exists()
        with refused(RunError, "is being written"), place.locked():
            pass
    assert not (tmp_path / LEASE_FILE).exists()


def _lease(place: Storage, ahead: float = 0.0) -> dict[str, Any]:
    """A lease that another host took now, whose clock is ahead."""
    there = {"host": "elsewhere", "pid": 12, "owner": "x", "time": time.time() + ahead}
    place.write_json(LEASE_FILE, there)
    return there


def test_a_lease_that_was_not_renewed_is_nobodys_whatever_it_holds_and_the_clocks_of_hosts_say(
    store: s3.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleep = time.sleep
    monkeypatch.setattr(storage.time, "sleep", lambda _seconds: None)
    ahead = {Storage(store.address()): days * 86_400 for days in (-1, 0, 1)}
    for place, seconds in ahead.items():
        _lease(place, seconds)
        with refused(RunError, "process 12 on elsewhere", "120 s if it was killed"), place.locked():
            pass
    damaged = {Storage(store.address()): one for one in (b"", b"no", b"[" * 200_000, b'{"time": "noon"}', b"[1]")}
    for place, content in damaged.items():
        place.write(LEASE_FILE, content)
        with refused(RunError, "by another process"), place.locked():
            pass
    monkeypatch.setattr(storage, "LEASE", 2)
    sleep(3.1)  # a store's clock counts in seconds
    for place in (*ahead, *damaged):
        with place.locked() as lease:
            assert lease.mine()
            place.write(LEASE_FILE, damaged.get(place, b""))
            lease._again()
            assert lease.mine()
        assert place.files() == []


def test_a_driver_that_slept_longer_than_its_lease_looks_before_it_goes_on(
    store: s3.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Storage(store.address())
    with place.locked() as lease:
        _lease(place)
        lease.renew()  # the next look is that of the thread
        lease._taken -= storage.LEASE + 1
        with refused(RunError, "process 12 on elsewhere"):
            lease.renew()


def test_of_two_that_come_at_once_one_stays(store: s3.Store, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Storage(store.address())
    monkeypatch.setattr(storage.time, "sleep", lambda _seconds: _lease(place))  # another one writes meanwhile
    with refused(RunError, "process 12 on elsewhere"), place.locked():
        pass
    assert place.read_json(LEASE_FILE)["owner"] == "x"


def test_a_lease_is_renewed_while_its_driver_is_busy_and_noticed_when_it_is_lost(
    store: s3.Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "LEASE", 0.4)
    place = Storage(store.address())
    with place.locked() as lease:
        first = place.read_json(LEASE_FILE)["time"]
        time.sleep(0.6)
        assert place.read_json(LEASE_FILE)["time"] > first + 0.2
        lease.renew()
        for _ in range(5):  # a renewal that is on its way may come after it
            _lease(place)
            time.sleep(0.6)
            if not lease.mine():
                break
        assert not lease.mine()
        with refused(RunError, "process 12 on elsewhere"):
            lease.renew()
    assert place.read_json(LEASE_FILE)["owner"] == "x"


def test_whether_a_driver_is_there_can_be_seen_without_disturbing_it(tmp_path: Path) -> None:
    place = Storage(tmp_path)
    assert place.is_held() is None
    with place.locked():
        assert place.is_held() is True
    assert place.is_held() is False
