"""Two ranks whose caches lie in one memory that other workers reach: what rank 0 says of it, and what stays."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from orchestra.worker.assembly import Rank
from orchestra.worker.overlap import HalvedAttention
from orchestra.worker.pipeline import execute
from orchestra.worker.plan import StepPlan
from orchestra.worker.sharding import Shard
from tests.worker.conftest import MakeRank
from tests.worker.plans import PlanBuilder, sampling_start

Ranks = tuple[Rank, Rank]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


@pytest.fixture
def ranks(make_rank: MakeRank, tmp_path: Path, pool: ThreadPoolExecutor) -> Iterator[Ranks]:
    """In two threads of this process."""
    meet = (tmp_path / "meet").as_uri()
    first, second = pool.map(
        lambda number: make_rank("llama", shard=Shard(number, 2), rendezvous=meet), range(2)
    )
    yield first, second
    assert first.group.leader is not None
    assert second.group.follower is not None
    first.group.leader.close()
    second.group.follower.close()
    list(pool.map(lambda rank: rank.group.close(), (first, second)))


def run(ranks: Ranks, plan: StepPlan, pool: ThreadPoolExecutor) -> None:
    list(pool.map(lambda rank: rank.runner.execute(plan), ranks))


def parts(ranks: Ranks) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """`[num_layers, ranks, blocks, bytes]`: all blocks of sequences, and the one to warm up in."""
    memory = np.asarray(ranks[0].kv_pool)
    return memory.reshape(ranks[0].model_config.num_layers, 2, ranks[0].num_blocks + 1, -1)


def test_a_layer_is_announced_when_the_kv_of_both_ranks_is_in_the_pool(
    ranks: Ranks, pool: ThreadPoolExecutor
) -> None:
    first, second = ranks
    assert second.kv_memory is not None
    assert second.kv_pool is None
    num_layers = first.model_config.num_layers
    builder = PlanBuilder(first.num_blocks, seed=3)
    builder.add("a", list(range(20, 60)))
    plan = replace(builder.plan({"a": 40}, [sampling_start(0)]), fills_blocks=True)
    blocks, memory = builder.sequences["a"].blocks, parts(ranks)
    announced: list[tuple[int, int]] = []

    def listen(step_id: int, layer: int) -> None:
        announced.append((step_id, layer))
        assert memory[: layer // 2 + 1, :, blocks].any(axis=-1).all()

    assert first.kv_memory is not None
    first.runner.watch(first.kv_memory.watched_by(listen))
    assert not memory[:, :, blocks].any()
    run(ranks, plan, pool)
    # The last layer is there when the step is.
    assert announced == [(plan.step_id, 2 * layer - 1) for layer in range(1, num_layers)]
    assert memory[:, :, blocks].any(axis=-1).all()


def test_a_step_that_draws_nothing_is_over_when_both_ranks_are(
    ranks: Ranks, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it is committed other workers may read what it has filled, of both."""
    first, second = ranks
    builder = PlanBuilder(first.num_blocks, seed=3)
    builder.add("a", list(range(20, 120)))
    plan = builder.plan({"a": 80}, [sampling_start(0)])
    blocks, memory = builder.sequences["a"].blocks, parts(ranks)
    is_over = threading.Event()
    attention = second.runner._attention
    assert isinstance(attention, HalvedAttention)
    slow = attention.halves[0]
    forward = slow.forward

    def wait_in_the_last_layer(layer: int, query: Tensor, key_value: Tensor) -> Tensor:
        if layer == first.model_config.num_layers - 1:
            # As long as rank 0 needs to go past it; which it must not.
            is_over.wait(0.5)
        return forward(layer, query, key_value)

    monkeypatch.setattr(slow, "forward", wait_in_the_last_layer)
    others = pool.submit(execute, second, plan)
    execute(first, plan)
    is_there = memory[:, :, blocks].any(axis=-1).all()
    is_over.set()
    others.result()
    assert len(plan.sample_slots) == 0
    assert is_there


def test_ranks_that_settle_again_write_to_no_block_that_a_sequence_can_have(
    ranks: Ranks, pool: ThreadPoolExecutor
) -> None:
    memory = parts(ranks)
    assert memory[:, :, -1].any(), "they have warmed up there"
    memory[:] = 7
    list(pool.map(lambda rank: rank.settle(), ranks))
    assert (memory[:, :, :-1] == 7).all()
    assert not (memory[:, :, -1] == 7).all()


def test_a_replacement_is_told_where_the_memory_is(ranks: Ranks) -> None:
    first, second = ranks
    assert first.kv_pool is not None
    assert first.cache_terms.num_blocks == second.num_blocks
    assert first.cache_terms.memory == first.kv_pool.address
    assert first.kv_memory is not None
    assert second.kv_memory is not None
    first.kv_memory.whole[5] = 9
    assert second.kv_memory.whole[5] == 9
