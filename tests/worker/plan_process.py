"""What the processes of `test_plan_ring` run, each one end of a plan channel."""

import time
from multiprocessing.connection import Connection
from pathlib import Path

from torch._C._distributed_c10d import FileStore

from orchestra.worker.plan_channel import Follower, Leader
from orchestra.worker.plan_socket import RankLostError


def open_store(folder: Path, size: int) -> FileStore:
    """Where the ranks meet; it goes when all have let go of it."""
    return FileStore(str(folder / "store"), size)


def lead(folder: Path, size: int, told: Connection) -> None:
    """Sends a plan, and then nothing, for as long as it lives."""
    store = open_store(folder, size)
    leader = Leader(store, size, (folder / "meet").as_uri())
    leader.broadcast(b"plan")
    told.send("sent")
    time.sleep(1000)


def follow(folder: Path, size: int, rank: int, told: Connection) -> None:
    """Says what it receives, and after how much of its own time; a goodbye ends it, a lost rank brings it again."""
    store = open_store(folder, size)
    follower = Follower(store, rank)
    told.send(follower.generation)
    while True:
        began = time.thread_time()
        try:
            message = follower.receive()
        except RankLostError:
            follower.rejoin()
            told.send(follower.generation)
            continue
        told.send((message, time.thread_time() - began))
        if message is None:
            return
