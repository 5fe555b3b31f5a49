"""Prompts: what the user asks, the token ids it becomes, and left-padded batches of them.

Knows tokens and positions, and which special tokens a tokenizer puts around a text: what it puts before is kept, what
it appends is left off, so that the last position is the text's own. A conversation is what the model's own template
makes of it, and nothing is added to that. Refuses to know models beyond a tokenizer, a
vocabulary size, a context length and the configuration's first token, and never repairs a prompt: one that cannot be
taken literally is a `JobError`.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol, SupportsIndex, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from tracer.errors import JobError, first_line, option, quoted
from tracer.records import as_int, as_python, is_list
from tracer.system.forks import cached_property

Ids = Sequence[SupportsIndex] | np.ndarray | Tensor
"""Whole numbers of any kind: Python's, numpy's, torch's; they become ints when encoded."""

Target = str | SupportsIndex | Sequence[str | SupportsIndex] | np.ndarray | Tensor


@runtime_checkable
class Vocabulary(Protocol):
    """What encoding needs to know of a model; where there is a `config`, its `bos_token_id` too."""

    @property
    def tokenizer(self) -> Any: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def context_length(self) -> int: ...


ROLES = ("system", "user", "assistant")
"""Who says a message."""

TEMPLATE_DATE = "26 Jul 2024"
"""The day that a template is told it is, so that numbers do not change overnight: what Llama's falls back to."""


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: ``system``, ``user`` or ``assistant``.
        content: what is said.
    """

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """One question to a model; token ids are accepted everywhere text is.

    Args:
        text: the prompt; special tokens (BOS) are put before it as the tokenizer does. What it appends (EOS) is not.
        target: the token(s) asked about, each one token: text such as ``" are"`` or an id.
        foil: the wrong token(s); with them the metric is the logit difference.
        counterfactual: the paired prompt, of equal length in tokens; text or token ids. Beside `messages`, messages as
            well, and a text takes the place of the last user message.
        token_ids: the prompt as ids, used as they are, instead of `text`.
        messages: a conversation instead of `text`, each message with its role and content; the last is the user's. The
            model's own template makes a text of it, special tokens included, which ends where the answer begins.
        seed: with `messages`, how the answer begins, such as ``"Answer:"``; the metric is read at its last token.
        system: with `messages`, a message of the role ``system`` that is put before them.
        bos: begin the text, and a counterfactual text, with the beginning-of-sequence token, also where the tokenizer
            does not put it there.
        positions: where the logits are read, as token indices (negative from the end); the last if None.
        answer: instead of `target`, an answer of any number of tokens, text such as ``" New York"`` or ids: it is read
            behind the prompt, and the metric is the sum over its tokens of each one's log-probability (or logit) after
            the prompt and the answer's tokens before it.
        id: the user's own name for it.
    """

    text: str | None = None
    target: Target | None = None
    foil: Target | None = None
    counterfactual: str | Ids | Sequence[Message | Mapping[str, str]] | None = None
    token_ids: Ids | None = None
    positions: SupportsIndex | Ids | None = None
    id: str | None = None
    bos: bool = False
    messages: Sequence[Message | Mapping[str, str]] | None = None
    seed: str | None = None
    system: str | None = None
    answer: str | Ids | None = None

    def __post_init__(self) -> None:
        self._read_messages()
        for name in ("target", "foil", "counterfactual", "token_ids", "positions", "answer"):
            # Arrays and tensors become lists here: they have no truth value and no plain equality.
            object.__setattr__(self, name, as_python(getattr(self, name)))
        for name in ("text", "id"):
            if not isinstance(given := getattr(self, name), str | None):
                raise JobError(f"{name} {quoted(given)}", f"is {type(given).__name__}, not text", "put it in quotes")
        if self.id is not None:
            _check_characters(self.id, "id")
        for name in ("token_ids", "counterfactual", "answer"):
            value = getattr(self, name)
            text = (isinstance(value, str) and name != "token_ids") or (
                _is_messages(value) and name == "counterfactual"
            )
            if value is not None and not text and not is_list(value):
                raise JobError(
                    f"{name} {quoted(value)}", "is not a sequence of token ids", "give a list such as [1, 5, 7]"
                )
        given = [name for name in ("text", "token_ids", "messages") if getattr(self, name) is not None]
        if not given:
            raise JobError("prompt", "neither text nor token_ids nor messages was given", "give one of them")
        if len(given) > 1:
            raise JobError(
                f"prompt {quoted(self.shown)}", f"both {given[0]} and {given[1]} were given", "give one of them"
            )
        self._check_bos()
        self._check_asked()

    def _check_bos(self) -> None:
        if not isinstance(self.bos, bool):
            raise JobError(f"bos {quoted(self.bos)}", "must be true or false", "leave it out, or use true")
        if self.bos and self.messages is not None:
            rule = "has no effect on messages, which begin as the model's template says"
            raise JobError(option("bos", True), rule, "leave it out")
        if self.bos and self.text is None:
            rule = "has no effect on token ids, which are used as they are"
            raise JobError(option("bos", True), rule, "leave it out, and begin the ids with that token")

    def _check_asked(self) -> None:
        if self.foil is not None and self.target is None:
            step = "leave it out: another answer would be another text" if self.answer is not None else "give a target"
            raise JobError(f"foil {quoted(self.foil)}", "a foil needs a target to differ from", step)
        for name in ("target", "positions"):
            if self.answer is not None and getattr(self, name) is not None:
                rule = f"is given beside {option('answer')}, whose own tokens say what is asked about, and where"
                raise JobError(f"{name} {quoted(getattr(self, name))}", rule, "leave one of them out")

    def _read_messages(self) -> None:
        """Messages of any kind as `Message`s, with the system's first."""
        for name in ("messages", "counterfactual"):
            value = getattr(self, name)
            if value is None or (name == "counterfactual" and not _is_messages(value)):
                continue
            if self.messages is None:
                rule = "is messages, and the prompt is none"
                raise JobError(f"{name} {quoted(value)}", rule, f"give {option('messages')} too")
            object.__setattr__(self, name, _messages(value, name, self.system))
        for name, value in (("seed", self.seed), ("system", self.system)):
            if value is None:
                continue
            called = "seed_answer" if name == "seed" and option("x").startswith("--") else name
            if self.messages is None:
                step = "give --chat" if option("x").startswith("--") else f"give {option('messages')}"
                raise JobError(option(called, value), "has no effect without messages", step)
            if not isinstance(value, str) or not value.strip():
                raise JobError(f"{option(called)} {quoted(value)}", "is not a text with words", "leave it out")
            _check_characters(value, called)
        object.__setattr__(self, "system", None)  # it is a message now

    @property
    def shown(self) -> str | Ids:
        """The prompt in a message to its user: its text, what the user says last, or its ids."""
        if self.text is not None:
            return self.text
        if self.messages is not None:
            return _last_of_user(self.messages).content
        return self.token_ids or ()

    def as_chat(self, system: str | None = None, seed: str | None = None) -> Prompt:
        """A text as what the user says, and a counterfactual text as what the user might say instead.

        Args:
            system, seed: as of a prompt.

        Raises:
            JobError: it is not a text, or begins with what only a text begins with.
        """
        if self.text is None:
            raise JobError("prompt of token ids or messages", "cannot become what a user says", "give a text")
        said = [Message("user", self.text)]
        return replace(self, text=None, messages=said, system=system, seed=seed)


