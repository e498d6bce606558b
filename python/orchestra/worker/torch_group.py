"""Groups of torch's, of which a process may be in several: gloo between CPUs, NCCL between GPUs."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from orchestra.worker.sharding import Shard
from orchestra.worker.topology import add_up


class TorchGroup:
    """What moves numbers between ranks, and adds them here: so their order is ours, not that of a ring.

    Raises `RuntimeError` from every method where a rank is lost, as torch's groups do.

    Args:
        shard: this rank's place in the group.
        store: through which its ranks, and no others, find each other.
        device: where the tensors live.
        timeout: how long a collective waits for a rank.
    """

    def __init__(
        self, shard: Shard, store: Store, device: torch.device, timeout: timedelta
    ) -> None:
        self.shard = shard
        self._can_abort = device.type == "cuda"
        self._group = _join(shard, store, device, timeout)

    def all_gather(self, part: Tensor) -> Tensor:
        """Every rank's `[n, ...]`, `[size, n, ...]`."""
        return self.start_all_gather(part)()

    def start_all_gather(self, part: Tensor) -> Callable[[], Tensor]:
        """Begins an `all_gather`, which goes on while this thread does other things; what it returns waits for it."""
        part = part.contiguous()
        joined = part.new_empty((self.shard.size, *part.shape))
        work = None
        if part.numel() > 0:
            work = self._group._allgather_base(joined.view(-1), part.view(-1))

        def finish() -> Tensor:
            if work is not None:
                work.wait()
            return joined

        return finish

    def exchange(self, shares: Tensor) -> Tensor:
        """`shares[r]` goes to rank `r`: `[size, n]` of this rank's to `[size, n]` of all ranks', this rank's share."""
        received = shares.new_empty(shares.shape)
        if shares.numel() > 0:
            self._group.alltoall_base(
                received.view(-1), shares.contiguous().view(-1), [], []
            ).wait()
        return received

    def exchange_rows(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Sends the first `sent[0]` of `rows` to rank 0 and so on; returns `received[0]` from rank 0 and so on."""
        given = rows.new_empty(sum(received), *rows.shape[1:])
        self._group.alltoall_base(given, rows.contiguous(), received, sent).wait()
        return given

    def reduce_scatter(self, numbers: Tensor) -> Tensor:
        """This rank's share `[n / size]` of the sum of all ranks' `[n]`, added in the order of the ranks."""
        received = self.exchange(numbers.view(self.shard.size, -1))
        return add_up(list(received))

    def gather_columns(self, tensor: Tensor) -> Tensor | None:
        """Joins the ranks' `[n, columns]` side by side on rank 0; None on the others."""
        options = dist.GatherOptions()
        options.rootRank = 0
        part = tensor.contiguous()
        if self.shard.rank != 0:
            self._group.gather([], [part], options).wait()
            return None
        parts = [torch.empty_like(part) for _ in range(self.shard.size)]
        self._group.gather([parts], [part], options).wait()
        return torch.cat(parts, dim=-1)

    def abort(self) -> None:
        """Ends the collectives of this rank, where the transport can: gloo's end when a rank's process does."""
        group = self._group
        if self._can_abort and group is not None:
            group.abort()

    def close(self) -> None:
        """Leaves the group: the other ranks find its connections closed."""
        self._group = None


def _join(shard: Shard, store: Store, device: torch.device, timeout: timedelta) -> Any:
    """Untyped: torch's stubs leave out the methods that its backends have."""
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, shard.rank, shard.size, options)
    return dist.ProcessGroupGloo(store, shard.rank, shard.size, timeout)
