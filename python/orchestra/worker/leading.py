"""The loop of rank 0: have a step planned, execute it on all ranks, commit what was drawn."""

import logging
from typing import Protocol

from orchestra.worker.assembly import Rank
from orchestra.worker.metrics import WorkerMetrics
from orchestra.worker.pipeline import StepsInFlight
from orchestra.worker.plan_socket import RankLostError
from orchestra.worker.recovery import LOSSES, LeaderRecovery, Restartable
from orchestra.worker.repartition import Repartition
from orchestra.worker.status import write_status
from orchestra.worker.stopping import Drain, Drainable, StopSignals

# Short enough that a signal or a lost rank is noticed at once, long enough to sleep between requests.
IDLE_WAIT_MS = 200

logger = logging.getLogger("orchestra.worker")


class Agent(Drainable, Restartable, Protocol):
    """What the loop needs of `orchestra._core.Agent`."""

    @property
    def is_attached(self) -> bool:
        """Whether a router's stream is open."""
        ...

    def next_step(self, timeout_ms: int) -> bytes | None:
        """The next plan; None when there was nothing to do for so long. So many before a commit as `Rank` says."""
        ...

    def commit(
        self,
        step_id: int,
        token_ids: bytes,
        chosen_logprobs: bytes,
        top_ids: bytes,
        top_logprobs: bytes,
    ) -> None:
        """Hands in what the oldest step has drawn."""
        ...


class Leading:
    """The loop.

    `Rank.steps_in_flight` says how many steps are started before the first of them is waited for: one; of a pipeline
    one for each stage; or of a single stage whose steps are planned ahead, the one that its device runs and the next.

    Args:
        agent: where plans come from.
        rank: this rank.
        metrics: of the steps.
        recovery: what to do when a rank is lost; None: end.
        repartition: moves layers between stages; None: they stay.
    """

    def __init__(
        self,
        agent: Agent,
        rank: Rank,
        metrics: WorkerMetrics,
        recovery: LeaderRecovery | None = None,
        repartition: Repartition | None = None,
    ) -> None:
        self._agent = agent
        self._rank = rank
        self._metrics = metrics
        self._recovery = recovery
        self._repartition = repartition
        self._steps = StepsInFlight(rank, recovery)
        self._is_announced = False

    def run(self, stop: StopSignals) -> None:
        """Leads until a signal, and then until what runs has finished or the time is up.

        Raises:
            RankLostError: a rank is lost, and none takes its place.
        """
        drain = Drain(self._agent, stop.drain_timeout_s)
        while True:
            try:
                while not (stop.is_requested and drain.is_over()):
                    self._turn()
                break
            except LOSSES:
                if self._recovery is None or not self._recovery.is_over_lost_rank():
                    raise
                self._steps.give_up()
                if not self._regroup(self._recovery, stop):
                    return
        # A goodbye behind reports that nobody reads could be lost.
        while self._steps:
            self._finish()
        if self._recovery is not None:
            self._recovery.close()

    def _turn(self) -> None:
        """Starts a step, where there is one and room for it; then finishes those that are through, or must be."""
        steps, message = self._steps, None
        if steps.has_room and not self._move_layers():
            with self._metrics.wait.time():
                message = self._agent.next_step(0 if steps else IDLE_WAIT_MS)
        if not self._is_announced and self._agent.is_attached:
            logger.info("attached to the router, ready")
            write_status("ready")
            self._is_announced = True
        if message is not None:
            steps.start(message)
        elif not steps:
            self._check_ranks()
        # Nothing to start: the next answer is what changes that.
        must_wait = len(steps) > 0 and (message is None or not steps.has_room)
        while must_wait or steps.is_oldest_done:
            self._finish()
            must_wait = False

    def _move_layers(self) -> bool:
        """Moves layers that are to move; returns whether they still are, as nothing may be in flight meanwhile."""
        if self._repartition is None or not self._repartition.is_due:
            return False
        if self._steps:
            return True
        self._repartition.carry_out()
        return False

    def _finish(self) -> None:
        """Waits for the oldest step, and commits what it has drawn."""
        step, metrics = self._steps.finish(), self._metrics
        metrics.execute.observe(step.took_s)
        metrics.note_stages(step.busy_s, step.alone_s)
        if self._repartition is not None:
            self._repartition.note(step)
        output = step.output
        with metrics.commit.time():
            self._agent.commit(
                step.plan.step_id,
                output.token_ids.tobytes(),
                output.chosen_logprobs.tobytes(),
                output.top_ids.tobytes(),
                output.top_logprobs.tobytes(),
            )
        metrics.computed_tokens.inc(len(step.plan.token_ids))
        metrics.sampled_tokens.inc(len(output.token_ids))

    def _check_ranks(self) -> None:
        if self._recovery is not None:
            self._recovery.watch.check()
        elif self._rank.group.leader is not None:
            self._rank.group.leader.check()

    def _regroup(self, recovery: LeaderRecovery, stop: StopSignals) -> bool:
        """Makes the group whole again; returns false where the worker is told to stop meanwhile.

        Raises:
            RankLostError: it does not become whole.
        """
        try:
            done = recovery.regroup(self._agent, lambda: not stop.is_requested)
        except RankLostError:
            if stop.is_requested:
                return False
            raise
        self._metrics.regrouped(done.survivors_s, done.total_s)
        survivors_ms, total_ms = round(done.survivors_s * 1000), round(done.total_s * 1000)
        logger.info(
            "ranks %s are replaced: the others were ready after %d ms, all after %d ms",
            *(list(done.lost), survivors_ms, total_ms),
        )
        write_status("regrouped", survivors_ms=survivors_ms, total_ms=total_ms)
        return True
