"""What the router's process holds over time, and whether that grows."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import psutil

from tests.faults.processes import Router, call

# A run's memory may grow in its second half by this share of it, or by this much where that is more. Pages that the
# allocator has not given back come and go by some hundred kilobytes. One allocation of the smallest size, 16 bytes,
# that is lost with each request exceeds a megabyte after 65,000 requests, and 6 KB lost with each kill after 180 kills.
GROWTH_SHARE_MAX = 0.02
GROWTH_MB_MAX = 1.0


@dataclass(frozen=True)
class Sample:
    """The router at one time."""

    at_s: float
    rss_mb: float
    descriptors: int
    threads: int
    # Of one core, since the sample before.
    cpu: float
    running: int
    waiting: int
    connections: int
    workers: int
    engines: int
    # Lines of the access log so far.
    requests: int


def figures(router: Router) -> dict[str, float]:
    """All metrics by name and labels, and the sum over its labels by each name."""
    found: dict[str, float] = {}
    for line in call(router.address[1], "GET", "/metrics")[1].decode().splitlines():
        if not line.startswith("#"):
            series, _, value = line.rpartition(" ")
            name = series.split("{")[0]
            found[name] = found.get(name, 0.0) + float(value)
            if name != series:
                found[series] = float(value)
    return found


class Sampler:
    """Takes samples of a router."""

    def __init__(self, router: Router) -> None:
        self.router = router
        self.process = psutil.Process(router.process.pid)
        self.samples: list[Sample] = []
        self.started = time.monotonic()
        self.process.cpu_percent()

    def take(self, requests: int) -> Sample:
        """One more."""
        metrics = figures(self.router)
        sample = Sample(
            at_s=time.monotonic() - self.started,
            rss_mb=self.process.memory_info().rss / 2**20,
            descriptors=self.process.num_fds(),
            threads=self.process.num_threads(),
            cpu=self.process.cpu_percent() / 100,
            running=int(metrics["orchestra_requests_running"]),
            waiting=int(metrics["orchestra_requests_waiting"]),
            connections=int(metrics['orchestra_connections{door="http"}']),
            workers=int(metrics["orchestra_workers"]),
            engines=int(metrics["orchestra_engine_up"]),
            requests=requests,
        )
        self.samples.append(sample)
        return sample


@dataclass(frozen=True)
class Growth:
    """A straight line through the memory of a run's second half (least squares)."""

    # By the line, from its first to its last sample.
    mb: float
    mb_per_hour: float
    # Of the samples around the line, one standard deviation.
    noise_mb: float
    allowed_mb: float

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Growth:
        """The second half of a run, of at least three samples."""
        half = samples[len(samples) // 2 :]
        times = [sample.at_s for sample in half]
        memory = [sample.rss_mb for sample in half]
        slope, start = statistics.linear_regression(times, memory)
        around = [rss - start - slope * at for at, rss in zip(times, memory, strict=True)]
        return cls(
            mb=slope * (times[-1] - times[0]),
            mb_per_hour=slope * 3600,
            noise_mb=statistics.pstdev(around),
            allowed_mb=max(GROWTH_MB_MAX, GROWTH_SHARE_MAX * statistics.fmean(memory)),
        )

    @property
    def is_flat(self) -> bool:
        """Whether the line rises by no more than is allowed."""
        return self.mb <= self.allowed_mb


def plot(samples: Sequence[Sample], columns: int = 72, rows: int = 12) -> str:
    """Memory over time, in characters."""
    top = max(sample.rss_mb for sample in samples)
    length = samples[-1].at_s or 1.0
    grid = [[" "] * columns for _ in range(rows)]
    for sample in samples:
        column = min(int(sample.at_s / length * columns), columns - 1)
        row = min(int(sample.rss_mb / top * rows), rows - 1)
        grid[rows - 1 - row][column] = "*"
    lines = [
        f"{top * (rows - row) / rows:7.1f} |{''.join(line).rstrip()}"
        for row, line in enumerate(grid)
    ]
    return "\n".join(
        [*lines, f"{'MB':>7} +{'-' * columns}", f"{'0':>9}{length / 60:>{columns}.1f} min"]
    )
