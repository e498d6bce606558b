"""How much host memory this process may still take: by the machine, its control groups, and its own limits."""

import resource
import sys
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")

# Names of a control group's files, and of the file pages in its statistics that the kernel gives back when asked for
# memory: versions 2 and 1.
_UNIFIED = ("memory.max", "memory.current", "inactive_file")
_LEGACY = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
# The limits of a process with what counts towards them.
_PROCESS_LIMITS = {resource.RLIMIT_AS: "VmSize", resource.RLIMIT_DATA: "VmData"}


def free_bytes(local_size: int = 1) -> int:
    """What this process may count as free.

    Args:
        local_size: processes that share what the machine and the control groups leave; each has limits of its own.
    """
    available = _kilobytes(PROC / "meminfo", "MemAvailable")
    shared = min([available, *_left_in_groups()])
    return max(0, min([shared // local_size, *_left_to_process()]))


def _left_in_groups() -> Iterator[int]:
    """What each control group that this process is in may still take; nothing where there is no limit."""
    for line in (PROC / "self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            roots, names = [CGROUPS, CGROUPS / "unified"], _UNIFIED
        elif "memory" in controllers.split(","):
            roots, names = [CGROUPS / "memory"], _LEGACY
        else:
            continue
        for root in roots:
            # In a container the path may be the host's, and its own group the root.
            group = root / path.lstrip("/")
            levels = [group, *group.parents]
            for level in levels[: levels.index(root) + 1]:
                yield from _left_in_group(level, names)


def _left_in_group(group: Path, names: tuple[str, str, str]) -> Iterator[int]:
    limit_file, used_file, cached = names
    try:
        limit = (group / limit_file).read_text().strip()
        used = int((group / used_file).read_text())
        reclaimable = _statistic(group / "memory.stat", cached)
    except OSError:
        return
    if limit != "max":
        yield int(limit) - used + reclaimable


def _left_to_process() -> Iterator[int]:
    for kind, counted in _PROCESS_LIMITS.items():
        limit, _ = resource.getrlimit(kind)
        if limit != resource.RLIM_INFINITY:
            yield limit - _kilobytes(PROC / "self/status", counted)


def _kilobytes(path: Path, name: str) -> int:
    """A field of one of the kernel's tables in kB, as bytes; boundless where there is no such field."""
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.removesuffix("kB")) * 1024
    return sys.maxsize


def _statistic(path: Path, name: str) -> int:
    """A field of a control group's statistics; 0 where there is no such field."""
    for line in path.read_text().splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0
