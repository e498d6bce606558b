"""`python -m benches.router.tokenising`: the path that tokenises and routes by token ids, beside Dynamo's frontend.

Both get the same prompts from the same load generator, have the same tokeniser, and two workers each that compute
nothing: ours are Orchestra's agent around a model of hashes, Dynamo's are its mocker. Both learn from KV events which
worker holds what. They take turns, on core 0; workers and load are on core 1. CPU per request is that of the router's
process alone, read from the kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from benches.machine import commit, processor
from benches.router.cells import Sample
from benches.router.processes import cpu_s, load, rss_mb
from benches.router.systems import OURS, Router
from benches.router.tables import median
from benches.router.tokenising_systems import RIVAL, dynamo, orchestra
from tests.faults.processes import build, call

NUM_WORKERS = 2
# Of each answer: the prompt is what costs.
WORDS = 8
# The counter of prompt tokens that each of them has.
TOKENS = {OURS: "orchestra_prompt_tokens_total", RIVAL: "dynamo_frontend_input_sequence_tokens_sum"}


@dataclass(frozen=True)
class Cell:
    """One sort of prompts, from so many clients."""

    name: str
    body_bytes: int
    # Of the system message that all prompts share; 0: they share nothing.
    shared_bytes: int
    # Ours should cost at most this share of the rival's.
    bar: float
    concurrency: int

    @property
    def flags(self) -> list[str]:
        """The load generator's."""
        prompts = ["--prefixes", "0"]
        if self.shared_bytes:
            prompts = ["--prefixes", "1", "--prefix-bytes", str(self.shared_bytes)]
        size = ["--body-bytes", str(self.body_bytes), "--words", str(WORDS)]
        return [*prompts, *size, "-c", str(self.concurrency)]


@dataclass(frozen=True)
class Run:
    """What one system took for one cell."""

    sample: Sample
    # Of a prompt, by the system's own count.
    tokens: float


def cells(concurrencies: list[int]) -> list[Cell]:
    """Short and long prompts, repeated and not."""
    found = []
    for concurrency in concurrencies:
        found += [
            Cell("short system prompt, repeated", 510, 290, 0.3, concurrency),
            Cell("4 KB system prompt, repeated", 4096, 3850, 0.3, concurrency),
            Cell("short, never the same", 510, 0, 0.7, concurrency),
            Cell("4 KB of random words, never the same", 4096, 0, 0.7, concurrency),
        ]
    return found


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benches.router.tokenising", description=__doc__
    )
    parser.add_argument("--repeats", type=int, default=3, help="measured runs of each cell")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each run")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[16, 128])
    return parser.parse_args()


def prompt_tokens(router: Router) -> float:
    """All that it has counted."""
    name = TOKENS[router.name]
    lines = call(router.ports[0], "GET", "/metrics")[1].decode().splitlines()
    found = [line for line in lines if line.split("{")[0].split(" ")[0] == name]
    return sum(float(line.rsplit(" ", 1)[1]) for line in found)


def run_cell(cell: Cell, router: Router, seed: int, seconds: float) -> Run:
    """One run of one cell through one router."""
    assert router.pid is not None
    before, tokens = cpu_s(router.pid), prompt_tokens(router)
    report = load(router.ports, [*cell.flags, "--seconds", str(seconds), "--seed", str(seed)])
    sample = Sample.of(report, cpu_s(router.pid) - before, rss_mb(router.pid))
    return Run(sample, (prompt_tokens(router) - tokens) / sample.requests)


def measure(cell: Cell, routers: list[Router], args: argparse.Namespace) -> dict[str, list[Run]]:
    """Both take turns, after one unmeasured run each."""
    runs: dict[str, list[Run]] = {router.name: [] for router in routers}
    for repeat in range(-1, args.repeats):
        for router in routers:
            run = run_cell(cell, router, repeat + 2, args.seconds)
            if repeat >= 0:
                runs[router.name].append(run)
    return runs


def row(cell: Cell, runs: dict[str, list[Run]]) -> str:
    """The cell's row."""
    ours, theirs = ([run.sample for run in runs[name]] for name in (OURS, RIVAL))
    ratio = statistics.median(
        mine.cpu_us / other.cpu_us for mine, other in zip(ours, theirs, strict=True)
    )
    tokens = [f"{statistics.median(run.tokens for run in of):.0f}" for of in runs.values()]
    cpu = [f"{median(of, lambda sample: sample.cpu_us):.0f}" for of in (ours, theirs)]
    rps = [f"{median(of, lambda sample: sample.rps):.0f}" for of in (ours, theirs)]
    errors = sum(sample.errors for sample in [*ours, *theirs])
    return (
        f"| {cell.name}, c={cell.concurrency} | {' / '.join(dict.fromkeys(tokens))} | {cpu[0]} | {cpu[1]} "
        f"| {ratio:.2f} | {cell.bar} | {rps[0]} | {rps[1]} | {errors} |"
    )


def main() -> None:
    """Measures and prints a row for each cell."""
    args = parse_args()
    build()
    print(
        f"- {processor()}, commit {commit()}, load at start {os.getloadavg()[0]:.1f}\n"
        f"- `python -m benches.router.tokenising {' '.join(sys.argv[1:])}`\n\n"
        "| prompts | tokens | ours, CPU µs/request | Dynamo, CPU µs/request | ratio | at most "
        "| ours, answers/s | Dynamo, answers/s | errors |\n"
        "|---|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        routers = [stack.enter_context(start(folder, NUM_WORKERS)) for start in (orchestra, dynamo)]
        for cell in cells(args.concurrency):
            print(row(cell, measure(cell, routers, args)), flush=True)


if __name__ == "__main__":
    main()
