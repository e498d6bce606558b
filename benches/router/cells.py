"""What every router is asked to carry, and what a run of it measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Words of a stream whose events are written back to back, and of one that is paced as an engine's.
BURST_WORDS = 64
PACED_WORDS = 32


@dataclass(frozen=True)
class Fleet:
    """The mock engines behind all routers of a group of cells."""

    engines: int
    paced: bool = False

    @property
    def flags(self) -> list[str]:
        """Their flags: an engine's pace is a first token after 20 ms and one more every 10 ms."""
        pace = ["--ttft", "20ms", "--itl", "10ms"] if self.paced else []
        return ["--ports", f"0:{self.engines}", "--print-ports", *pace]


@dataclass(frozen=True)
class Cell:
    """One row: a closed loop of `concurrency` clients."""

    fleet: Fleet
    body_kb: float
    concurrency: int
    streams: bool = False

    @property
    def words(self) -> int:
        """Words of each answer."""
        if not self.streams:
            return 8
        return PACED_WORDS if self.fleet.paced else BURST_WORDS

    @property
    def name(self) -> str:
        """As the tables call it."""
        kind = "unary"
        if self.streams:
            kind = "paced stream" if self.fleet.paced else f"{BURST_WORDS}-event stream"
        return f"{kind}, {self.body_kb:g} KB, c={self.concurrency}, {self.fleet.engines} engines"

    @property
    def flags(self) -> list[str]:
        """The load generator's flags."""
        flags = ["--body-bytes", str(int(self.body_kb * 1024)), "--words", str(self.words)]
        return [*flags, "-c", str(self.concurrency), *(["--stream"] if self.streams else [])]


@dataclass(frozen=True)
class Sample:
    """One system's run of one cell. Times in microseconds."""

    requests: int
    errors: int
    rps: float
    events_per_s: float
    latency_p50: float
    latency_p99: float
    ttft_p50: float
    ttft_p99: float
    gap_p99: float
    cpu_us: float
    rss_mb: float

    @classmethod
    def of(cls, report: dict[str, Any], cpu_s: float, rss_mb: float) -> Sample:
        """From the load generator's report and what the router used meanwhile."""
        latency, ttft = report["latency_us"], report["ttft_us"]
        requests = max(report["requests"], 1)
        return cls(
            requests=report["requests"],
            errors=sum(report["errors"].values()),
            rps=report["rps"],
            events_per_s=report["events_per_s"],
            latency_p50=latency["p50"],
            latency_p99=latency["p99"],
            ttft_p50=ttft["p50"],
            ttft_p99=ttft["p99"],
            gap_p99=report["gap_us"]["p99"],
            cpu_us=cpu_s / requests * 1e6,
            rss_mb=rss_mb,
        )


def quick_cells() -> list[Cell]:
    """A few minutes: one size, each kind of answer."""
    few = Fleet(4)
    return [
        *(Cell(few, 4, concurrency) for concurrency in (1, 16, 128)),
        *(Cell(few, 4, concurrency, streams=True) for concurrency in (1, 128)),
        Cell(Fleet(64), 4, 16),
        Cell(Fleet(4, paced=True), 4, 16, streams=True),
    ]


def full_cells() -> list[Cell]:
    """Every size, concurrency and number of engines."""
    few, paced = Fleet(4), Fleet(4, paced=True)
    loads = (1, 16, 128)
    return [
        *(Cell(few, size, concurrency) for size in (0.5, 4, 32) for concurrency in loads),
        *(Cell(few, 4, concurrency, streams=True) for concurrency in loads),
        *(Cell(Fleet(engines), 4, 16) for engines in (64, 512)),
        *(Cell(paced, 4, concurrency, streams=True) for concurrency in loads),
    ]
