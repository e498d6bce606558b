"""The collectives of GPUs of one node that reach each other's memory over NVLink.

NCCL's order of sums depends on the size of a message where more than two ranks add up, and so does which algorithm is
fast. Here one kernel adds up messages of every size, in the order of the ranks: a request's numbers do not depend on
its batch. It can be recorded in a CUDA graph, since what it needs to know of the calls before lies on the device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import triton
from torch import Tensor
from torch._C._distributed_c10d import _SymmetricMemory
from torch.distributed import _symmetric_memory as symmetric_memory
from torch.distributed.distributed_c10d import Store

from orchestra.worker import symmetric_triton_kernels as kernels
from orchestra.worker.attention_triton import DTYPES, is_interpreted
from orchestra.worker.parallel import ProcessGroup
from orchestra.worker.plan_socket import RankLostError
from orchestra.worker.sharding import Shard

# Programs of the kernel at most, all of which have to run at once: GPUs with NVLink have more processors.
PROGRAMS = 64
BLOCK = 1024
# What a program exchanges at a time. All slots take 8 MiB of each GPU.
SLOT_BYTES = 64 << 10
# Up to so many bytes each of more than two ranks adds up everything; larger messages they share. To be measured.
ALONE_BYTES_MAX = 256 << 10
# How often a program looks for the others before it looks whether to go on: that takes a microsecond over PCIe.
LOOKS = 1024
# How long the kernel waits for another rank: longer than any rank may be building kernels while others have them.
WAIT_TIMEOUT = timedelta(minutes=2)


@dataclass(frozen=True)
class Cut:
    """How a message is divided: by its size and the number of ranks alone, so alike on every rank."""

    programs: int
    piece: int
    """Numbers that a program exchanges at a time."""
    share: int
    """Of a piece, numbers that each rank adds up for all; 0: each adds up everything."""

    @classmethod
    def of(cls, count: int, itemsize: int, size: int) -> "Cut":
        """Divides `count` numbers among few programs, in pieces that fit a slot."""
        blocks = triton.cdiv(count, BLOCK)
        programs = min(PROGRAMS, blocks)
        piece = min(triton.cdiv(blocks, programs) * BLOCK, SLOT_BYTES // itemsize)
        # Two ranks read as many bytes either way.
        is_shared = size > 2 and count * itemsize > ALONE_BYTES_MAX
        return cls(programs, piece, triton.cdiv(piece // BLOCK, size) * BLOCK if is_shared else 0)


@dataclass(frozen=True)
class SharedBuffers:
    """Memory of every rank that every rank can read and write, of zeros at first."""

    views: list[Tensor]
    """`uint8[num_bytes]` of each rank."""
    owner: object
    """What has to live as long as they are used."""


Allocate = Callable[[Shard, int, torch.device], SharedBuffers]


def allocate_symmetric(shard: Shard, num_bytes: int, device: torch.device) -> SharedBuffers:
    """Takes memory on each GPU of torch's group and opens it to the others; every rank calls it."""
    # Not `symmetric_memory.empty`: that may return a part of a larger allocation, whose beginning the others would see.
    own = _SymmetricMemory.empty_strided_p2p((num_bytes,), (1,), torch.uint8, device)
    own.zero_()
    # Whoever has met this rank may write to it.
    torch.cuda.synchronize(device)
    assert dist.group.WORLD is not None
    handle = symmetric_memory.rendezvous(own, dist.group.WORLD)
    views = [handle.get_buffer(rank, (num_bytes,), torch.uint8) for rank in range(shard.size)]
    return SharedBuffers(views, (own, handle))


class SymmetricGroup:
    """A `Communicator` over memory that the GPUs share, and over NCCL for what is not added up.

    Sums are added in fp32, in the order of the ranks, whatever the size of the message: every rank gets the bits of
    `topology.add_up`.

    A kernel waits for its like on the other GPUs, and NCCL's abort does not reach it. `abort`, which any thread may
    call at any time, does: the kernel looks at a word of host memory, and then waits for nothing any more. What it
    leaves are no sums. So all later collectives raise `RankLostError`, and who replays recorded ones has to look
    whether the group was aborted meanwhile, as `RenewableGroup.step` does. The device stays usable: the rank keeps its
    weights, and can form the next group.

    Where nobody calls `abort`, a kernel that has waited for `WAIT_TIMEOUT` takes the device's context down, so that no
    wrong number gets out. All that this process asks of its GPU fails from then on with a `RuntimeError`, also to form
    another group: the rank ends, as one that cannot regroup does, and has to be started again.

    Args:
        shard: this rank's place.
        store: through which the ranks find each other.
        device: where the tensors live.
        generation: 0 for the first group of these ranks, one more for each that follows.
        allocate: what makes the ranks' memory.
    """

    def __init__(
        self,
        shard: Shard,
        store: Store,
        device: torch.device,
        generation: int = 0,
        allocate: Allocate = allocate_symmetric,
    ) -> None:
        self.shard = shard
        self._others = ProcessGroup(shard, store, device, generation)
        self._signal_bytes = triton.cdiv(4 * PROGRAMS * shard.size, 128) * 128
        num_bytes = self._signal_bytes + 2 * PROGRAMS * SLOT_BYTES
        self._buffers = allocate(shard, num_bytes, device)
        bases = [view.data_ptr() for view in self._buffers.views]
        self._bases = torch.tensor(bases, dtype=torch.int64, device=device)
        self._epochs = torch.zeros(PROGRAMS, dtype=torch.int32, device=device)
        # On the host, where it can be written while the device computes; pinned, so that the device can read it.
        self._stop = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._is_stopped = False

    def all_reduce(self, tensor: Tensor) -> None:
        """Replaces `tensor` (fp32, bf16 or fp16) by its sum over all ranks.

        Raises:
            RankLostError: the group was aborted.
        """
        self._check()
        assert tensor.dtype in DTYPES
        numbers = tensor.contiguous()
        count, size = numbers.numel(), self.shard.size
        if count == 0:
            return
        cut = Cut.of(count, numbers.itemsize, size)
        kernels.all_reduce[(cut.programs,)](
            *(numbers, self._bases, self._epochs, self._stop),
            *(count, cut.piece, cut.share, WAIT_TIMEOUT // timedelta(microseconds=1) * 1000),
            RANK=self.shard.rank,
            SIZE=size,
            LANES=triton.next_power_of_2(size),
            PROGRAMS=PROGRAMS,
            SLOT_BYTES=SLOT_BYTES,
            SIGNAL_BYTES=self._signal_bytes,
            BLOCK=BLOCK,
            LOOKS=LOOKS,
            IS_SHARED=cut.share > 0,
            IS_INTERPRETED=is_interpreted(),
            num_warps=4,
        )
        if numbers is not tensor:
            tensor.copy_(numbers)

    def gather_columns(self, tensor: Tensor) -> Tensor | None:
        """Joins the ranks' `[n, columns]` side by side on rank 0; None on the others.

        Raises:
            RankLostError: the group was aborted.
        """
        self._check()
        return self._others.gather_columns(tensor)

    def abort(self) -> None:
        """Ends the collectives of this rank, now and from now on; any thread may call it."""
        self._is_stopped = True
        self._stop.fill_(1)
        self._others.abort()

    def close(self) -> None:
        """Leaves the group."""
        self._others.close()

    def _check(self) -> None:
        if self._is_stopped:
            raise RankLostError("the group was aborted")
