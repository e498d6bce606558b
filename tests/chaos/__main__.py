"""`python -m tests.chaos`: faults under load, with real processes; every word of every answer is checked.

Foreign engines are mock engines that fail in all the ways that they know, beside SIGKILL and SIGSTOP. Orchestra's own
workers are mock workers (the real agent around a model that computes nothing) that are killed. One seed draws the
faults and the requests; what the machine does in between is its own. Exits with 1 where one answer was lost, doubled a
word, or did not end.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from pathlib import Path

from tests.chaos import engines, workers
from tests.faults.processes import build

# What the rival that continues streams took for the median; and what nobody should have to wait longer than.
WORKER_GAP_MS = (71.0, 500.0)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, help="repeats the draws of a run; printed")
    parser.add_argument("--faults", type=int, default=1000, help="on engines")
    parser.add_argument("--kills", type=int, default=200, help="of workers")
    return parser.parse_args()


def main() -> int:
    """Runs both halves; 1 where something was lost."""
    args = parse_args()
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}", flush=True)
    build()
    lost = 0
    with tempfile.TemporaryDirectory() as folder:
        if args.faults:
            report = engines.run(Path(folder), seed, args.faults)
            print(report.table("Foreign engines"), flush=True)
            lost += len(report.lost)
        if args.kills:
            report = workers.run(Path(folder), seed, args.kills)
            print(report.table("Orchestra workers"), flush=True)
            lost += len(report.lost)
            gaps = report.replays["SIGKILL"]
            reached = [report.above_ms(gaps, share) for share in (0.5, 0.99)]
            print(
                f"replay gap p50 {reached[0]:.1f} ms (at most {WORKER_GAP_MS[0]:.0f}), "
                f"p99 {reached[1]:.1f} ms (at most {WORKER_GAP_MS[1]:.0f})"
            )
    print("nothing was lost" if not lost else f"{lost} answers were lost: seed {seed}")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
