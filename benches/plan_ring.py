"""How long a plan takes from rank 0 to rank 1, and what it costs both: through shared memory beside a socket.

`python -m benches.plan_ring` starts a rank 1 for each way, which take turns message by message. Between two messages
rank 0 computes (it looks at the clock) for as long as the table says, and rank 1 waits. Times are medians over all
messages of a turn, then over the turns; ratios are taken turn by turn.
"""

import argparse
import multiprocessing
import statistics
import struct
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from torch.distributed import FileStore

from orchestra.worker import plan_ring
from orchestra.worker.plan_channel import Follower, Leader

IDLE_MS = (0.2, 1.0, 5.0, 10.0, 50.0)
SIZES = (800, 8192)
WAYS = ("ring", "socket")
# When the message was there, by the clock of the machine, and what this thread has computed until then.
_ANSWER = struct.Struct("<dd")


@dataclass(frozen=True)
class Figures:
    """Medians of some messages, microseconds."""

    send: float
    """Until rank 0 goes on."""
    one_way: float
    """Until rank 1 has it."""
    round_trip: float
    """Until rank 0 has the answer, which goes over the socket in both ways."""
    spent: float
    """Of its processor, by rank 1, from one message to the next; the mean."""


def follow(folder: Path) -> None:
    """Rank 1: answers each message."""
    follower = Follower(FileStore(str(folder / "store"), 2), 1)
    while follower.receive() is not None:
        follower.send(_ANSWER.pack(time.perf_counter(), time.thread_time()))


def join(way: str) -> Leader:
    """Rank 0 of two, which is in this process."""
    folder = Path(tempfile.mkdtemp())
    context = multiprocessing.get_context("spawn")
    context.Process(target=follow, args=(folder,), daemon=True).start()
    if way == "socket":
        # As where rank 1 is in a container of its own.
        plan_ring.make_ring = lambda _size: None  # type: ignore[assignment]
    leader = Leader(FileStore(str(folder / "store"), 2), 2, (folder / "meet").as_uri())
    assert leader.near == ({1} if way == "ring" else set())
    return leader


def compute(seconds: float) -> None:
    """Keeps the processor busy."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def measure(leader: Leader, message: bytes, idle_s: float, count: int) -> Figures:
    """Sends so many messages."""
    sends, ways, trips, spents = [], [], [], []
    before = 0.0
    for _ in range(count + 1):
        compute(idle_s)
        began = time.perf_counter()
        leader.broadcast(message)
        sent = time.perf_counter()
        arrived, spent = _ANSWER.unpack(leader.receive(1))
        ended = time.perf_counter()
        sends.append(sent - began)
        ways.append(arrived - began)
        trips.append(ended - began)
        spents.append(spent - before)
        before = spent
    medians = (statistics.median(times[1:]) * 1e6 for times in (sends, ways, trips))
    return Figures(*medians, statistics.mean(spents[1:]) * 1e6)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=15, help="of each way")
    parser.add_argument("--count", type=int, default=40, help="messages of a turn")
    arguments = parser.parse_args()
    leaders = {way: join(way) for way in WAYS}
    print(
        "| bytes | idle ms | way | send µs | one way µs | round trip µs | rank 1 computes µs | ratio one way |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for size in SIZES:
        for idle_ms in IDLE_MS:
            turns: dict[str, list[Figures]] = {way: [] for way in WAYS}
            for _ in range(arguments.turns):
                for way, leader in leaders.items():
                    idle_s = idle_ms / 1000
                    turns[way].append(measure(leader, bytes(size), idle_s, arguments.count))
            pairs = zip(turns["socket"], turns["ring"], strict=True)
            ratio = statistics.median(socket.one_way / ring.one_way for socket, ring in pairs)
            for way, figures in turns.items():
                rows = zip(*(vars(it).values() for it in figures), strict=True)
                cells = " | ".join(f"{statistics.median(row):.1f}" for row in rows)
                shown = f"{ratio:.2f}" if way == "ring" else ""
                print(f"| {size} | {idle_ms:g} | {way} | {cells} | {shown} |", flush=True)
    for leader in leaders.values():
        leader.close()


if __name__ == "__main__":
    main()
