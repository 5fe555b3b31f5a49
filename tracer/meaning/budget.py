"""What asking a language model may cost, and what it has cost: calls and tokens, reserved before a request is sent.

Knows counts. Refuses to know what is asked, and prices.
"""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass
from typing import Any

from tracer.errors import JobError, RemoteError, option

BYTES_PER_TOKEN = 3
"""Of an estimate: English has four or so, JSON with numbers and other scripts have fewer."""
MOST_BYTES_PER_TOKEN = 16
"""A server that counts a token for more bytes than that is not believed."""


class BoundError(RemoteError):
    """The next request could cost more than it may."""


@dataclass(frozen=True)
class Bounds:
    """How much may be asked, and how long an answer may take.

    Attributes:
        max_calls: requests sent, further tries included. max_tokens_total: tokens of requests and answers.
        connect: seconds until there is a connection. silence: seconds without a byte; an answer comes as a whole, so
            this is how long a model may take. total: seconds for one exchange, however slowly it comes.
        attempts: of one request that a server turns away or does not answer. malformed: answers to one request that
            are read, the further ones because those before were not as asked.
        parallel: requests at a time. answer: bytes of one.
    """

    max_calls: int = 1000
    max_tokens_total: int = 2_000_000
    connect: float = 10.0
    silence: float = 120.0
    total: float = 300.0
    attempts: int = 5
    malformed: int = 3
    parallel: int = 4
    answer: int = 2**20

    def __post_init__(self) -> None:
        for name in ("max_calls", "max_tokens_total", "attempts", "malformed", "parallel", "answer"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise JobError(f"{option(name)} {value!r}", "must be a whole number, 1 or more", "change it")
        for name in ("connect", "silence", "total"):
            if not getattr(self, name) > 0:
                raise JobError(f"{name}={getattr(self, name)!r}", "must be more than 0 seconds", "change it")


@dataclass
class Spent:
    """What was asked so far.

    Attributes:
        calls: requests sent, further tries included. kept: answers that were there from before.
        again: requests that were turned away or not answered, and sent again. malformed: answers otherwise than asked.
        refused: requests that the model refused.
        prompt_tokens, completion_tokens: as the server counts them; of `estimated` calls as we estimate them, since it
            gave no count, or one that cannot be.
    """

    calls: int = 0
    kept: int = 0
    again: int = 0
    malformed: int = 0
    refused: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    estimated: int = 0

    @property
    def tokens(self) -> int:
        """Of requests and answers."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def summary(self) -> str:
        """In a few words."""
        told = f"{self.calls:,} calls, {self.prompt_tokens:,} tokens in and {self.completion_tokens:,} out"
        more = {
            "counted by an estimate": self.estimated,
            "sent again": self.again,
            "malformed answers": self.malformed,
            "refused": self.refused,
            "answers there from before": self.kept,
        }
        return ", ".join([told, *(f"{count:,} {what}" for what, count in more.items() if count)])

    def as_record(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def estimate(text: str) -> int:
    """About how many tokens a text is."""
    return -(-len(text.encode(errors="surrogatepass")) // BYTES_PER_TOKEN)


class Purse:
    """Bounds on calls and tokens that several threads keep together: what is under way counts as spent in full."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds, self.spent = bounds, Spent()
        self._changed, self._reserved, self._under_way = threading.Condition(), 0, 0

    def reserve(self, tokens: int) -> None:
        """Take a call, and so many tokens, before it is made; waits for calls under way where they may leave enough.

        Raises:
            BoundError: there is not as much left.
        """
        calls, most = self.bounds.max_calls, self.bounds.max_tokens_total
        with self._changed:
            while True:
                if self.spent.calls >= calls:
                    raise BoundError(option("max_calls", calls), "is reached", _STEP)
                left = most - self.spent.tokens - self._reserved
                if tokens <= left:
                    break
                if not self._under_way:
                    rule = f"is reached: {max(0, left):,} tokens are left, the next request may take {tokens:,}"
                    raise BoundError(option("max_tokens_total", most), rule, _STEP)
                self._changed.wait()
            self.spent.calls += 1
            self._reserved += tokens
            self._under_way += 1

    def settle(self, reserved: int, prompt: int, completion: int, estimated: bool) -> None:
        """A call that was reserved has ended, and took so many tokens."""
        with self._changed:
            self._reserved -= reserved
            self._under_way -= 1
            self.spent.prompt_tokens += prompt
            self.spent.completion_tokens += completion
            self.spent.estimated += estimated
            self._changed.notify_all()

    def count(self, name: str) -> None:
        """Add one to a count of `Spent`."""
        with self._changed:
            setattr(self.spent, name, getattr(self.spent, name) + 1)


_STEP = "what was answered is kept: repeat the command with more, and nothing is asked twice"
