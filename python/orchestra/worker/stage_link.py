"""How hidden states go from one stage of a pipeline to the next."""

import time
from collections import deque
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from orchestra.errors import InternalError
from orchestra.worker.sharding import Shard, Stage

# As long as a rank may take to load; in a step, whoever ends closes its connections and is noticed at once.
LINK_TIMEOUT = timedelta(minutes=30)

_FORMER, _LATTER = 0, 1


class StageLink(Protocol):
    """One rank's connections to the ranks of the same place in the stages before and after its own."""

    waited_s: float
    """Seconds that `receive` has taken in all."""

    def send(self, hidden: Tensor) -> None:
        """Hands `[T, H]` to the next stage, perhaps before that takes it; nobody may change the tensor any more."""
        ...

    def receive(self, hidden: Tensor) -> None:
        """Waits for what the stage before sends next, and fills `[T, H]` with it."""
        ...

    def close(self) -> None:
        """Leaves both neighbours."""
        ...


class SingleStage:
    """A pipeline of one stage: nobody to send to."""

    waited_s = 0.0

    def send(self, hidden: Tensor) -> None:
        """Never called: the only stage is the last.

        Raises:
            InternalError: always.
        """
        raise InternalError(f"the only stage has nobody to send {tuple(hidden.shape)} to")

    def receive(self, hidden: Tensor) -> None:
        """Never called: the only stage is the first.

        Raises:
            InternalError: always.
        """
        raise InternalError(f"the only stage has nobody to receive {tuple(hidden.shape)} from")

    def close(self) -> None:
        """Does nothing."""


class ProcessLink:
    """NCCL between GPUs, gloo between CPUs: a group of two with each neighbour, apart from the groups of the shards.

    Sends are asynchronous, so that a stage goes on to its next step while the next one is still at work. At most one
    for each step in flight is under way, of which there are no more than stages.

    Args:
        stage: this rank's.
        shard: its place in the stage.
        store: through which the ranks find each other.
        device: where the tensors live.
    """

    def __init__(self, stage: Stage, shard: Shard, store: Store, device: torch.device) -> None:
        self.waited_s = 0.0
        self._count = stage.count
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()

        def meet(former: int, rank: int) -> Any:
            prefix = f"stages-{former}-{former + 1}/{shard.rank}"
            return pair(PrefixStore(prefix, store), rank, device, LINK_TIMEOUT)

        # From the first stage to the last: each pair waits only for one that waits for nobody behind it.
        self._before = None if stage.is_first else meet(stage.index - 1, _LATTER)
        self._after = None if stage.is_last else meet(stage.index, _FORMER)

    def send(self, hidden: Tensor) -> None:
        """See `StageLink`."""
        assert self._after is not None
        while self._sending and (
            len(self._sending) >= self._count or self._sending[0][0].is_completed()
        ):
            work, _ = self._sending.popleft()
            work.wait()
        # Kept until it is sent: the memory is the tensor's own.
        hidden = hidden.contiguous()
        self._sending.append((self._after.send([hidden], _LATTER, 0), hidden))

    def receive(self, hidden: Tensor) -> None:
        """See `StageLink`."""
        assert self._before is not None
        began = time.monotonic()
        self._before.recv([hidden], _FORMER, 0).wait()
        self.waited_s += time.monotonic() - began

    def close(self) -> None:
        """Waits for what is under way, then leaves."""
        for work, _ in self._sending:
            work.wait()
        self._sending.clear()
        self._before = self._after = None


def pair(store: Store, rank: int, device: torch.device, timeout: timedelta) -> Any:
    """A group of two, made without the default group, which is the shard's.

    Untyped: torch's stubs leave out the methods that its backends have.

    Args:
        store: for these two alone.
        rank: 0 or 1.
        device: where the tensors live.
        timeout: of meeting, and of each message.
    """
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, 2, options)
    return dist.ProcessGroupGloo(store, rank, 2, timeout)
