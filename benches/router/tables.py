"""Medians of the samples as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from benches.router.cells import Cell, Sample
from benches.router.systems import DIRECT, NGINX, OURS

# Per cell, per system, one sample a repeat.
Samples = dict[Cell, dict[str, list[Sample]]]


def median(samples: list[Sample], value: Callable[[Sample], float]) -> float:
    """The median over repeats."""
    return statistics.median(value(sample) for sample in samples)


def above(samples: list[Sample], direct: list[Sample], value: Callable[[Sample], float]) -> float:
    """What a router adds to the engines alone: the median of the repeats' differences."""
    pairs = zip(samples, direct, strict=True)
    return statistics.median(value(sample) - value(alone) for sample, alone in pairs)


def cell_table(cell: Cell, systems: dict[str, list[Sample]]) -> str:
    """One row a system: its CPU, what it adds, its throughput and memory."""
    times = ["TTFT p50", "TTFT p99"] if cell.streams else []
    names = [*times, "latency p50", "latency p99"]
    rows = [
        f"### {cell.name}\n",
        f"| | CPU µs/request | {' | '.join(f'+ {name} ms' for name in names)} | answers/s | RSS MB | errors |",
        "|---|" + "---|" * (len(names) + 4),
    ]
    direct = systems[DIRECT]
    for name, samples in systems.items():
        values: list[Callable[[Sample], float]] = [
            lambda sample: sample.latency_p50,
            lambda sample: sample.latency_p99,
        ]
        if cell.streams:
            values = [lambda sample: sample.ttft_p50, lambda sample: sample.ttft_p99, *values]
        is_direct = name == DIRECT
        added = [
            f"({median(samples, value) / 1e3:.2f})"
            if is_direct
            else f"{above(samples, direct, value) / 1e3:.2f}"
            for value in values
        ]
        cpu = "-" if is_direct else f"{median(samples, lambda sample: sample.cpu_us):.0f}"
        rss = "-" if is_direct else f"{median(samples, lambda sample: sample.rss_mb):.0f}"
        rps = median(samples, lambda sample: sample.rps)
        errors = sum(sample.errors for sample in samples)
        rows.append(f"| {name} | {cpu} | {' | '.join(added)} | {rps:.0f} | {rss} | {errors} |")
    return "\n".join(rows) + "\n"


def ratio_table(cells: Samples) -> str:
    """Our CPU over the best rival's round-robin, and over nginx's, repeat by repeat."""
    rows = [
        "| cell | ours µs | best rival's round robin | ratio | of nginx |",
        "|---|---|---|---|---|",
    ]
    for cell, systems in cells.items():
        if OURS not in systems:
            continue
        rivals = {
            name: samples for name, samples in systems.items() if name.endswith("round_robin")
        }
        best = min(rivals, key=lambda name: median(rivals[name], lambda sample: sample.cpu_us))
        ours = systems[OURS]
        floor = _ratio(ours, systems[NGINX]) if NGINX in systems else "-"
        rows.append(
            f"| {cell.name} | {median(ours, lambda sample: sample.cpu_us):.0f} "
            f"| {best.split()[0]} {median(rivals[best], lambda sample: sample.cpu_us):.0f} "
            f"| {_ratio(ours, rivals[best])} | {floor} |"
        )
    return "\n".join(rows) + "\n"


def _ratio(ours: list[Sample], theirs: list[Sample]) -> str:
    pairs = zip(ours, theirs, strict=True)
    return f"{statistics.median(a.cpu_us / max(b.cpu_us, 1e-9) for a, b in pairs):.2f}"
