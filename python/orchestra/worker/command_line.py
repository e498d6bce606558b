"""The flags of `orchestra worker`."""

import argparse
import os
import socket
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlparse

from orchestra.errors import ConfigError
from orchestra.worker.argument_types import (
    address,
    integer,
    layer_split,
    parse_bytes,
    parse_layer_split,
)
from orchestra.worker.config import STEP_TOKENS, STEP_TOKENS_CPU, WorkerConfig
from orchestra.worker.sharding import Shard, Stage

# EX_USAGE of sysexits.h: a restart changes nothing.
EXIT_INVALID_CONFIG = 64

# Flags that `WorkerConfig` has in another form.
_SPELT_OTHERWISE = (
    *("tp", "pipeline_parallel", "context_parallel", "layer_split", "rank", "regroup_timeout"),
    *("served_model_name", "no_prefix_cache", "drain_timeout"),
)


def parse_arguments(arguments: Sequence[str]) -> WorkerConfig:
    """Reads the command line; exits with a message where it is wrong."""
    parser = build_parser()
    given = parser.parse_args(arguments)
    try:
        return _from_namespace(given)
    except ConfigError as error:
        parser.error(str(error))


def build_parser() -> argparse.ArgumentParser:
    """The options of `orchestra worker`; `docs/configuration.md` is written from them."""
    parser = _Parser(prog="orchestra worker", description="Runs one rank of a worker.")
    _add_required(parser)
    _add_group(parser)
    add_engine_arguments(parser)
    _add_process(parser)
    return parser


