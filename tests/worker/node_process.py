"""What the processes of `test_node_group` run, each one rank of a group over several nodes that are names alone."""

import os
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch._C._distributed_c10d import FileStore

from orchestra.worker.algorithm_table import Algorithm
from orchestra.worker.collectives import join_group
from orchestra.worker.config import WorkerConfig
from orchestra.worker.node_group import NodeGroup
from orchestra.worker.recovery import LOSSES
from orchestra.worker.sharding import Shard

# Fewer numbers than ranks, what no number of ranks divides, and more than a slot of shared memory or a piece holds.
COUNTS = [1, 5, 1024, 100_003, 1_200_001]
DTYPES = [torch.float32, torch.bfloat16]
Results = dict[tuple[torch.dtype, int, Algorithm | None], torch.Tensor]


def numbers(rank: int, count: int, dtype: torch.dtype) -> torch.Tensor:
    """What a rank brings: the same in the process and in the test, and of sizes that make the order of sums show."""
    generator = torch.Generator().manual_seed(1000 * rank + count)
    spread = 10.0 ** torch.randint(-3, 4, (count,), generator=generator)
    return (torch.randn(count, generator=generator) * spread).to(dtype)


def join(
    rank: int, names: list[str], path: Path, collectives: str = "auto", generation: int = 0
) -> NodeGroup:
    """Forms a group of the ranks whose nodes have these names."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    config = WorkerConfig(
        *(path, "http://router", "w", "m", Shard(rank, len(names))),
        collectives=collectives,
        node=names[rank],
    )
    store = FileStore(str(path / "store"), len(names))
    group = join_group(config, store, torch.device("cpu"), generation)
    assert isinstance(group, NodeGroup)
    return group


def add_up(rank: int, names: list[str], path: Path, collectives: str) -> None:
    """Leaves in a file what each collective gives, and the table that was measured."""
    group = join(rank, names, path, collectives)
    results: Results = {}
    for dtype in DTYPES:
        for count in COUNTS:
            for algorithm in group.algorithms:
                tensor = numbers(rank, count, dtype)
                group.all_reduce_by(algorithm, tensor)
                results[dtype, count, algorithm] = tensor
            # Every other column: no tensor without gaps.
            wide = torch.zeros(count, 2, dtype=dtype)
            wide[:, 0] = numbers(rank, count, dtype)
            group.all_reduce(wide[:, 0])
            assert torch.equal(wide[:, 1], torch.zeros(count, dtype=dtype))
            results[dtype, count, None] = wide[:, 0].clone()
    group.all_reduce(torch.empty(0))
    part = numbers(rank, 6, torch.float32).view(3, 2)
    joined = group.gather_columns(part), group.all_gather(part)
    torch.save((results, joined, group.table.encode()), path / str(rank))
    group.close()


def lose_a_rank(
    rank: int, names: list[str], path: Path, algorithm: Algorithm, told: Connection
) -> None:
    """Waits for the last rank, which never comes; says that this ended, and adds up with those left."""
    group = join(rank, names, path)
    group.all_reduce_by(algorithm, torch.ones(1))
    told.send("met")
    if rank == len(names) - 1:
        time.sleep(1000)
    try:
        group.all_reduce_by(algorithm, torch.ones(1))
    except LOSSES:
        group.abort()
        group.close()
        told.send("lost")
    left = join(rank, names[:-1], path, generation=1)
    total = torch.full((3,), float(rank + 1))
    left.all_reduce(total)
    told.send(total.tolist())
    left.close()
