"""`python -m benches.kv_moves`: what moving KV between two workers is worth.

Each pair of systems is two workers with a core each, and takes turns repeat by repeat:

- *fetch*: requests that share long prefixes, many for each at once. With `--kv-transfer auto` a worker that lacks a
  prefix pulls it from the other one; with `off` it computes it. Compared is the time to the first token.
- *split*: short prompts that decode all the while, and long prompts that come in between. One worker for prompts and
  one for decoding, beside two that do both. Compared is the time between tokens of the short ones.
- *loss*: a long prompt whose worker is killed in the middle of the answer. With `--write-through` the other worker has
  copies of its KV; else it computes the prompt again. Compared is how long the client waits for the next token.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import random
import statistics
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

from benches.machine import commit, processor
from benches.serving.checkpoint import random_model
from benches.serving.orchestra_system import Orchestra, serving
from tests.e2e.stack import eventually

if TYPE_CHECKING:
    import psutil

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "models" / "demo"
# Tokens, as the workloads below use them.
PREFIX, QUESTION, ANSWER = 1024, 32, 16
FAMILIES, PER_FAMILY = 4, 6
DECODERS, DECODED = 4, 160
LONG_PROMPT, LONG_PROMPTS = 1536, 6
# Tokens of an answer, and after how many its worker is killed.
LOST_ANSWER, LOST_AT = 120, 60
# Of each worker's cache, 16 tokens each: more than any of this needs.
BLOCKS = 4096

Figures = dict[str, float]
Work = Callable[[Orchestra, "Prompts"], Awaitable[Figures]]


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benches.kv_moves", description=__doc__)
    parser.add_argument("--model", default="60m", help="a random Llama of benches/serving")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=["fetch", "split", "loss"], help="one of the pairs")
    parser.add_argument("--out", type=Path, help="also save every figure as JSON here")
    return parser.parse_args()


def percentile(values: list[float], share: float) -> float:
    """Of a sample, by rank, in milliseconds from seconds."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1e3


