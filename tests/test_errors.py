"""Every error a user can fix says value, rule and next step on one line."""

from __future__ import annotations

import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tracer
from tracer.errors import JobError, ModelError, RemoteError, RunError, TracerError, option, quoted, say, surface

KINDS = (JobError, ModelError, RunError, RemoteError)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_a_tracer_error_and_public(kind: type[TracerError]) -> None:
    assert issubclass(kind, TracerError)
    assert getattr(tracer, kind.__name__) is kind


@pytest.mark.parametrize("kind", KINDS)
def test_the_message_is_value_rule_next_step(kind: type[TracerError]) -> None:
    problem = kind("target ' arent'", "is 2 tokens", "choose another")
    assert str(problem) == "target ' arent': is 2 tokens; choose another"
    assert (problem.value, problem.rule, problem.next_step) == ("target ' arent'", "is 2 tokens", "choose another")


@given(st.text(), st.text(), st.text())
def test_the_message_is_one_line_whatever_it_holds(value: str, rule: str, step: str) -> None:
    text = str(TracerError(value, rule, step))
    assert len(text.splitlines()) <= 1


def test_an_error_survives_the_way_between_processes() -> None:
    problem = JobError("a", "b", "c")
    again = pickle.loads(pickle.dumps(problem))
    assert type(again) is JobError
    assert str(again) == str(problem)
    assert again.next_step == "c"


@given(st.one_of(st.text(), st.integers(), st.lists(st.text())), st.integers(4, 80))
def test_quoted_is_short_and_on_one_line(value: object, limit: int) -> None:
    text = quoted(value, limit)
    assert len(text) <= limit
    assert len(text.splitlines()) <= 1


def test_spaces_of_the_user_are_kept_and_only_line_ends_and_controls_replaced() -> None:
    assert quoted("  are") == "'  are'"
    assert quoted(["   "]) == "['   ']"
    problem = TracerError(f"target {quoted('  are')}", "one\r\ntwo\x1b[31m\u2028three", "x")
    assert str(problem) == "target '  are': one two [31m three; x"


def test_quoted_shows_short_values_whole() -> None:
    assert quoted(" are") == "' are'"
    assert quoted("x" * 100) == "'" + "x" * 56 + "..."


def test_a_setting_is_named_as_the_surface_writes_it() -> None:
    words = {}
    for name in ("python", "shell", "job"):
        with surface(name):
            words[name] = [option("skip_first", True), option("foil", " is"), option("out")]
    assert words == {
        "python": ["skip_first=True", "foil=' is'", "out="],
        "shell": ["--skip-first", "--foil ' is'", "--out"],
        "job": ["skip_first: true", "foil: ' is'", "out:"],
    }
    assert option("bos", True) == "bos=True"


def test_what_is_said_is_a_warning_of_ours_on_one_line() -> None:
    with pytest.warns(tracer.TracerWarning, match="^one two$") as seen:
        say(["one\ntwo"])
    assert len(seen) == 1


def test_the_command_line_prints_a_warning_once_as_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    from tracer.cli import terminal

    @terminal.report_errors
    def verb() -> None:
        say([f"heard; {option('bos', True)} adds it"])
        say([f"heard; {option('bos', True)} adds it"])

    verb()
    assert capsys.readouterr().err == "note: heard; --bos adds it\n"


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("dtype='x': must be one of", "--dtype x: must be one of"),
        ("give reference= with more prompts", "give --reference with more prompts"),
        ("use edges=False", "use --no-edges"),
        ("skip_first=True leaves it out", "--skip-first leaves it out"),
        ("edge share=5.0: is a part", "--edge-share 5.0: is a part"),
        ("top_k=99999: the vocabulary", "--top-k 99999: the vocabulary"),
        ("foil=' is': is empty", "--foil ' is': is empty"),
        ("or weights='local', or ask", "or --weights local, or ask"),
        ("prompt 'so nodes=3 and' is 'nodes=4'", "prompt 'so nodes=3 and' is 'nodes=4'"),
        ("engine='replay' needs", "engine='replay' needs"),
    ],
)
def test_a_shell_user_reads_options_and_never_arguments(said: str, shown: str) -> None:
    from tracer.cli import app, terminal

    assert terminal.worded(said, terminal._options(app.trace)) == shown
