"""What takes long: signs of life, the question before hours, and what an interrupt says was kept."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tracer.cli import manner, terminal, waiting
from tracer.system import wholefile

CHILD = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # background jobs ignore it
    "from tracer.cli import main\nsys.argv = ['tracer', *sys.argv[1:]]\nmain()"
)


@pytest.fixture(autouse=True)
def _manner() -> None:
    manner.begin()


def test_a_sigint_while_a_model_loads_says_that_nothing_was_saved(tmp_path: Path) -> None:
    words = ["trace", "The keys", "--out", str(tmp_path / "run"), "-v"]
    with subprocess.Popen([sys.executable, "-c", CHILD, *words], stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if "loading demo" in line:
                break
        child.send_signal(signal.SIGINT)
        said = child.stderr.read()
        assert child.wait(60) == 130
    assert said.splitlines()[-1] == "error: interrupted; nothing was saved"
    assert not (tmp_path / "run").exists()


def test_an_interrupt_names_what_is_written_already(tmp_path: Path) -> None:
    wholefile.WRITTEN.clear()
    assert terminal.kept() == "nothing was saved"
    wholefile.write(tmp_path / "one.csv", "a")
    assert terminal.kept() == f"written already: {tmp_path / 'one.csv'}; repeat the command for the rest"


def test_signs_of_life_in_a_pipe_are_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(terminal, "LOG_EVERY", 0.05)
    with waiting.Signs(lambda: "loading org/name (3.0 GiB)"):
        deadline = time.monotonic() + 20
        while not (said := capsys.readouterr().err) and time.monotonic() < deadline:
            time.sleep(0.02)
    assert said.startswith("loading org/name (3.0 GiB), 0 s\n")
    manner.speak(quiet=True)
    with waiting.Signs(lambda: "loading"):
        time.sleep(0.12)
    assert capsys.readouterr().err == ""


class Clock:
    """A clock that is set."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def advance(bar: terminal.ProgressBar, clock: Clock, seconds: float, done: int, total: int) -> None:
    """Work that took so many seconds."""
    with bar as report:
        report(0, total)
        clock.now += seconds
        report(done, total)


@pytest.mark.parametrize("answer", [b"n\n", b"", b"yes\n"])
def test_work_of_hours_is_asked_about(
    answer: bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reading, writing = os.pipe()
    os.write(writing, answer)
    os.close(writing)
    monkeypatch.setattr(waiting, "can_ask", lambda: True)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(fileno=lambda: reading))
    clock = Clock()
    if answer.startswith(b"y"):
        advance(terminal.ProgressBar("exact", clock), clock, 60, 10, 1000)
    else:
        with pytest.raises(waiting.Declined):
            advance(terminal.ProgressBar("exact", clock), clock, 60, 10, 1000)
    question = "about 1 h 39 min to go on this machine (nothing is saved before its end); go on? [y/N]"
    assert question in capsys.readouterr().err
    os.close(reading)


@pytest.mark.parametrize(
    ("seconds", "done", "yes", "said"),
    [
        (60, 100, False, ""),  # nine minutes to go
        (5, 1, False, ""),  # too little is measured
        (60, 10, True, ""),
        (60, 10, False, "note: about 1 h 39 min to go on this machine, by what is measured so far; it goes on\n"),
    ],
)
def test_where_nobody_can_be_asked_it_goes_on(
    seconds: float, done: int, yes: bool, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    manner.speak(yes=yes)
    clock = Clock()
    advance(terminal.ProgressBar("exact", clock), clock, seconds, done, 1000)
    printed = capsys.readouterr().err
    assert (said in printed) if said else ("to go on this machine" not in printed)


def test_a_no_while_a_run_goes_on_is_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"no\n")
    sent = []
    monkeypatch.setattr(waiting, "can_ask", lambda: True)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(fileno=lambda: reading))
    monkeypatch.setattr(os, "kill", lambda number, which: sent.append((number, which)))
    question = waiting.Question()
    assert question.due(30.0, 7200.0)
    assert not question.due(30.0, 7200.0), "asked once"
    assert question.ask_meanwhile(7200.0, "what is committed is kept", lambda: pytest.fail("it was no"))
    deadline = time.monotonic() + 20
    while not sent and time.monotonic() < deadline:
        time.sleep(0.02)
    assert sent == [(os.getpid(), signal.SIGINT)]
    os.close(writing)
