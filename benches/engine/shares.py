"""How evenly the cores read memory, which bounds what ranks with equal shares of a model can reach.

A step of `--tp` ranks is through when the slowest has read its share. Threads of one process take the next piece when
they are through with one, so that a faster core reads more. On a shared host cores are seldom alike for long.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from orchestra.worker.linear import CpuLinear

if TYPE_CHECKING:
    from multiprocessing.synchronize import Barrier

# Of each core: far more than its caches hold.
STREAM_BYTES = 128 << 20
SECONDS = 2.0
# Until every process has loaded torch.
START_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Shares:
    """What each core reads while the others do too."""

    bytes_per_s: list[float]

    @property
    def evenness(self) -> float:
        """Of the speed of shares that fit the cores, what equal ones reach: 1 where all are alike."""
        return len(self.bytes_per_s) * min(self.bytes_per_s) / sum(self.bytes_per_s)

    def __str__(self) -> str:
        """For people."""
        speeds = " and ".join(f"{speed / 1e9:.1f}" for speed in self.bytes_per_s)
        return (
            f"cores read {speeds} GB/s at a time, of which equal shares reach {self.evenness:.2f}"
        )


def measure() -> Shares:
    """Has every core read its own memory for some seconds, all at the same time."""
    cores = sorted(os.sched_getaffinity(0))
    context = multiprocessing.get_context("spawn")
    start, ends = context.Barrier(len(cores)), []
    for core in cores:
        receiver, sender = context.Pipe(duplex=False)
        context.Process(target=_read, args=(core, start, sender), daemon=True).start()
        ends.append(receiver)
    return Shares([float(end.recv()) for end in ends])


def _read(core: int, start: Barrier, result: multiprocessing.connection.Connection) -> None:
    """Reads as one row times a matrix does, on one core."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    weights = CpuLinear(torch.ones(STREAM_BYTES // 4096 // 4, 4096), None)
    row = torch.ones(1, 4096)
    weights(row)
    start.wait(START_TIMEOUT_S)
    began, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - began) < SECONDS:
        weights(row)
        count += 1
    result.send(count * STREAM_BYTES / elapsed)
