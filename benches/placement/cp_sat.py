"""`python -m benches.placement.cp_sat`: how much of the optimum the scheduler places when gangs arrive together.

Needs `pip install ortools`. Each instance has eight GPUs of 32 extents, in one domain or in two, and more gangs than
fit. CP-SAT chooses the gangs with most memory in all, with a proof; the scheduler gets the same gangs one by one and
as one batch, through `cargo run --release -p orchestra-core --example place_batch`. Nothing ends, so where memory lies
on a GPU does not matter to the optimum: sizes that fit in sum can be laid one behind the other.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from ortools.sat.python import cp_model

ROOT = Path(__file__).resolve().parents[2]
EXTENTS = 32
NUM_GPUS = 8


@dataclass(frozen=True)
class Instance:
    """Gangs as (GPUs, extents on each), in order of arrival."""

    num_domains: int
    extents: int
    gangs: list[tuple[int, int]]


def draw(seed: int) -> Instance:
    """An instance of 18 to 42 gangs that ask for 1.0 to 1.5 times the memory there is."""
    rng = random.Random(seed)
    while True:
        num_domains = rng.choice([1, 2])
        widths = [width for width in (1, 2, 4, 8) if width <= NUM_GPUS // num_domains]
        wanted = rng.uniform(1.0, 1.5) * NUM_GPUS * EXTENTS
        gangs: list[tuple[int, int]] = []
        while sum(width * size for width, size in gangs) < wanted:
            size = round(rng.lognormvariate(1.6, 0.8))
            gangs.append((rng.choice(widths), min(max(size, 1), EXTENTS * 3 // 4)))
        if 18 <= len(gangs) <= 42:
            return Instance(num_domains, EXTENTS, gangs)


def optimum(instance: Instance, seconds: float) -> tuple[int, bool]:
    """The most extents that can be placed, and whether that is proven."""
    model = cp_model.CpModel()
    per_domain = NUM_GPUS // instance.num_domains
    load: list[list[cp_model.LinearExpr]] = [[] for _ in range(NUM_GPUS)]
    placed = []
    for number, (width, size) in enumerate(instance.gangs):
        homes = [model.new_bool_var(f"{number} in {d}") for d in range(instance.num_domains)]
        model.add_at_most_one(homes)
        for domain, home in enumerate(homes):
            gpus = range(domain * per_domain, (domain + 1) * per_domain)
            on = [model.new_bool_var(f"{number} on {gpu}") for gpu in gpus]
            model.add(sum(on) == width * home)
            for gpu, chosen in zip(gpus, on, strict=True):
                load[gpu].append(size * chosen)
            placed.append(width * size * home)
    for terms in load:
        model.add(sum(terms) <= instance.extents)
    model.maximize(sum(placed))
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = seconds
    solver.parameters.num_workers = 1
    status = solver.solve(model)
    return round(solver.objective_value), status == cp_model.OPTIMAL


def schedule(instances: list[Instance]) -> list[dict[str, int]]:
    """Extents that the scheduler places of each instance: one by one, and as a batch."""
    command = ["cargo", "run", "-q", "--release", "-p", "orchestra-core"]
    lines = "".join(json.dumps(asdict(instance)) + "\n" for instance in instances)
    done = subprocess.run(
        [*command, "--example", "place_batch"],
        cwd=ROOT,
        input=lines,
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def main() -> None:
    """Prints a line per instance, and the means."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--instances", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=20, help="for each proof")
    args = parser.parse_args()
    instances = [draw(seed) for seed in range(args.instances)]
    ratios: dict[str, list[float]] = {"one by one": [], "batch": []}
    num_proven = 0
    for seed, placed in enumerate(schedule(instances)):
        best, is_proven = optimum(instances[seed], args.seconds)
        num_proven += is_proven
        for name, values in ratios.items():
            values.append(placed[name] / best * 100)
        gangs = len(instances[seed].gangs)
        mark = "" if is_proven else " (not proven)"
        print(f"seed {seed:2}: {gangs:2} gangs, optimum {best}{mark}, scheduler {placed}")
    print(f"{num_proven} of {len(instances)} optima proven")
    for name, values in ratios.items():
        print(
            f"{name}: mean {statistics.mean(values):.1f} %, min {min(values):.1f} % of the optimum"
        )


if __name__ == "__main__":
    main()
