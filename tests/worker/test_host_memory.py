"""What a process may still take, read from files as the kernel writes them, and from the real kernel."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from orchestra.worker import device as devices
from orchestra.worker import host_memory

GROUP = {"memory.max": "max", "memory.current": "0", "memory.stat": "anon 7\ninactive_file 0\n"}


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files instead of the kernel's: 2,000 kB available, no groups, no limits."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:  4000 kB\nMemAvailable:    2000 kB\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/\n")
    (tmp_path / "cgroup").mkdir()
    monkeypatch.setattr(host_memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(host_memory, "CGROUPS", tmp_path / "cgroup")
    return tmp_path


def write_group(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")


def test_ranks_share_the_machine(kernel: Path) -> None:
    assert host_memory.free_bytes(1) == 2000 * 1024
    assert devices.free_bytes(torch.device("cpu"), 2) == 1000 * 1024


def test_container_is_a_bound(kernel: Path) -> None:
    write_group(kernel / "cgroup", {**GROUP, "memory.current": "500000"})
    assert host_memory.free_bytes() == 2000 * 1024
    write_group(kernel / "cgroup", {"memory.max": "900000"})
    assert host_memory.free_bytes() == 400_000
    assert host_memory.free_bytes(2) == 200_000
    # Pages of files that were read go when the memory is needed.
    write_group(kernel / "cgroup", {"memory.stat": "anon 7\ninactive_file 30000"})
    assert host_memory.free_bytes() == 430_000
    write_group(kernel / "cgroup", {"memory.current": "1000000"})
    assert host_memory.free_bytes() == 0


def test_groups_around_the_own_one_are_bounds(kernel: Path) -> None:
    (kernel / "proc/self/cgroup").write_text("0::/system.slice/worker.service\n")
    inner, outer = kernel / "cgroup/system.slice/worker.service", kernel / "cgroup/system.slice"
    write_group(inner, {**GROUP, "memory.max": "800000", "memory.current": "100000"})
    write_group(outer, GROUP)
    assert host_memory.free_bytes() == 700_000
    write_group(outer, {"memory.max": "900000", "memory.current": "300000"})
    assert host_memory.free_bytes() == 600_000


def test_old_groups_are_bounds(kernel: Path) -> None:
    text = "9:name=systemd:/\n4:cpu,memory:/jobs/1\n0::/\n"
    (kernel / "proc/self/cgroup").write_text(text)
    files = {
        "memory.limit_in_bytes": "900000",
        "memory.usage_in_bytes": "500000",
        "memory.stat": "inactive_file 1\ntotal_inactive_file 50000",
    }
    write_group(kernel / "cgroup/memory/jobs/1", files)
    assert host_memory.free_bytes() == 450_000


@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_limits_of_the_process_are_bounds(limit: str) -> None:
    script = (
        "import resource, sys; from orchestra.worker.host_memory import free_bytes;"
        f"resource.setrlimit(resource.{limit}, (1 << 29, 1 << 29)); print(free_bytes(), free_bytes(2))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True)
    alone, beside_others = map(int, done.stdout.split())
    # The interpreter itself takes some 10 MB of data, and some 100 of addresses.
    assert (1 << 29) - (300 << 20) < alone < 1 << 29
    assert beside_others == pytest.approx(alone, rel=0.05)


def test_no_limit_is_no_bound(kernel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: unlimited)
    (kernel / "proc/self/cgroup").write_text("4:memory:/\n")
    assert host_memory.free_bytes() == 2000 * 1024
