"""Waits until nobody else computes: a figure taken beside others says nothing."""

from __future__ import annotations

import time

import psutil

# Cores that others may use, and how long that is looked at.
OTHERS_MAX = 0.15
LOOK_S = 0.5


def await_quiet(ours: set[int], timeout_s: float = 60.0) -> float:
    """Sleeps until all but some processes use little; gives up waiting after a while.

    Args:
        ours: process ids whose use is not counted, nor that of their children.
        timeout_s: how long to wait.

    Returns:
        Cores that others used when it returned.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        used = _others(ours)
        if used < OTHERS_MAX or time.monotonic() > deadline:
            return used


def stolen_s() -> float:
    """Seconds of all cores together that the host took away from whoever wanted them.

    0 where the system does not count them.
    """
    return float(getattr(psutil.cpu_times(), "steal", 0.0))


def _others(ours: set[int]) -> float:
    before = _seconds(ours)
    began = time.monotonic()
    time.sleep(LOOK_S)
    after = _seconds(ours)
    spent = sum(used - before.get(pid, used) for pid, used in after.items())
    return spent / (time.monotonic() - began)


def _seconds(ours: set[int]) -> dict[int, float]:
    """CPU seconds of each process that is not ours."""
    known = set(ours)
    for pid in ours:
        known |= {child.pid for child in psutil.Process(pid).children(recursive=True)}
    used = {}
    for process in psutil.process_iter(["cpu_times"]):
        times = process.info["cpu_times"]
        if process.pid not in known and times is not None:
            used[process.pid] = times.user + times.system
    return used
