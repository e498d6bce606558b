"""How large the cache becomes, and how long a sequence may then be."""

from dataclasses import replace

import pytest
import torch

from orchestra.errors import ConfigError
from orchestra.worker.kv_cache import (
    KvCache,
    KvCacheBudget,
    KvCacheSpec,
    check_host_blocks,
    decide_max_model_len,
    decide_num_blocks,
)

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
