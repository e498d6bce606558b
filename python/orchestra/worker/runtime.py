"""The loop of a rank: take a plan, execute it, commit what was drawn."""

import json
import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from orchestra.errors import ConfigError, UnsupportedError
from orchestra.worker.assembly import Rank, assemble
from orchestra.worker.config import EXIT_INVALID_CONFIG, WorkerConfig
from orchestra.worker.metrics import WorkerMetrics
from orchestra.worker.pipeline import FinishedStep, StepsInFlight, execute
from orchestra.worker.plan_channel import Follower, RankLostError

EXIT_OK = 0
EXIT_FAILED = 1
# Short enough that a signal or a lost rank is noticed at once, long enough to sleep between requests.
IDLE_WAIT_MS = 200

logger = logging.getLogger("orchestra.worker")


class Agent(Protocol):
    """What the loop needs of `orchestra._core.Agent`."""

    @property
    def is_attached(self) -> bool:
        """Whether a router's stream is open."""
        ...

    @property
    def is_idle(self) -> bool:
        """Whether no sequence runs or waits."""
        ...

    def next_step(self, timeout_ms: int) -> bytes | None:
        """The next plan; None when there was nothing to do for so long. At most one for each stage before a commit."""
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

    def drain(self) -> None:
        """Refuses new sequences."""
        ...


