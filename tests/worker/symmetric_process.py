"""What the processes of `test_symmetric_group` run, each one rank of a group: the kernel in Triton's interpreter.

Without GPUs there is no symmetric memory of torch's: memory of the host takes its place, which the processes share.
Ranks are processes, as they are on GPUs: what one writes and another reads, and when, is the kernel's own doing.
"""

import mmap
import os
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from orchestra.worker import symmetric_group
from orchestra.worker.plan_socket import RankLostError
from orchestra.worker.sharding import Shard
from orchestra.worker.symmetric_group import SharedBuffers, SymmetricGroup

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Smaller than on a GPU, so that a message of thousands of numbers takes several programs and several pieces of each.
PROGRAMS, BLOCK, SLOT_BYTES, ALONE_BYTES_MAX, LOOKS = 3, 64, 512, 2048, 4
# One number, blocks that are not full, one piece of every program, and more turns than there are slots.
COUNTS = [1, 192, 300, 2000]
# Two epochs for a piece: these wrap around on the way.
FIRST_EPOCH = 2**31 - 8


class SharedMemoryStandIn:
    """Stands for torch's symmetric memory: the same file, mapped by every rank; not at the same address.

    Args:
        path: of the file.
        first_epoch: what signals begin with, as though that had been reached.
    """

    def __init__(self, path: Path, first_epoch: int = 0) -> None:
        self._path = path
        self._first_epoch = first_epoch

    def __call__(self, shard: Shard, num_bytes: int, device: torch.device) -> SharedBuffers:
        """Maps the memory of all ranks."""
        assert device == CPU
        with self._path.open("a+b") as file:
            file.truncate(shard.size * num_bytes)
            mapping = mmap.mmap(file.fileno(), shard.size * num_bytes)
        whole = torch.frombuffer(mapping, dtype=torch.uint8)
        views = list(torch.split(whole, num_bytes))
        words = PROGRAMS * shard.size
        views[shard.rank].view(torch.int32)[:words] = self._first_epoch
        return SharedBuffers(views, mapping)


def numbers(rank: int, count: int, dtype: torch.dtype) -> Tensor:
    """What a rank brings: the same in the process and in the test, and of sizes that make the order of sums show."""
    generator = torch.Generator().manual_seed(1000 * rank + count)
    spread = 10.0 ** torch.randint(-2, 3, (count,), generator=generator)
    return (torch.randn(count, generator=generator) * spread).to(dtype)


def join(rank: int, size: int, path: Path, first_epoch: int = 0) -> SymmetricGroup:
    """Forms a group."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    for name in ("PROGRAMS", "BLOCK", "SLOT_BYTES", "ALONE_BYTES_MAX", "LOOKS"):
        setattr(symmetric_group, name, globals()[name])
    store = FileStore(str(path / "store"), size)
    stand_in = SharedMemoryStandIn(path / "memory", first_epoch)
    group = SymmetricGroup(Shard(rank, size), store, CPU, allocate=stand_in)
    group._epochs.fill_(first_epoch)
    # As at torch's rendezvous, nobody goes on before all have their memory.
    store.set(f"mapped-{rank}", "")
    store.wait([f"mapped-{other}" for other in range(size)])
    return group


def add_up(rank: int, size: int, path: Path, first_epoch: int) -> None:
    """Leaves in a file what comes of messages of every size, one after the other."""
    group = join(rank, size, path, first_epoch)
    results: list[Tensor] = []
    for dtype in DTYPES:
        for turn, count in enumerate(COUNTS):
            # Ranks that come late, in turns.
            time.sleep(0.05 * ((turn + rank) % size))
            tensor = numbers(rank, count, dtype)
            group.all_reduce(tensor)
            results.append(tensor)
    # Every other column: no tensor without gaps.
    wide = numbers(rank, 64, torch.float32).view(8, 8)
    group.all_reduce(wide[:, ::2])
    group.all_reduce(torch.empty(0))
    joined = group.gather_columns(numbers(rank, 6, torch.float32).view(3, 2))
    torch.save((results, wide, joined), path / str(rank))
    group.close()


def lose_a_rank(rank: int, size: int, path: Path, told: Connection) -> None:
    """Waits for the last rank, which never comes, until another thread aborts the group."""
    group = join(rank, size, path)
    group.all_reduce(torch.ones(3))
    told.send("met")
    if rank == size - 1:
        time.sleep(1000)
    threading.Timer(0.3, group.abort).start()
    began = time.monotonic()
    group.all_reduce(torch.ones(1000))
    took_s = time.monotonic() - began
    try:
        group.all_reduce(torch.ones(3))
    except RankLostError:
        told.send(took_s)