class _Parser(argparse.ArgumentParser):
    """Reports a bad argument in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_INVALID_CONFIG, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _add_required(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model_dir", type=Path, metavar="MODEL_DIR", help="checkpoint directory")
    parser.add_argument("--router", required=True, metavar="URL", help="the router's worker door")
    parser.add_argument(
        "--worker-id", metavar="NAME", help="unique name (default: host and chance)"
    )


def _add_group(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("ranks")
    group.add_argument("--tp", type=integer(1), help="ranks that share each layer (default: 1)")
    add_parallel_arguments(group)
    group.add_argument(
        "--rank", type=integer(0), help="which of the tp x cp x pp ranks this is, stage after stage"
    )
    group.add_argument(
        "--rendezvous", default="", metavar="URL", help="file:///path, tcp://host:port or env://"
    )
    group.add_argument(
        "--node",
        default=WorkerConfig.node,
        metavar="NAME",
        help="of what this rank shares with near ones; sums go by node first (default: this boot and PID namespace)",
    )
    group.add_argument(
        "--regroup-timeout",
        type=float,
        default=WorkerConfig.regroup_timeout_s,
        metavar="SECONDS",
        help="how long the ranks wait for a replacement of a lost one; 0: they end with it",
    )


def add_parallel_arguments(group: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """Declares stages, and ranks that divide prompts, for `orchestra worker` and `orchestra serve` alike."""
    group.add_argument(
        "--pipeline-parallel",
        "--pp",
        type=integer(1),
        default=1,
        metavar="STAGES",
        help="stages that the layers are divided among, each of --tp x --cp ranks",
    )
    group.add_argument(
        "--context-parallel",
        "--cp",
        type=integer(1),
        default=1,
        metavar="N",
        help="times that each stage is there, to divide the tokens of long prompts",
    )


def add_engine_arguments(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Declares what every rank of a worker is told alike. `orchestra serve` declares the same and passes it on."""
    default = WorkerConfig
    add = parser.add_argument_group("engine").add_argument
    return [
        add(
            "--served-model-name",
            metavar="NAME",
            help="name that clients use (default: the directory's name)",
        ),
        add(
            "--runner",
            choices=["auto", "native", "hf"],
            default=default.runner,
            help="whose code computes the model; hf: transformers' modules; auto: hf where native has no such model",
        ),
        add(
            "--dtype",
            choices=["auto", "float32", "bfloat16"],
            default=default.dtype,
            help="what weights and KV are computed in; auto: the checkpoint's, on CPUs bf16 instead of fp16, and "
            "fp32 for transformers' modules where the processor has no units for bf16",
        ),
        add(
            "--device",
            choices=["auto", "cpu", "cuda"],
            default=default.device,
            help="auto: CUDA where there is some",
        ),
        add(
            "--attention",
            choices=["auto", "torch", "cpu", "triton", "flashinfer"],
            default=default.attention,
            help="what attends over the cache; auto: kernels of our own, triton on a GPU; torch where they cannot",
        ),
        add(
            "--cuda-graphs",
            choices=["auto", "on", "off"],
            default=default.cuda_graphs,
            help="replay recorded decode steps on a GPU; auto: where the worker has one rank and triton attends",
        ),
        add(
            "--record-steps",
            choices=["auto", "off"],
            default=default.record_steps,
            help="run steps of few tokens from a recording of their kernels, on a CPU, where the model can be recorded",
        ),
        add(
            "--bind-cores",
            choices=["auto", "off"],
            default=default.bind_cores,
            help="keep each of several ranks on cores of its own, on a CPU; auto: where there is one for each",
        ),
        add(
            "--async-scheduling",
            choices=["auto", "on", "off"],
            default=default.async_scheduling,
            help="plan the next step while one runs; auto: on a GPU, where the worker has one rank and moves no KV",
        ),
        add(
            "--collectives",
            choices=["auto", "gloo", "shm", "nccl", "nvlink"],
            default=default.collectives,
            help="between the ranks of a model; auto: memory that a node shares (GPUs: over NVLink), else gloo, NCCL",
        ),
        add(
            "--overlap-min-tokens",
            type=integer(0),
            default=default.overlap_min_tokens,
            help="fewest tokens of a step that computes one half beside sums of the other, by gloo or NCCL; 0: none",
        ),
        add(
            "--block-size", type=integer(1), default=default.block_size, help="tokens per KV block"
        ),
        add(
            "--num-blocks",
            type=integer(1),
            help="KV blocks (default: as many as the memory allows)",
        ),
        add(
            "--kv-cache-memory",
            type=parse_bytes,
            metavar="SIZE",
            help="memory of each rank for KV, like 4GiB; instead of --num-blocks",
        ),
        add(
            "--num-host-blocks",
            type=integer(0),
            default=default.num_host_blocks,
            help="KV blocks of host memory below the cache: of preempted sequences, evicted, copied for other workers",
        ),
        add(
            "--max-num-seqs",
            type=integer(1),
            default=default.max_num_seqs,
            help="most sequences in one step",
        ),
        add(
            "--max-num-batched-tokens",
            type=integer(1),
            help=f"most tokens in one step (default: {STEP_TOKENS} on a GPU, {STEP_TOKENS_CPU} on a CPU, at least"
            " as many as sequences)",
        ),
        add(
            "--max-model-len",
            type=integer(2),
            help="longest prompt plus output, tokens (default: what model and cache hold)",
        ),
        add(
            "--max-prefill-chunk",
            type=integer(0),
            default=default.max_prefill_chunk,
            help="most prompt tokens of one sequence in one step; 0: only the token budget",
        ),
        add(
            "--tpot-target-ms",
            type=integer(0),
            default=default.tpot_target_ms,
            metavar="MS",
            help="how long a step may last while sequences decode, which sizes the chunks of prompts; 0: no limit",
        ),
        add(
            "--rank-hang-timeout-ms",
            type=integer(0),
            default=default.rank_hang_timeout_ms,
            metavar="MS",
            help="shortest standstill in a step after which one of several ranks counts as hung; 0: never",
        ),
        add(
            "--context-min-tokens",
            type=integer(1),
            default=default.context_min_tokens,
            metavar="TOKENS",
            help="fewest tokens of prompts in a step that --context-parallel divides",
        ),
        add("--no-prefix-cache", action="store_true", help="compute every prompt from its start"),
        add(
            "--layer-split",
            type=layer_split,
            metavar="N,N",
            help="layers of each stage of a pipeline, like 10,6 (default: equally many)",
        ),
        add(
            "--repartition",
            choices=["off", "auto"],
            default=default.repartition,
            help="auto: layers move from stages that take long to others while the worker serves, where that pays",
        ),
        add(
            "--expert-parallel",
            action="store_true",
            help="keep each expert whole on one rank (with --cp: of all), instead of a slice of each on every rank",
        ),
        add(
            "--kv-transfer",
            choices=["auto", "off", "shm", "tcp"],
            default=default.kv_transfer,
            help="what moves KV between workers; auto: shared memory on one host, TCP where there is --kv-address",
        ),
        add(
            "--write-through",
            action="store_true",
            help="have another worker, with --num-host-blocks, keep copies of what the prefix cache holds",
        ),
        add(
            "--failure-domain",
            default=default.failure_domain,
            metavar="NAME",
            help="what fails together with the worker: copies go to another one (default: the host, by its boot)",
        ),
        add(
            "--weights-epoch",
            type=integer(0),
            default=default.weights_epoch,
            help="version of the weights; KV is never shared between two",
        ),
    ]