Asked = Prompt | str
"""A prompt, or its text."""


def as_prompt(given: Asked, **asked: Any) -> Prompt:
    """A prompt; of a text the one that asks what is given beside it.

    Args:
        asked: fields of `Prompt`; those that are None or false were not given.

    Raises:
        JobError: neither a prompt nor a text, or what is asked is given beside a prompt, which says that itself.
    """
    beside = {name: value for name, value in asked.items() if value is not None and value is not False}
    if isinstance(given, str):
        return Prompt(given, **beside)
    if not isinstance(given, Prompt):
        raise JobError(f"prompt={quoted(given)}", "must be a tracer.Prompt or a text", "write tracer.Prompt(...)")
    if beside:
        name, value = next(iter(beside.items()))
        rule = "is given beside a tracer.Prompt, which says what it asks itself"
        raise JobError(f"{name}={quoted(as_python(value))}", rule, f"write tracer.Prompt(..., {name}=...)")
    return given


def as_prompts(given: Asked | Sequence[Asked], **asked: Any) -> list[Prompt]:
    """Prompts, of which each may be its text; one alone is a list of one.

    Args:
        asked: of those that are texts, as of `as_prompt`; a list of prompts alone has no use for it.

    Raises:
        JobError: as `as_prompt`.
    """
    several = [given] if isinstance(given, Prompt | str) else given
    if not is_list(several) or not all(isinstance(one, Prompt | str) for one in several):
        rule = "must be a list of tracer.Prompt or of texts"
        raise JobError(f"prompts={quoted(given)}", rule, "write [tracer.Prompt(...)]")
    texts = any(isinstance(one, str) for one in several)
    return [as_prompt(one, **({} if texts and isinstance(one, Prompt) else asked)) for one in several]


def _is_messages(value: Any) -> bool:
    return is_list(value) and len(value) > 0 and all(isinstance(one, Message | Mapping) for one in value)


