"""`python -m benches.lost_rank`: from the moment when a rank is killed, or stops, until the others have a new group.

`orchestra serve` runs the demonstration model in several ranks. While streams decode, rank 1 gets SIGKILL or SIGSTOP;
the worker says on the log how long the survivors needed from when they noticed, and this bench adds when it read that
line, which is an upper bound of the time since the signal.
"""

from __future__ import annotations

import argparse
import re
import signal
import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benches.machine import commit, processor
from tests.e2e.stack import Serve, start_serve
from tests.e2e.streams import Stream, wait_for_the_middle

if TYPE_CHECKING:
    import psutil

DEMO = Path(__file__).resolve().parents[1] / "examples" / "models" / "demo"
REPLACED = re.compile(r"the others were ready after (\d+) ms, all after (\d+) ms")
STREAMS, MAX_TOKENS = 3, 400
# How often the log is looked at, and how long a replacement may take.
LOOK_S, TIMEOUT_S = 0.001, 90.0


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benches.lost_rank", description=__doc__)
    parser.add_argument("--repeats", type=int, default=5, help="of each signal")
    parser.add_argument("--tp", type=int, default=2)
    return parser.parse_args()


def victim(serve: Serve) -> psutil.Process:
    """The worker's rank 1, whichever process that is by now."""
    for process in serve.children("worker"):
        command = process.cmdline()
        if command[command.index("--rank") + 1] == "1":
            return process
    raise RuntimeError("there is no rank 1")


def strike(serve: Serve, number: signal.Signals) -> tuple[float, float, float]:
    """Sends the signal in the middle of streams.

    Returns:
        Milliseconds: from the signal until the survivors were ready, from when they noticed until then, and from the
        signal until the worker was whole.
    """
    streams = [Stream(serve, f"prompt {at}", MAX_TOKENS) for at in range(STREAMS)]
    wait_for_the_middle(streams)
    known = len(REPLACED.findall(serve.log.read_text()))
    struck_rank = victim(serve)
    struck = time.monotonic()
    struck_rank.send_signal(number)
    deadline = struck + TIMEOUT_S
    while len(found := REPLACED.findall(serve.log.read_text())) == known:
        if time.monotonic() > deadline:
            raise RuntimeError(f"not replaced within {TIMEOUT_S} s")
        time.sleep(LOOK_S)
    whole = (time.monotonic() - struck) * 1e3
    survivors, total = map(int, found[-1])
    for stream in streams:
        stream.answer()
    # Both clocks end when the worker is whole: what lies before the loss was noticed is their difference.
    return whole - total + survivors, survivors, whole


def main() -> None:
    """Measures both signals and prints a table."""
    args = parse_args()
    print(f"{processor()}, commit {commit()}, --tp {args.tp}, medians of {args.repeats}\n")
    print(
        "| signal | survivors ready, ms after it | after they noticed | whole again, ms after it |"
    )
    print("|---|---|---|---|")
    flags = ["--tp", str(args.tp), "--dtype", "float32"]
    environment = {"ORCHESTRA_REPLAY_WAIT": "100s"}
    with start_serve(DEMO, *flags, environment=environment) as serve:
        for number in (signal.SIGKILL, signal.SIGSTOP):
            taken = [strike(serve, number) for _ in range(args.repeats)]
            ready, noticed, whole = (
                statistics.median(column) for column in zip(*taken, strict=True)
            )
            print(f"| {number.name} | {ready:.0f} | {noticed:.0f} | {whole:.0f} |", flush=True)


if __name__ == "__main__":
    main()
