"""What the processes of `test_shared_group` run, each one rank of a group over shared memory."""

import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch._C._distributed_c10d import FileStore

from orchestra.worker.plan_socket import RankLostError
from orchestra.worker.sharding import Shard
from orchestra.worker.shared_group import SharedMemoryGroup

# Around the end of a slot (256 KiB) and far beyond it; more ranks than cores make every wait a sleep.
SIZES = [1, 7, 512, 65536, 65537, 200_000]
COLUMNS = [1, 3, 70_000]
HANG_TIMEOUT_S = 3.0


def numbers(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """What a rank brings: the same in the process and in the test."""
    generator = torch.Generator().manual_seed(1000 * rank + count)
    return torch.randn(count, generator=generator).to(dtype)


def collectives(group: SharedMemoryGroup) -> list[torch.Tensor]:
    """Sums and joined columns, in order."""
    rank, results = group.shard.rank, []
    for dtype in (torch.float32, torch.bfloat16):
        for count in SIZES:
            tensor = numbers(rank, count, dtype)
            group.all_reduce(tensor)
            results.append(tensor)
        for columns in COLUMNS:
            joined = group.gather_columns(numbers(rank, 3 * columns, dtype).view(3, columns))
            results.append(torch.empty(0) if joined is None else joined)
        whole = numbers(rank, 60_000, dtype)
        results.append(group.all_gather(group.reduce_scatter(whole)).view(-1))
    # Every other column: no tensor without gaps.
    wide = numbers(rank, 64, torch.float32).view(8, 8)
    group.all_reduce(wide[:, ::2])
    return [*results, wide]


def join(rank: int, size: int, path: Path) -> tuple[SharedMemoryGroup, FileStore]:
    """Forms the first group."""
    torch.set_num_threads(1)
    store = FileStore(str(path / "store"), size)
    # The timeout is short: it begins when all are there.
    store.set(f"loaded-{rank}", "")
    store.wait([f"loaded-{other}" for other in range(size)])
    return SharedMemoryGroup(Shard(rank, size), store, timeout_s=HANG_TIMEOUT_S), store


def add_up(rank: int, size: int, path: Path) -> None:
    """Leaves the results of the collectives in a file."""
    group, _ = join(rank, size, path)
    torch.save(collectives(group), path / str(rank))


def lose_a_rank(rank: int, size: int, path: Path, told: Connection) -> None:
    """Waits in a collective to which the last rank does not come; says how that ends, and sums with those left."""
    group, store = join(rank, size, path)
    group.all_reduce(torch.ones(1))
    told.send("met")
    if rank == size - 1:
        time.sleep(1000)
    try:
        group.all_reduce(torch.ones(1))
    except RankLostError as error:
        told.send(str(error))
    group.close()
    left = SharedMemoryGroup(Shard(rank, size - 1), store, generation=1)
    total = torch.full((3,), float(rank + 1))
    left.all_reduce(total)
    told.send(total.tolist())