def _messages(value: Any, what: str, system: str | None) -> tuple[Message, ...]:
    """Messages as they are given, checked as far as no template is needed.

    Raises:
        JobError: something else, another role, nothing said, or not the user's at the end.
    """
    step = 'give them as [{"role": "user", "content": "..."}]'
    if not _is_messages(value):
        raise JobError(f"{what} {quoted(value)}", "is not a list of messages", step)
    found = [] if system is None else [Message("system", system)]
    for one in value:
        fields = asdict(one) if isinstance(one, Message) else one
        given = {key: kept for key, kept in fields.items() if kept is not None}
        role, content = given.get("role"), given.get("content")
        _check_parts(content)
        if set(given) != {"role", "content"} or not isinstance(content, str):
            raise JobError(f"message {quoted(given)}", "must have a role and a content that is text, and no more", step)
        if role not in ROLES:
            raise JobError(f"role {quoted(role)}", "is not known", f"use {', '.join(ROLES)}")
        if not content.strip():
            raise JobError(f"message {quoted(given)}", "says nothing", "give at least one word")
        _check_characters(content, f"message of the {role}")
        found.append(Message(role, content))
    if any(one.role == "system" for one in found[1:]):
        rule = "is not the first" if system is None else f"is beside {option('system')}"
        raise JobError("message of the system", rule, "give one, before all others")
    if found[-1].role != "user":
        rule = f"ends with a message of the {found[-1].role}, the last must be the user's"
        step = f"give how the answer begins as {option('seed')}" if found[-1].role == "assistant" else "add one"
        raise JobError(f"{what} {quoted(found[-1].content)}", rule, step)
    return tuple(found)


def _check_parts(content: Any) -> None:
    """Refuse what is said in parts, as models that also take images or sound are asked."""
    if not is_list(content) or not all(isinstance(one, Mapping) and "type" in one for one in content):
        return
    kinds = list(dict.fromkeys(str(one["type"]) for one in content))
    if kinds == ["text"]:
        rule, step = "is in parts, not one text", "give the text itself as content"
    else:
        rule = f"has parts of the types {', '.join(kinds)}, and only text is traced"
        step = "ask about a text alone: no image or sound can be part of a prompt"
    raise JobError(f"content {quoted(content)}", rule, step)


def _last_of_user(messages: Any) -> Message:
    return messages[-1]  # which `_messages` has checked


@dataclass(frozen=True)
class Encoded:
    """A prompt as token ids, checked against a vocabulary. Positions are indices from 0.

    Attributes:
        warnings: what whoever reads a result should know of how it was read, a sentence each.
        answer: whether the targets are an answer's tokens, each asked about at its own of the `positions`; the tokens
            end with the answer's last but one.
        weights: of each target in the metric ``share``, which settles them.
    """

    token_ids: tuple[int, ...]
    target_ids: tuple[int, ...]
    foil_ids: tuple[int, ...]
    counterfactual_ids: tuple[int, ...] | None
    positions: tuple[int, ...]
    text: str
    id: str | None
    warnings: tuple[str, ...] = ()
    answer: bool = False
    weights: tuple[float, ...] = ()


def encode(prompt: Prompt, vocabulary: Vocabulary) -> Encoded:
    """Token ids of a prompt, its targets, foils and counterfactual.

    Raises:
        JobError: an empty or too long prompt, a target of several tokens, a target that is also a foil, an id out
            of the vocabulary, a counterfactual of another length, a position outside the prompt.
    """
    notes: list[str] = []
    text, ids = _asked(prompt, vocabulary, notes)
    targets = _singles(prompt.target, vocabulary, "target")
    foils = _singles(prompt.foil, vocabulary, "foil")
    if both := set(targets) & set(foils):
        name = quoted(decode(vocabulary, both.pop()))
        raise JobError(f"token {name}", "is both target and foil", "give a foil that differs from the target")
    paired = None
    if prompt.counterfactual is not None:
        paired = _paired(prompt, vocabulary, notes)
        if len(paired) != len(ids):
            raise JobError(
                f"counterfactual {quoted(prompt.counterfactual)}",
                f"is {len(paired)} tokens, the prompt {len(ids)}; they must be equally long",
                "choose words that are the same number of tokens",
            )
    text = text if text is not None else "".join(decode(vocabulary, token) for token in ids)
    if prompt.answer is None:
        positions = _positions(prompt.positions, len(ids))
        return Encoded(ids, targets, foils, paired, positions, text, prompt.id, tuple(dict.fromkeys(notes)))
    targets = _answer(prompt, vocabulary, notes)
    positions = tuple(range(len(ids) - 1, len(ids) + len(targets) - 1))
    ids, paired = ids + targets[:-1], None if paired is None else paired + targets[:-1]
    _check_length(ids, text, vocabulary, "prompt with its answer")
    return Encoded(ids, targets, (), paired, positions, text, prompt.id, tuple(dict.fromkeys(notes)), True)


