"""`python -m tests.soak`: half an hour with a full queue, and something behind the router killed every 5 s.

Behind it are mock workers (the real agent around a model that computes nothing) and mock engines; before it are more
clients than it has places for, of several tenants and classes. Some leave. Each request has to end exactly once: as its
client sees it, in the access log, and in the metrics; each answer that comes has to be right, word by word. At the end
the router must hold no more descriptors and threads than at the start, and its memory must not grow. Exits with 1
where any of this is wrong.
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
import tempfile
from pathlib import Path

from tests.faults.processes import ROOT, build
from tests.soak.report import summary, write
from tests.soak.run import run

SAMPLE_EVERY_S = 10.0


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, help="repeats the draws of a run; printed")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "target/soak", help="folder of the report"
    )
    return parser.parse_args()


def main() -> int:
    """Runs it; 1 where something was wrong."""
    args = parse_args()
    seed = args.seed if args.seed is not None else random.SystemRandom().randrange(1 << 32)
    say = functools.partial(print, flush=True)
    say(f"seed {seed}")
    build()
    args.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        soak = run(Path(folder), seed, args.minutes * 60, SAMPLE_EVERY_S, say)
    path = write(args.out, soak, seed)
    say(f"{summary(soak)}\nwritten to {path}")
    return 1 if soak.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
