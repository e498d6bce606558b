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
from orchestra.worker.command_line import EXIT_INVALID_CONFIG
from orchestra.worker.config import WorkerConfig
from orchestra.worker.layer_mover import MoveOrder
from orchestra.worker.metrics import WorkerMetrics
from orchestra.worker.pipeline import StepsInFlight, execute
from orchestra.worker.plan import StepOutput, StepPlan
from orchestra.worker.plan_channel import Follower
from orchestra.worker.plan_socket import RankLostError
from orchestra.worker.recovery import LOSSES, FollowerRecovery, LeaderRecovery
from orchestra.worker.repartition import Repartition, obey

EXIT_OK = 0
EXIT_FAILED = 1
# Short enough that a signal or a lost rank is noticed at once, long enough to sleep between requests.
IDLE_WAIT_MS = 200
# Prompts get at least this share of a step's tokens, one in so many, whatever `--tpot-target-ms` says: behind a long
# context a token costs many times what it costs at the beginning, so it is little.
MIN_PREFILL_SHARE = 16

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

    def start_over(self) -> None:
        """Forgets everything computed and lets go of the router."""
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
            _follow_and_recover(rank, rank.group.follower)
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


def follow(rank: Rank, channel: Follower, recovery: FollowerRecovery | None = None) -> None:
    """The loop of every rank but rank 0: executes what rank 0 sends, until its goodbye.

    Signals are left to rank 0: the group still has to finish what runs.

    Args:
        rank: this rank.
        channel: where the plans come from.
        recovery: what to do when a rank is lost; None: end.
    """
    _write_status("ready")
    while True:
        try:
            while (message := channel.receive()) is not None:
                if (order := MoveOrder.decode(message)) is not None:
                    channel.send(obey(rank, order).encode())
                    continue
                with rank.group.step():
                    report = execute(rank, rank.reader.read(message))
                if rank.is_reporting:
                    channel.send(report.encode())
            break
        except LOSSES:
            if recovery is None or not recovery.is_over_lost_rank():
                raise
            recovery.rejoin()
    if recovery is not None:
        recovery.close()
    channel.close()


def lead(
    agent: Agent,
    rank: Rank,
    stop: StopSignals,
    metrics: WorkerMetrics,
    drain_timeout_s: float,
    recovery: LeaderRecovery | None = None,
) -> None:
    """The loop of rank 0 of a single stage: until a signal, and then until what runs has finished or the time is up.

    Args:
        agent: where plans come from.
        rank: this rank.
        stop: what the signals have asked for.
        metrics: of the steps.
        drain_timeout_s: how long running sequences may go on after a signal to stop.
        recovery: what to do when a rank is lost; None: end.
    """
    drain = _Drain(agent, drain_timeout_s)
    is_announced = False
    while not (stop.is_requested and drain.is_over()):
        with metrics.wait.time():
            message = agent.next_step(IDLE_WAIT_MS)
        if not is_announced and agent.is_attached:
            _announce_ready()
            is_announced = True
        try:
            if message is None:
                _check_ranks(rank, recovery)
            else:
                _run_step(agent, rank, metrics, message, recovery)
        except LOSSES:
            if recovery is None or not recovery.is_over_lost_rank():
                raise
            if not _regroup(agent, stop, metrics, recovery):
                return
    if recovery is not None:
        recovery.close()


def lead_stages(
    agent: Agent,
    rank: Rank,
    stop: StopSignals,
    metrics: WorkerMetrics,
    drain_timeout_s: float,
    repartition: Repartition | None = None,
) -> None:
    """The loop of rank 0 with several steps in flight. A lost rank ends the worker.

    There is one for each stage of a pipeline; or of a single stage, the one that its device runs and the next.

    Args:
        agent: where plans come from.
        rank: this rank.
        stop: what the signals have asked for.
        metrics: of the steps.
        drain_timeout_s: how long running sequences may go on after a signal to stop.
        repartition: moves layers between the stages; None: they stay.
    """
    drain = _Drain(agent, drain_timeout_s)
    leader = rank.group.leader
    steps = StepsInFlight(rank, limit=rank.steps_in_flight)
    is_announced = False
    while not (stop.is_requested and drain.is_over()):
        message = None
        is_move_due = repartition is not None and repartition.is_due
        if repartition is not None and is_move_due and not steps:
            repartition.carry_out()
            is_move_due = False
        if steps.has_room and not is_move_due:
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
            _finish_step(agent, steps, metrics, repartition)
            must_wait = False
    # A goodbye behind reports that nobody reads could be lost.
    while steps:
        _finish_step(agent, steps, metrics, None)


