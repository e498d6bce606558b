"""How a step's arrays get to the device: all in one copy, out of pinned memory, waiting for nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestra.worker.plan import Int32Array

# Arrays begin at multiples of 16 bytes: Triton compiles a kernel anew for pointers that do not.
ALIGNED = 4
# Pieces of host memory that take turns: one is written while the copy out of the other may still be under way.
_TURNS = 2


@dataclass
class _Piece:
    """Host memory and, on a GPU, what tells when the copy out of it is done."""

    memory: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    copied: torch.cuda.Event | None = None


class StagingRing:
    """Host memory from which copies to a device start, in turns.

    It grows with the longest step; a step's arrays are bounded by the scheduler's limits.

    Args:
        device: where the copies go.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._pieces = [_Piece() for _ in range(_TURNS)]
        self._turn = 0

    def take(self, length: int) -> Int32Array:
        """The next piece, `int32[length]`, to be filled. Waits only where the copy before the last is not done."""
        self._turn = (self._turn + 1) % len(self._pieces)
        piece = self._pieces[self._turn]
        if piece.copied is not None:
            piece.copied.synchronize()
        if len(piece.memory) < length:
            size = 1 << (length - 1).bit_length()
            piece.memory = torch.empty(size, dtype=torch.int32, pin_memory=self._is_cuda)
        array: Int32Array = piece.memory.numpy()[:length]
        return array

    def send(self, target: Tensor) -> None:
        """Copies the piece that was taken last to `target`, `int32[at most its length]`."""
        piece = self._pieces[self._turn]
        target.copy_(piece.memory[: len(target)], non_blocking=True)
        if self._is_cuda:
            if piece.copied is None:
                piece.copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            piece.copied.record()


class Staging:
    """Sends the arrays of one step after the other.

    Args:
        device: where they go.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ring = StagingRing(device)

    def send(self, arrays: Sequence[NDArray[np.integer]]) -> list[Tensor]:
        """Copies flat arrays to the device as `int32`; they are all in one allocation."""
        lengths = [len(array) for array in arrays]
        starts = np.cumsum([0, *map(aligned, lengths)]).tolist()
        host = self._ring.take(max(1, starts[-1]))
        for array, start in zip(arrays, starts, strict=False):
            host[start : start + len(array)] = array
        sent = torch.empty(len(host), dtype=torch.int32, device=self._device)
        self._ring.send(sent)
        pairs = zip(starts, lengths, strict=False)
        return [sent[start : start + length] for start, length in pairs]


def send(array: NDArray[np.generic], device: torch.device) -> Tensor:
    """Copies one array to the device, waiting for nothing: neither for the copy nor for what the device computes.

    For what has no place in a step's own arrays. On a CPU nothing is copied: the tensor is the array's memory.
    """
    host = torch.from_numpy(array)
    if device.type == "cuda":
        # Out of pageable memory the driver may wait for the stream first. Torch keeps pinned pieces and uses one again
        # when the copy out of it is done.
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def aligned(length: int) -> int:
    """So many numbers and what pads them to the beginning of the next array."""
    return -(-length // ALIGNED) * ALIGNED
