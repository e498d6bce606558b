"""The paged KV cache: one slab, and how large it may be."""

import math
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestra.errors import ConfigError
from orchestra.worker.kv_memory import KvMemory
from orchestra.worker.plan import BlockCopies

GIB = 1 << 30


@dataclass(frozen=True)
class KvCacheSpec:
    """Shape of one rank's cache, apart from the number of blocks."""

    num_layers: int
    num_kv_heads: int
    """KV heads of this rank."""
    head_dim: int
    block_size: int
    """Tokens per block."""
    dtype: torch.dtype
    key_order: str = "pairs"
    """How the elements of a key lie: KV means the same to two workers only if they agree."""

    @property
    def layer_block_bytes(self) -> int:
        """Keys and values of one block in one layer."""
        return self.block_size * 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    @property
    def bytes_per_block(self) -> int:
        """Keys and values of one block in all layers."""
        return self.num_layers * self.layer_block_bytes


class PagedCache(Protocol):
    """What computes a step has to know of a cache."""

    @property
    def spec(self) -> KvCacheSpec:
        """Its shape."""
        ...

    @property
    def num_blocks(self) -> int:
        """Its blocks."""
        ...

    def layer(self, index: int) -> Tensor:
        """One layer, `[num_blocks, 2, num_kv_heads, block_size, head_dim]`."""
        ...

    def copy_blocks(self, swap_out: BlockCopies, swap_in: BlockCopies) -> None:
        """Copies blocks to host memory, then others back."""
        ...


class KvCache:
    """Keys and values of every block, in one preallocated slab; and host memory for those of preempted sequences.

    The slab is `[num_layers, num_blocks, 2, num_kv_heads, block_size, head_dim]`, keys before values: what a block
    holds of a layer is one run of bytes, which is what a transfer wants; and what it holds of a head is one too, which
    is what a kernel wants.

    Args:
        spec: the shape.
        num_blocks: how many blocks.
        device: where the slab lives.
        num_host_blocks: blocks that host memory holds besides.
        shared: memory for the slab, all zero, that other workers can reach, with as many blocks of host memory behind
            those of each layer; None: memory of its own.
    """

    def __init__(
        self,
        spec: KvCacheSpec,
        num_blocks: int,
        device: torch.device,
        num_host_blocks: int = 0,
        shared: KvMemory | None = None,
    ) -> None:
        self.spec = spec
        self.num_blocks = num_blocks
        shape = (
            spec.num_layers,
            num_blocks,
            2,
            spec.num_kv_heads,
            spec.block_size,
            spec.head_dim,
        )
        # Zeros, not garbage: attention multiplies what lies behind a sequence's end by 0, which NaN would survive.
        # Here a block is one run of bytes, layer after layer: a copy touches host memory once.
        host_shape = (num_host_blocks, spec.num_layers, *shape[2:])
        if shared is not None and device.type == "cpu":
            # The tensors keep the memory for as long as they live.
            shard = shared.shard
            both = (spec.num_layers, shard.size, num_blocks + num_host_blocks, *shape[2:])
            used = math.prod(both) * spec.dtype.itemsize
            memory = _view(shared.whole[:used], spec, both)[:, shard.rank]
            self.slab = memory[:, :num_blocks]
            self._host = memory[:, num_blocks:].transpose(0, 1)
        elif device.type == "cpu":
            self.slab = _zeros(spec, shape)
            self._host = _zeros(spec, host_shape)
        else:
            self.slab = torch.zeros(shape, dtype=spec.dtype, device=device)
            self._host = torch.zeros(host_shape, dtype=spec.dtype, pin_memory=num_host_blocks > 0)

    def layer(self, index: int) -> Tensor:
        """One layer, `[num_blocks, 2, num_kv_heads, block_size, head_dim]`."""
        return self.slab[index]

    def host_layer(self, index: int) -> Tensor:
        """What host memory holds of one layer, `[num_host_blocks, 2, num_kv_heads, block_size, head_dim]`."""
        return self._host[:, index]

    def copy_blocks(self, swap_out: BlockCopies, swap_in: BlockCopies) -> None:
        """Copies blocks to host memory, then others back.

        On a GPU nothing waits: its stream does the copies in their order, before the kernels that come after them.
        """
        for block, host_block in zip(swap_out.blocks, swap_out.host_blocks, strict=True):
            self._host[host_block].copy_(self.slab[:, block], non_blocking=True)
        for block, host_block in zip(swap_in.blocks, swap_in.host_blocks, strict=True):
            self.slab[:, block].copy_(self._host[host_block], non_blocking=True)


