"""Collectives over shared memory between real processes, which are killed and stopped in the middle."""

import os
import signal
import threading
from functools import reduce
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._C._distributed_c10d import FileStore, HashStore

from orchestra.errors import ConfigError
from orchestra.worker.collectives import join_group
from orchestra.worker.config import WorkerConfig
from orchestra.worker.parallel import Communicator, ProcessGroup
from orchestra.worker.plan_socket import RankLostError
from orchestra.worker.sharding import Shard
from orchestra.worker.shared_group import SharedMemoryGroup
from tests.worker.forked import RANKS
from tests.worker.group_process import COLUMNS, SIZES, add_up, lose_a_rank, numbers

CPU = torch.device("cpu")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("size", [2, 3])
def test_every_rank_gets_the_same_bits(size: int, tmp_path: Path) -> None:
    ranks = [RANKS.Process(target=add_up, args=(rank, size, tmp_path)) for rank in range(size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * size
    results: list[list[Tensor]] = [torch.load(tmp_path / str(rank)) for rank in range(size)]
    at = 0
    for dtype in (torch.float32, torch.bfloat16):
        for count in SIZES:
            parts = [numbers(rank, count, dtype).float() for rank in range(size)]
            total = reduce(torch.add, parts)
            for result in results:
                assert torch.equal(result[at], total.to(dtype))
            at += 1
        for columns in COLUMNS:
            shaped = [numbers(rank, 3 * columns, dtype).view(3, -1) for rank in range(size)]
            assert torch.equal(results[0][at], torch.cat(shaped, dim=1))
            assert all(len(result[at]) == 0 for result in results[1:])
            at += 1
        whole = [numbers(rank, 60_000, dtype).float() for rank in range(size)]
        for result in results:
            assert torch.equal(result[at], reduce(torch.add, whole).to(dtype))
        at += 1
    wides = [numbers(rank, 64, torch.float32).view(8, 8) for rank in range(size)]
    for wide, result in zip(wides, results, strict=True):
        assert torch.equal(result[at][:, 1::2], wide[:, 1::2])
        torch.testing.assert_close(result[at][:, ::2], torch.stack(wides).sum(0)[:, ::2])


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("number", "named"),
    [
        pytest.param(signal.SIGKILL, "rank 2 is gone", id="killed"),
        pytest.param(signal.SIGSTOP, "rank 2 did not come within 3000 ms", id="stopped"),
    ],
)
def test_a_lost_rank_ends_the_wait_and_the_rest_regroup(
    number: signal.Signals, named: str, tmp_path: Path
) -> None:
    pipes = [RANKS.Pipe() for _ in range(3)]
    ranks = [
        RANKS.Process(target=lose_a_rank, args=(rank, 3, tmp_path, told), daemon=True)
        for rank, (_, told) in enumerate(pipes)
    ]
    for rank in ranks:
        rank.start()
    heard = [pipe for pipe, _ in pipes]
    assert [pipe.recv() for pipe in heard] == ["met"] * 3
    # Whether the others wait already or come later, both have to end.
    os.kill(ranks[2].pid or 0, number)
    assert [pipe.recv() for pipe in heard[:2]] == [named] * 2
    assert [pipe.recv() for pipe in heard[:2]] == [[3.0] * 3] * 2
    ranks[2].kill()
    for rank in ranks:
        rank.join()


def test_abort_from_another_thread_ends_the_wait() -> None:
    store, groups = HashStore(), {}

    def join(rank: int) -> None:
        groups[rank] = SharedMemoryGroup(Shard(rank, 2), store)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    failed = []

    def wait() -> None:
        try:
            groups[0].all_reduce(torch.ones(4))
        except RankLostError as error:
            failed.append(str(error))

    waiter = threading.Thread(target=wait)
    waiter.start()
    groups[0].abort()
    waiter.join()
    assert failed == ["the group was aborted"]
    with pytest.raises(RankLostError, match="aborted"):
        groups[1].gather_columns(torch.ones(1, 1))


def test_a_rank_that_never_comes_is_named() -> None:
    with pytest.raises(RankLostError, match="rank 1 did not come within 100 ms"):
        SharedMemoryGroup(Shard(0, 2), HashStore(), timeout_s=0.1)


def test_ranks_of_one_node_share_memory_however_they_meet(tmp_path: Path) -> None:
    store = FileStore(str(tmp_path / "store"), 1)

    def join(collectives: str, device: torch.device = CPU) -> Communicator:
        asked = WorkerConfig(*(tmp_path, "http://router", "w", "m"), collectives=collectives)
        return join_group(asked, store, device, generation=0)

    assert isinstance(join("auto"), SharedMemoryGroup)
    assert isinstance(join("shm"), SharedMemoryGroup)
    group = join("gloo")
    assert isinstance(group, ProcessGroup)
    group.close()
    with pytest.raises(ConfigError, match="--collectives: shm is for CPU ranks") as raised:
        join("shm", torch.device("cuda"))
    assert raised.value.key == "collectives"
