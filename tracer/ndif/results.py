"""A server's result, from bytes to plain values: bounded before anything is made of it, and no code.

A result is a zip of torch's, compressed or not. Sizes are taken from headers before anything is decompressed or read,
and what headers do not say is decompressed in pieces. The checksum of every record is verified. What may be made of its
pickle is listed here, and torch's reader of weights makes it. Refuses to know where a result comes from and what it
means.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import zstandard

PIECE = 2**20
PICKLE = 16 * 2**20
"""Bytes of what is not a tensor's numbers; 100,000 tensors take as many."""
_MADE = frozenset(
    {
        "builtins complex",
        "builtins set",
        "collections OrderedDict",
        "torch Size",
        "torch Tensor",
        "torch device",
        "torch._tensor _rebuild_from_type_v2",
        "torch._utils _rebuild_parameter",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_tensor_v3",
    }
)
"""What a result is made of, besides storages and dtypes. torch's reader knows more, some of which takes a size and
that much memory."""
_PLAIN = frozenset({type(None), bool, int, float, complex, str, torch.Size, torch.dtype, torch.device})


class UnreadableError(Exception):
    """A damaged result, or one of more than tensors and plain containers."""


def values(body: bytes | bytearray, compressed: bool, check_size: Callable[[int], None]) -> dict[str, Any]:
    """What a block saved, by name.

    Args:
        check_size: raises where a result of so many bytes is too large.

    Raises:
        UnreadableError: as it says. MemoryError: there is no room for it.
    """
    whole = _decompressed(body, check_size) if compressed else io.BytesIO(body)
    try:
        sizes = _checked(whole)
        whole.seek(0)
        saved = torch.load(whole, map_location="cpu", weights_only=True)
    except (MemoryError, UnreadableError):
        raise
    except Exception as error:  # noqa: BLE001  whatever the readers of a damaged file raise
        raise UnreadableError(type(error).__name__) from None
    _check_plain(saved, sizes)
    if not isinstance(saved, dict) or not saved or not all(isinstance(name, str) for name in saved):
        raise UnreadableError("it holds no values by name")
    return saved


def _decompressed(body: bytes | bytearray, check_size: Callable[[int], None]) -> io.BytesIO:
    whole = io.BytesIO()
    try:
        check_size(max(0, zstandard.frame_content_size(body)))  # -1 where it does not say
        with zstandard.ZstdDecompressor().stream_reader(body, read_across_frames=True) as reader:
            while piece := reader.read(PIECE):
                check_size(whole.tell() + len(piece))
                whole.write(piece)
    except (zstandard.ZstdError, ValueError) as error:
        raise UnreadableError(type(error).__name__) from None
    return whole


def _checked(whole: io.BytesIO) -> frozenset[int]:
    """The sizes of the records of torch's zip, all of them as it says and no larger than the file."""
    with zipfile.ZipFile(whole) as archive:
        records = archive.infolist()
        stored = all(one.compress_type == zipfile.ZIP_STORED and one.file_size == one.compress_size for one in records)
        apart = sum(one.file_size for one in records) <= len(whole.getbuffer())
        if not stored or not apart or len({one.filename for one in records}) < len(records):
            raise UnreadableError("its records are compressed, overlap, or have one name")
        first = min((one.header_offset for one in records), default=1)
        if first != 0 or bytes(whole.getbuffer()[-22:-18]) != b"PK\x05\x06":  # the last record of a zip
            raise UnreadableError("there is more than a zip in it")
        pickles = [one for one in records if one.filename.endswith(".pkl")]
        if len(pickles) != 1 or pickles[0].file_size > PICKLE:
            raise UnreadableError("its pickle is missing, too large, or not the only one")
        for one in records:
            with archive.open(one) as record:
                while record.read(PIECE):  # to the end, where its checksum is compared
                    pass
        _check_pickle(archive.read(pickles[0]))
        return frozenset(one.file_size for one in records)


def _check_pickle(pickle: bytes) -> None:
    """Refuse one that would make anything but tensors and plain containers, by its instructions alone."""
    for instruction, given, _ in pickletools.genops(pickle):
        match instruction.name:
            case "PROTO" if given != 2:
                raise UnreadableError(f"its pickle has protocol {given}")
            case "GLOBAL" if not _is_made(str(given)):
                raise UnreadableError(f"it holds {given}")
            case "LONG1" if not -(2**63) <= given < 2**64:  # of such numbers many can share a hash
                raise UnreadableError("it holds a number of more than 64 bits")


def _is_made(name: str) -> bool:
    module, _, what = name.partition(" ")
    is_storage = what.endswith("Storage") and what != "UntypedStorage"
    return name in _MADE or (module == "torch" and (is_storage or isinstance(getattr(torch, what, None), torch.dtype)))


def _check_plain(saved: Any, sizes: frozenset[int]) -> None:
    """Refuse what is no plain value, however it is nested; and a tensor over more memory than a record has."""
    waiting, seen = [saved], set[int]()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:  # a few bytes can name one thing in more places than could be visited
            continue
        seen.add(id(one))
        if type(one) in (list, tuple, set):
            waiting.extend(one)
        elif type(one) in (dict, OrderedDict):
            waiting.extend((*one.keys(), *one.values()))
        elif isinstance(one, torch.Tensor):
            nbytes = one.untyped_storage().nbytes()
            if one.device.type != "cpu" or one.layout != torch.strided or (nbytes and nbytes not in sizes):
                raise UnreadableError("it holds a tensor that is not as it says")
            waiting.extend(vars(one).values())
        elif type(one) not in _PLAIN:
            raise UnreadableError(f"it holds a {type(one).__name__}")