def _answer(prompt: Prompt, vocabulary: Vocabulary, notes: list[str]) -> tuple[int, ...]:
    """The tokens of the answer behind its prompt.

    Args:
        notes: is told where the tokenizer would split the prompt and its answer otherwise, were they one text.
    """
    value: Any = prompt.answer
    name = f"answer {quoted(value)}"
    if len(value) == 0:
        raise JobError(name, "is empty", "give at least one token")
    if not isinstance(value, str):
        return tuple(_in_vocabulary(token, vocabulary, "answer") for token in value)
    _check_characters(value, "answer")
    _, ids = _readings(value, vocabulary, "answer")
    if not ids:
        raise JobError(name, "becomes no token", "give at least one word")
    _check_tokenizer(ids, vocabulary, name)
    if prompt.text is not None:
        alone, both = (
            tokenize(text, vocabulary.tokenizer, vocabulary.context_length, special=False, what="prompt")
            for text in (prompt.text, prompt.text + value)
        )
        if both != alone + ids:
            joined = "".join(decode(vocabulary, token) for token in both[len(alone) :])
            rule = f"in one text with its prompt the tokenizer would read the answer otherwise ({quoted(joined)})"
            notes.append(f"{rule}: it is read as {quoted([decode(vocabulary, one) for one in ids])}")
    return ids


def _asked(prompt: Prompt, vocabulary: Vocabulary, notes: list[str]) -> tuple[str | None, tuple[int, ...]]:
    """The prompt as one text, if it is one, and its tokens."""
    if prompt.messages is not None:
        text = rendered(prompt.messages, prompt.seed, vocabulary.tokenizer, notes)
        return text, _tokens_of_template(text, vocabulary, "messages")
    if prompt.text is not None:
        return prompt.text, _tokens(prompt.text, vocabulary, "prompt", prompt.bos, notes)
    return None, _tokens(prompt.token_ids, vocabulary, "prompt", False, notes)


def _paired(prompt: Prompt, vocabulary: Vocabulary, notes: list[str]) -> tuple[int, ...]:
    """The tokens of the counterfactual."""
    other: Any = prompt.counterfactual
    if prompt.messages is not None and isinstance(other, str):
        if not other.strip():
            raise JobError(f"counterfactual {quoted(other)}", "is empty", "give at least one word")
        _check_characters(other, "counterfactual")
        other = (*prompt.messages[:-1], Message("user", other))
    if _is_messages(other):
        text = rendered(other, prompt.seed, vocabulary.tokenizer, notes)
        return _tokens_of_template(text, vocabulary, "counterfactual")
    return _tokens(other, vocabulary, "counterfactual", prompt.bos, notes)


def rendered(messages: Any, seed: str | None, tokenizer: Any, notes: list[str] | None = None) -> str:
    """A conversation as the tokenizer's own chat template writes it, special tokens included, up to where the
    assistant's answer begins, or through its seed.

    With a seed it is what ``apply_chat_template(..., continue_final_message=True)`` gives of the messages and the seed
    as the assistant's, spaces at the seed's ends kept; of a template that cannot do that, the open answer and the seed.
    A template that asks which day it is gets `TEMPLATE_DATE`; one that looks for parts in what is said, as those for
    images do, gets a text as a part.

    Args:
        messages: as `Prompt` has checked them.
        notes: is told of that date.

    Raises:
        JobError: there is no template, it fails on the messages or leaves out what the user says, or they hold one of
            the tokenizer's special tokens, which would end a message where its writer did not.
    """
    template, value = getattr(tokenizer, "chat_template", None), f"messages {quoted(_last_of_user(messages).content)}"
    if not template:
        rule = "the model's tokenizer has no chat template"
        raise JobError(value, rule, "ask a text instead, or a model that is tuned for chats")
    for said in (*messages, *([] if seed is None else [Message("assistant", seed)])):
        _check_not_special(said, tokenizer)
    told: dict[str, Any] = {"date_string": TEMPLATE_DATE} if "strftime_now" in str(template) else {}
    if told and notes is not None:
        notes.append(f"the model's chat template writes a date, which is {TEMPLATE_DATE} here, whatever day it is")
    bare = None if seed is None else seed.strip()  # many templates drop the spaces around an answer
    given, answer = [asdict(one) for one in messages], {"role": "assistant", "content": bare}
    opened = _applied(tokenizer, given, value, add_generation_prompt=True, **told)
    if messages[-1].content.strip() not in opened:  # as a template does that takes images too, and looks for parts
        *given, answer = _in_parts([*given, answer])
        opened = _applied(tokenizer, given, value, add_generation_prompt=True, **told)
        if messages[-1].content.strip() not in opened:
            rule = "the model's chat template leaves out or changes what the user says"
            raise JobError(value, rule, "say it otherwise, or ask a text instead")
    if seed is None or bare is None:
        return opened
    try:
        text = _applied(tokenizer, [*given, answer], value, continue_final_message=True, **told)
    except JobError:  # it takes no answer that is begun
        return opened + seed
    return text.removesuffix(bare) + seed if text.endswith(bare) else opened + seed


