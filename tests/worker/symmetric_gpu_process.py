"""What the processes of `test_symmetric_gpus` run, each one rank of a group, with a GPU of its own."""

from pathlib import Path

import torch
from torch import Tensor
from torch._C._distributed_c10d import FileStore, Store

from orchestra.worker.collectives import join_group
from orchestra.worker.config import WorkerConfig
from orchestra.worker.decode_graphs import CudaRecorder
from orchestra.worker.renewable_group import RenewableGroup
from orchestra.worker.sharding import Shard
from orchestra.worker.symmetric_group import SymmetricGroup
from tests.worker.symmetric_process import DTYPES, numbers

# One number, a row, more than each adds up by itself, and several pieces of every program.
COUNTS = [1, 4096, 300_003, 9_000_000]
# An odd number: each replay then begins with the other slot.
SUMS_RECORDED = 3
REPLAYS = 50


def join(rank: int, size: int, store: Store, generation: int = 0) -> SymmetricGroup:
    """Forms a group of GPUs."""
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    config = WorkerConfig(
        *(Path("model"), "http://router", "w", "m", Shard(rank, size)), collectives="nvlink"
    )
    group = join_group(config, store, device, generation)
    assert isinstance(group, SymmetricGroup)
    return group


def add_up(rank: int, size: int, path: Path) -> None:
    """Leaves in a file what comes of messages of every size, and of recorded ones."""
    group = join(rank, size, FileStore(str(path / "store"), size))
    device = torch.device("cuda", rank)
    results: list[Tensor] = []
    for dtype in DTYPES:
        for count in COUNTS:
            tensor = numbers(rank, count, dtype).to(device)
            group.all_reduce(tensor)
            results.append(tensor.cpu())
    replayed = replay(group, rank, device)
    joined = group.gather_columns(numbers(rank, 6, torch.float32).view(3, 2).to(device))
    torch.save((results, replayed, None if joined is None else joined.cpu()), path / str(rank))
    group.close()


def replay(group: SymmetricGroup, rank: int, device: torch.device) -> list[Tensor]:
    """Sums of recorded and of usual messages in turns, each of other numbers, with nothing waited for in between."""
    inputs = torch.zeros(SUMS_RECORDED, 4096, dtype=torch.bfloat16, device=device)
    sums = torch.empty_like(inputs)

    def compute() -> Tensor | None:
        for source, target in zip(inputs, sums, strict=True):
            group.all_reduce(target.copy_(source))
        return sums

    again = CudaRecorder()(compute)
    collected = []
    for turn in range(REPLAYS):
        inputs.copy_(replayed_numbers(rank, turn))
        recorded = again()
        assert recorded is not None
        usual = inputs[0].clone()
        group.all_reduce(usual)
        collected += [recorded.clone(), usual]
    return [tensor.cpu() for tensor in collected]


def replayed_numbers(rank: int, turn: int) -> Tensor:
    """What a rank brings to a replay."""
    return numbers(rank + 10 * turn, SUMS_RECORDED * 4096, torch.bfloat16).view(SUMS_RECORDED, -1)


def lose_a_rank(rank: int, size: int, path: Path) -> None:
    """Aborts a wait for the last rank, which does not come to the first group; forms the next, and adds up in that."""
    store = FileStore(str(path / "store"), size)
    shard = Shard(rank, size)
    group = RenewableGroup(shard, lambda generation: join(rank, size, store, generation), 0)
    total = torch.ones(4096, device=torch.device("cuda", rank))
    group.all_reduce(total)
    if rank < size - 1:
        group.all_reduce(torch.ones_like(total))
        group.abort()
        torch.cuda.synchronize()
    group.leave()
    group.renew(1)
    group.all_reduce(total)
    torch.save(total.cpu(), path / str(rank))
    group.close()
