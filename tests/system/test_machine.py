"""What a process may use: trees of files as kernels show them, and the numbers that follow."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from tracer.system import machine

MIB, GIB = 2**20, 2**30


@pytest.fixture(autouse=True)
def _large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=64 * GIB, available=48 * GIB))
    monkeypatch.setattr(os, "cpu_count", lambda: 32)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(32)), raising=False)
    monkeypatch.setattr(machine, "_address_space", lambda: None)
    taken = SimpleNamespace(rss=GIB // 4, vms=5 * GIB)
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: taken))


def tree(root: Path, files: dict[str, Any]) -> Path:
    for name, content in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{content}\n")
    return root


V1 = {
    "proc/self/cgroup": "5:cpu,cpuacct:/job\n4:memory:/job/step\n0::/",
    "proc/self/mountinfo": "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
    "32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"
    "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime shared:9 - cgroup cgroup rw,memory",
    "sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712,
    "sys/fs/cgroup/memory/memory.usage_in_bytes": 30 * GIB,
    "sys/fs/cgroup/memory/job/memory.limit_in_bytes": 760 * MIB,
    "sys/fs/cgroup/memory/job/memory.usage_in_bytes": 500 * MIB,
    "sys/fs/cgroup/memory/job/memory.stat": f"cache 9\ninactive_file 1\ntotal_inactive_file {90 * MIB}\n"
    f"total_active_file {10 * MIB}",
    "sys/fs/cgroup/memory/job/step/memory.limit_in_bytes": 9223372036854771712,
    "sys/fs/cgroup/memory/job/step/memory.usage_in_bytes": 200 * MIB,
    "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": 350000,
    "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": 100000,
    "sys/fs/cgroup/cpu/cpu.cfs_quota_us": -1,
    "sys/fs/cgroup/cpu/cpu.cfs_period_us": 100000,
}
V2 = {
    "proc/self/cgroup": "0::/user.slice/app.scope",
    "proc/self/mountinfo": "25 1 0:22 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate",
    "sys/fs/cgroup/user.slice/memory.max": 4 * GIB,
    "sys/fs/cgroup/user.slice/memory.high": 3 * GIB,
    "sys/fs/cgroup/user.slice/memory.current": 2 * GIB,
    "sys/fs/cgroup/user.slice/memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file 0",
    "sys/fs/cgroup/user.slice/cpu.max": "150000 100000",
    "sys/fs/cgroup/user.slice/app.scope/memory.max": "max",
    "sys/fs/cgroup/user.slice/app.scope/memory.high": "max",
    "sys/fs/cgroup/user.slice/app.scope/memory.current": GIB,
    "sys/fs/cgroup/user.slice/app.scope/cpu.max": "max 100000",
}


def test_version_1_counts_the_level_with_the_limit_and_what_files_can_give_back(tmp_path: Path) -> None:
    found = machine.memory(tree(tmp_path, V1), {})
    assert found == machine.Memory(760 * MIB, 360 * MIB, "of the cgroup")
    assert str(found) == "360 MiB of memory free of 760 MiB of the cgroup"
    assert machine.largest(tmp_path, {}) == 760 * MIB
    assert machine.cores(tmp_path, {}) == machine.Cores(4, "of the cgroup")


def test_version_2_counts_every_level_above_and_the_lower_of_both_limits(tmp_path: Path) -> None:
    assert machine.memory(tree(tmp_path, V2), {}) == machine.Memory(3 * GIB, 2 * GIB, "of the cgroup")
    assert machine.cores(tmp_path, {}) == machine.Cores(2, "of the cgroup")


def test_the_tightest_of_nested_limits_is_the_one_that_leaves_least(tmp_path: Path) -> None:
    inner = "sys/fs/cgroup/user.slice/app.scope/memory."
    tree(tmp_path, V2 | {f"{inner}max": 2 * GIB, f"{inner}current": 3 * GIB // 2})
    assert machine.memory(tmp_path, {}) == machine.Memory(2 * GIB, GIB // 2, "of the cgroup")


def test_in_a_container_the_path_is_the_hosts_and_the_mount_is_the_group(tmp_path: Path) -> None:
    mounted = "35 31 0:32 /docker/12 /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
    for path in ("/docker/12", "/docker/12/inner", "/another/one"):
        there = tree(
            tmp_path / path.replace("/", "-"),
            {
                "proc/self/cgroup": f"4:memory:{path}",
                "proc/self/mountinfo": mounted,
                "sys/fs/cgroup/memory/memory.limit_in_bytes": GIB,
                "sys/fs/cgroup/memory/memory.usage_in_bytes": GIB // 4,
            },
        )
        assert machine.memory(there, {}) == machine.Memory(GIB, 3 * GIB // 4, "of the cgroup")


@pytest.mark.parametrize(
    "files",
    [
        {},
        V2 | {"sys/fs/cgroup/user.slice/memory.max": "max", "sys/fs/cgroup/user.slice/memory.high": "max"},
        {name: text for name, text in V2.items() if "sys" not in name},
        V2 | {f"sys/fs/cgroup/user.slice/memory.{name}": "garbage \x00" for name in ("max", "high", "stat")},
        V1 | {"sys/fs/cgroup/memory/job/memory.limit_in_bytes": "9" * 30},
    ],
    ids=["nothing", "max", "hidden", "garbage", "endless"],
)
def test_without_a_limit_it_is_the_machine(files: dict[str, Any], tmp_path: Path) -> None:
    assert machine.memory(tree(tmp_path, files), {}) == machine.Memory(64 * GIB, 48 * GIB, "of the machine")


def test_more_is_used_than_is_allowed(tmp_path: Path) -> None:
    tree(tmp_path, V2 | {"sys/fs/cgroup/user.slice/memory.current": 9 * GIB})
    assert machine.memory(tmp_path, {}).available == 0


@pytest.mark.parametrize(
    ("granted", "size"),
    [
        ({"SLURM_MEM_PER_NODE": "4096"}, 4 * GIB),
        ({"SLURM_MEM_PER_NODE": "2G"}, 2 * GIB),
        ({"SLURM_MEM_PER_CPU": "1024", "SLURM_CPUS_ON_NODE": "3"}, 3 * GIB),
        ({"SLURM_MEM_PER_NODE": "0"}, 64 * GIB),
        ({"SLURM_MEM_PER_NODE": "much"}, 64 * GIB),
    ],
)
def test_slurm(granted: dict[str, str], size: int, tmp_path: Path) -> None:
    found = machine.memory(tmp_path, granted | {"SLURM_JOB_ID": "7"})
    assert found.total == machine.largest(tmp_path, granted | {"SLURM_JOB_ID": "7"}) == size
    assert found.whose == ("of SLURM" if size < 64 * GIB else "of the machine")
    assert found.available < size
    assert machine.memory(tmp_path, granted).total == 64 * GIB, "left over from a job that ended"


def test_cores_of_slurm_and_of_an_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "16", "SLURM_CPUS_PER_TASK": "8"}
    assert machine.cores(tmp_path, job) == machine.Cores(8, "of SLURM")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {3, 5}, raising=False)
    assert str(machine.cores(tmp_path, job)) == "2 cores of its CPU affinity"
    monkeypatch.delattr(os, "sched_getaffinity")
    assert machine.cores(tmp_path, {}) == machine.Cores(32, "of the machine")


def test_an_address_space_is_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_address_space", lambda: 10 * GIB)
    found = machine.memory(tmp_path, {})
    assert found == machine.Memory(10 * GIB, 5 * GIB + GIB // 4, "of ulimit -v")


def test_this_machine_has_memory_and_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert 0 < machine.memory().available <= machine.memory().total
    assert 1 <= machine.cores().count <= (os.cpu_count() or 1)