def _in_parts(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages whose content is one part, a text."""
    return [{**one, "content": [{"type": "text", "text": one["content"]}]} for one in messages]


def _applied(tokenizer: Any, messages: list[dict[str, Any]], value: str, **how: Any) -> str:
    """What the tokenizer's template makes of messages."""
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **how)
    except Exception as error:  # a template is a program of the model's own, and fails as it likes
        rule = f"the model's chat template fails on them ({first_line(error)})"
        raise JobError(value, rule, "see which roles it takes, and in which order") from error


def _check_not_special(said: Message, tokenizer: Any) -> None:
    """Refuse what would be read as a special token where somebody only wrote its name."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {str(token) for token in added.values() if getattr(token, "special", False)}
    special |= set(getattr(tokenizer, "all_special_tokens", ()))
    if found := next((token for token in sorted(special, key=len, reverse=True) if token in said.content), None):
        rule = f"holds {quoted(found)}, a special token of the model, which would be read as one"
        raise JobError(f"message of the {said.role} {quoted(said.content)}", rule, "write it otherwise")


def _tokens_of_template(text: str, vocabulary: Vocabulary, what: str) -> tuple[int, ...]:
    """The tokens of a text that holds its special tokens already."""
    ids = tokenize(text, vocabulary.tokenizer, vocabulary.context_length, special=False, what=what)
    _check_length(ids, text, vocabulary, what)
    _check_tokenizer(ids, vocabulary, f"{what} {quoted(text)}")
    return ids


def with_bos(prompt: Prompt, bos: bool) -> Prompt:
    """The prompt with `bos`, where it is a text; token ids stay as they are, messages begin as their template says."""
    return replace(prompt, bos=True) if bos and prompt.text is not None else prompt


def bos_of(vocabulary: Vocabulary) -> int | None:
    """The token that begins a sequence: the tokenizer's, else the configuration's if the tokenizer has it as special.
    None where neither names one."""
    return next(iter(_bos_tokens(vocabulary)), None)


def lacks_bos(vocabulary: Vocabulary) -> bool:
    """Whether there is such a token and the tokenizer does not put it first."""
    known, first = _bos_tokens(vocabulary), vocabulary.tokenizer.encode("a")[:1]
    return bool(known) and not (first and first[0] in known)


def _bos_tokens(vocabulary: Vocabulary) -> list[int]:
    """Tokens that count as the beginning of a sequence; the first is the one to put there."""
    tokenizer = vocabulary.tokenizer
    own = [as_int(getattr(tokenizer, name, None)) for name in ("bos_token_id", "cls_token_id")]
    configured = as_int(getattr(getattr(vocabulary, "config", None), "bos_token_id", None))
    if configured not in {*getattr(tokenizer, "all_special_ids", ()), *getattr(tokenizer, "added_tokens_decoder", ())}:
        configured = None  # many configurations have a default that is an ordinary token of theirs
    return [token for token in (*own, configured) if token is not None]


def tokenize(text: str, tokenizer: Any, most: int, *, special: bool = True, what: str = "text") -> tuple[int, ...]:
    """The tokens of a text; one that cannot become `most` tokens, however it is split, is never given to the tokenizer,
    which would take gigabytes for it.

    Args:
        special: whether what the tokenizer puts around a text is among them.

    Raises:
        JobError: the text is too long, or the tokenizer fails on it.
    """
    # A character is at most four bytes, and a token at least one.
    if 4 * len(text) > most and (longest := _longest_token(tokenizer)):
        size = len(text.encode("utf-8", "surrogatepass"))
        if size > most * longest:
            rule = f"is {size:,} bytes, the model reads at most {most:,} tokens, none of more than {longest} bytes"
            raise JobError(f"{what} {quoted(text, 30)}", rule, "shorten it")
    try:
        return tuple(tokenizer.encode(text) if special else tokenizer.encode(text, add_special_tokens=False))
    except BaseException as error:
        # A panic of the tokenizers library is no Exception, and is no more than this text's.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        rule = f"its tokenizer fails on it ({type(error).__name__}: {first_line(error)})"
        raise JobError(f"{what} {quoted(text, 30)}", rule, "change the text, or give token ids") from error


def _longest_token(tokenizer: Any) -> int:
    """Bytes of the longest token, as its vocabulary writes it, which is never shorter than what it stands for; 0 where
    that is not known."""
    if not hasattr(tokenizer, "get_vocab"):
        return 0
    size = getattr(tokenizer, "vocab_size", None), len(getattr(tokenizer, "added_tokens_encoder", ()))
    known, longest = getattr(tokenizer, "_tracer_longest_token", (None, 0))
    if known != size:
        longest = max((len(word.encode("utf-8", "surrogatepass")) for word in tokenizer.get_vocab()), default=0)
        tokenizer._tracer_longest_token = size, longest  # slow to find, and asked for with every prompt
    return longest


@dataclass(frozen=True)
class Document:
    """A text of any length as tokens: what stands `before` it (a beginning-of-sequence token), and its own."""

    before: tuple[int, ...]
    body: tuple[int, ...]

    def windows(self, length: int) -> list[tuple[int, tuple[int, ...]]]:
        """Its tokens in pieces of at most `length`, each behind what stands before the text: where each piece begins
        among the document's tokens, what stands before counted once, and its tokens with that."""
        step = max(1, length - len(self.before))
        return [
            (first + len(self.before), self.before + self.body[first : first + step])
            for first in range(0, len(self.body), step)
        ]


