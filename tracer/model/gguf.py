"""GGUF files, as llama.cpp writes them: what is in one, read with every length checked before it is used.

Knows the file's header (metadata and the places of its tensors) and its quantisations by name. Only numbers, texts and
short lists of the metadata are kept, the vocabulary is counted; no tensor is read. Refuses to know models
(model/dequantised.py).
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
import mmap
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from tracer.errors import ModelError, first_line, quoted
from tracer.settings import WeightsFile

SUFFIX = ".gguf"
POINTER = b"version https://git-lfs"
"""How a pointer of Git LFS begins, which stands in the place of a file."""
_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_PART = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
"""How llama.cpp names the parts of a file that it cuts."""
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
"""Kinds of metadata values: numbers by their letter in `struct`, texts, lists."""
_ALIGNMENT = 32
_KEY, _KEPT, _DIMENSIONS, _ENTRIES, _HEADER = 1024, 1024, 4, 2**17, 2**28
"""The most of a name's bytes, of a list's numbers that are kept, of a tensor's dimensions, of metadata keys and of
tensors, and of the header's bytes: many times those of any model."""


@dataclass(frozen=True)
class Tensor:
    """Where a tensor is in the file.

    Attributes:
        shape: as torch has it. kind: GGML's number of its type.
        start, size: bytes.
    """

    name: str
    shape: tuple[int, ...]
    kind: int
    start: int
    size: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says of itself.

    Attributes:
        path: of the file. name: as messages call it.
        file: its name in its folder or Hugging Face repository.
        values: its metadata: numbers, texts, and lists of up to 1,024 numbers; of other lists their length.
        tensors: in the file's order; each lies in the file, none is read.
    """

    path: Path
    name: str
    file: str
    values: Mapping[str, Any]
    tensors: tuple[Tensor, ...]

    @property
    def architecture(self) -> str:
        return self.values["general.architecture"]

    @property
    def types(self) -> tuple[str, ...]:
        """The types of its tensors by name, that of most weights first."""
        weights: dict[str, int] = {}
        for tensor in self.tensors:
            name = block(tensor.kind)[0]
            weights[name] = weights.get(name, 0) + math.prod(tensor.shape)
        return tuple(sorted(weights, key=lambda name: (-weights[name], name)))

    def record(self) -> WeightsFile:
        """What a circuit keeps of it; reads the whole file, for its hash."""
        with self.path.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        return WeightsFile(file=self.file, sha256=digest, types=self.types)


@lru_cache
def block(kind: int) -> tuple[str, int, int]:
    """A type of GGML: its name, and how many weights are in how many bytes.

    Raises:
        ValueError: there is no such type, or the package gguf cannot dequantise it.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    known = GGMLQuantizationType(kind)
    weights, size = GGML_QUANT_SIZES[known]
    try:
        dequantize(np.zeros((1, size), np.uint8), known)
    except NotImplementedError:
        raise ValueError(f"{known.name} is not a type of weights that can be dequantised") from None
    return known.name, weights, size


def check_installed(name: str) -> None:
    """Refuse a file that the package for it is missing for.

    Raises:
        ModelError: names the command that installs it.
    """
    if importlib.util.find_spec("gguf") is None:
        rule = "is a GGUF file, which is read with the package gguf, and that is not installed"
        raise ModelError(name, rule, "pip install 'neuron-tracer[gguf]'")


def read(path: Path, file: str, name: str) -> Header:
    """A file's header.

    Args:
        file: as `Header.file`. name: as `Header.name`.

    Raises:
        ModelError: no GGUF file, damaged, cut short, one part of several, of a type that cannot be read, no model; or
            the package gguf is missing.
    """
    check_installed(name)
    with _damaged(name), path.open("rb") as content:
        start = content.read(len(POINTER))
        if start == POINTER:
            raise ModelError(name, "is a pointer of Git LFS, not the file", "fetch it: git lfs pull in its folder")
        if not start.startswith(_MAGIC):
            rule = f"is no GGUF file: it begins with {quoted(start[:4])}, not with {quoted(_MAGIC)}"
            raise ModelError(name, rule, "give a .gguf file, or a folder in Hugging Face format")
        with mmap.mmap(content.fileno(), 0, access=mmap.ACCESS_READ) as data:
            values, tensors = _Reader(data).header()
    header = Header(path, name, file, values, tensors)
    _check_whole(header)
    return header


def _check_whole(header: Header) -> None:
    """Refuse one part of several, and what is no model by its own word."""
    parts, kind = _PART.search(header.file), header.values.get("general.type", "model")
    if (parts and int(parts[2]) > 1) or header.values.get("split.count", 1) not in (0, 1):
        rule = "is one of several parts of a file"
        raise ModelError(header.name, rule, "put them together: llama-gguf-split --merge FIRST_PART WHOLE.gguf")
    if kind != "model":
        step = "give the model's own GGUF file"
        raise ModelError(header.name, f"holds no model: its general.type is {quoted(kind)}", step)


