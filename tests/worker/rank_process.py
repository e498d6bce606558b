"""One rank of a worker as a process of its own, its agent played by a script."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack

from orchestra.worker.assembly import assemble
from orchestra.worker.config import WorkerConfig
from orchestra.worker.leading import Leading
from orchestra.worker.metrics import WorkerMetrics
from orchestra.worker.runtime import follow
from orchestra.worker.sharding import Shard, Stage
from orchestra.worker.stopping import StopSignals


@dataclass(frozen=True)
class RankOrder:
    """What the process of a rank is told."""

    model_dir: Path
    rank: int
    sizes: tuple[int, int, int]
    """Shards, contexts, stages."""
    folder: Path
    """Where the ranks meet and `plans` lies, a msgpack list of messages to execute; rank 0 leaves there, as `answers`,
    what it would commit."""
    collectives: str
    """Those of the worker's flag; `nccl` and `nvlink` mean GPUs."""


class ScriptedAgent:
    """Hands out prepared plans, keeps what is committed, and asks to stop when the plans are used up."""

    is_attached = True

    def __init__(self, messages: list[bytes], stop: StopSignals) -> None:
        self.answers: list[dict[str, Any]] = []
        self.is_draining = False
        self._messages = messages
        self._stop = stop

    @property
    def is_idle(self) -> bool:
        """Whether every plan was committed."""
        return not self._messages

    def next_step(self, timeout_ms: int) -> bytes | None:
        """The next plan."""
        assert timeout_ms >= 0
        if self._messages:
            return self._messages.pop(0)
        self._stop.is_requested = True
        return None

    def commit(
        self,
        step_id: int,
        token_ids: bytes,
        chosen_logprobs: bytes,
        top_ids: bytes,
        top_logprobs: bytes,
    ) -> None:
        """Keeps the answer."""
        self.answers.append(
            {
                "step_id": step_id,
                "token_ids": token_ids,
                "chosen_logprobs": chosen_logprobs,
                "top_ids": top_ids,
                "top_logprobs": top_logprobs,
            }
        )

    def start_over(self) -> None:
        """No rank of these tests is lost."""
        raise AssertionError

    def drain(self) -> None:
        """Notes that it was asked to drain."""
        self.is_draining = True


def empty_stats() -> dict[str, int]:
    """`Agent.stats` of an agent that has done nothing."""
    names = (
        "num_running",
        "num_waiting",
        "kv_blocks_used",
        "kv_blocks_total",
        "preemptions",
        "swaps",
        "prefix_hit_tokens",
        "kv_blocks_fetched",
        "kv_blocks_pushed",
        "kv_fetch_failures",
        "host_hit_tokens",
        "kv_blocks_written_through",
        "kv_blocks_kept",
        "kv_write_throughs_dropped",
    )
    return dict.fromkeys(names, 0)


def run(order: RankOrder) -> None:
    """Runs the rank."""
    size, contexts, stages = order.sizes
    in_stage = contexts * size
    is_cuda = order.collectives in ("nccl", "nvlink")
    config = WorkerConfig(
        model_dir=order.model_dir,
        router="",
        worker_id="",
        model_name="",
        shard=Shard(order.rank % size, size),
        stage=Stage(order.rank // in_stage, stages),
        context=Shard(order.rank % in_stage // size, contexts),
        context_min_tokens=16,
        rendezvous=(order.folder / "rendezvous").as_uri(),
        collectives=order.collectives,
        device="cuda" if is_cuda else "cpu",
        cuda_graphs="on" if is_cuda else "off",
        dtype="float32",
        num_blocks=64,
        max_num_seqs=8,
    )
    ready = assemble(config, lambda _done, _total: None)
    if ready.group.follower is not None:
        follow(ready, ready.group.follower)
    else:
        stop = StopSignals(drain_timeout_s=5.0)
        agent = ScriptedAgent(msgpack.unpackb((order.folder / "plans").read_bytes()), stop)
        metrics = WorkerMetrics(empty_stats, 16)
        Leading(agent, ready, metrics).run(stop)
        assert agent.is_draining
        (order.folder / "answers").write_bytes(msgpack.packb(agent.answers))
        assert ready.group.leader is not None
        ready.group.leader.close()
    ready.group.close()