def document(given: str | Ids, vocabulary: Vocabulary, bos: bool = False) -> Document:
    """A text, or token ids, that may be longer than the model reads.

    Args:
        bos: as of `Prompt`. Token ids that begin with such a token begin with it in every piece.

    Raises:
        JobError: it is empty or no text, has tokens outside the vocabulary, or begins with a token that the tokenizer
            adds too.
    """
    known = _bos_tokens(vocabulary)
    if given is None or len(given) == 0 or (isinstance(given, str) and not given.strip()):
        raise JobError(f"text {quoted(given)}", "is empty", "give at least one word, or leave the row out")
    if not isinstance(given, str):
        ids = tuple(_in_vocabulary(token, vocabulary, "text") for token in given)
        at = int(ids[0] in known and len(ids) > 1)
        return Document(ids[:at], ids[at:])
    _check_characters(given, "text")
    before, _, _ = _parts("a", vocabulary, "text")
    body = tokenize(given, vocabulary.tokenizer, 4 * len(given), special=False)
    if not body:
        raise JobError(f"text {quoted(given)}", "becomes no token", "give at least one word, or leave the row out")
    if bos and not (before and before[0] in known):
        if not known:
            rule = "neither the tokenizer nor the model's configuration names a beginning-of-sequence token"
            raise JobError(option("bos", True), rule, "leave it out")
        before = (known[0], *before)
    _check_tokenizer((*before, *body), vocabulary, f"text {quoted(given)}")
    if before and body[0] == before[0] and body[0] in known:
        if len(body) == 1:
            raise JobError(f"text {quoted(given)}", "becomes no token", "give at least one word, or leave the row out")
        rule = f"begins with {decode(vocabulary, body[0])}, which is put there anyhow"
        raise JobError(f"text {quoted(given)}", rule, "leave it out of the text")
    return Document(before, body)


def decode(vocabulary: Vocabulary, token: int) -> str:
    """One token as it reads after other text, so its leading space is kept; bytes that are not text by themselves
    become the replacement character."""
    return decoded(vocabulary, [token])[token]


def decoded(vocabulary: Vocabulary, tokens: Iterable[int]) -> dict[int, str]:
    """The texts of many tokens, each as `decode` has it."""
    tokenizer = vocabulary.tokenizer

    def text(ids: list[int]) -> str:
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    special = set(getattr(tokenizer, "all_special_ids", ()))
    # Tokenizers of the SentencePiece kind drop the space that begins a text: decoded after an anchor it stays.
    anchor = list(tokenizer.encode("a", add_special_tokens=False))
    before, found = text(anchor), dict[int, str]()
    for token in tokens:
        both = before if token in special else text([*anchor, token])
        # Unless the token changes the bytes of the anchor itself, or adds nothing to it.
        found[token] = both[len(before) :] if both.startswith(before) and both != before else text([token])
    return found


def _tokens(value: Any, vocabulary: Vocabulary, what: str, bos: bool, notes: list[str]) -> tuple[int, ...]:
    if value is None or len(value) == 0 or (isinstance(value, str) and not value.strip()):
        raise JobError(f"{what} {quoted(value)}", "is empty", "give at least one word")
    if isinstance(value, str):
        ids = _encoded(value, vocabulary, what, bos, notes)
    else:
        ids = tuple(_in_vocabulary(token, vocabulary, what) for token in value)
    _check_length(ids, value, vocabulary, what)
    return ids


def _check_length(ids: Sequence[int], value: Any, vocabulary: Vocabulary, what: str) -> None:
    if len(ids) > vocabulary.context_length:
        raise JobError(
            f"{what} {quoted(value, 30)}",
            f"is {len(ids)} tokens, the model reads at most {vocabulary.context_length}",
            "shorten it",
        )


