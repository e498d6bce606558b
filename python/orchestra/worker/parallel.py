"""What the ranks of one worker say to each other while they compute."""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous as meet

from orchestra.errors import ConfigError
from orchestra.worker.aside import make_aside
from orchestra.worker.sharding import Shard

# The first collective of a rank waits this long for the others, which may still be loading.
GROUP_TIMEOUT = timedelta(minutes=30)
# A group that forms again does so when all of its ranks have come: one that stays away now is lost.
REGROUP_TIMEOUT = timedelta(minutes=2)


class Communicator(Protocol):
    """The collectives of the forward pass, over the ranks of one shard group."""

    shard: Shard

    def all_reduce(self, tensor: Tensor) -> None:
        """Replaces `tensor` by its sum over all ranks."""
        ...

    def gather_columns(self, tensor: Tensor) -> Tensor | None:
        """Joins the ranks' `[n, columns]` side by side on rank 0; None on the others."""
        ...

    def close(self) -> None:
        """Leaves the group."""
        ...


@runtime_checkable
class Overlapping(Protocol):
    """A `Communicator` whose sums go on while this thread computes."""

    def start_all_reduce(self, tensor: Tensor) -> Callable[[], None]:
        """Begins an `all_reduce`; what it returns waits until `tensor` is the sum. They are done in their order."""
        ...


class SingleRank:
    """A group of one: nothing to say."""

    shard = Shard()

    def all_reduce(self, tensor: Tensor) -> None:
        """Does nothing: the sum is there."""

    def gather_columns(self, tensor: Tensor) -> Tensor | None:
        """Returns `tensor`."""
        return tensor

    def close(self) -> None:
        """Does nothing."""


class ProcessGroup:
    """NCCL between GPUs, gloo between CPUs.

    Args:
        shard: this rank's place.
        store: through which the ranks find each other.
        device: where the tensors live.
        generation: 0 for the first group of these ranks, one more for each that follows.
    """

    def __init__(
        self, shard: Shard, store: Store, device: torch.device, generation: int = 0
    ) -> None:
        self.shard = shard
        self._aside = make_aside(device)
        dist.init_process_group(
            backend="nccl" if device.type == "cuda" else "gloo",
            # A group that forms again after a rank was lost takes the next prefix of the same store.
            store=PrefixStore(f"group-{generation}", store),
            rank=shard.rank,
            world_size=shard.size,
            timeout=REGROUP_TIMEOUT if generation else GROUP_TIMEOUT,
            device_id=device if device.type == "cuda" else None,
        )

    def all_reduce(self, tensor: Tensor) -> None:
        """Replaces `tensor` by its sum over all ranks."""
        dist.all_reduce(tensor)

    def start_all_reduce(self, tensor: Tensor) -> Callable[[], None]:
        """See `Overlapping`."""
        return self._aside.start(lambda: self.all_reduce(tensor))

    def gather_columns(self, tensor: Tensor) -> Tensor | None:
        """Joins the ranks' `[n, columns]` side by side on rank 0; None on the others."""
        if self.shard.rank != 0:
            dist.gather(tensor)
            return None
        parts = [torch.empty_like(tensor) for _ in range(self.shard.size)]
        dist.gather(tensor, parts)
        return torch.cat(parts, dim=-1)

    def abort(self) -> None:
        """Ends the collectives of this rank; any thread may call it.

        NCCL's only: gloo's end by themselves when a rank's process does, and not before.
        """
        if dist.group.WORLD is not None:
            dist.group.WORLD.abort()

    def close(self) -> None:
        """Leaves the group."""
        dist.destroy_process_group()


def rendezvous(url: str, shard: Shard) -> Store:
    """Meets the other ranks.

    Args:
        url: `file:///path` for ranks of one machine, `env://` as torchrun sets it, or `tcp://host:port`.
        shard: this rank's place.

    Raises:
        ConfigError: the URL is of another kind, or what it needs is missing.
    """
    if url.startswith("file://"):
        # All ranks are on this machine. Without this gloo binds to whatever the host's name resolves to.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    try:
        store, _, _ = next(meet(url, shard.rank, shard.size))
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"rendezvous: {url} does not work: {error}") from error
    assert isinstance(store, Store)
    return store
