"""One rank of a pipeline whose layers move, as a process of its own, its agent played by a script."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import msgpack
import numpy as np
from torch import Tensor

from orchestra.worker import assembly
from orchestra.worker.assembly import Rank, assemble
from orchestra.worker.attention import AttentionBackend, LayerListener
from orchestra.worker.attention_choice import make_attention
from orchestra.worker.config import WorkerConfig
from orchestra.worker.leading import Leading
from orchestra.worker.metrics import WorkerMetrics
from orchestra.worker.pipeline import FinishedStep
from orchestra.worker.plan import StepPlan
from orchestra.worker.repartition import Repartition, StageWindow
from orchestra.worker.runtime import follow
from orchestra.worker.sharding import Shard, Stage
from orchestra.worker.stopping import StopSignals
from tests.worker.rank_process import ScriptedAgent, empty_stats


@dataclass(frozen=True)
class Settings:
    """What all ranks are told."""

    model_dir: str
    folder: str
    """Where the ranks meet, the file `plans` (a msgpack list) lies and the record goes."""
    split: list[int]
    """Layers of each stage at start."""
    size: int = 1
    """Ranks of each stage."""
    forced: list[tuple[int, list[int]]] = field(default_factory=list)
    """After so many steps the layers are to lie so."""
    window: tuple[int, float] | None = None
    """Steps and seconds after which the solver is asked; None: it is not."""
    slow_stage: int = -1
    slow_layer_s: float = 0.0
    """By how much each layer takes longer in the slow stage: the machine that it stands for is a slow one."""
    num_blocks: int = 64


@dataclass
class Record:
    """What rank 0 has seen."""

    token_ids: list[list[int]]
    """Drawn in each step."""
    committed_s: list[float]
    """When, from the first commit on."""
    moves: list[tuple[int, list[int], bool]]
    """After how many steps which split was tried, and whether it came about."""
    split: list[int]
    """At the end."""


class SlowAttention:
    """Attention in a stage whose layers all take longer."""

    def __init__(self, inner: AttentionBackend, seconds: float) -> None:
        self._inner = inner
        self._seconds = seconds

    def prepare(self, plan: StepPlan) -> None:
        """See `AttentionBackend`."""
        self._inner.prepare(plan)

    def watch(self, listener: LayerListener) -> None:
        """See `AttentionBackend`."""
        self._inner.watch(listener)

    def forward(self, layer: int, query: Tensor, key_value: Tensor) -> Tensor:
        """See `AttentionBackend`."""
        time.sleep(self._seconds)
        return self._inner.forward(layer, query, key_value)


class RecordedMoves(Repartition):
    """Forced moves, or the solver's; writes all of them down."""

    def __init__(self, rank: Rank, metrics: WorkerMetrics, settings: Settings) -> None:
        window = None if settings.window is None else StageWindow(*settings.window)
        super().__init__(rank, metrics, window)
        self.moves: list[tuple[int, list[int], bool]] = []
        self._forced = list(settings.forced)
        self._asks = settings.window is not None
        self._num_steps = 0

    def note(self, step: FinishedStep) -> None:
        """See `Repartition`."""
        self._num_steps += 1
        if self._asks:
            super().note(step)
        else:
            self.is_due = bool(self._forced) and self._num_steps >= self._forced[0][0]

    def carry_out(self) -> None:
        """See `Repartition`."""
        if self._asks:
            super().carry_out()
            return
        self.is_due = False
        self.move(self._forced.pop(0)[1])

    def move(self, split: Sequence[int]) -> bool:
        """See `Repartition`."""
        has_moved = super().move(split)
        self.moves.append((self._num_steps, list(split), has_moved))
        return has_moved


class TimedAgent(ScriptedAgent):
    """Writes down when each step was committed."""

    def __init__(self, messages: list[bytes], stop: StopSignals) -> None:
        super().__init__(messages, stop)
        self.committed_s: list[float] = []

    def commit(self, *arguments: Any) -> None:
        """Keeps the answer, and its time."""
        super().commit(*arguments)
        self.committed_s.append(time.monotonic())


def bring_up(rank: int, settings: Settings) -> Rank:
    """One rank, slowed down where it is to be."""
    stage = Stage(rank // settings.size, len(settings.split), tuple(settings.split))
    if stage.index == settings.slow_stage:

        def make_slow(*arguments: Any) -> AttentionBackend:
            return SlowAttention(make_attention(*arguments), settings.slow_layer_s)

        mock.patch.object(assembly, "make_attention", make_slow).start()
    config = WorkerConfig(
        model_dir=Path(settings.model_dir),
        router="",
        worker_id="",
        model_name="",
        shard=Shard(rank % settings.size, settings.size),
        stage=stage,
        repartition="auto",
        rendezvous=(Path(settings.folder) / "rendezvous").as_uri(),
        device="cpu",
        dtype="float32",
        num_blocks=settings.num_blocks,
        max_num_seqs=8,
    )
    return assemble(config, lambda _done, _total: None)


def run_leader(rank: Rank, settings: Settings) -> Record:
    """Rank 0's part."""
    stop = StopSignals(drain_timeout_s=5.0)
    messages = msgpack.unpackb((Path(settings.folder) / "plans").read_bytes())
    agent = TimedAgent(messages, stop)
    metrics = WorkerMetrics(empty_stats, 16)
    moves = RecordedMoves(rank, metrics, settings)
    Leading(agent, rank, metrics, repartition=moves).run(stop)
    assert rank.group.leader is not None
    assert rank.mover is not None
    rank.group.leader.close()
    return Record(
        token_ids=[np.frombuffer(it["token_ids"], "<i4").tolist() for it in agent.answers],
        committed_s=[it - agent.committed_s[0] for it in agent.committed_s],
        moves=moves.moves,
        split=list(rank.mover.split),
    )


def run(index: int, settings: Settings) -> None:
    """Runs the rank; rank 0 leaves a `Record`."""
    rank = bring_up(index, settings)
    if rank.group.follower is not None:
        follow(rank, rank.group.follower)
    else:
        record = run_leader(rank, settings)
        (Path(settings.folder) / "record").write_text(json.dumps(asdict(record)))
    rank.group.close()
