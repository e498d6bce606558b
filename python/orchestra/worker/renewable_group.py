"""A communicator that outlives its group: the model keeps it, whatever happens to the ranks."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from orchestra.worker.parallel import Communicator, Overlapping
from orchestra.worker.plan_socket import RankLostError
from orchestra.worker.sharding import Shard


class AbortableCommunicator(Communicator, Protocol):
    """A communicator whose collectives another thread can end."""

    def abort(self) -> None:
        """Ends the collectives of this rank, where the transport can; any thread may call it."""
        ...


@runtime_checkable
class SelfMetered(Protocol):
    """What counts its collectives itself, those too that are called without Python."""

    def begin_step(self) -> None:
        """A step begins."""
        ...

    def metered(self) -> tuple[int, bool, float]:
        """Collectives entered, whether it is in one, and the longest time between two in the step, seconds."""
        ...


@dataclass(frozen=True)
class Progress:
    """How far a rank is."""

    num_collectives: int
    """Collectives that it has entered."""
    num_steps: int
    """Steps that it has executed."""
    is_waiting: bool
    """Whether it waits for other ranks now, and not they for it."""


class RenewableGroup:
    """A `Communicator` over one group after the other, which counts what passes through it.

    Args:
        shard: this rank's place.
        join: forms the group of a generation.
        generation: of the first group.
    """

    def __init__(
        self, shard: Shard, join: Callable[[int], AbortableCommunicator], generation: int
    ) -> None:
        self.shard = shard
        self._slowest_round_s = 0.0
        self._join = join
        self._num_collectives = 0
        self._num_steps = 0
        self._is_waiting = False
        self._is_aborted = False
        self._round_began = 0.0
        self._group: AbortableCommunicator | None = None
        self._meter: SelfMetered | None = None
        self._enter_group(generation)

    @property
    def group(self) -> AbortableCommunicator:
        """Of this generation."""
        assert self._group is not None
        return self._group

    @property
    def slowest_round_s(self) -> float:
        """Longest time between the ends of two collectives of the step that runs, or ran last."""
        return self._slowest_round_s if self._meter is None else self._meter.metered()[2]

    def all_reduce(self, tensor: Tensor) -> None:
        """Replaces `tensor` by its sum over all ranks."""
        self._enter().all_reduce(tensor)
        self._left()

    def start_all_reduce(self, tensor: Tensor) -> Callable[[], None]:
        """See `Overlapping`; only while `group` is such a one.

        This rank waits for others from when it needs the sum: until then they may wait for it.
        """
        group = self.group
        assert isinstance(group, Overlapping)
        self._num_collectives += 1
        wait = group.start_all_reduce(tensor)

        def finish() -> None:
            self._is_waiting = True
            wait()
            self._left()

        return finish

    def gather_columns(self, tensor: Tensor) -> Tensor | None:
        """Joins the ranks' `[n, columns]` side by side on rank 0; None on the others."""
        joined = self._enter().gather_columns(tensor)
        self._left()
        return joined

    @contextlib.contextmanager
    def step(self) -> Iterator[None]:
        """Brackets a step, which is counted where it ends well.

        Raises:
            RankLostError: the group was aborted meanwhile. A GPU that was told so computes the step to its end, with
                sums that are none, and where it replays recorded ones no collective is called that would say so.
        """
        self._round_began = time.monotonic()
        self._slowest_round_s = 0.0
        if self._meter is not None:
            self._meter.begin_step()
        yield
        self.check()
        self._num_steps += 1

    def check(self) -> None:
        """Finds out whether what was computed can be used.

        Raises:
            RankLostError: the group was aborted.
        """
        if self._is_aborted:
            raise RankLostError("the group was aborted during the step")

    def progress(self) -> Progress:
        """How far this rank is; any thread may ask."""
        meter = self._meter
        if meter is None:
            return Progress(self._num_collectives, self._num_steps, self._is_waiting)
        num_collectives, is_waiting, _ = meter.metered()
        return Progress(num_collectives, self._num_steps, is_waiting)

    def abort(self) -> None:
        """Ends the collectives of this rank, where the transport can; any thread may call it."""
        # Said before any collective can end by it.
        self._is_aborted = True
        group = self._group
        if group is not None:
            group.abort()

    def leave(self) -> None:
        """Lets go of a group that has lost a rank."""
        group, self._group, self._meter = self._group, None, None
        if group is not None:
            with contextlib.suppress(RuntimeError):
                group.abort()
            with contextlib.suppress(RuntimeError):
                group.close()

    def renew(self, generation: int) -> None:
        """Forms the next group; the last one was left."""
        assert self._group is None
        self._num_collectives = self._num_steps = 0
        self._is_waiting = self._is_aborted = False
        self._enter_group(generation)

    def close(self) -> None:
        """Leaves the group for good."""
        group, self._group = self._group, None
        if group is not None:
            group.close()

    def _enter_group(self, generation: int) -> None:
        self._group = self._join(generation)
        self._meter = self._group if isinstance(self._group, SelfMetered) else None

    # Two calls instead of a context manager: that costs as much as a small sum over shared memory.

    def _enter(self) -> AbortableCommunicator:
        group = self.group
        if self._meter is None:
            self._num_collectives += 1
            self._is_waiting = True
        return group

    def _left(self) -> None:
        if self._meter is not None:
            return
        self._is_waiting = False
        now = time.monotonic()
        self._slowest_round_s = max(self._slowest_round_s, now - self._round_began)
        self._round_began = now
