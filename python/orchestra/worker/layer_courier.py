"""How the KV of a layer goes from one stage of a pipeline to any other."""

from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from orchestra.worker.sharding import Shard, Stage
from orchestra.worker.stage_link import pair

# Both sides begin at the same word of rank 0; a lost one is noticed at once, by the end of its connections.
EXCHANGE_TIMEOUT = timedelta(minutes=2)


class Courier(Protocol):
    """One rank's way to the ranks of the same place in other stages, for one move at a time."""

    def begin(self, number: int) -> None:
        """A move begins, the same one on every rank."""
        ...

    def send(self, stage: int, tensor: Tensor) -> None:
        """Waits until a stage has taken a tensor."""
        ...

    def receive(self, stage: int, tensor: Tensor) -> None:
        """Waits for what a stage sends, and fills the tensor with it."""
        ...

    def end(self) -> None:
        """Everything has arrived."""
        ...


class ProcessCourier:
    """Gloo between CPUs: a group of two with each stage that there is something to say to.

    The groups last for one move: moves are rare, and idle connections would be one more thing that can end.

    Args:
        stage: this rank's.
        shard: its place in the stage.
        store: through which the ranks find each other.
        device: where the tensors live.
    """

    def __init__(self, stage: Stage, shard: Shard, store: Store, device: torch.device) -> None:
        self._index = stage.index
        self._shard = shard
        self._store = store
        self._device = device
        self._number = 0
        self._pairs: dict[int, Any] = {}

    def begin(self, number: int) -> None:
        """See `Courier`."""
        self._number = number
        self._pairs = {}

    def send(self, stage: int, tensor: Tensor) -> None:
        """See `Courier`.

        Raises:
            RuntimeError: the stage is gone or late.
        """
        self._pair_with(stage).send([tensor.contiguous()], self._place_of(stage), 0).wait()

    def receive(self, stage: int, tensor: Tensor) -> None:
        """See `Courier`.

        Raises:
            RuntimeError: the stage is gone or late.
        """
        self._pair_with(stage).recv([tensor], self._place_of(stage), 0).wait()

    def end(self) -> None:
        """See `Courier`."""
        self._pairs = {}

    def _place_of(self, stage: int) -> int:
        """The rank of another stage in the group with it: the earlier stage is 0."""
        return int(stage > self._index)

    def _pair_with(self, stage: int) -> Any:
        if stage not in self._pairs:
            former, latter = sorted((stage, self._index))
            prefix = f"move-{self._number}/{former}-{latter}/{self._shard.rank}"
            own = 1 - self._place_of(stage)
            store = PrefixStore(prefix, self._store)
            self._pairs[stage] = pair(store, own, self._device, EXCHANGE_TIMEOUT)
        return self._pairs[stage]