@contextmanager
def _damaged(name: str) -> Iterator[None]:
    """Around reading: whatever does not fit is that the file is damaged."""
    try:
        yield
    except (struct.error, UnicodeDecodeError, ValueError) as error:
        known = isinstance(error, ValueError) and not isinstance(error, UnicodeDecodeError)
        said = first_line(error) if known else "a name or a number is not where it should be"
        rule = f"is damaged or cut short ({said})"
        raise ModelError(name, rule, "download it again, and compare its size or SHA-256") from error
    except OSError as error:
        raise ModelError(name, f"cannot be read ({first_line(error.strerror)})", "check its rights") from error


class _Reader:
    """Reads a header from its first byte on. Every length is compared with what is left before it is used."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.end = data, len(_MAGIC), min(len(data), _HEADER)

    def header(self) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
        """Metadata and tensors."""
        if (version := self.number("I")) not in _VERSIONS:
            raise ValueError(f"version {version}; {' and '.join(map(str, _VERSIONS))} are read")
        tensors, keys = self.number("Q"), self.number("Q")
        if max(tensors, keys) > _ENTRIES:
            raise ValueError(f"{max(tensors, keys):,} entries")
        values: dict[str, Any] = {}
        for _ in range(keys):
            if (key := self.text(_KEY)) in values:
                raise ValueError(f"{quoted(key)} is there twice")
            values[key] = self.value(self.number("I"))
        if not isinstance(values.get("general.architecture"), str):
            raise ValueError("no general.architecture")
        return values, self.tensors([self.entry() for _ in range(tensors)], values)

    def tensors(self, entries: list[tuple[str, list[int], int, int]], values: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The table of tensors, each checked to lie in the file."""
        alignment = values.get("general.alignment", _ALIGNMENT)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**20 or alignment & (alignment - 1):
            raise ValueError(f"general.alignment {quoted(alignment)}")
        first, found, room = -(-self.at // alignment) * alignment, dict[str, Tensor](), len(self.data)
        for name, dimensions, kind, offset in entries:
            label, weights, size = block(kind)
            if name in found or not dimensions or min(dimensions) < 1 or dimensions[0] % weights:
                raise ValueError(f"tensor {quoted(name)} of shape {dimensions} in {label}")
            bytes_ = math.prod(dimensions) // weights * size
            if first + offset + bytes_ > len(self.data):
                rule = f"tensor {quoted(name)} ends at byte {first + offset + bytes_:,}"
                raise ValueError(f"{rule}, the file at {len(self.data):,}")
            room -= bytes_
            found[name] = Tensor(name, tuple(reversed(dimensions)), kind, first + offset, bytes_)
        if room < 0:
            raise ValueError("tensors that lie over each other")
        return tuple(found.values())

    def entry(self) -> tuple[str, list[int], int, int]:
        """A tensor's name, dimensions with the fastest first, type and offset."""
        name, count = self.text(_KEY), self.number("I")
        if count > _DIMENSIONS:
            raise ValueError(f"tensor {quoted(name)} has {count} dimensions")
        dimensions = [self.number("Q") for _ in range(count)]
        return name, dimensions, self.number("I"), self.number("Q")

    def number(self, letter: str) -> Any:
        form = f"<{letter}"
        self.skip(size := struct.calcsize(form))
        return struct.unpack_from(form, self.data, self.at - size)[0]

    def text(self, most: int | None = None) -> str:
        length = self.number("Q")
        if most is not None and length > most:
            raise ValueError(f"a name of {length:,} bytes")
        self.skip(length)
        return self.data[self.at - length : self.at].decode()

    def value(self, kind: int) -> Any:
        """A value of the metadata; of a long list, or one of texts, its length."""
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            raise ValueError(f"a value of kind {kind}")
        inside, count = self.number("I"), self.number("Q")
        if inside == _TEXT:
            for _ in range(count):
                self.skip(self.number("Q"))
            return count
        if inside not in _NUMBERS:
            raise ValueError(f"a list of kind {inside}")
        if count <= _KEPT:
            return [self.number(_NUMBERS[inside]) for _ in range(count)]
        self.skip(count * struct.calcsize(f"<{_NUMBERS[inside]}"))
        return count

    def skip(self, size: int) -> None:
        """Go on by so many bytes, which must be there."""
        if size > self.end - self.at:
            raise ValueError(f"its header ends before byte {self.at + size:,}" if size < 2**48 else "a length")
        self.at += size
