"""`python -m benches.serving`: the table of `benches/README.md`.

Both systems stay up for the whole run and take turns cell by cell, repeat by repeat, so that noise of a shared machine
falls on both alike. Medians over the repeats are printed and saved, with every single sample beside them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

from benches.machine import commit, processor
from benches.serving.checkpoint import SHAPES, random_model
from benches.serving.orchestra_system import Orchestra, serving
from benches.serving.transformers_system import Transformers, batching
from benches.serving.workload import Cell, Sample, default_cells

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "models" / "demo"


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benches.serving", description=__doc__)
    parser.add_argument(
        "--models",
        nargs="+",
        default=["demo", "60m"],
        help=f"`demo`, or a random Llama of {', '.join(SHAPES)}",
    )
    parser.add_argument("--dtype", default="float32", help="of both systems")
    parser.add_argument("--repeats", type=int, default=3, help="measured runs of each cell")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--cache", type=Path, default=ROOT / "target" / "bench-models")
    parser.add_argument("--out", type=Path, help="also save everything as JSON here")
    return parser.parse_args()


def measure(
    cells: list[Cell], repeats: int, ours: Orchestra, theirs: Transformers, vocab_size: int
) -> dict[str, dict[str, list[Sample]]]:
    """Runs every cell `repeats` times on both systems in turn, after one unmeasured run each."""
    samples: dict[str, dict[str, list[Sample]]] = {
        cell.name: {"orchestra": [], "transformers": []} for cell in cells
    }
    for repeat in range(-1, repeats):
        for cell in cells:
            prompts = cell.prompts(repeat, vocab_size)
            pair = {"orchestra": ours.run(cell, prompts), "transformers": theirs.run(cell, prompts)}
            if repeat < 0:
                continue
            for system, sample in pair.items():
                samples[cell.name][system].append(sample)
            speeds = ", ".join(f"{name} {run.tokens_per_s:.0f}" for name, run in pair.items())
            print(
                f"  repeat {repeat + 1}/{repeats} {cell.name}: {speeds} tokens/s", file=sys.stderr
            )
    return samples


def table(samples: dict[str, dict[str, list[Sample]]]) -> str:
    """The medians as a Markdown table."""
    rows = [
        "| cell | orchestra tok/s | transformers tok/s | ratio | TTFT p50 ms, ours | theirs |",
        "|---|---|---|---|---|---|",
    ]
    for name, pair in samples.items():
        ours, theirs = pair["orchestra"], pair["transformers"]
        speed = [statistics.median(run.tokens_per_s for run in runs) for runs in (ours, theirs)]
        # The ratio is taken repeat by repeat: neighbours in time saw the same machine.
        ratio = statistics.median(
            a.tokens_per_s / b.tokens_per_s for a, b in zip(ours, theirs, strict=True)
        )
        ttft = [statistics.median(run.ttft_p50_ms for run in runs) for runs in (ours, theirs)]
        rows.append(
            f"| {name} | {speed[0]:.0f} | {speed[1]:.0f} | {ratio:.2f} | {ttft[0]:.0f} | {ttft[1]:.0f} |"
        )
    return "\n".join(rows)


def overheads(ours: Orchestra, before: dict[str, float]) -> dict[str, float]:
    """What the router and the step scheduler cost over the run."""
    after = ours.serve.metrics()
    spent = {name: after[name] - before.get(name, 0.0) for name in after}
    steps = spent["orchestra_worker_steps_total"]
    return {
        "requests": ours.requests,
        "router_cpu_us_per_request": ours.router_cpu_s / ours.requests * 1e6,
        "steps": steps,
        "schedule_us_per_step": spent["orchestra_worker_schedule_seconds_total"] / steps * 1e6,
        "execute_us_per_step": spent["orchestra_worker_execute_seconds_total"] / steps * 1e6,
    }


def run_model(name: str, args: argparse.Namespace) -> dict[str, object]:
    """Measures one checkpoint and prints its table."""
    checkpoint = DEMO if name == "demo" else random_model(name, args.cache, DEMO)
    vocab_size = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    with contextlib.ExitStack() as stack:
        theirs = stack.enter_context(batching(checkpoint, args.dtype, args.threads))
        ours = stack.enter_context(serving(checkpoint, ["--dtype", args.dtype]))
        before = ours.serve.metrics()
        samples = measure(default_cells(), args.repeats, ours, theirs, vocab_size)
        costs = overheads(ours, before)
    print(f"\n### {checkpoint.name}, {args.dtype}\n\n{table(samples)}\n")
    print(
        f"Router CPU {costs['router_cpu_us_per_request']:.0f} µs per request (64 streamed events each); "
        f"step scheduler {costs['schedule_us_per_step']:.1f} µs per step beside "
        f"{costs['execute_us_per_step']:.0f} µs in the model ({costs['steps']:.0f} steps)."
    )
    return {
        "model": checkpoint.name,
        "samples": {
            cell: {system: [asdict(run) for run in runs] for system, runs in pair.items()}
            for cell, pair in samples.items()
        },
        "overheads": costs,
    }


def machine() -> dict[str, str]:
    """What the figures belong to."""
    import torch
    import transformers

    return {
        "cpu": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
        "command": "python -m benches.serving " + " ".join(sys.argv[1:]),
    }


def main() -> None:
    """Measures every model asked for."""
    args = parse_args()
    report = {"machine": machine(), "models": [run_model(name, args) for name in args.models]}
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
