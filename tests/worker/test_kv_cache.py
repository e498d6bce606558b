"""How large the cache becomes, and how long a sequence may then be."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from orchestra import _core
from orchestra.errors import ConfigError, InternalError, UnsupportedError
from orchestra.worker.config import WorkerConfig
from orchestra.worker.group import Group
from orchestra.worker.kv_cache import (
    KvCache,
    KvCacheBudget,
    KvCacheSpec,
    check_host_blocks,
    decide_max_model_len,
    decide_num_blocks,
)
from orchestra.worker.kv_memory import KvMemory, map_memory
from orchestra.worker.kv_pool import make_kv_pool
from orchestra.worker.parallel import SingleRank
from orchestra.worker.plan import BlockCopies
from orchestra.worker.sharding import Shard, Stage

SPEC = KvCacheSpec(num_layers=2, num_kv_heads=4, head_dim=8, block_size=16, dtype=torch.bfloat16)
BLOCK_BYTES = 2 * 2 * 4 * 8 * 16 * 2
FREE = KvCacheBudget(
    num_blocks=None,
    memory_bytes=None,
    free_bytes=1000 * BLOCK_BYTES,
    useful_tokens=None,
    share=0.5,
)


def test_bytes_per_block_are_those_of_the_slab() -> None:
    cache = KvCache(SPEC, 10, torch.device("cpu"))
    assert SPEC.bytes_per_block == BLOCK_BYTES
    assert cache.slab.nbytes == 10 * BLOCK_BYTES
    assert cache.layer(1).shape == (10, 2, 4, 16, 8)
    assert cache.layer(1).is_contiguous()
    assert not cache.slab.any()


def make_pool(num_blocks: int, num_host_blocks: int = 0) -> _core.KvPool:
    return _core.KvPool(
        {
            "num_layers": SPEC.num_layers,
            "num_blocks": num_blocks,
            "num_host_blocks": num_host_blocks,
            "layer_block_bytes": SPEC.layer_block_bytes,
            "layout": "test",
            "transports": "shm",
        }
    )


def whole(pool: _core.KvPool) -> KvMemory:
    """The memory of a rank alone."""
    return KvMemory(np.asarray(pool), Shard(), pool)


def test_a_pool_is_the_memory_of_the_slab() -> None:
    pool = make_pool(10)
    cache = KvCache(SPEC, 10, torch.device("cpu"), shared=whole(pool))
    plain = KvCache(SPEC, 10, torch.device("cpu"))
    assert (cache.slab.shape, cache.slab.stride()) == (plain.slab.shape, plain.slab.stride())
    assert not cache.slab.any()
    cache.layer(1)[9, 1, 3, 15, 7] = 1
    seen = np.asarray(pool)
    assert seen.ctypes.data == cache.slab.data_ptr()
    assert (seen.nonzero()[0] >= len(seen) - 2).all()
    assert seen.any()
    # The tensor keeps the memory.
    del pool, seen
    assert cache.slab.count_nonzero() == 1


def test_host_blocks_of_a_pool_lie_behind_those_of_each_layer() -> None:
    pool = make_pool(5, 3)
    cache = KvCache(SPEC, 5, torch.device("cpu"), 3, whole(pool))
    assert cache.layer(1).is_contiguous()
    cache.slab[:, 4] = 7
    out = BlockCopies(np.array([4], np.int32), np.array([2], np.int32))
    none = BlockCopies(np.empty(0, np.int32), np.empty(0, np.int32))
    cache.copy_blocks(out, none)
    shape = (SPEC.num_layers, 8, -1)
    memory = torch.from_numpy(np.asarray(pool)).view(SPEC.dtype).view(shape)
    assert (memory[:, 7] == 7).all()
    assert not memory[:, 5:7].any()
    cache.slab.zero_()
    cache.copy_blocks(none, out)
    assert (cache.slab[:, 4] == 7).all()
    assert not cache.slab[:, :4].any()


def test_ranks_have_their_parts_of_a_pool_behind_each_other_in_each_layer() -> None:
    device, none = torch.device("cpu"), BlockCopies(np.empty(0, np.int32), np.empty(0, np.int32))
    # Of each of two ranks: four blocks of sequences, one to warm up in, three of host memory.
    pool = _core.KvPool(
        {
            **{"num_layers": 2 * SPEC.num_layers, "num_blocks": 4, "num_scratch_blocks": 1},
            **{"num_host_blocks": 3, "layer_block_bytes": SPEC.layer_block_bytes},
            **{"layout": "test", "transports": "shm"},
        }
    )
    first = KvMemory(np.asarray(pool), Shard(0, 2), pool)
    second = map_memory(pool.address, Shard(1, 2))
    assert (first.num_scratch_blocks, second.num_scratch_blocks) == (1, 1)
    caches = [KvCache(SPEC, 5, device, 3, memory) for memory in (first, second)]
    assert caches[1].layer(1).is_contiguous()
    for number, cache in enumerate(caches, start=1):
        cache.slab[:, 2] = number
        cache.slab[:, 4] = 10 * number
        cache.copy_blocks(BlockCopies(np.array([2], np.int32), np.array([1], np.int32)), none)
    memory = torch.from_numpy(np.asarray(pool)).view(SPEC.dtype).view(SPEC.num_layers, 2, 8, -1)
    for place, number in enumerate([0, 0, 1, 0, 10, 0, 1, 0]):
        assert (memory[:, 0, place] == number).all()
        assert (memory[:, 1, place] == 2 * number).all()


def test_memory_that_is_not_there_is_an_error() -> None:
    with pytest.raises(InternalError, match="cannot be mapped: No such file"):
        map_memory("/proc/self/fd/1000000", Shard(1, 2))


def test_rank_0_tells_of_layers_that_are_behind_every_rank() -> None:
    heard: list[tuple[int, int]] = []

    def hear(step_id: int, layer: int) -> None:
        heard.append((step_id, layer))

    memory = np.empty(0, np.uint8)
    assert KvMemory(memory, Shard()).watched_by(hear) is hear
    listen = KvMemory(memory, Shard(0, 4)).watched_by(hear)
    for layer in range(3):
        listen(9, layer)
    # Four of the pool's layers are one of the model's.
    assert heard == [(9, 3), (9, 7)]


def test_a_pool_has_a_limit() -> None:
    with pytest.raises(ConfigError, match="must fit") as caught:
        make_pool(2**31)
    assert caught.value.key == "num_blocks"


ALONE = Group(SingleRank())


def config_with(**settings: Any) -> WorkerConfig:
    named = {"model_dir": Path(), "router": "", "worker_id": "w", "model_name": "m", **settings}
    return WorkerConfig(**named)


@pytest.mark.parametrize(
    ("settings", "device", "message"),
    [
        ({"shard": Shard(0, 2)}, "cpu", "do not share memory"),
        ({"stage": Stage(0, 2)}, "cpu", "several stages"),
        ({"context": Shard(0, 2)}, "cpu", "divide prompts"),
        ({"enable_prefix_cache": False}, "cpu", "no prefix cache"),
        ({}, "meta", "accelerator"),
    ],
)
def test_where_kv_cannot_move_it_is_an_error_to_ask_for_it(
    settings: dict[str, Any], device: str, message: str
) -> None:
    def make(kv_transfer: str) -> object:
        config = config_with(kv_transfer=kv_transfer, **settings)
        return make_kv_pool(config, SPEC, 4, torch.device(device), ALONE)

    assert make("auto") is None
    assert make("off") is None
    config = config_with(write_through=True, **settings)
    with pytest.raises(UnsupportedError, match=message):
        make_kv_pool(config, SPEC, 4, torch.device(device), ALONE)
    with pytest.raises(UnsupportedError, match=message):
        make("shm")


def test_kv_can_move_where_nobody_says_otherwise() -> None:
    device = torch.device("cpu")
    assert make_kv_pool(config_with(), SPEC, 4, device, ALONE) is not None
    assert make_kv_pool(config_with(kv_transfer="off"), SPEC, 4, device, ALONE) is None


def test_host_blocks_are_limited_by_the_free_memory() -> None:
    check_host_blocks(SPEC, 3, 3 * BLOCK_BYTES)
    with pytest.raises(ConfigError, match="num_host_blocks: 4 blocks"):
        check_host_blocks(SPEC, 4, 4 * BLOCK_BYTES - 1)


@pytest.mark.parametrize(
    ("budget", "blocks"),
    [
        (FREE, 500),
        (replace(FREE, useful_tokens=100), 7),
        (replace(FREE, useful_tokens=10**9), 500),
        (replace(FREE, num_blocks=900), 900),
        (replace(FREE, memory_bytes=10 * BLOCK_BYTES - 1), 9),
    ],
)
def test_number_of_blocks(budget: KvCacheBudget, blocks: int) -> None:
    assert decide_num_blocks(SPEC, budget) == blocks


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (replace(FREE, free_bytes=BLOCK_BYTES), "free memory: not enough"),
        (replace(FREE, memory_bytes=5), "kv_cache_memory: not enough"),
        (replace(FREE, num_blocks=1001), "num_blocks: 1001 blocks"),
        (replace(FREE, memory_bytes=2000 * BLOCK_BYTES), "kv_cache_memory: 2000 blocks"),
    ],
)
def test_impossible_budgets_are_refused(budget: KvCacheBudget, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        decide_num_blocks(SPEC, budget)


def test_max_model_len_is_what_model_and_cache_can_hold() -> None:
    assert decide_max_model_len(SPEC, num_blocks=10, asked=None, longest=2048) == 160
    assert decide_max_model_len(SPEC, num_blocks=1000, asked=None, longest=2048) == 2048
    assert decide_max_model_len(SPEC, num_blocks=10, asked=160, longest=160) == 160
    with pytest.raises(
        ConfigError, match="161 tokens need 11 KV blocks of 16 tokens, there are 10"
    ):
        decide_max_model_len(SPEC, num_blocks=10, asked=161, longest=161)
