"""The collectives of CPU ranks of one machine, over shared memory instead of gloo's sockets and threads."""

from urllib.parse import urlparse

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from orchestra._core import SharedGroup
from orchestra.errors import ConfigError, InternalError
from orchestra.worker.config import WorkerConfig
from orchestra.worker.parallel import ProcessGroup
from orchestra.worker.plan_channel import RankLostError
from orchestra.worker.renewable_group import AbortableCommunicator
from orchestra.worker.sharding import Shard

# A rank that does not come to a collective for so long hangs: the others are in the same step.
COLLECTIVE_TIMEOUT_S = 60.0

_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


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
            self._group.all_reduce(numbers.data_ptr(), numbers.numel(), _DTYPES[tensor.dtype])
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

    def abort(self) -> None:
        """Ends the collectives of every rank, now and from now on; any thread may call it."""
        self._group.abort()

    def close(self) -> None:
        """Leaves the group: nothing to do, its memory goes with the last rank that has it."""


def join_group(
    config: WorkerConfig, store: Store, device: torch.device, generation: int
) -> AbortableCommunicator:
    """Joins a group of this rank's, over what fits the place of its ranks.

    Args:
        config: says what was asked for, and whether the ranks share a machine.
        store: through which the ranks find each other.
        device: where the tensors live.
        generation: 0 for the first group of these ranks, one more for each that follows.

    Raises:
        ConfigError: `shm` was asked for where it cannot be.
        RankLostError: not every rank came.
    """
    is_local = urlparse(config.rendezvous).scheme == "file" and device.type == "cpu"
    if config.collectives == "shm" and not is_local:
        message = "--collectives: shm is for CPU ranks that meet by a file:// rendezvous"
        raise ConfigError(message, key="collectives")
    if is_local and config.collectives != "gloo":
        return SharedMemoryGroup(config.shard, store, generation)
    return ProcessGroup(config.shard, store, device, generation)
