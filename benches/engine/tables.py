"""What is printed: Markdown, medians over the repeats."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING

from benches.serving.workload import Cell, Sample

if TYPE_CHECKING:
    from benches.engine.limits import Limits, ModelSize

Samples = Mapping[str, Mapping[str, list[Sample]]]
OURS = "orchestra"


def speeds(samples: Samples, cells: list[Cell], limit: Limits, size: ModelSize) -> str:
    """Output tokens per second of each system, ours as a ratio of each rival's and as a fraction of the roofline."""
    names = list(next(iter(samples.values())))
    rivals = [name for name in names if name != OURS]
    head = [
        "cell",
        *(f"{name} tok/s" for name in names),
        *(f"/ {name}" for name in rivals),
        "of the roofline",
    ]
    rows = [_row(head), _row(["---"] * len(head))]
    for cell in cells:
        runs = samples[cell.name]
        medians = [statistics.median(run.tokens_per_s for run in runs[name]) for name in names]
        ratios = [ratio(runs[OURS], runs[name]) for name in rivals]
        computed = cell.prompt_tokens - cell.shared_prefix_tokens
        most = limit.tokens_per_s(size, cell.concurrency, computed, cell.output_tokens)
        rows.append(
            _row(
                [
                    cell.name,
                    *(f"{speed:.0f}" for speed in medians),
                    *(f"{one:.2f}" for one in ratios),
                    f"{100 * medians[names.index(OURS)] / most:.0f} %",
                ]
            )
        )
    return "\n".join(rows) + "\n"


def latencies(samples: Samples) -> str:
    """Time to the first token and between tokens, milliseconds."""
    names = list(next(iter(samples.values())))
    head = ["cell"]
    for name in names:
        head += [f"{name} TTFT p50", "ITL p50", "ITL p99"]
    rows = [_row(head), _row(["---"] * len(head))]
    for cell, runs in samples.items():
        row = [cell]
        for name in names:
            first = statistics.median(run.ttft_p50_ms for run in runs[name])
            row.append(f"{first:.0f}")
            gaps = sorted(gap for run in runs[name] for gap in run.gaps_s)
            row += [_percentile(gaps, 0.5), _percentile(gaps, 0.99)]
        rows.append(_row(row))
    return "\n".join(rows) + "\n"


def overheads(before: Mapping[str, float], after: Mapping[str, float], elapsed_s: float) -> str:
    """What is not the model's computing: planning, and all that lies between one step's end and the next one's begin.

    Args:
        before: the router's metrics before the cells.
        after: and after.
        elapsed_s: that the cells took. The beginning and the end of each, when nothing runs, count as overhead too.
    """
    spent = {name: after[name] - before.get(name, 0.0) for name in after}
    steps = spent["orchestra_worker_steps_total"]
    schedule = spent["orchestra_worker_schedule_seconds_total"] / steps * 1e6
    execute = spent["orchestra_worker_execute_seconds_total"] / steps * 1e6
    between = 100 * (1 - steps * execute / 1e6 / elapsed_s)
    return (
        f"A step of ours: planned in {schedule:.0f} µs, executed in {execute:.0f} µs ({steps:.0f} steps); "
        f"{between:.1f} % of the time lay between steps.\n"
    )


def ratio(ours: list[Sample], theirs: list[Sample]) -> float:
    """Of tokens per second, repeat by repeat: neighbours in time saw the same machine."""
    pairs = zip(ours, theirs, strict=True)
    return statistics.median(a.tokens_per_s / b.tokens_per_s for a, b in pairs)


def _percentile(ordered: list[float], share: float) -> str:
    if not ordered:
        return "-"
    return f"{ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1e3:.0f}"


def _row(values: list[str]) -> str:
    return "| " + " | ".join(values) + " |"
