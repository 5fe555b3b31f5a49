"""What this process may use of its machine, memory and cores, and whose limit that is.

A machine's own numbers are those of nobody in a container, a batch job or a shell with limits: there the least of
several limits counts. Knows control groups (v1 and v2, each level above the process), CPU affinity, address spaces and
SLURM's grants. Refuses to know what the memory is for.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

_ENDLESS = 2**60  # v1 has no word for "no limit", but a number of pages that no machine has
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True)
class Memory:
    """Bytes of memory.

    Attributes:
        total: that this process and those beside it under the same limit may hold.
        available: of them now; what the system keeps of files can be had.
        whose: the limit is: ``of the machine``, ``of the cgroup``, ``of SLURM`` or ``of ulimit -v``.
    """

    total: int
    available: int
    whose: str

    def __str__(self) -> str:
        return f"{gib(self.available)} of memory free of {gib(self.total)} {self.whose}"


@dataclass(frozen=True)
class Cores:
    """Cores that this process may use at a time, and whose limit that is."""

    count: int
    whose: str

    def __str__(self) -> str:
        return f"{self.count} core{'s' * (self.count != 1)} {self.whose}"


def gib(size: int) -> str:
    """Bytes in readable units."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def memory(root: Path = Path("/"), environment: Mapping[str, str] | None = None) -> Memory:
    """Memory that this process may use: of all limits the one that leaves least.

    Args:
        root: where ``proc`` and ``sys`` are. environment: of the process; its own if None.
    """
    found = min(_limits(root, environment), key=lambda one: one.available)
    return replace(found, available=max(0, found.available))


def largest(root: Path = Path("/"), environment: Mapping[str, str] | None = None) -> int:
    """The most bytes that this process could hold, whatever is free now; arguments as of `memory`."""
    return min(one.total for one in _limits(root, environment))


def _limits(root: Path, environment: Mapping[str, str] | None) -> Iterator[Memory]:
    host, mine = psutil.virtual_memory(), psutil.Process().memory_info()
    yield Memory(host.total, host.available, "of the machine")
    for total, left in _cgroup_memory(root):
        yield Memory(total, left, "of the cgroup")
    if granted := _slurm_memory(os.environ if environment is None else environment):
        yield Memory(granted, granted - mine.rss, "of SLURM")
    if space := _address_space():
        yield Memory(space, space - mine.vms + mine.rss, "of ulimit -v")


def cores(root: Path = Path("/"), environment: Mapping[str, str] | None = None) -> Cores:
    """Cores that this process may use: of those of the machine, the fewest that anyone grants it.

    Args:
        root: where ``proc`` and ``sys`` are. environment: of the process; its own if None.
    """
    environment = os.environ if environment is None else environment
    found = [Cores(os.cpu_count() or 1, "of the machine")]
    if hasattr(os, "sched_getaffinity"):
        found.append(Cores(len(os.sched_getaffinity(0)), "of its CPU affinity"))
    found += [Cores(max(1, math.ceil(one)), "of the cgroup") for one in _cgroup_cores(root)]
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        if (count := _number(environment.get(name))) and "SLURM_JOB_ID" in environment:
            found.append(Cores(count, "of SLURM"))
    return min(found, key=lambda one: one.count)


# ------------------------------------------------------------------------------------------------- control groups


def _cgroup_memory(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and what is left of it, of every level that has one."""
    for level in _levels(root, "memory"):
        limits = [_number(_read(level / name)) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
        limit = min((one for one in limits if one is not None), default=_ENDLESS)
        used = _number(_read(level / "memory.current")) or _number(_read(level / "memory.usage_in_bytes"))
        if limit < _ENDLESS:
            yield limit, limit - max(0, (used or 0) - _files(_read(level / "memory.stat") or ""))


def _files(statistics: str) -> int:
    """Bytes of files that the system keeps, and gives up where memory is asked for; v1 adds up what is below a level
    under names of its own."""
    of = dict(line.split(maxsplit=1) for line in statistics.splitlines() if " " in line)
    return sum(_number(of.get(f"total_{name}", of.get(name))) or 0 for name in ("inactive_file", "active_file"))


def _cgroup_cores(root: Path) -> Iterator[float]:
    """The share of cores that every level with a quota grants."""
    for level in _levels(root, "cpu"):
        both = (_read(level / "cpu.max") or "").split()
        quota, period = both if len(both) == 2 else (
            _read(level / "cpu.cfs_quota_us"),
            _read(level / "cpu.cfs_period_us"),
        )  # fmt: skip
        if (most := _number(quota)) and (each := _number(period)):
            yield most / each


def _levels(root: Path, controller: str) -> Iterator[Path]:
    """The folders of this process's control group and of those above it, for v1 and v2."""
    paths: dict[str, str] = {}
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path)  # v2 names none
    for line in (_read(root / "proc/self/mountinfo") or "").splitlines():
        about, _, kind = line.partition(" - ")
        top, mount = (_plain(one) for one in about.split()[3:5])
        name = {"cgroup": controller, "cgroup2": ""}.get(kind.split()[0])
        if name not in paths or (name and name not in kind.split()[-1].split(",")):
            continue
        # In a container the path is the host's, and what is mounted is the group itself.
        inside = paths[name].removeprefix(top) if top != "/" else paths[name]
        folder = root / mount.lstrip("/")
        level = folder / inside.strip("/")
        while True:
            if level.is_dir():
                yield level
            if level == folder or folder not in level.parents:
                break
            level = level.parent


def _plain(path: str) -> str:
    """A path of mountinfo, where blanks are octal."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), path)


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return None


def _number(text: str | None) -> int | None:
    """A whole number; None for ``max``, -1 and whatever else is not one."""
    return int(text) if text is not None and text.isdecimal() and len(text) < 20 else None


# ------------------------------------------------------------------------------------------------- other limits


def _slurm_memory(environment: Mapping[str, str]) -> int | None:
    """Bytes that SLURM granted on this node; None where it says nothing, and for 0, which is all of them."""
    if "SLURM_JOB_ID" not in environment:
        return None
    node, each = (_megabytes(environment.get(name)) for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU"))
    count = _number(environment.get("SLURM_CPUS_ON_NODE")) or _number(environment.get("SLURM_CPUS_PER_TASK")) or 1
    return node or (each * count if each else None)


def _megabytes(text: str | None) -> int | None:
    match = re.fullmatch(r"([0-9]{1,12})([KMGT]?)", text or "")
    return int(match[1]) * _UNITS[match[2] or "M"] if match else None


def _address_space() -> int | None:
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft in (resource.RLIM_INFINITY, -1) else soft
