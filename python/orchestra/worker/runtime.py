"""A rank from its start to its end: brings it up, and has it lead the others or follow."""

import gc
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch

from orchestra.errors import ConfigError, UnsupportedError
from orchestra.worker import cores
from orchestra.worker.assembly import Rank, assemble
from orchestra.worker.command_line import EXIT_INVALID_CONFIG
from orchestra.worker.config import WorkerConfig
from orchestra.worker.layer_mover import MoveOrder
from orchestra.worker.leading import Leading
from orchestra.worker.metrics import WorkerMetrics
from orchestra.worker.pipeline import execute
from orchestra.worker.plan_channel import Follower
from orchestra.worker.plan_socket import RankLostError
from orchestra.worker.recovery import LOSSES, FollowerRecovery, LeaderRecovery
from orchestra.worker.repartition import Repartition, obey
from orchestra.worker.status import write_status
from orchestra.worker.stopping import StopSignals

EXIT_OK = 0
EXIT_FAILED = 1
# Prompts get at least this share of a step's tokens, one in so many, whatever `--tpot-target-ms` says: behind a long
# context a token costs many times what it costs at the beginning, so it is little.
MIN_PREFILL_SHARE = 16

logger = logging.getLogger("orchestra.worker")


def run(config: WorkerConfig) -> int:
    """Runs one rank until it is told to stop; returns the exit code of its process."""
    logging.basicConfig(
        stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s", level="INFO"
    )
    if config.parent_pid is not None:
        from orchestra import _core

        _core.die_with_parent(config.parent_pid)
    stop = StopSignals(config.drain_timeout_s)
    stop.install()
    try:
        rank = assemble(config, _report_loading)
        _keep_what_is_there()
        stop.is_serving = True
        with torch.inference_mode():
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


def _keep_what_is_there() -> None:
    """Collects garbage from here on, but not among what a rank has when it begins to serve.

    There are 200,000 objects by then, which stay: to look through them takes as long as many steps.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


def follow(rank: Rank, channel: Follower, recovery: FollowerRecovery | None = None) -> None:
    """The loop of every rank but rank 0: executes what rank 0 sends, until its goodbye.

    Signals are left to rank 0: the group still has to finish what runs.

    Args:
        rank: this rank.
        channel: where the plans come from.
        recovery: what to do when a rank is lost; None: end.
    """
    cores.bind(rank.cores)
    write_status("ready")
    while True:
        try:
            while (message := channel.receive()) is not None:
                if (order := MoveOrder.decode(message)) is not None:
                    channel.send(obey(rank, order).encode())
                    continue
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
        recovery = _leader_recovery(config, rank)
        repartition = None if rank.mover is None else Repartition(rank, metrics)
        leading = Leading(agent, rank, metrics, recovery, repartition)
        # Last: threads that were made from now on would stay on these cores too.
        cores.bind(rank.cores)
        leading.run(stop)
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
        on_hung=lambda hung: write_status("hung", rank=hung),
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


def _report_loading(done: int, total: int) -> None:
    write_status("loading", done=done, total=total)