class Prompts:
    """Random token ids; equal seeds give equal prompts, and unequal ones share nothing."""

    def __init__(self, vocab_size: int, seed: str) -> None:
        self._draw = random.Random(seed)
        self._ids = range(vocab_size // 8, vocab_size - 1)

    def tokens(self, count: int) -> list[int]:
        """New ones."""
        return [self._draw.choice(self._ids) for _ in range(count)]


async def shared_prefixes(system: Orchestra, prompts: Prompts) -> Figures:
    """One request brings each prefix in; then all others ask at once."""
    families = [prompts.tokens(PREFIX) for _ in range(FAMILIES)]

    async def ask(prefix: list[int]) -> float:
        line = await system.client.connect()
        moments = await system.client.stream(prefix + prompts.tokens(QUESTION), ANSWER, line)
        line.close()
        return moments[0]

    for prefix in families:
        await ask(prefix)
    waits = await asyncio.gather(*(ask(prefix) for prefix in families for _ in range(PER_FAMILY)))
    return {"TTFT p50 ms": percentile(waits, 0.5), "TTFT p99 ms": percentile(waits, 0.99)}


async def long_among_short(system: Orchestra, prompts: Prompts) -> Figures:
    """Short prompts decode while long ones come one after the other."""

    async def decode() -> list[float]:
        line = await system.client.connect()
        moments = await system.client.stream(prompts.tokens(QUESTION), DECODED, line)
        line.close()
        return [later - earlier for earlier, later in itertools.pairwise(moments)]

    async def interfere() -> list[float]:
        line = await system.client.connect()
        waits = []
        for _ in range(LONG_PROMPTS):
            moments = await system.client.stream(prompts.tokens(LONG_PROMPT), 2, line)
            waits.append(moments[0])
        line.close()
        return waits

    *decoded, waits = await asyncio.gather(*(decode() for _ in range(DECODERS)), interfere())
    gaps = [gap for one in decoded for gap in one]
    return {
        "ITL p50 ms": percentile(gaps, 0.5),
        "ITL p99 ms": percentile(gaps, 0.99),
        "TTFT p50 of long prompts ms": percentile(waits, 0.5),
    }


async def lost_worker(system: Orchestra, prompts: Prompts) -> Figures:
    """The worker of a stream is killed, and there are two again afterwards."""
    workers = system.serve.children("worker")
    before = {worker: cpu_s(worker) for worker in workers}

    def kill(num_events: int) -> None:
        if num_events == LOST_AT:
            max(workers, key=lambda worker: cpu_s(worker) - before[worker]).kill()

    line = await system.client.connect()
    moments = await system.client.stream(prompts.tokens(LONG_PROMPT), LOST_ANSWER, line, kill)
    line.close()
    eventually(lambda: system.serve.metrics()["orchestra_workers"] == len(workers), 120)
    gaps = [later - earlier for earlier, later in itertools.pairwise(moments)]
    return {
        "TTFT ms": moments[0] * 1e3,
        "ITL p50 ms": percentile(gaps, 0.5),
        "gap at the loss ms": max(gaps) * 1e3,
    }


def cpu_s(process: psutil.Process) -> float:
    """CPU seconds that a process has used."""
    times = process.cpu_times()
    return float(times.user + times.system)


def compare(
    name: str, flags: dict[str, list[str]], work: Work, args: argparse.Namespace
) -> dict[str, list[Figures]]:
    """Runs one workload on each system in turn, after one unmeasured run each; prints its table."""
    checkpoint = random_model(args.model, ROOT / "target" / "bench-models", DEMO)
    vocab_size = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    samples: dict[str, list[Figures]] = {system: [] for system in flags}
    with contextlib.ExitStack() as stack:
        common = ["--dtype", args.dtype, "--num-blocks", str(BLOCKS)]
        systems = {
            system: stack.enter_context(serving(checkpoint, [*common, *extra]))
            for system, extra in flags.items()
        }
        for repeat in range(-1, args.repeats):
            for system, running in systems.items():
                prompts = Prompts(vocab_size, f"{name}/{repeat}")
                figures = asyncio.run(_run(work, running, prompts))
                if repeat >= 0:
                    samples[system].append(figures)
                shown = ", ".join(f"{key} {value:.0f}" for key, value in figures.items())
                print(f"  {name} {repeat + 1}/{args.repeats} {system}: {shown}", file=sys.stderr)
        moved = {system: moves(running) for system, running in systems.items()}
    print(f"\n### {name}\n\n{table(samples, moved)}")
    return samples


async def _run(work: Work, system: Orchestra, prompts: Prompts) -> Figures:
    return await work(system, prompts)


def moves(system: Orchestra) -> int:
    """How often KV moved, as the router counted it."""
    lines = system.serve.get("/metrics").splitlines()
    found = [line for line in lines if line.startswith("orchestra_kv_moves_total")]
    return sum(int(float(line.rsplit(" ", 1)[1])) for line in found if 'outcome="moved"' in line)


def table(samples: dict[str, list[Figures]], moved: dict[str, int]) -> str:
    """Medians; the last row is the first system over the second, repeat by repeat."""
    first, second = samples
    keys = list(samples[first][0])
    rows = ["| | " + " | ".join(keys) + " | moves |", "|---" * (len(keys) + 2) + "|"]
    for system, runs in samples.items():
        medians = [statistics.median(run[key] for run in runs) for key in keys]
        cells = " | ".join(f"{value:.0f}" for value in medians)
        rows.append(f"| {system} | {cells} | {moved[system]} |")
    pairs = list(zip(samples[first], samples[second], strict=True))
    ratios = [statistics.median(a[key] / b[key] for a, b in pairs) for key in keys]
    rows.append("| ratio | " + " | ".join(f"{ratio:.2f}" for ratio in ratios) + " | |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Measures the pairs."""
    args = parse_args()
    command = "python -m benches.kv_moves " + " ".join(sys.argv[1:])
    print(f"- {processor()}, commit {commit()}, load at start {os.getloadavg()[0]:.1f}")
    print(f"- `{command.strip()}`")
    two = ["--replicas", "2"]
    fetch = {
        "fetch": [*two, "--kv-transfer", "auto"],
        "recompute": [*two, "--kv-transfer", "off"],
    }
    split = {"one prefill, one decode": ["--prefill", "1", "--decode", "1"], "two of both": two}
    kept = [*two, "--num-host-blocks", str(BLOCKS)]
    loss = {"write-through": [*kept, "--write-through"], "replay alone": kept}
    pairs: dict[str, tuple[str, dict[str, list[str]], Work]] = {
        "fetch": ("Shared prefixes", fetch, shared_prefixes),
        "split": ("Long prompts among short ones", split, long_among_short),
        "loss": ("A worker is killed", loss, lost_worker),
    }
    chosen = [args.only] if args.only else list(pairs)
    report = {pair: compare(*pairs[pair], args) for pair in chosen}
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