class StopSignals:
    """SIGTERM and SIGINT: the first asks to stop, the second (or the first before `is_serving`) ends the process."""

    def __init__(self) -> None:
        self.is_requested = False
        self.is_serving = False

    def install(self) -> None:
        """Takes both signals over."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.is_requested or not self.is_serving:
            os._exit(128 + number)
        self.is_requested = True


def run(config: WorkerConfig) -> int:
    """Runs one rank until it is told to stop; returns the exit code of its process."""
    logging.basicConfig(
        stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s", level="INFO"
    )
    if config.parent_pid is not None:
        from orchestra import _core

        _core.die_with_parent(config.parent_pid)
    stop = StopSignals()
    stop.install()
    try:
        rank = assemble(config, _report_loading)
        stop.is_serving = True
        if rank.group.follower is not None:
            follow(rank, rank.group.follower)
        else:
            _lead_with_agent(config, rank, stop)
    except (ConfigError, UnsupportedError) as error:
        logger.error("%s", error)  # noqa: TRY400 (the message says it all; nobody wants a traceback of a typo)
        return EXIT_INVALID_CONFIG
    except Exception as error:
        # A lost rank has said why itself; anything else needs its traceback.
        is_ours = not isinstance(error, RankLostError)
        logger.error("the worker failed: %s", error, exc_info=is_ours)  # noqa: TRY400
        if config.num_ranks > 1:
            # Leaving a group whose other ranks are gone can block for ever; nothing is left to clean up.
            logging.shutdown()
            os._exit(EXIT_FAILED)
        return EXIT_FAILED
    rank.group.close()
    return EXIT_OK


def follow(rank: Rank, channel: Follower) -> None:
    """The loop of every rank but rank 0: executes what rank 0 sends, until its goodbye.

    Signals are left to rank 0: the group still has to finish what runs.
    """
    _write_status("ready")
    while (message := channel.receive()) is not None:
        report = execute(rank, rank.reader.read(message))
        if rank.is_reporting:
            channel.send(report.encode())
    channel.close()


def lead(
    agent: Agent,
    rank: Rank,
    stop: StopSignals,
    metrics: WorkerMetrics,
    drain_timeout_s: float,
) -> None:
    """The loop of rank 0: until a signal, and then until what runs has finished or the time is up."""
    leader = rank.group.leader
    drain = _Drain(agent, drain_timeout_s)
    steps = StepsInFlight(rank, limit=rank.stage.count)
    is_announced = False
    while not (stop.is_requested and drain.is_over()):
        message = None
        if steps.has_room:
            with metrics.wait.time():
                message = agent.next_step(0 if steps else IDLE_WAIT_MS)
        if not is_announced and agent.is_attached:
            _announce_ready()
            is_announced = True
        if message is not None:
            steps.start(message)
        elif not steps and leader is not None:
            leader.check()
        # Nothing to start: the next answer is what changes that.
        must_wait = len(steps) > 0 and (message is None or not steps.has_room)
        while must_wait or steps.is_oldest_done:
            _commit(agent, steps.finish(), metrics)
            must_wait = False
    # A goodbye behind reports that nobody reads could be lost.
    while steps:
        _commit(agent, steps.finish(), metrics)


def _commit(agent: Agent, step: FinishedStep, metrics: WorkerMetrics) -> None:
    metrics.execute.observe(step.took_s)
    metrics.note_stages(step.busy_s, step.alone_s)
    plan, output = step.plan, step.output
    with metrics.commit.time():
        agent.commit(
            plan.step_id,
            output.token_ids.tobytes(),
            output.chosen_logprobs.tobytes(),
            output.top_ids.tobytes(),
            output.top_logprobs.tobytes(),
        )
    metrics.computed_tokens.inc(len(plan.token_ids))
    metrics.sampled_tokens.inc(len(output.token_ids))


class _Drain:
    """Lets what runs finish, for a limited time that begins with the first question."""

    def __init__(self, agent: Agent, timeout_s: float) -> None:
        self._agent = agent
        self._timeout_s = timeout_s
        self._deadline: float | None = None

    def is_over(self) -> bool:
        """Whether nothing is left to finish, or no time to finish it in."""
        if self._deadline is None:
            self._agent.drain()
            self._deadline = time.monotonic() + self._timeout_s
        return self._agent.is_idle or time.monotonic() > self._deadline


def agent_config(config: WorkerConfig, rank: Rank) -> dict[str, Any]:
    """The settings of `orchestra._core.Agent`; what is not named here has its default there.

    Raises:
        ConfigError: a file of the tokeniser is missing or damaged.
    """
    return {
        "router": config.router,
        "worker_id": config.worker_id,
        "model": config.model_name,
        "role": config.role,
        "weights_epoch": config.weights_epoch,
        "vocab_size": rank.model_config.vocab_size,
        "model_files": {
            "tokenizer_json": _read(config.model_dir / "tokenizer.json", is_required=True),
            "tokenizer_config_json": _read(config.model_dir / "tokenizer_config.json"),
            "generation_config_json": _read(config.model_dir / "generation_config.json"),
            "chat_template": _read_text(config.model_dir / "chat_template.jinja"),
        },
        "scheduler": {
            "block_size": config.block_size,
            "num_blocks": rank.num_blocks,
            "num_host_blocks": config.num_host_blocks,
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": config.max_num_batched_tokens,
            "max_model_len": rank.max_model_len,
            "max_steps_in_flight": config.stage.count,
            "max_prefill_chunk": config.max_prefill_chunk,
            "tpot_target_us": config.tpot_target_ms * 1000,
            "enable_prefix_cache": config.enable_prefix_cache,
            "eos_token_ids": list(rank.model_config.eos_token_ids),
        },
    }


def _lead_with_agent(config: WorkerConfig, rank: Rank, stop: StopSignals) -> None:
    from orchestra import _core

    _core.init_logging()
    settings = agent_config(config, rank)
    logger.info("loaded, attaching to the router at %s", config.router)
    agent = _core.Agent(settings, rank.kv_pool)
    if rank.kv_pool is not None:
        rank.runner.watch(agent.layer_done)
    metrics = WorkerMetrics(agent.stats, config.block_size)
    stop_metrics = None
    try:
        if config.metrics_port is not None:
            stop_metrics = metrics.serve(config.metrics_host, config.metrics_port)
        lead(agent, rank, stop, metrics, config.drain_timeout_s)
    finally:
        agent.close()
        if stop_metrics is not None:
            stop_metrics()
    if rank.group.leader is not None:
        rank.group.leader.close()


def _read(path: Path, *, is_required: bool = False) -> bytes:
    if not is_required and not path.exists():
        return b""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path.name} cannot be read: {error.strerror}") from error


def _read_text(path: Path) -> str:
    try:
        return _read(path).decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path.name} is not UTF-8: {error.reason}") from error


# === what the supervisor reads: one JSON object per line of standard output ===


def _report_loading(done: int, total: int) -> None:
    _write_status("loading", done=done, total=total)


def _announce_ready() -> None:
    logger.info("attached to the router, ready")
    _write_status("ready")


def _write_status(status: str, **figures: int) -> None:
    print(json.dumps({"status": status, **figures}), flush=True)