def _encoded(text: str, vocabulary: Vocabulary, what: str, bos: bool, notes: list[str]) -> tuple[int, ...]:
    """The tokens of a whole prompt: what the tokenizer puts before the text, or `bos` asks for, and the text.

    Args:
        notes: is told of a beginning that is missing and an end that is left off.
    """
    _check_characters(text, what)
    name, known = f"{what} {quoted(text)}", _bos_tokens(vocabulary)
    before, body, appended = _parts(text, vocabulary, what)
    if not body:
        raise JobError(name, "becomes no token", "give at least one word")
    ids = before + body
    _check_tokenizer(ids, vocabulary, name)
    if ids[0] in known and ids[1:2] == ids[:1]:
        start = decode(vocabulary, ids[0])
        if before and text.startswith(start):
            rule = f"begins with {start}, which the tokenizer adds too"
            raise JobError(name, rule, f"leave it out of the text, or give {option('token_ids')}")
    if appended:
        names = " ".join(decode(vocabulary, token) for token in appended)
        notes.append(f"the tokenizer appends {names}, which is left off: the last position is that of the text's end")
    if ids[0] in known:
        return ids
    if bos and not known:
        rule = "neither the tokenizer nor the model's configuration names a beginning-of-sequence token"
        raise JobError(option("bos", True), rule, "leave it out")
    if bos:
        ids = (known[0], *ids)
        _check_tokenizer(ids, vocabulary, name)
    elif known:
        start = quoted(decode(vocabulary, known[0]))
        notes.append(
            f"{start}, the model's beginning-of-sequence token, is not put first by its tokenizer; "
            f"{option('bos', True)} puts it there"
        )
    return ids


def _parts(text: str, vocabulary: Vocabulary, what: str) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """A text's tokens: those that the tokenizer puts before it, its own, and those that are appended."""

    def split(text: str, special: bool = True) -> tuple[int, ...]:
        return tokenize(text, vocabulary.tokenizer, vocabulary.context_length, special=special, what=what)

    full, body = split(text), split(text, special=False)
    if full == body:
        return (), body, ()
    # What is put around a text is the same for every text; one that is not special itself shows what.
    for other in ("a", "1"):
        around, inside = split(other), split(other, special=False)
        for at in range(len(around) - len(inside) + 1 if inside else 0):
            before, after = around[:at], around[at + len(inside) :]
            if around[at : at + len(inside)] == inside and full in (before + body + after, before + body):
                return before, body, full[len(before + body) :]
    return (), full, ()


def _check_characters(text: str, what: str) -> None:
    """Refuse surrogates (undecodable bytes of a command line become these): they cannot be encoded or saved."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        rule = f"holds {text[error.start]!a} at character {error.start}, which is not Unicode text"
        raise JobError(f"{what} {quoted(text)}", rule, "give it as UTF-8") from None


def _check_tokenizer(ids: Sequence[int], vocabulary: Vocabulary, name: str) -> None:
    """Refuse tokens outside the model's vocabulary, which have no embedding."""
    if beyond := [token for token in ids if token >= vocabulary.vocab_size]:
        raise JobError(
            name,
            f"becomes token {beyond[0]}, the model has {vocabulary.vocab_size}; the tokenizer is not this model's",
            "load the model with the tokenizer it was trained with",
        )


def _singles(value: Any, vocabulary: Vocabulary, what: str) -> tuple[int, ...]:
    if value is None:
        return ()
    several = list(value) if is_list(value) else [value]
    if not several:
        raise JobError(f"{what} {quoted(value)}", "is empty", "give a token or leave it out")
    ids = tuple(_single(item, vocabulary, what) for item in several)
    if len(set(ids)) < len(ids):
        raise JobError(f"{what} {quoted(value)}", "names a token twice", "name each token once")
    return ids


def _single(value: Any, vocabulary: Vocabulary, what: str) -> int:
    """The token that stands for this text after other text, or the id."""
    if not isinstance(value, str):
        return _in_vocabulary(value, vocabulary, what)
    if not value:
        raise JobError(f"{what} ''", "is empty", "give one token, or leave it out")
    _check_characters(value, what)
    alone, following = _readings(value, vocabulary, what)
    _check_tokenizer((*alone, *following), vocabulary, f"{what} {quoted(value)}")
    token = _meant(value, alone, following, vocabulary)
    if token is not None:
        return token
    spaced = " " + value
    known = _meant(spaced, *_readings(spaced, vocabulary, what), vocabulary) is not None
    hint = f"did you mean {spaced!r} with its leading space?" if known else "give one token, or its id"
    one_each = {ids[0]: quoted(decode(vocabulary, ids[0])) for ids in (alone, following) if len(ids) == 1}
    if one_each:
        names = " or ".join(f"{text} (token {token})" for token, text in one_each.items())
        raise JobError(f"{what} {quoted(value)}", f"could be {names}", hint)
    pieces = [decode(vocabulary, token) for token in following]
    raise JobError(f"{what} {quoted(value)}", f"is {len(pieces)} tokens {quoted(pieces)}, one is needed", hint)


