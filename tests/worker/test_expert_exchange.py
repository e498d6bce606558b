"""Rows that go where they are wanted, over gloo and over shared memory, beside a model that looks at everything."""

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed.distributed_c10d import Store

from orchestra.worker.expert_exchange import ExpertGroup
from orchestra.worker.sharding import Shard
from orchestra.worker.shared_group import SharedMemoryGroup
from orchestra.worker.torch_group import TorchGroup

TIMEOUT = timedelta(seconds=20)
WIDTH = 5


def torch_group(shard: Shard, store: Store) -> TorchGroup:
    return TorchGroup(shard, store, torch.device("cpu"), TIMEOUT)


def on_all_ranks(
    join: Callable[[Shard, Store], TorchGroup | SharedMemoryGroup],
    size: int,
    work: Callable[[ExpertGroup], Tensor],
) -> list[Tensor]:
    """What each rank, a thread, has in the end."""
    store = HashStore()

    def run(rank: int) -> Tensor:
        group = join(Shard(rank, size), store)
        try:
            return work(ExpertGroup(group, group.shard))
        finally:
            group.close()

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


@pytest.mark.parametrize("join", [torch_group, SharedMemoryGroup])
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_rows_arrive_once_and_in_the_order_of_the_ranks(
    join: Callable[[Shard, Store], TorchGroup | SharedMemoryGroup], size: int, seed: int
) -> None:
    draw = random.Random(seed)
    # Some have nothing for some, and with the last seed nobody has anything for anybody.
    most = 0 if seed == 3 else 9
    counts = [[draw.randint(-3, most) for _ in range(size)] for _ in range(size)]
    counts = [[max(0, count) for count in row] for row in counts]
    # A row is who sent it, for whom, and its number.
    rows = [
        [
            [float(rank), float(to), float(at), 0.5, -1.0]
            for to in range(size)
            for at in range(row[to])
        ]
        for rank, row in enumerate(counts)
    ]

    def work(group: ExpertGroup) -> Tensor:
        rank = group.shard.rank
        own = torch.tensor(rows[rank]).view(-1, WIDTH)
        assert group.share(counts[rank], own.device) == counts
        back = group.exchange(own, counts)
        # There and back again, they are as they were.
        home = group.exchange(back, [list(row) for row in zip(*counts, strict=True)])
        assert torch.equal(home, own)
        totals = [sum(row) for row in counts]
        everything = [row for part in rows for row in part]
        assert group.gather(own, totals).tolist() == everything
        return back

    arrived = on_all_ranks(join, size, work)
    for rank, received in enumerate(arrived):
        assert received.tolist() == [row for part in rows for row in part if row[1] == rank]
