"""What the ranks of a worker do when one of them is lost: the others keep their process and their weights.

The step is given up, the router replays its sequences, and a replacement of the lost rank makes the group whole again,
as its next generation. Whoever leads the worker, rank 0, cannot be replaced.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from orchestra.worker.assembly import Rank
from orchestra.worker.plan_channel import Follower, Leader
from orchestra.worker.plan_socket import RankLostError
from orchestra.worker.rank_watch import FollowerWatch, LeaderWatch, Patience
from orchestra.worker.renewable_group import RenewableGroup

# A collective that ends because a rank died ends before, or after, that was noticed otherwise.
CONFIRM_S = 1.0
# Ranks may be lost while the group forms again; a worker that loses them so often is better started anew. Counted down.
ATTEMPTS = (2, 1, 0)

# As what a lost rank is felt: on a socket, or inside a collective of torch.
LOSSES = (RankLostError, RuntimeError)

logger = logging.getLogger("orchestra.worker")


class Restartable(Protocol):
    """What is needed of `orchestra._core.Agent`."""

    def start_over(self) -> None:
        """Forgets everything computed and lets go of the router."""
        ...


@dataclass(frozen=True)
class Regrouping:
    """How it went."""

    lost: tuple[int, ...]
    survivors_s: float
    """From the moment when the loss was noticed until every other rank was ready for the next generation."""
    total_s: float
    """Until the next generation was ready to serve."""


class LeaderRecovery:
    """Rank 0's part.

    Args:
        rank: this rank.
        ends: its group, and its end of the plan channel.
        timeout_s: how long to wait for a replacement; 0: there will be none.
        hang_timeout_s: shortest standstill after which a rank counts as hung; 0: never.
        on_hung: told of each rank that hangs, which is to be killed.
    """

    def __init__(
        self,
        rank: Rank,
        ends: tuple[RenewableGroup, Leader],
        timeout_s: float,
        hang_timeout_s: float,
        on_hung: Callable[[int], None],
    ) -> None:
        self._rank = rank
        self._group, self._leader = ends
        self._timeout_s = timeout_s
        self._patience = Patience(hang_timeout_s)
        self._on_hung = on_hung
        self.watch = self._watch()

    def is_over_lost_rank(self) -> bool:
        """Whether what was raised just now has to do with a rank that is lost."""
        return self.watch.is_lost(CONFIRM_S)

    def regroup(self, agent: Restartable, is_wanted: Callable[[], bool]) -> Regrouping:
        """Gives up the step and waits until the group is whole again.

        Args:
            agent: whose sequences end.
            is_wanted: asked now and then; false ends the wait.

        Raises:
            RankLostError: the group is not whole again in time.
        """
        watch = self.watch
        lost = tuple(watch.lost)
        watch.left()
        watch.stop()
        if self._timeout_s <= 0.0:
            raise RankLostError(f"ranks {list(lost)} are lost")
        logger.warning("ranks %s are lost, waiting for their replacements", list(lost))
        self._group.leave()
        self._leader.part()
        # The router replays the sequences while the other ranks come.
        agent.start_over()
        arrivals = _Arrivals(self._leader, lost, is_wanted)
        attempts = (self._form(arrivals, is_last_try=left == 0) for left in ATTEMPTS)
        any(attempts)
        self.watch = self._watch()
        began, now = watch.lost_at, time.monotonic()
        return Regrouping(lost, arrivals.survived_at - began, now - began)

    def close(self) -> None:
        """Stops watching."""
        self.watch.stop()

    def _form(self, arrivals: "_Arrivals", *, is_last_try: bool) -> bool:
        try:
            self._leader.gather(self._timeout_s, self._rank.cache_terms, arrivals.look)
            self._group.renew(self._leader.generation)
            self._rank.settle()
        except LOSSES as error:
            if is_last_try or not arrivals.is_wanted():
                raise
            logger.warning("the group did not form: %s", error)
            self._group.leave()
            self._leader.part()
            return False
        return True

    def _watch(self) -> LeaderWatch:
        watch = LeaderWatch(self._leader.pulses, self._group, self._patience, self._on_hung)
        watch.start()
        return watch


class _Arrivals:
    """Notes when the ranks that were not lost have come again."""

    def __init__(
        self, leader: Leader, lost: tuple[int, ...], is_wanted: Callable[[], bool]
    ) -> None:
        self.is_wanted = is_wanted
        self.survived_at = 0.0
        self._leader = leader
        self._survivors = leader.others - set(lost)

    def look(self) -> bool:
        """Looks who is there; returns whether to go on waiting."""
        if self.survived_at == 0.0 and self._survivors <= self._leader.present:
            self.survived_at = time.monotonic()
        return self.is_wanted()


class FollowerRecovery:
    """The part of any other rank.

    Args:
        rank: this rank.
        group: its group.
        follower: its end of the plan channel.
    """

    def __init__(self, rank: Rank, group: RenewableGroup, follower: Follower) -> None:
        self._rank = rank
        self._group = group
        self._follower = follower
        self._watch = FollowerWatch(follower.pulse, group)
        self._watch.start()

    def is_over_lost_rank(self) -> bool:
        """Whether what was raised just now has to do with a rank that is lost."""
        return self._watch.is_lost(CONFIRM_S)

    def rejoin(self) -> None:
        """Leaves the step and waits until the group is whole again.

        Raises:
            RankLostError: rank 0 is gone, or has given up.
        """
        self._watch.stop()
        any(self._form(is_last_try=left == 0) for left in ATTEMPTS)
        self._watch = FollowerWatch(self._follower.pulse, self._group)
        self._watch.start()

    def close(self) -> None:
        """Stops watching."""
        self._watch.stop()

    def _form(self, *, is_last_try: bool) -> bool:
        self._group.leave()
        self._follower.rejoin()
        try:
            self._group.renew(self._follower.generation)
            self._rank.settle()
        except LOSSES:
            if is_last_try:
                raise
            return False
        return True
