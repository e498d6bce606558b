"""`python -m benches.router`: ours, its rivals and nginx in front of the same mock engines.

All routers of a group stay up and take turns, cell by cell and repeat by repeat, so that the noise of a shared machine
falls on all alike. Routers are on core 0, engines and load on core 1. CPU per request
is read from the kernel, for the whole router process; it is the figure that noise disturbs least.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from benches.machine import commit, processor
from benches.router.cells import Cell, Fleet, Sample, full_cells, quick_cells
from benches.router.processes import cpu_s, load, mock_engines, rss_mb
from benches.router.systems import DIRECT, NGINX, OURS, RIVALS, Router, System, started, systems
from benches.router.tables import Samples, cell_table, ratio_table
from tests.faults.processes import build, call

MEMORY_PROMPTS = 20_000
# Of a body of 4 KB, as text that is not tokenised is counted.
BODY_TOKENS = 1024


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benches.router", description=__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a few cells (the default)")
    size.add_argument("--full", action="store_true", help="the whole grid: about an hour")
    parser.add_argument("--repeats", type=int, default=3, help="measured runs of each cell")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each run")
    parser.add_argument(
        "--policies",
        nargs="+",
        default=["round_robin"],
        help="of the rivals; cache_aware is their answer to our prefix-aware default",
    )
    parser.add_argument("--only", nargs="+", help="systems by the beginning of their name")
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory table")
    parser.add_argument("--out", type=Path, help="also save every sample as JSON here")
    return parser.parse_args()


def run_cell(cell: Cell, router: Router, seed: int, seconds: float) -> Sample:
    """One run of one cell through one router."""
    before = cpu_s(router.pid) if router.pid else 0.0
    report = load(router.ports, [*cell.flags, "--seconds", str(seconds), "--seed", str(seed)])
    spent = cpu_s(router.pid) - before if router.pid else 0.0
    return Sample.of(report, spent, rss_mb(router.pid) if router.pid else 0.0)


def measure(cells: list[Cell], chosen: list[System], args: argparse.Namespace) -> Samples:
    """All cells: those of one fleet share its routers."""
    samples: Samples = {}
    for fleet in dict.fromkeys(cell.fleet for cell in cells):
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            engines = stack.enter_context(mock_engines(fleet.flags, folder))
            routers = [Router(DIRECT, engines, None)]
            routers += [stack.enter_context(started(one, engines, folder)) for one in chosen]
            for cell in (cell for cell in cells if cell.fleet == fleet):
                samples[cell] = turns(cell, routers, args)
                print(cell_table(cell, samples[cell]), flush=True)
    return samples


def turns(cell: Cell, routers: list[Router], args: argparse.Namespace) -> dict[str, list[Sample]]:
    """Every router's runs of a cell, after one unmeasured run each."""
    samples: dict[str, list[Sample]] = {router.name: [] for router in routers}
    for repeat in range(-1, args.repeats):
        for router in routers:
            seconds = args.seconds if repeat >= 0 else min(args.seconds, 1.0)
            sample = run_cell(cell, router, repeat + 2, seconds)
            if repeat >= 0:
                samples[router.name].append(sample)
        print(f"  {cell.name}: {repeat + 1}/{args.repeats}", file=sys.stderr, flush=True)
    return samples


def memory_table(chosen: list[System]) -> str:
    """Resident memory: idle, after a load of few prompts, and of each unlike prompt after that."""
    rows = [
        f"| | idle MB | after a warm load MB | after {MEMORY_PROMPTS} unlike 4 KB prompts MB | KB each | found again |",
        "|---|---|---|---|---|---|",
    ]
    for system in chosen:
        if system.name == NGINX:
            continue
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            # So many that what our router takes each to remember, 2 MiB of text, holds all prompts.
            engines = stack.enter_context(mock_engines(Fleet(64).flags, folder))
            router = stack.enter_context(started(system, engines, folder))
            assert router.pid is not None
            stages = [rss_mb(router.pid)]
            # The first load fills the buffers with few prompts, so that the second one adds memory of prompts alone.
            for distinct, seed in ((64, 9), (0, 10)):
                flags = ["--prefixes", "0", "--distinct", str(distinct), "--seed", str(seed)]
                flags += ["--count", str(MEMORY_PROMPTS), "--seconds", "120", "-c", "16"]
                load(router.ports, flags)
                stages.append(rss_mb(router.pid))
            known = found_again(router, flags) if system.name == OURS else ""
        each = (stages[2] - stages[1]) * 1e3 / MEMORY_PROMPTS
        figures = " | ".join(f"{mb:.0f}" for mb in stages)
        rows.append(f"| {system.name} | {figures} | {each:.2f} | {known} |")
    return "\n".join(rows) + "\n"


def found_again(router: Router, flags: list[str]) -> str:
    """The share of the same prompts, asked once more, that our router expects its engines to have.

    What is forgotten costs no memory, and proves nothing.
    """

    def predicted() -> float:
        lines = call(router.ports[0], "GET", "/metrics")[1].decode().splitlines()
        name = "orchestra_cached_tokens_predicted_total"
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))

    before = predicted()
    load(router.ports, flags)
    return f"{(predicted() - before) / (MEMORY_PROMPTS * BODY_TOKENS):.0%}"


def machine() -> dict[str, str]:
    """What the figures belong to."""
    return {
        "cpu": processor(),
        "load at start": f"{os.getloadavg()[0]:.1f}",
        "rivals": ", ".join(f"{name} {version}" for name, version in RIVALS.items()),
        "commit": commit(),
        "command": "python -m benches.router " + " ".join(sys.argv[1:]),
    }


def main() -> None:
    """Measures the cells asked for and prints their tables."""
    args = parse_args()
    build()
    about = machine()
    print("\n".join(f"- {key}: {value}" for key, value in about.items()) + "\n")
    chosen = systems(args.policies)
    if args.only:
        chosen = [one for one in chosen if one.name.startswith(tuple(args.only))]
    samples = measure(full_cells() if args.full else quick_cells(), chosen, args)
    print(f"### CPU beside the best rival\n\n{ratio_table(samples)}")
    memory = "" if args.no_memory else memory_table(chosen)
    print(f"### Memory\n\n{memory}" if memory else "")
    if args.out:
        saved = {
            cell.name: {name: [asdict(one) for one in runs] for name, runs in by_name.items()}
            for cell, by_name in samples.items()
        }
        report = {"machine": about, "samples": saved, "memory": memory}
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
