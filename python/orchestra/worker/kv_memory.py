"""Memory of a KV cache that other workers can reach, with the parts of all ranks that share the layers."""

import contextlib
import mmap
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from orchestra.errors import InternalError
from orchestra.worker.sharding import Shard

if TYPE_CHECKING:
    from orchestra._core import KvPool
    from orchestra.worker.attention import LayerListener


def num_scratch_blocks(shard: Shard) -> int:
    """How many blocks such a cache has for warming up.

    A rank alone warms up once, when no block holds anything yet. Several do so again when one of them was replaced, and
    other workers may then be reading any block that a sequence can have.
    """
    return 1 if shard.size > 1 else 0


@dataclass(frozen=True)
class KvMemory:
    """Where one rank's cache lies among those of the others; rank 0 has the pool that moves all of them."""

    whole: NDArray[np.uint8]
    """Every rank's: the bytes of `[num_layers, ranks, num_blocks + scratch + num_host_blocks, layer_block_bytes]`."""
    shard: Shard
    """This rank's place."""
    pool: "KvPool | None" = None
    """What moves it; None on the other ranks, which have mapped it."""

    @property
    def num_scratch_blocks(self) -> int:
        """Blocks behind those of sequences, to warm up in."""
        return num_scratch_blocks(self.shard)

    def watched_by(self, listener: "LayerListener") -> "LayerListener":
        """What rank 0's attention is to call so that `listener` hears of the pool's layers.

        To the pool each rank's part of a layer is one. When rank 0's own is in the cache, that of another may not be;
        but rank 0 has the sums that followed the layers before, to which every rank came through its attention.
        """
        size = self.shard.size
        if size == 1:
            return listener

        def listen(step_id: int, layer: int) -> None:
            if layer > 0:
                listener(step_id, layer * size - 1)

        return listen


def map_memory(address: str, shard: Shard) -> KvMemory:
    """Maps the memory that rank 0 has made, on another rank.

    Args:
        address: `KvPool.address`, of a process that runs.
        shard: this rank's place.

    Raises:
        InternalError: it cannot be reached.
    """
    try:
        descriptor = os.open(address, os.O_RDWR | os.O_CLOEXEC)
        try:
            mapped = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise InternalError(f"rank 0's KV memory cannot be mapped: {error.strerror}") from error
    with contextlib.suppress(OSError):
        # As rank 0 has asked for; a kernel without huge pages refuses.
        mapped.madvise(mmap.MADV_HUGEPAGE)
    return KvMemory(np.frombuffer(mapped, np.uint8), shard)
