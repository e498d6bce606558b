"""The KV cache of a stage whose layers may come and go: each layer has memory of its own."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestra.worker.kv_cache import KvCache, KvCacheSpec
from orchestra.worker.plan import BlockCopies, StepPlan

# Largest piece of a layer's KV that is handed over at once, unless a single block is larger.
PIECE_BYTES_MAX = 32 << 20

_CPU = torch.device("cpu")


class WrittenBlocks:
    """Which blocks were ever written: all that has to go with a layer.

    Every stage runs every step, so the ranks remember the same ones.

    Args:
        num_blocks: of the device.
        num_host_blocks: of host memory.
        block_size: tokens per block.
    """

    def __init__(self, num_blocks: int, num_host_blocks: int, block_size: int) -> None:
        self._block_size = block_size
        self._blocks = np.zeros(num_blocks, np.bool_)
        self._host_blocks = np.zeros(num_host_blocks, np.bool_)

    @property
    def blocks(self) -> NDArray[np.int64]:
        """Those of the device, in order."""
        return np.flatnonzero(self._blocks)

    @property
    def host_blocks(self) -> NDArray[np.int64]:
        """Those of host memory, in order."""
        return np.flatnonzero(self._host_blocks)

    def note(self, plan: StepPlan) -> None:
        """Takes in what a step writes."""
        self._blocks[plan.slot_mapping // self._block_size] = True
        self._blocks[plan.swap_in.blocks] = True
        self._host_blocks[plan.swap_out.host_blocks] = True


class StageCache:
    """A `PagedCache` on the CPU of which each layer is a cache of its own.

    Args:
        layers: in order, at least one; all alike, each of one layer.
        written: of their blocks.
    """

    def __init__(self, layers: Sequence[KvCache], written: WrittenBlocks) -> None:
        self.layers = tuple(layers)
        self.spec = replace(layers[0].spec, num_layers=len(layers))
        self.num_blocks = layers[0].num_blocks
        self.written = written

    @classmethod
    def allocate(cls, spec: KvCacheSpec, num_blocks: int, num_host_blocks: int) -> "StageCache":
        """A cache of a shape, all zero; see `KvCache`."""
        one = replace(spec, num_layers=1)
        layers = [KvCache(one, num_blocks, _CPU, num_host_blocks) for _ in range(spec.num_layers)]
        return cls(layers, WrittenBlocks(num_blocks, num_host_blocks, spec.block_size))

    @property
    def layer_bytes(self) -> int:
        """What one layer takes, host memory included."""
        return (self.num_blocks + self._num_host_blocks) * self.spec.layer_block_bytes

    @property
    def _num_host_blocks(self) -> int:
        return self.layers[0].host_layer(0).shape[0]

    def layer(self, index: int) -> Tensor:
        """One layer, `[num_blocks, 2, num_kv_heads, block_size, head_dim]`."""
        return self.layers[index].layer(0)

    def copy_blocks(self, swap_out: BlockCopies, swap_in: BlockCopies) -> None:
        """See `KvCache.copy_blocks`."""
        for layer in self.layers:
            layer.copy_blocks(swap_out, swap_in)

    def new_layer(self) -> KvCache:
        """Memory for one layer more, all zero."""
        return KvCache(self.layers[0].spec, self.num_blocks, _CPU, self._num_host_blocks)

    def written_pieces(self, layer: KvCache) -> Iterator[tuple[Tensor, Tensor]]:
        """What was ever written of a layer, in pieces of bounded size: the same ones on both sides of a move.

        Yields:
            All blocks of the device, or of host memory, `[blocks, 2, num_kv_heads, block_size, head_dim]`; and the
            numbers of those that the piece is made of, `int64[n]`.
        """
        count = max(1, PIECE_BYTES_MAX // self.spec.layer_block_bytes)
        tiers = (
            (layer.layer(0), self.written.blocks),
            (layer.host_layer(0), self.written.host_blocks),
        )
        for blocks, written in tiers:
            for start in range(0, len(written), count):
                yield blocks, torch.from_numpy(written[start : start + count])
