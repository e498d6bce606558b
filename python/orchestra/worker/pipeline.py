"""Steps in flight: rank 0 starts them, and waits for what was drawn, of several stages for the reports of each."""

import time
from collections import deque
from dataclasses import dataclass

import msgpack
import numpy as np
import torch

from orchestra.errors import InternalError
from orchestra.worker.assembly import Rank
from orchestra.worker.drawn import NOTHING_DRAWN, Drawn
from orchestra.worker.plan import StepOutput, StepPlan
from orchestra.worker.plan_socket import MESSAGE_BYTES_MAX
from orchestra.worker.recovery import LeaderRecovery


@dataclass(frozen=True)
class StageReport:
    """What a stage says of a step that it has computed."""

    step_id: int
    busy_s: float
    """Seconds in which it computed; waiting for the stage before is not counted."""
    output: StepOutput
    """What the last stage drew; empty of the others."""

    def encode(self) -> bytes:
        """The message that `decode` reads."""
        arrays = {name: array.tobytes() for name, array in vars(self.output).items()}
        fields = {"step_id": self.step_id, "busy_s": self.busy_s, **arrays}
        return bytes(msgpack.packb(fields))

    @classmethod
    def decode(cls, message: bytes) -> "StageReport":
        """Reads a message.

        Raises:
            InternalError: it is damaged or no report.
        """
        try:
            fields = msgpack.unpackb(message, max_bin_len=MESSAGE_BYTES_MAX)
            output = StepOutput(
                token_ids=np.frombuffer(fields["token_ids"], "<i4"),
                chosen_logprobs=np.frombuffer(fields["chosen_logprobs"], "<f4"),
                top_ids=np.frombuffer(fields["top_ids"], "<i4"),
                top_logprobs=np.frombuffer(fields["top_logprobs"], "<f4"),
            )
            return cls(int(fields["step_id"]), float(fields["busy_s"]), output)
        except (ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
            raise InternalError(f"a stage's report cannot be read: {error!r}") from error


def execute(rank: Rank, plan: StepPlan) -> StageReport:
    """Runs a step on this rank, and measures it."""
    return start(rank, plan, time.monotonic()).report()


def start(rank: Rank, plan: StepPlan, handed_out: float) -> "Started":
    """Hands a step to this rank's device, and measures how long that takes: on a CPU, as long as the step.

    Args:
        rank: this one.
        plan: the step.
        handed_out: when its plan was, by the monotonic clock.
    """
    if rank.mover is not None:
        rank.mover.note(plan)
    group = rank.group
    waited_s, began = group.link.waited_s, time.monotonic()
    with group.step():
        drawn = rank.runner.start(plan)
        if rank.shares_cache and len(plan.sample_slots) == 0:
            # Nobody had to wait for the others' last layer to draw anything; but once a step is committed other workers
            # may read what every rank has filled, and write where it has read.
            group.communicator.all_reduce(torch.zeros(1))
    busy_s = time.monotonic() - began - (group.link.waited_s - waited_s)
    return Started(plan, drawn, handed_out, max(0.0, busy_s), group.slowest_round_s)


@dataclass(frozen=True)
class FinishedStep:
    """A step that every stage has computed."""

    plan: StepPlan
    output: StepOutput
    busy_s: list[float]
    """Of each stage."""
    took_s: float
    """From its start on; of a single stage as `alone_s`."""
    alone_s: float
    """Since the step before it was finished, if it had started by then; else as `took_s`."""


@dataclass(frozen=True)
class Started:
    """A step that a rank's device has been given."""

    plan: StepPlan
    drawn: Drawn | None
    """To be waited for; None where this rank draws nothing."""
    began: float
    """When its plan was handed out, by the monotonic clock."""
    busy_s: float
    slowest_round_s: float
    """Longest time between two of its collectives."""

    def report(self) -> StageReport:
        """Waits for what was drawn."""
        output = NOTHING_DRAWN if self.drawn is None else self.drawn.fetch()
        return StageReport(self.plan.step_id, self.busy_s, output)


class StepsInFlight:
    """Rank 0's steps that are started and not finished, at most so many at a time. They finish in order.

    One for each stage; or of a single stage, whose device is given its next step before it is through with one.

    Args:
        rank: this one, rank 0.
        recovery: is told of them, to find ranks that hang; None: nobody is.
    """

    def __init__(self, rank: Rank, recovery: LeaderRecovery | None = None) -> None:
        self._rank = rank
        self._recovery = recovery
        self._steps: deque[Started] = deque()
        self._finished = 0.0

    def __len__(self) -> int:
        return len(self._steps)

    @property
    def has_room(self) -> bool:
        """Whether another step may start."""
        return len(self._steps) < self._rank.steps_in_flight

    @property
    def is_oldest_done(self) -> bool:
        """Whether `finish` would not wait."""
        rank, leader = self._rank, self._rank.group.leader
        if not self._steps or leader is None or rank.stage.count == 1:
            # A single stage does better to start its next step first.
            return False
        return leader.has_message(rank.sampling_rank)

    def start(self, message: bytes) -> None:
        """Hands a plan to all ranks, and runs it on this one.

        Raises:
            InternalError: the plan cannot be read.
            RankLostError: a rank is gone.
        """
        rank, handed_out = self._rank, time.monotonic()
        if rank.group.leader is not None:
            rank.group.leader.broadcast(message)
        plan = rank.reader.read(message)
        if self._recovery is not None:
            self._recovery.watch.begin_step(len(plan.token_ids))
        self._steps.append(start(rank, plan, handed_out))

    def give_up(self) -> None:
        """Forgets all of them: a rank was lost."""
        self._steps.clear()

    def finish(self) -> FinishedStep:
        """Waits for the reports of the oldest step.

        Raises:
            InternalError: a report cannot be read, or is of another step.
            RankLostError: a rank is gone.
        """
        step = self._steps.popleft()
        reports = [step.report(), *map(self._report_of, self._rank.reporting_ranks)]
        # A device whose sums were ended while it computed has drawn whatever came.
        self._rank.group.check()
        if self._recovery is not None:
            self._recovery.watch.end_step(len(step.plan.token_ids), step.slowest_round_s)
        for report in reports:
            if report.step_id != step.plan.step_id:
                message = f"step {report.step_id} was reported, step {step.plan.step_id} is due"
                raise InternalError(message)
        busy_s = [report.busy_s for report in reports]
        now = time.monotonic()
        alone_s = now - max(step.began, self._finished)
        self._finished = now
        # Behind another step a single stage only waits for its turn.
        took_s = now - step.began if len(reports) > 1 else alone_s
        return FinishedStep(step.plan, reports[-1].output, busy_s, took_s, alone_s)

    def _report_of(self, rank: int) -> StageReport:
        leader = self._rank.group.leader
        assert leader is not None
        return StageReport.decode(leader.receive(rank))
