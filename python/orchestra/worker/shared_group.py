"""The collectives of CPU ranks of one machine, over shared memory instead of gloo's sockets and threads."""

from torch import Tensor
from torch.distributed.distributed_c10d import Store

from orchestra._core import SharedGroup
from orchestra.errors import InternalError
from orchestra.worker.plan_socket import RankLostError
from orchestra.worker.row_kernels import KERNEL_DTYPES
from orchestra.worker.sharding import Shard

# A rank that does not come to a collective for so long hangs: the others are in the same step.
COLLECTIVE_TIMEOUT_S = 60.0


class SharedMemoryGroup:
    """A `Communicator` over memory that the ranks share.

    Sums are added in fp32, in the order of the ranks: every rank gets the same bits, however the ranks run.

    One thread, the one that computes, calls the collectives and `close`. `abort` may be called from any thread at any
    time, also while that one waits in a collective, and by any rank: the collectives of every rank then raise within
    some milliseconds, and so does every later one. A group never recovers from that, nor from a lost rank: `close` it
    and make another with the same store and the next `generation`, in the same processes or with others.

    Args:
        shard: this rank's place.
        store: through which the ranks find each other's memory.
        generation: 0 for the first group that these ranks form over this store, one more for each that follows.
        timeout_s: how long a rank waits for another inside a collective.

    Raises:
        RankLostError: not every rank came in time.
        InternalError: the ranks cannot see each other's memory, as in containers of their own.
    """

    def __init__(
        self,
        shard: Shard,
        store: Store,
        generation: int = 0,
        timeout_s: float = COLLECTIVE_TIMEOUT_S,
    ) -> None:
        self.shard = shard
        key = f"shared-group-{generation}"
        address = None if shard.rank == 0 else store.get(key).decode()
        timeout_ms = int(timeout_s * 1000)
        self._group = SharedGroup(shard.rank, shard.size, generation, timeout_ms, address)
        if address is None:
            store.set(key, self._group.address)
        try:
            self._group.meet()
        except InternalError as error:
            raise RankLostError(str(error)) from error

    def all_reduce(self, tensor: Tensor) -> None:
        """Replaces `tensor` (fp32 or bf16, on the CPU) by its sum over all ranks.

        Raises:
            RankLostError: a rank is gone or late, or the group was aborted.
        """
        numbers = tensor.contiguous()
        try:
            self._group.all_reduce(numbers.data_ptr(), numbers.numel(), KERNEL_DTYPES[tensor.dtype])
        except InternalError as error:
            # What ends a collective is that a rank is lost, or was given up for lost.
            raise RankLostError(str(error)) from error
        if numbers is not tensor:
            tensor.copy_(numbers)

    def gather_columns(self, tensor: Tensor) -> Tensor | None:
        """Joins the ranks' `[n, columns]` side by side on rank 0; None on the others.

        Raises:
            RankLostError: a rank is gone or late, or the group was aborted.
        """
        part = tensor.contiguous()
        rows, columns = part.shape
        joined = None
        if self.shard.rank == 0:
            joined = part.new_empty(rows, columns * self.shard.size)
        address = None if joined is None else joined.data_ptr()
        try:
            self._group.gather_columns(part.data_ptr(), part.nbytes, rows, address)
        except InternalError as error:
            raise RankLostError(str(error)) from error
        return joined

    def reduce_scatter(self, numbers: Tensor) -> Tensor:
        """This rank's share `[n / size]` of the sum of all ranks' `[n]`; dtypes and bits as by `all_reduce`.

        Raises:
            InvalidRequestError: the ranks do not divide the numbers.
            RankLostError: a rank is gone or late, or the group was aborted.
        """
        numbers = numbers.contiguous()
        share = numbers.new_empty(numbers.numel() // self.shard.size)
        arguments = (
            numbers.data_ptr(),
            numbers.numel(),
            KERNEL_DTYPES[numbers.dtype],
            share.data_ptr(),
        )
        try:
            self._group.reduce_scatter(*arguments)
        except InternalError as error:
            raise RankLostError(str(error)) from error
        return share

    def all_gather(self, part: Tensor) -> Tensor:
        """Every rank's `[n, ...]` in the order of the ranks, `[size, n, ...]`.

        Raises:
            RankLostError: a rank is gone or late, or the group was aborted.
        """
        part = part.contiguous()
        joined = part.new_empty((self.shard.size, *part.shape))
        try:
            self._group.all_gather(part.data_ptr(), part.nbytes, joined.data_ptr())
        except InternalError as error:
            raise RankLostError(str(error)) from error
        return joined

    def begin_step(self) -> None:
        """See `SelfMetered`."""
        self._group.begin_step()

    def metered(self) -> tuple[int, bool, float]:
        """See `SelfMetered`."""
        return self._group.progress()

    def abort(self) -> None:
        """Ends the collectives of every rank, now and from now on; any thread may call it."""
        self._group.abort()

    def close(self) -> None:
        """Leaves the group: nothing to do, its memory goes with the last rank that has it."""
