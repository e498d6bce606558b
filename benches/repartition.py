"""`python -m benches.repartition`: a pipeline of which one stage is slow, with static splits and with layers that move.

The stages are processes that run the real loop over the same prepared decode steps of two micro-batches; the agent is a
script. One stage is slowed down: it stands for a slow machine, and sleeps in each of its layers. Every static split is
tried under that, round by round, and then the run that begins with the even split and may move; its rate counts from
its last move on. Prints a table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import msgpack

from benches.machine import commit, processor
from benches.serving.checkpoint import SHAPES, random_model
from tests.worker.moving_process import Record, Settings
from tests.worker.plans import PlanBuilder, encode_plan, sampling_start

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples" / "models" / "demo"
STAGES, MICRO_BATCHES = 2, 2
CONTEXT = 64
# After a start or a move: caches are cold, and a step was in flight before.
SETTLING_STEPS = 10


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benches.repartition", description=__doc__)
    parser.add_argument("--model", choices=list(SHAPES), default="60m", help="a random Llama")
    parser.add_argument("--slow-stage", type=int, choices=range(STAGES), default=0)
    parser.add_argument("--slow-layer-ms", type=float, default=6.0, help="by how much each layer")
    parser.add_argument("--batch", type=int, default=4, help="sequences of each micro-batch")
    parser.add_argument("--steps", type=int, default=80, help="of each static split and round")
    parser.add_argument("--moving-steps", type=int, default=600, help="of the run that may move")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cache", type=Path, default=ROOT / "target" / "bench-models")
    return parser.parse_args()


def plans(num_steps: int, batch: int) -> tuple[list[bytes], int]:
    """Messages of so many decode steps behind the prefills, in which the micro-batches take turns; and KV blocks."""
    names = [[f"{half} {index}" for index in range(batch)] for half in range(MICRO_BATCHES)]
    blocks = MICRO_BATCHES * batch * (2 + (CONTEXT + num_steps) // 16)
    builder = PlanBuilder(blocks)
    for name in itertools.chain(*names):
        builder.add(name, range(10, 10 + CONTEXT))
    starts = [sampling_start(member.slot) for member in builder.sequences.values()]
    messages = []
    for step in range(num_steps + MICRO_BATCHES):
        half = names[step % MICRO_BATCHES]
        count = CONTEXT if step < MICRO_BATCHES else 1
        messages.append(encode_plan(builder.plan(dict.fromkeys(half, count), starts)))
        starts = []
        for name in half:
            builder.append(name, 10 + step % 1000)
    return messages, blocks


def run(settings: Settings, messages: list[bytes]) -> Record:
    """Runs a worker over the steps."""
    folder = Path(settings.folder)
    (folder / "plans").write_bytes(msgpack.packb(messages))
    (folder / "settings").write_text(json.dumps(asdict(settings)))
    command = [sys.executable, "-m", "tests.worker.moving_process"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([*command, str(rank), str(folder / "settings")], cwd=ROOT, env=environment)
        for rank in range(STAGES)
    ]
    try:
        if any(rank.wait() != 0 for rank in ranks):
            raise SystemExit("a rank failed")
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    return Record(**json.loads((folder / "record").read_text()))


def tokens_per_second(record: Record, batch: int, since: int = 0) -> float:
    """By the median time between two commits, which others on the machine disturb least."""
    times = record.committed_s[since + SETTLING_STEPS :]
    gaps = [later - earlier for earlier, later in zip(times, times[MICRO_BATCHES:], strict=False)]
    return MICRO_BATCHES * batch / statistics.median(gaps)


def main() -> None:
    """Measures and prints the table."""
    args = parse_args()
    checkpoint = random_model(args.model, args.cache, DEMO)
    num_layers = int(SHAPES[args.model]["num_hidden_layers"])
    splits = [[first, num_layers - first] for first in range(1, num_layers)]
    even = [-(-num_layers // STAGES), num_layers // STAGES]
    static: dict[int, list[float]] = {split[0]: [] for split in splits}
    moving: list[tuple[float, Record]] = []

    def measure(split: list[int], num_steps: int, window: tuple[int, float] | None) -> Record:
        messages, blocks = plans(num_steps, args.batch)
        with tempfile.TemporaryDirectory() as folder:
            settings = Settings(
                *(str(checkpoint), folder, split),
                window=window,
                slow_stage=args.slow_stage,
                slow_layer_s=args.slow_layer_ms / 1e3,
                num_blocks=blocks,
            )
            return run(settings, messages)

    for _ in range(args.rounds):
        for split in splits:
            record = measure(split, args.steps, None)
            static[split[0]].append(tokens_per_second(record, args.batch))
        record = measure(even, args.moving_steps, (64, 2.0))
        last = record.moves[-1][0] if record.moves else 0
        moving.append((tokens_per_second(record, args.batch, last), record))
    print(f"{processor()}, commit {commit()}; stage {args.slow_stage} slower by", end=" ")
    print(f"{args.slow_layer_ms:g} ms a layer; {MICRO_BATCHES} micro-batches of {args.batch}\n")
    print("| split | tok/s, median of rounds |\n|---|---|")
    for split in splits:
        print(f"| {split[0]},{split[1]} | {statistics.median(static[split[0]]):.1f} |")
    for rate, record in moving:
        path = " → ".join(",".join(map(str, it)) for it in [even, *(m[1] for m in record.moves)])
        steps = ", ".join(str(move[0]) for move in record.moves)
        print(f"| {path} after {steps} steps | {rate:.1f} |")
    best = max(statistics.median(rates) for rates in static.values())
    after = statistics.median(rate for rate, _ in moving)
    start = statistics.median(static[even[0]])
    print(
        f"\nAfter moving: {after / best:.2f} of the best static split, {after / start:.2f}", end=""
    )
    print(" of the even one.")


if __name__ == "__main__":
    main()
