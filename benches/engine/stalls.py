"""What long prompts do to those who decode meanwhile: the time between tokens, with and without them."""

from __future__ import annotations

import asyncio
import random
import statistics
from itertools import pairwise
from typing import TYPE_CHECKING

from benches.serving.orchestra_system import Orchestra, serving

if TYPE_CHECKING:
    from pathlib import Path

STREAMS = 16
PROMPT, OUTPUT = 32, 160
LONG_PROMPT = 4000
EVERY_S = 1.0
# How long a step may last, as a multiple of the undisturbed median: some steps last longer than they should.
TARGET = 1.3


def measure(checkpoint: Path, dtype: str, repeats: int) -> str:
    """Measures both in turns, `repeats` times; returns a Markdown table.

    The undisturbed time between tokens is measured first, on a server of its own, and the target of the measured one
    set by it, as an operator would.

    Args:
        checkpoint: of the model.
        dtype: of it.
        repeats: of each.
    """
    flags = ["--dtype", dtype, "--max-model-len", "8192", "--max-num-seqs", "64"]
    with serving(checkpoint, flags) as server:
        # The first of the two warms up.
        runs = [asyncio.run(_gaps(server, run, is_disturbed=False)) for run in range(2)]
        undisturbed = statistics.median(runs[1])
    target = max(1, round(TARGET * undisturbed * 1e3))
    gaps: dict[bool, list[list[float]]] = {False: [], True: []}
    with serving(checkpoint, [*flags, "--tpot-target-ms", str(target)]) as server:
        for repeat in range(-1, repeats):
            for is_disturbed in (False, True):
                taken = asyncio.run(_gaps(server, 1 + repeat, is_disturbed=is_disturbed))
                if repeat >= 0:
                    gaps[is_disturbed].append(sorted(taken))
    rows = [
        f"{STREAMS} streams, a prompt of {LONG_PROMPT} tokens each second, --tpot-target-ms {target}",
        "",
        "| | ITL p50 ms | ITL p99 ms |",
        "|---|---|---|",
    ]
    medians = {}
    for is_disturbed, name in ((False, "alone"), (True, "among long prompts")):
        middle, last = (_median_of(gaps[is_disturbed], share) for share in (0.5, 0.99))
        medians[is_disturbed] = last
        rows.append(f"| {name} | {middle:.1f} | {last:.1f} |")
    rows.append(f"| ratio of p99 | | {medians[True] / medians[False]:.2f} |")
    return "\n".join(rows)


def _median_of(runs: list[list[float]], share: float) -> float:
    """The median over the runs of a percentile, in milliseconds."""
    each = [run[min(len(run) - 1, int(share * len(run)))] for run in runs]
    return statistics.median(each) * 1e3


async def _gaps(server: Orchestra, seed: int, *, is_disturbed: bool) -> list[float]:
    """Seconds between the tokens of the streams, from when all of them had their first."""
    draw = random.Random(f"{seed}/{is_disturbed}")

    def prompt(length: int) -> list[int]:
        return [draw.randint(4000, 31000) for _ in range(length)]

    async def stream() -> list[float]:
        line = await server.client.connect()
        moments = await server.client.stream(prompt(PROMPT), OUTPUT, line)
        line.close()
        return moments

    async def disturb() -> None:
        async def ask() -> None:
            line = await server.client.connect()
            await server.client.stream(prompt(LONG_PROMPT), 1, line)
            line.close()

        asked: list[asyncio.Task[None]] = []
        try:
            while True:
                await asyncio.sleep(EVERY_S)
                asked.append(asyncio.create_task(ask()))
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)

    others = asyncio.create_task(disturb()) if is_disturbed else None
    moments = await asyncio.gather(*(stream() for _ in range(STREAMS)))
    if others is not None:
        others.cancel()
        await asyncio.gather(others, return_exceptions=True)
    began = max(each[0] for each in moments)
    return [
        after - before for each in moments for before, after in pairwise(each) if before >= began
    ]