def _zeros(spec: KvCacheSpec, shape: tuple[int, ...]) -> Tensor:
    """Zeros in pages that the kernel provides when they are first touched: no wait, no memory before use."""
    if 0 in shape:  # which torch cannot view as other numbers
        return torch.empty(shape, dtype=spec.dtype)
    memory = np.zeros(math.prod(shape) * spec.dtype.itemsize, np.uint8)
    return _view(memory, spec, shape)


def _view(memory: NDArray[np.uint8], spec: KvCacheSpec, shape: tuple[int, ...]) -> Tensor:
    return torch.from_numpy(memory).view(spec.dtype).view(shape)


@dataclass(frozen=True)
class KvCacheBudget:
    """What decides the number of blocks."""

    num_blocks: int | None
    """Asked for by number."""
    memory_bytes: int | None
    """Asked for by memory, of this rank."""
    free_bytes: int
    """Memory that this rank may count as free, after the weights were loaded."""
    useful_tokens: int | None
    """More tokens than this can never be in the cache; None: as many as there is room for are useful."""
    share: float
    """Of the free memory, where nothing was asked for."""


def decide_num_blocks(spec: KvCacheSpec, budget: KvCacheBudget) -> int:
    """How many blocks to allocate: the number asked for, or what fits the memory.

    Raises:
        ConfigError: not one block fits, or what was asked for exceeds the free memory.
    """
    size = spec.bytes_per_block
    if budget.num_blocks is not None:
        num_blocks, source = budget.num_blocks, "num_blocks"
    elif budget.memory_bytes is not None:
        num_blocks, source = budget.memory_bytes // size, "kv_cache_memory"
    else:
        num_blocks, source = int(budget.free_bytes * budget.share) // size, "free memory"
        if budget.useful_tokens is not None:
            num_blocks = min(num_blocks, -(-budget.useful_tokens // spec.block_size))
    if num_blocks < 1:
        raise ConfigError(f"{source}: not enough for one KV block of {size} bytes")
    if num_blocks * size > budget.free_bytes:
        raise ConfigError(
            f"{source}: {num_blocks} blocks of {size} bytes take {num_blocks * size / GIB:.2f} GiB, "
            f"but {budget.free_bytes / GIB:.2f} GiB are free"
        )
    return num_blocks


def check_host_blocks(spec: KvCacheSpec, num_host_blocks: int, free_bytes: int) -> None:
    """Compares what host memory is to hold with what is free of it.

    Raises:
        ConfigError: it is too much.
    """
    size = num_host_blocks * spec.bytes_per_block
    if size > free_bytes:
        raise ConfigError(
            f"num_host_blocks: {num_host_blocks} blocks of {spec.bytes_per_block} bytes take "
            f"{size / GIB:.2f} GiB, but {free_bytes / GIB:.2f} GiB are free",
            key="num_host_blocks",
        )


def decide_max_model_len(
    spec: KvCacheSpec, num_blocks: int, asked: int | None, longest: int
) -> int:
    """The longest sequence to accept.

    Args:
        spec: the cache's shape.
        num_blocks: its blocks.
        asked: for by the configuration, if at all.
        longest: sequence that the model is built for.

    Raises:
        ConfigError: the cache cannot hold what was asked for.
    """
    capacity = num_blocks * spec.block_size
    if asked is not None and asked > capacity:
        raise ConfigError(
            f"max_model_len: {asked} tokens need {-(-asked // spec.block_size)} KV blocks of "
            f"{spec.block_size} tokens, there are {num_blocks}",
            key="max_model_len",
        )
    return min(longest, capacity)