def _finish_step(
    agent: Agent, steps: StepsInFlight, metrics: WorkerMetrics, repartition: Repartition | None
) -> None:
    step = steps.finish()
    metrics.execute.observe(step.took_s)
    metrics.note_stages(step.busy_s, step.alone_s)
    if repartition is not None:
        repartition.note(step)
    _commit(agent, step.plan, step.output, metrics)


def _check_ranks(rank: Rank, recovery: LeaderRecovery | None) -> None:
    if recovery is not None:
        recovery.watch.check()
    elif rank.group.leader is not None:
        rank.group.leader.check()


def _run_step(
    agent: Agent,
    rank: Rank,
    metrics: WorkerMetrics,
    message: bytes,
    recovery: LeaderRecovery | None,
) -> None:
    """Executes a plan on all ranks and commits what was drawn."""
    with metrics.execute.time(), rank.group.step():
        if rank.group.leader is not None:
            rank.group.leader.broadcast(message)
        plan = rank.reader.read(message)
        num_tokens = len(plan.token_ids)
        if recovery is not None:
            recovery.watch.begin_step(num_tokens)
        output = rank.runner.execute(plan)
        if recovery is not None:
            recovery.watch.end_step(num_tokens)
    _commit(agent, plan, output, metrics)


def _commit(agent: Agent, plan: StepPlan, output: StepOutput, metrics: WorkerMetrics) -> None:
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


def _regroup(
    agent: Agent, stop: StopSignals, metrics: WorkerMetrics, recovery: LeaderRecovery
) -> bool:
    """Makes the group whole again; returns false where the worker is told to stop meanwhile.

    Raises:
        RankLostError: it does not become whole.
    """
    try:
        done = recovery.regroup(agent, lambda: not stop.is_requested)
    except RankLostError:
        if stop.is_requested:
            return False
        raise
    metrics.regrouped(done.survivors_s, done.total_s)
    logger.info(
        "ranks %s are replaced: the others were ready after %.0f ms, all after %.0f ms",
        list(done.lost),
        done.survivors_s * 1000,
        done.total_s * 1000,
    )
    _write_status("regrouped", survivors_ms=_ms(done.survivors_s), total_ms=_ms(done.total_s))
    return True


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


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
            "max_num_batched_tokens": rank.step_tokens,
            "max_model_len": rank.max_model_len,
            "max_steps_in_flight": rank.steps_in_flight,
            "plans_ahead": rank.plans_ahead,
            "max_prefill_chunk": config.max_prefill_chunk,
            "tpot_target_us": config.tpot_target_ms * 1000,
            "min_prefill_tokens": max(1, rank.step_tokens // MIN_PREFILL_SHARE),
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
    if rank.kv_memory is not None:
        rank.runner.watch(rank.kv_memory.watched_by(agent.layer_done))
    metrics = WorkerMetrics(agent.stats, config.block_size)
    stop_metrics = None
    try:
        if config.metrics_port is not None:
            stop_metrics = metrics.serve(config.metrics_host, config.metrics_port)
        if rank.steps_in_flight > 1:
            repartition = None if rank.mover is None else Repartition(rank, metrics)
            lead_stages(agent, rank, stop, metrics, config.drain_timeout_s, repartition)
        else:
            recovery = _leader_recovery(config, rank)
            lead(agent, rank, stop, metrics, config.drain_timeout_s, recovery)
    finally:
        agent.close()
        if stop_metrics is not None:
            stop_metrics()
    if rank.group.leader is not None:
        rank.group.leader.close()


def _follow_and_recover(rank: Rank, channel: Follower) -> None:
    group = rank.group.renewable
    follow(rank, channel, None if group is None else FollowerRecovery(rank, group, channel))


def _leader_recovery(config: WorkerConfig, rank: Rank) -> LeaderRecovery | None:
    group, leader = rank.group.renewable, rank.group.leader
    if group is None or leader is None:
        return None
    hang_timeout_s = config.rank_hang_timeout_ms / 1000
    return LeaderRecovery(
        *(rank, (group, leader), config.regroup_timeout_s, hang_timeout_s),
        on_hung=lambda hung: _write_status("hung", rank=hung),
    )


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