def _add_process(parser: argparse.ArgumentParser) -> None:
    default = WorkerConfig
    add = parser.add_argument_group("process").add_argument
    add(
        "--drain-timeout",
        type=float,
        default=default.drain_timeout_s,
        metavar="SECONDS",
        help="how long running sequences may go on after SIGTERM or SIGINT",
    )
    add(
        "--metrics-host",
        default=default.metrics_host,
        metavar="ADDRESS",
        help="address of the metrics page",
    )
    add("--metrics-port", type=integer(0), metavar="PORT", help="(default: no metrics page)")
    add(
        "--role",
        choices=["both", "prefill", "decode"],
        default=default.role,
        help="compute prompts for others, or take the KV of long prompts from them, where KV moves",
    )
    add(
        "--kv-address",
        type=address,
        metavar="ADDRESS",
        help="of this host, at which workers of other hosts reach its KV; unencrypted (default: none)",
    )
    add("--parent-pid", type=integer(1), help=argparse.SUPPRESS)


def _from_namespace(given: argparse.Namespace) -> WorkerConfig:
    model_dir = given.model_dir
    if not model_dir.is_dir():
        raise ConfigError(f"{model_dir} is not a directory", key="model_dir")
    if given.block_size & (given.block_size - 1):
        raise ConfigError(
            f"--block-size: {given.block_size} is not a power of two", key="block_size"
        )
    if given.num_blocks is not None and given.kv_cache_memory is not None:
        raise ConfigError(
            "--num-blocks and --kv-cache-memory exclude each other", key="kv_cache_memory"
        )
    names: dict[str, Any] = vars(given).copy()
    for name in _SPELT_OTHERWISE:
        del names[name]
    shard, context, stage = _place(given)
    if stage.count * context.size > 1 and given.regroup_timeout > 0:
        message = (
            "--regroup-timeout: with --pp or --cp no rank is replaced, the worker starts again"
        )
        raise ConfigError(message, key="regroup_timeout")
    if stage.count == 1 and given.repartition != "off":
        message = "--repartition: needs stages to move layers between, --pp of at least 2"
        raise ConfigError(message, key="repartition")
    names["worker_id"] = given.worker_id or f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}"
    return WorkerConfig(
        **names,
        model_name=given.served_model_name or model_dir.resolve().name,
        shard=shard,
        context=context,
        stage=stage,
        enable_prefix_cache=not given.no_prefix_cache,
        drain_timeout_s=given.drain_timeout,
        regroup_timeout_s=given.regroup_timeout,
    )


def _place(given: argparse.Namespace) -> tuple[Shard, Shard, Stage]:
    """This rank's place: from the flags, or with `env://` from what torchrun sets."""
    stages, contexts = given.pipeline_parallel, given.context_parallel
    size, rank = given.tp, given.rank
    if urlparse(given.rendezvous).scheme == "env":
        world = int(os.environ.get("WORLD_SIZE", "1"))
        size = max(1, world // (stages * contexts)) if size is None else size
        rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    size = 1 if size is None else size
    in_stage = contexts * size
    num_ranks = stages * in_stage
    flags = f"--tp {size}"
    flags += f" --cp {contexts}" if contexts > 1 else ""
    flags += f" --pp {stages}" if stages > 1 else ""
    rank = 0 if rank is None and num_ranks == 1 else rank
    if rank is None or rank >= num_ranks:
        raise ConfigError(f"--rank: must be 0 to {num_ranks - 1} with {flags}", key="rank")
    if num_ranks > 1 and not given.rendezvous:
        raise ConfigError(f"--rendezvous: needed with {flags}", key="rendezvous")
    split = parse_layer_split(given.layer_split) if given.layer_split else ()
    stage = Stage(rank // in_stage, stages, split)
    context = Shard(rank % in_stage // size, contexts)
    return Shard(rank % size, size), context, stage
