"""`python -m benches.runners`: a step of the native runner beside one that is not recorded, and transformers' modules.

All run the same plans on the same checkpoint in one process and take turns step by step, so that what else happens on
the machine falls on all. The time is that of the forward pass; router, scheduler and sampler are the same for all.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

from benches.machine import processor
from benches.serving.checkpoint import SHAPES, random_model
from orchestra.worker.assembly import Rank, assemble
from orchestra.worker.config import WorkerConfig
from tests.worker.plans import PlanBuilder

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples" / "models" / "demo"
# By what the table calls them: `--runner` and `--record-steps`.
RUNNERS = {
    "native": ("native", "auto"),
    "native, not recorded": ("native", "off"),
    "transformers' modules": ("hf", "off"),
}
# Before decoding, and of the prompt whose prefill is measured.
CONTEXT, PROMPT = 128, 512
NUM_BLOCKS = 512


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benches.runners", description=__doc__)
    parser.add_argument("--model", choices=list(SHAPES), default="60m", help="a random Llama")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=40, help="measured decode steps of each size")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--cache", type=Path, default=ROOT / "target" / "bench-models")
    return parser.parse_args()


def bring_up(checkpoint: Path, runner: str, dtype: str) -> Rank:
    """One rank of a row of `RUNNERS`."""
    name, record_steps = RUNNERS[runner]
    config = WorkerConfig(
        *(checkpoint, "", "", ""),
        runner=name,
        record_steps=record_steps,
        dtype=dtype,
        device="cpu",
        num_blocks=NUM_BLOCKS,
    )
    return assemble(config, lambda _done, _total: None)


def time_steps(
    ranks: dict[str, Rank], builder: PlanBuilder, scheduled: list[dict[str, int]]
) -> dict[str, float]:
    """Runs the same steps on every runner in turn; returns the median step of each, ms."""
    times: dict[str, list[float]] = {runner: [] for runner in ranks}
    for step in scheduled:
        plan = builder.plan(step)
        for runner, rank in ranks.items():
            start = time.perf_counter()
            rank.runner.forward(plan)
            times[runner].append((time.perf_counter() - start) * 1e3)
        for name in step:
            builder.append(name, plan.step_id % 1000)
    return {runner: statistics.median(spent) for runner, spent in times.items()}


def main() -> None:
    """Measures and prints the table."""
    args = parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    checkpoint = random_model(args.model, args.cache, DEMO)
    ranks = {runner: bring_up(checkpoint, runner, args.dtype) for runner in RUNNERS}
    rows = []
    builder = PlanBuilder(NUM_BLOCKS)
    for index in range(5):
        builder.add(f"long {index}", range(PROMPT))
    prefill = time_steps(ranks, builder, [{name: PROMPT} for name in builder.sequences])
    rows.append((f"prefill of {PROMPT} tokens", prefill))
    for batch in (1, 8, 32):
        builder = PlanBuilder(NUM_BLOCKS)
        names = [str(index) for index in range(batch)]
        for name in names:
            builder.add(name, range(CONTEXT))
            time_steps(ranks, builder, [{name: CONTEXT}])
        decode = time_steps(ranks, builder, [dict.fromkeys(names, 1)] * args.steps)
        rows.append((f"decode, batch {batch}", decode))
    print(f"{checkpoint.name}, {args.dtype}, {args.threads} threads, {processor()}\n")
    print("| step | " + " | ".join(f"{runner} ms" for runner in RUNNERS) + " | ratios to native |")
    print("|---" * (len(RUNNERS) + 2) + "|")
    for name, spent in rows:
        native, *others = (spent[runner] for runner in RUNNERS)
        times = " | ".join(f"{time:.1f}" for time in (native, *others))
        print(f"| {name} | {times} | {', '.join(f'{other / native:.2f}' for other in others)} |")


if __name__ == "__main__":
    main()
