"""When layers move from one stage of a pipeline to another, and how rank 0 leads the move.

The solver of the core says which division is best for what the stages were seen to take, and whether going there pays.
It is asked once per window, and two windows have to agree before anything happens.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from orchestra import _core
from orchestra.errors import ConfigError
from orchestra.worker.assembly import Rank
from orchestra.worker.layer_mover import LayerMover, MoveAnswer, MoveError, MoveOrder, Phase
from orchestra.worker.metrics import WorkerMetrics
from orchestra.worker.models.decoder import prefix_of
from orchestra.worker.pipeline import FinishedStep

# A window is over when both have passed: steps that were finished, seconds in which some were in flight.
WINDOW_STEPS = 64
WINDOW_S = 2.0
# How long the load is taken to stay as it is.
HORIZON_S = 60
# Least gain of the time between two steps: the figures of two windows differ by a few percent without a reason.
GAIN_PERCENT_MIN = 5
# What a move brings over in a second, until one has shown it.
BYTES_PER_SECOND = 200 << 20
# Most windows without another try after moves that failed.
RESTING_WINDOWS_MAX = 64
# Stands for memory that nobody has asked for yet.
_BOUNDLESS = 1 << 62

logger = logging.getLogger("orchestra.worker")


@dataclass(frozen=True)
class StageTimes:
    """What a window has seen."""

    busy_ns: tuple[int, ...]
    """That each stage takes for its share of a step."""
    steps_in_flight: int
    """On average."""


class StageWindow:
    """Sums up finished steps until there are enough of them.

    Args:
        num_steps: least number of steps.
        seconds: least time in which some were in flight.
    """

    def __init__(self, num_steps: int = WINDOW_STEPS, seconds: float = WINDOW_S) -> None:
        self._num_steps_min = num_steps
        self._seconds_min = seconds
        self.clear()

    def clear(self) -> None:
        """Begins anew."""
        self._num_steps = 0
        self._busy_s: list[float] = []
        self._took_s = self._alone_s = 0.0

    def note(self, step: FinishedStep) -> StageTimes | None:
        """Takes a step in; returns what was seen where the window is over, and begins the next one."""
        self._num_steps += 1
        sums = self._busy_s or [0.0] * len(step.busy_s)
        self._busy_s = [sum_s + busy_s for sum_s, busy_s in zip(sums, step.busy_s, strict=True)]
        self._took_s += step.took_s
        self._alone_s += step.alone_s
        if self._num_steps < self._num_steps_min or self._alone_s < self._seconds_min:
            return None
        busy_ns = tuple(max(1, round(busy / self._num_steps * 1e9)) for busy in self._busy_s)
        # Little's law: how long each was there, of the time in which any was.
        in_flight = max(1, round(self._took_s / max(self._alone_s, 1e-9)))
        self.clear()
        return StageTimes(busy_ns, in_flight)


class Repartition:
    """Rank 0's decisions about the layers of its worker.

    Args:
        rank: this rank, rank 0 of a pipeline whose layers can move.
        metrics: told of every move.
        window: of the steps that count; None: the usual one.

    Raises:
        ConfigError: the checkpoint is gone or damaged.
    """

    def __init__(
        self, rank: Rank, metrics: WorkerMetrics, window: StageWindow | None = None
    ) -> None:
        assert rank.mover is not None
        self._rank = rank
        self._mover: LayerMover = rank.mover
        self._metrics = metrics
        self._window = StageWindow() if window is None else window
        self._layers, self._head_work = _costs(self._mover)
        self._bytes_per_second = BYTES_PER_SECOND
        self._number = 0
        self._times: StageTimes | None = None
        self._candidate: tuple[int, ...] | None = None
        self._resting = self._next_rest = 0
        self.is_due = False
        """Whether layers are to move: no further step should start until `carry_out`."""
        metrics.note_split(self._mover.split)

    def note(self, step: FinishedStep) -> None:
        """Takes a finished step in, which may make a move due."""
        times = self._window.note(step)
        if times is None or self.is_due:
            return
        if self._resting > 0:
            self._resting -= 1
            return
        split = self._best_split(times, [_BOUNDLESS] * len(times.busy_ns))
        self.is_due = split is not None and split == self._candidate
        self._candidate, self._times = split, times

    def carry_out(self) -> None:
        """Moves what is due, where the memory allows; nothing may be in flight.

        Raises:
            RankLostError: a rank is gone.
            InternalError: ranks have different ideas of who has which layers.
        """
        times, self.is_due, self._candidate = self._times, False, None
        assert times is not None
        # What the ranks have free is asked for now: it is theirs, and changes.
        split = self._best_split(times, self._free_bytes())
        if split is not None and self.move(split):
            self._next_rest = 0
            return
        self._next_rest = min(RESTING_WINDOWS_MAX, 2 * self._next_rest + 1)
        self._resting = self._next_rest

    def move(self, split: Sequence[int]) -> bool:
        """Brings the layers to where a split has them; nothing may be in flight.

        Returns:
            Whether it came about. If not everything is as it was.

        Raises:
            RankLostError: a rank is gone.
            InternalError: ranks have different ideas of who has which layers.
        """
        self._number += 1
        began, before = time.monotonic(), self._mover.split
        try:
            for phase in (Phase.LOAD, Phase.EXCHANGE):
                self._order(phase, split)
        except MoveError as error:
            self._order(Phase.DROP, split)
            logger.warning("layers stay where they are: %s", error)
            self._metrics.repartitioned("refused", time.monotonic() - began)
            return False
        self._order(Phase.SWITCH, split)
        took_s = time.monotonic() - began
        moved = self._bytes_between(before, self._mover.split)
        if moved > 0:
            self._bytes_per_second = max(1, round(moved / max(took_s, 1e-6)))
        self._metrics.repartitioned("moved", took_s)
        self._metrics.note_split(self._mover.split)
        self._window.clear()
        logger.info(
            "layers of each stage: %s instead of %s, %d bytes moved in %.0f ms",
            *(_text(self._mover.split), _text(before), moved, took_s * 1000),
        )
        return True

    def _best_split(self, times: StageTimes, free_bytes: Sequence[int]) -> tuple[int, ...] | None:
        fixed = [0] * (len(times.busy_ns) - 1) + [self._head_work]
        stages = list(zip(self._mover.split, times.busy_ns, fixed, free_bytes, strict=True))
        terms = (times.steps_in_flight, self._bytes_per_second, HORIZON_S, GAIN_PERCENT_MIN)
        planned = _core.plan_layer_move(self._layers, stages, terms)
        if planned is None:
            return None
        split, before_ns, after_ns, _ = planned
        if split != list(self._candidate or ()):
            logger.info(
                "layers of each stage: %s would take %.1f ms a step, %s take %.1f ms",
                *(_text(split), after_ns / 1e6, _text(self._mover.split), before_ns / 1e6),
            )
        return tuple(split)

    def _free_bytes(self) -> list[int]:
        """What each stage could take: as much as the rank of it that could take least."""
        answers = self._order(Phase.SURVEY, self._mover.split)
        size = self._rank.place.size
        ranks = [answer.free_bytes for answer in answers]
        return [min(ranks[start : start + size]) for start in range(0, len(ranks), size)]

    def _order(self, phase: Phase, split: Sequence[int]) -> list[MoveAnswer]:
        """Has every rank carry a phase out; returns their answers in the order of the ranks.

        Raises:
            MoveError: a rank could not.
        """
        order, leader = MoveOrder(phase, self._number, tuple(split)), self._rank.group.leader
        if leader is not None:
            leader.broadcast(order.encode())
        answers = [obey(self._rank, order)]
        if leader is not None:
            answers += map(MoveAnswer.decode, leader.collect())
        for rank, answer in enumerate(answers):
            if answer.error:
                raise MoveError(f"rank {rank} cannot {phase.value}: {answer.error}")
        return answers

    def _bytes_between(self, before: Sequence[int], after: Sequence[int]) -> int:
        owners = [
            [stage for stage, count in enumerate(split) for _ in range(count)]
            for split in (before, after)
        ]
        moved = (old != new for old, new in zip(*owners, strict=True))
        return sum(
            size for (_, size), is_moved in zip(self._layers, moved, strict=True) if is_moved
        )


def obey(rank: Rank, order: MoveOrder) -> MoveAnswer:
    """Does what an order asks of a rank, which may have another runner then.

    Raises:
        InternalError: layers cannot move in this worker, or switching failed.
    """
    if rank.mover is None:
        raise MoveError("layers were to move, but this rank was not told so at start")
    answer = rank.mover.obey(order)
    rank.runner = rank.mover.runner
    return answer


def _costs(mover: LayerMover) -> tuple[list[tuple[int, int]], int]:
    """Of each layer its work and bytes; and the work of the head.

    Work is counted in weights: a decode step reads each of them once. So an expert counts as if it were used by every
    step, which large batches come near.
    """
    config = mover.model_config
    with mover.open_checkpoint() as reader:
        layers = [
            (reader.count_numbers(prefix_of(layer)), mover.layer_bytes(reader, layer))
            for layer in range(config.num_layers)
        ]
    if any(work == 0 for work, _ in layers):
        raise ConfigError("--repartition: the checkpoint has a layer without weights")
    return layers, config.vocab_size * config.hidden_size


def _text(split: Sequence[int]) -> str:
    return ",".join(map(str, split))