def _readings(value: str, vocabulary: Vocabulary, what: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens of `value` by itself, and those it adds to a preceding text (or again by itself, if unclear)."""

    def split(text: str) -> tuple[int, ...]:
        return tokenize(text, vocabulary.tokenizer, vocabulary.context_length, special=False, what=what)

    alone = split(value)
    # A letter after a digit starts a new token, and so does anything else after a letter.
    anchor = "1" if value[0].isalpha() else "a"
    before, both = split(anchor), split(anchor + value)
    return alone, both[len(before) :] if before and both[: len(before)] == before else alone


def _meant(value: str, alone: tuple[int, ...], following: tuple[int, ...], vocabulary: Vocabulary) -> int | None:
    """The token that reads as `value` after other text; None if there is none, or if a word alone is another token:
    ``are`` could then mean the end of a word or, as such tokenizers read a text's first word, `` are``."""

    def reads(ids: tuple[int, ...]) -> bool:
        return len(ids) == 1 and _same(decode(vocabulary, ids[0]), value)

    if reads(following):
        doubtful = value[0].isalnum() and len(alone) == 1 and not reads(alone)
        return None if doubtful else following[0]
    return alone[0] if reads(alone) and len(following) != 1 else None


def _same(text: str, other: str) -> bool:
    """Whether two texts are equal up to Unicode normalisation, which many tokenizers apply."""
    return unicodedata.normalize("NFKC", text) == unicodedata.normalize("NFKC", other)


def _in_vocabulary(token: Any, vocabulary: Vocabulary, what: str) -> int:
    number = as_int(token)
    if number is None or not 0 <= number < vocabulary.vocab_size:
        raise JobError(
            f"{what} token id {quoted(token)}",
            f"must be a whole number from 0 to {vocabulary.vocab_size - 1}, the model's vocabulary",
            "check which tokenizer made it",
        )
    return number


def _positions(value: Any, length: int) -> tuple[int, ...]:
    several = [-1] if value is None else list(value) if is_list(value) else [value]
    if not several:
        raise JobError("positions []", "is empty", "give a position or leave it out")
    numbers = [as_int(pos) for pos in several]
    for pos, number in zip(several, numbers, strict=True):
        if number is None or not -length <= number < length:
            raise JobError(f"position {quoted(pos)}", f"the prompt has {length} tokens", f"use 0 to {length - 1}")
    positions = tuple(number % length for number in numbers if number is not None)
    if len(set(positions)) < len(positions):
        raise JobError(f"positions {quoted(value)}", "names a position twice", "name each position once")
    return positions


@dataclass(frozen=True)
class Batch:
    """Prompts of any lengths, left-padded to one [prompt, column] tensor."""

    token_ids: tuple[tuple[int, ...], ...]

    @cached_property
    def width(self) -> int:
        """Columns: the length of the longest prompt."""
        return max(len(ids) for ids in self.token_ids)

    @cached_property
    def padding(self) -> Tensor:
        """Columns of padding before each prompt."""
        return torch.tensor([self.width - len(ids) for ids in self.token_ids])

    def inputs(self, device: torch.device | str, kept: int = 1) -> dict[str, Any]:
        """The model's keyword arguments; it returns logits of the last `kept` columns."""
        rows = [(0,) * (self.width - len(ids)) + tuple(ids) for ids in self.token_ids]
        columns = torch.arange(self.width)[None]
        mask = (columns >= self.padding[:, None]).long()
        places = (columns - self.padding[:, None]).clamp_min(0)
        return {
            "input_ids": torch.tensor(rows, device=device),
            "attention_mask": mask.to(device),
            "position_ids": places.to(device),
            "use_cache": False,
            "logits_to_keep": kept,
        }

    def real(self) -> Tensor:
        """Which positions exist, [prompt, pos]."""
        lengths = torch.tensor([len(ids) for ids in self.token_ids])
        return torch.arange(self.width)[None] < lengths[:, None]

    def aligned(self, padded: Tensor, dim: int) -> Tensor:
        """From columns to positions: each prompt moved to begin at 0, with zeros after its end.

        Args:
            padded: a tensor with prompts first and columns at `dim`.
            dim: of the columns.
        """
        return self._moved(padded, dim, torch.arange(self.width)[None] + self.padding[:, None].to(torch.long))

    def padded(self, aligned: Tensor, dim: int) -> Tensor:
        """From positions to columns: the inverse of `aligned`."""
        return self._moved(aligned, dim, torch.arange(self.width)[None] - self.padding[:, None].to(torch.long))

    def _moved(self, tensor: Tensor, dim: int, source: Tensor) -> Tensor:
        if not bool(self.padding.any()):
            return tensor
        shape = [1] * tensor.dim()
        shape[0], shape[dim] = source.shape
        inside = ((source >= 0) & (source < self.width)).view(shape).to(tensor.device)
        index = source.clamp(0, self.width - 1).view(shape).to(tensor.device).expand(tensor.shape)
        return torch.where(inside, tensor.gather(dim, index), torch.zeros((), dtype=tensor.dtype, device=tensor.device))
