"""A language model behind an OpenAI-compatible chat endpoint: one request, one answer that is read as JSON.

The address, the key and the model's name come from the environment: ``TRACER_LLM_URL`` (a local server counts:
``http://127.0.0.1:11434/v1``), ``TRACER_LLM_KEY`` (none for a server that wants none), ``TRACER_LLM_MODEL``. Knows
waits, further tries, refusals and costs. Refuses to know what is asked, and to write the key anywhere.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit, urlunsplit

import httpx

from tracer.errors import JobError, RemoteError, first_line, say
from tracer.meaning.answers import Answers
from tracer.meaning.budget import Bounds, Purse, Spent
from tracer.meaning.chat import Request, completion, object_of, usage
from tracer.ndif.connection import RETRIED, Key, address, in_clear, is_address, retry_after, whole
from tracer.ndif.network import Deadline, bounded
from tracer.ndif.parallel import EndedError, OrderedMap
from tracer.system import jsontext
from tracer.text import printable

log = logging.getLogger(__name__)

URL, KEY, MODEL = "TRACER_LLM_URL", "TRACER_LLM_KEY", "TRACER_LLM_MODEL"
LONGEST_PAUSE = 30.0
"""Seconds between two tries, unless the server asks for more."""
SECRET = 8
"""Characters from which on a key is one: local servers take any word."""

Part = TypeVar("Part")
Read = TypeVar("Read")


class NoAnswerError(RemoteError):
    """A request that this model has no usable answer to; others may have one."""


class _AgainError(Exception):
    """An exchange that is worth another try: the reason, and the seconds that the server asks for."""

    def __init__(self, reason: str, asked: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.asked = reason, asked


class _ChangedError(Exception):
    """A parameter that this model does not take is left out from now on."""


def is_set() -> bool:
    """Whether the environment names an endpoint."""
    return bool(os.environ.get(URL, "").strip())


def model_name() -> str:
    """The model that the environment names; empty where it names none."""
    return os.environ.get(MODEL, "").strip()


class Endpoint:
    """One model at one endpoint, within bounds.

    Args:
        url: the endpoint's base, as ``https://api.openai.com/v1``; ``TRACER_LLM_URL`` by default.
        model: its name there; ``TRACER_LLM_MODEL`` by default. The key is ``TRACER_LLM_KEY``.
        answers: where answers are kept, and found again. report: called with each wait for another try.
        sleep: waits between tries.

    Raises:
        JobError: no address or no model is given.
        RemoteError: the address is none, or the key cannot be one.
    """

    def __init__(
        self,
        url: str | None = None,
        model: str | None = None,
        bounds: Bounds | None = None,
        answers: Answers | None = None,
        report: Callable[[str], None] | None = None,
        sleep: Callable[[float], None] | None = None,
    ) -> None:
        given = (os.environ.get(URL, "") if url is None else url).strip()
        self.model = model_name() if model is None else model.strip()
        self._url, self.bounds = _completions(given), bounds or Bounds()
        self.host = address(given)
        if not self.model:
            raise JobError(MODEL, "is not set", f"set it to the name of a model at {self.host}")
        secret = os.environ.get(KEY, "").strip()
        key = Key(secret, KEY, "authorization", "Bearer ")
        self._clean = key.scrub if len(secret) >= SECRET else str
        self._parallel, self._deadline, self._purse = OrderedMap(self.bounds.parallel), Deadline(), Purse(self.bounds)
        self._answers, self._report, self._sleep = answers, report, sleep or self._parallel.sleep
        self._has_answered, self._ended = False, None
        self._names = {"temperature": "temperature", "max_tokens": "max_tokens"}
        if key.given and in_clear(given):
            rule = "http:// to another machine sends the key and all texts unencrypted: who is on the way can read and"
            say([f"{URL} {self.host}: {rule} change them; use https:// if the server has it"])
        how = {"headers": {"accept-encoding": "identity"}, "follow_redirects": False, "auth": key}
        silence = httpx.Timeout(self.bounds.silence, connect=self.bounds.connect)
        most = httpx.Limits(max_connections=None, max_keepalive_connections=self.bounds.parallel)
        self._client = bounded(httpx.Client(timeout=silence, limits=most, **how), self._deadline)

    _ended: RemoteError | None

    def __enter__(self) -> Endpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    @property
    def spent(self) -> Spent:
        """What was asked so far."""
        return self._purse.spent

    def each(self, function: Callable[[Part], Read], parts: Sequence[Part]) -> Iterator[Read]:
        """`function` of every part, in order, `Bounds.parallel` of them at a time."""
        return self._parallel.stream(function, parts)

    def ask(self, request: Request, read: Callable[[Any], Read]) -> Read:
        """The model's answer, from the kept ones if it is there.

        Args:
            read: what an answer says; a ValueError says that it is not as asked.

        Raises:
            NoAnswerError: it refused, or answered otherwise than asked each time.
            BoundError: asking could cost more than it may.
            RemoteError: the endpoint does not answer, or refuses us; from now on kept answers alone are given.
        """
        problem, is_chat = "", True
        for attempt in range(self.bounds.malformed):
            found = self._answer(request, attempt)
            try:
                why, content = found.get("refusal"), {} if "refusal" in found else object_of(found)
                if (why := why or content.get("refusal")) is None:
                    return read(content)
            except ValueError as error:
                self._purse.count("malformed")
                problem, is_chat = printable(str(error) or type(error).__name__, 200), "text" in found
                continue
            self._purse.count("refused")
            raise self._nothing(f"refused ({printable(str(why), 200)})")
        if not is_chat and not self._has_answered:
            self._end(self._error(f"does not answer as a chat endpoint does ({problem})", f"check {URL}"))
        raise self._nothing(f"answered {self.bounds.malformed} times otherwise than asked: {problem}")

    def has(self, request: Request) -> bool:
        """Whether the first answer is there."""
        return self._answers is not None and self._answers.get(request.name(self.model)) is not None

    def _answer(self, request: Request, attempt: int) -> dict[str, Any]:
        """One answer: its ``text``, or a ``refusal``, or what is ``malformed`` about it."""
        name = request.name(self.model, attempt)
        kept = self._answers.get(name) if self._answers is not None else None
        if kept is not None:
            self._purse.count("kept")
            return kept
        found = self._asked(request)
        # What answers otherwise from the beginning may be no endpoint at all.
        if self._answers is not None and (self._has_answered or "malformed" not in found):
            self._answers.put(name, found)
        return found

    # ------------------------------------------------------------------------------------------ one request

    def _asked(self, request: Request) -> dict[str, Any]:
        attempt = 0
        while True:
            if self._ended is not None:
                raise self._ended
            self._wait(0.0)
            try:
                return self._exchanged(request)
            except _ChangedError:
                continue
            except _AgainError as error:
                attempt += 1
                if attempt >= self.bounds.attempts:
                    self._end(self._error(f"{error.reason} ({attempt} times)", "try again later: answers are kept"))
                self._purse.count("again")
                pause = max(error.asked, min(LONGEST_PAUSE, 2.0 ** (attempt - 1)) * (0.5 + random.random()))
                log.info("%s: %s; again in %.0f s", self.host, error.reason, pause)
                if self._report is not None:
                    self._report(f"{self.host}: {error.reason}; again in {pause:.0f} s")
                self._wait(pause)

    def _wait(self, seconds: float) -> None:
        """Wait, unless the map that this thread belongs to was cancelled."""
        try:
            self._sleep(seconds)
        except EndedError:
            raise self._error("was not asked: another request failed", "see the error before this one") from None

    def _exchanged(self, request: Request) -> dict[str, Any]:
        """One exchange, its tokens counted; one without an answer may have cost all that it could."""
        prompt = request.tokens()
        reserved = prompt + request.max_tokens
        self._purse.reserve(reserved)
        used = (prompt, request.max_tokens, True)
        try:
            try:
                with self._deadline.within(self.bounds.total), self._post(request) as answer:
                    body = whole(answer, self.bounds.answer)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                used = (0, 0, False)
                raise self._broken(error) from None
            except (httpx.TransportError, httpx.StreamError) as error:
                raise self._broken(error) from None
            except ValueError:
                return {"malformed": f"is longer than {self.bounds.answer:,} bytes, or compressed"}
            if answer.status_code != 200:
                used = (0, 0, False)
                return self._refused(answer, body)
            found = completion(body)
            used = usage(found, request)
            self._has_answered = self._has_answered or "malformed" not in found
            return {name: self._clean(value) for name, value in found.items() if isinstance(value, str)}
        finally:
            self._purse.settle(reserved, *used)

    def _post(self, request: Request) -> Any:
        how = {"temperature": request.temperature, "max_tokens": request.max_tokens}
        named = {new: how[name] for name, new in self._names.items() if new}
        return self._client.stream(
            "POST", self._url, json={"model": self.model, "messages": request.messages(), **named}
        )

    def _broken(self, error: Exception) -> _AgainError | RemoteError:
        """What becomes of an exchange without an answer."""
        if isinstance(error, httpx.LocalProtocolError | httpx.UnsupportedProtocol):
            # Its message quotes the request, the key included.
            return self._error(f"cannot be asked ({type(error).__name__})", f"check {URL} and {KEY}")
        what = "did not answer in time" if isinstance(error, httpx.TimeoutException) else "cannot be reached"
        return _AgainError(f"{what} ({printable(self._clean(first_line(error)), 120)})")

    def _refused(self, answer: httpx.Response, body: bytes) -> dict[str, Any]:
        """An answer other than 200: another try, a refusal of this request, or the end."""
        status, code, said = answer.status_code, *self._said(body)
        told = f"answered {status} {said or answer.reason_phrase}".rstrip()
        if status in (401, 402, 403) or "insufficient_quota" in code:
            self._end(self._error(told, f"check {KEY}, and what it may use"))
        if status in RETRIED or status >= 500:
            raise _AgainError(told, retry_after(answer.headers.get("retry-after", "")))
        if "content_filter" in code or "content_policy" in code or status == 413 or "context_length" in code:
            return {"refusal": told}
        if status in (400, 422):
            for name, new in (("max_tokens", "max_completion_tokens"), ("temperature", "")):
                if name in said and self._names[name] == name:
                    self._names[name] = new
                    raise _ChangedError
            if self._has_answered:
                return {"refusal": told}
        where = " and points elsewhere" if 300 <= status < 400 else ""
        return self._end(self._error(told + where, f"check {URL} and {MODEL}"))

    def _said(self, body: bytes) -> tuple[str, str]:
        """The code and the message of an error."""
        try:
            found = jsontext.parse(body)
        except ValueError:
            return "", ""
        error = found.get("error", found) if isinstance(found, dict) else found
        error = error if isinstance(error, dict) else {"message": error}
        code, message = (self._clean(str(error.get(name) or "")) for name in ("code", "message"))
        return f"{code} {error.get('type') or ''}".strip(), printable(" ".join(message.split()), 200)

    def _error(self, rule: str, step: str) -> RemoteError:
        return RemoteError(f"endpoint {self.host}", rule, step)

    def _nothing(self, rule: str) -> NoAnswerError:
        return NoAnswerError(f"model {printable(self.model, 100)}", rule, "ask another model, or write it by hand")

    def _end(self, error: RemoteError) -> NoReturn:
        """Ask nothing more."""
        self._ended = error
        raise error


def _completions(given: str) -> str:
    """The address of chat completions below a base.

    Raises:
        JobError: none is given. RemoteError: it is no address, or holds a key.
    """
    if not given:
        step = f"set {URL} to the base of an OpenAI-compatible server (http://127.0.0.1:11434/v1), {MODEL} to the name"
        raise JobError("no language model", f"{URL} is not set", f"{step} of a model there, and {KEY} if it wants one")
    if not is_address(given) or "@" in urlsplit(given).netloc:
        rule = "holds a name or a key" if "@" in given else "is not an http:// or https:// address"
        raise RemoteError(URL, rule, f"write it as https://api.openai.com/v1, and the key into {KEY}")
    parts = urlsplit(given)
    path = parts.path.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    return urlunsplit((parts.scheme, parts.netloc, path, parts.query, ""))
