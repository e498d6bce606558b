"""What became of the answers, fault by fault."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest rank; 0 of nothing."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0


@dataclass
class Report:
    """The sums of a run."""

    injected: Counter[str] = field(default_factory=Counter)
    # Gaps of continued answers by the fault before them, seconds.
    replays: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    gaps: list[float] = field(default_factory=list)
    whole: int = 0
    # Each with what is needed to look for it in a log.
    lost: list[str] = field(default_factory=list)

    @property
    def spacing_s(self) -> float:
        """The normal time between two pieces."""
        return statistics.median(self.gaps) if self.gaps else 0.0

    def above_ms(self, gaps: Sequence[float], share: float) -> float:
        """A percentile of the time that replays add to the normal spacing, milliseconds."""
        return (percentile(gaps, share) - self.spacing_s) * 1e3

    def table(self, title: str) -> str:
        """Everything, for people."""
        lines = [
            "",
            f"{title}: {sum(self.injected.values())} faults, {self.whole + len(self.lost)} answers, "
            f"{self.whole} whole, {len(self.lost)} lost",
            f"normal spacing {self.spacing_s * 1e3:.1f} ms p50, {percentile(self.gaps, 0.99) * 1e3:.1f} ms p99; "
            "a replay's gap is what it adds to that",
            f"{'fault':<16}{'injected':>9}{'replays':>9}{'gap p50 ms':>12}{'gap p99 ms':>12}",
        ]
        for fault, count in sorted(self.injected.items()):
            lines.append(self._row(fault, count, self.replays[fault]))
        everything = [gap for gaps in self.replays.values() for gap in gaps]
        lines.append(self._row("all", sum(self.injected.values()), everything))
        lines += [f"  LOST: {loss}" for loss in self.lost[:20]]
        return "\n".join(lines)

    def _row(self, name: str, injected: int, gaps: list[float]) -> str:
        times = ["-", "-"]
        if gaps:
            times = [f"{self.above_ms(gaps, share):.1f}" for share in (0.5, 0.99)]
        return f"{name:<16}{injected:>9}{len(gaps):>9}{times[0]:>12}{times[1]:>12}"
