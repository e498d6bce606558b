"""What one rank is told at start: the flags of `orchestra worker`, and their only defaults."""

import argparse
import ipaddress
import os
import re
import socket
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlparse

from orchestra.errors import ConfigError
from orchestra.worker.sharding import Shard

# EX_USAGE of sysexits.h: a restart changes nothing.
EXIT_INVALID_CONFIG = 64

# Flags whose fields have other names.
_SPELT_OTHERWISE = (
    *("tp", "rank", "regroup_timeout"),
    *("served_model_name", "no_prefix_cache", "drain_timeout"),
)

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", re.IGNORECASE)


@dataclass(frozen=True)
class WorkerConfig:
    """Settings of one rank."""

    model_dir: Path
    """Checkpoint directory in the Hugging Face layout."""
    router: str
    """The router's worker gateway, `http://host:port`."""
    worker_id: str
    """Stable name of the worker, unique in the cluster."""
    model_name: str
    """Under which clients ask for the model."""
    shard: Shard = field(default_factory=Shard)
    """This rank's place in the tensor-parallel group."""
    rendezvous: str = ""
    """Where the ranks meet: `file:///path`, `tcp://host:port` or `env://`. Empty with one rank."""
    attention: str = "auto"
    """What attends over the cache: `torch`, `cpu`, or `auto`: kernels for the CPU where they can compute."""
    collectives: str = "auto"
    """What carries the sums of the ranks: `gloo`, `shm`, or `auto`: shared memory for CPU ranks of one machine."""
    regroup_timeout_s: float = 0.0
    """How long the ranks wait for a replacement of one that was lost; 0: they end with it."""
    rank_hang_timeout_ms: int = 300
    """Shortest time without progress in a step after which a rank is taken for hung; 0: it never is."""
    dtype: str = "auto"
    """`float32`, `bfloat16`, or `auto`: the checkpoint's, where the device computes in it natively."""
    runner: str = "auto"
    """Whose code computes the model: `native`, `hf` (transformers' modules), or `auto`: native where it can."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: CUDA where there is some."""
    block_size: int = 16
    """Tokens per KV block, a power of two."""
    num_blocks: int | None = None
    """KV blocks; None: as many as the memory allows."""
    kv_cache_memory: int | None = None
    """Bytes of KV cache per rank; None: a share of the free memory."""
    num_host_blocks: int = 0
    """KV blocks of host memory, of each rank, that keep what preempted sequences have computed."""
    max_num_seqs: int = 256
    """Most sequences in one step."""
    max_num_batched_tokens: int = 2048
    """Most tokens in one step."""
    max_model_len: int | None = None
    """Longest prompt plus output, tokens; None: what the model and the cache can hold."""
    max_prefill_chunk: int = 0
    """Most prompt tokens of one sequence in one step; 0: only the token budget."""
    tpot_target_ms: int = 0
    """How long a step may last while sequences decode; prompts get what is left. 0: no matter how long."""
    enable_prefix_cache: bool = True
    """Whether prompts reuse the KV of equal beginnings."""
    expert_parallel: bool = False
    """Whether each expert lies whole on one rank, instead of a slice of each on every rank."""
    kv_transfer: str = "auto"
    """What moves KV between workers: `auto`, `shm`, `tcp`, or `off`."""
    kv_address: str | None = None
    """Address at which workers of other hosts reach this one's KV; None: only those of this host do."""
    role: str = "both"
    """What the worker is for: `prefill`, `decode` or `both`."""
    weights_epoch: int = 0
    """Version of the weights."""
    drain_timeout_s: float = 30.0
    """How long running sequences may go on after a signal to stop."""
    metrics_host: str = "127.0.0.1"
    """Address of the metrics page."""
    metrics_port: int | None = None
    """Port of the metrics page; None: there is none."""
    parent_pid: int | None = None
    """The process whose end ends this one."""
    is_spare: bool = False
    """Whether the process waits for standard input to say which rank it is."""


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
    group = parser.add_argument_group("tensor parallelism")
    group.add_argument("--tp", type=_integer(1), help="ranks that share the model (default: 1)")
    group.add_argument("--rank", type=_integer(0), help="which of them this is")
    group.add_argument(
        "--rendezvous", default="", metavar="URL", help="file:///path, tcp://host:port or env://"
    )
    group.add_argument(
        "--regroup-timeout",
        type=float,
        default=WorkerConfig.regroup_timeout_s,
        metavar="SECONDS",
        help="how long the ranks wait for a replacement of a lost one; 0: they end with it",
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
            help="what weights and KV are computed in; auto: the checkpoint's, where the device has it natively",
        ),
        add(
            "--device",
            choices=["auto", "cpu", "cuda"],
            default=default.device,
            help="auto: CUDA where there is some",
        ),
        add(
            "--attention",
            choices=["auto", "torch", "cpu"],
            default=default.attention,
            help="what attends over the cache; auto: kernels of our own on a CPU, else torch",
        ),
        add(
            "--collectives",
            choices=["auto", "gloo", "shm"],
            default=default.collectives,
            help="between the CPU ranks of a model; auto: shared memory on one machine, else gloo",
        ),
        add(
            "--block-size", type=_integer(1), default=default.block_size, help="tokens per KV block"
        ),
        add(
            "--num-blocks",
            type=_integer(1),
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
            type=_integer(0),
            default=default.num_host_blocks,
            help="KV blocks of host memory for preempted sequences; 0: they compute theirs again",
        ),
        add(
            "--max-num-seqs",
            type=_integer(1),
            default=default.max_num_seqs,
            help="most sequences in one step",
        ),
        add(
            "--max-num-batched-tokens",
            type=_integer(1),
            default=default.max_num_batched_tokens,
            help="most tokens in one step",
        ),
        add(
            "--max-model-len",
            type=_integer(2),
            help="longest prompt plus output, tokens (default: what model and cache hold)",
        ),
        add(
            "--max-prefill-chunk",
            type=_integer(0),
            default=default.max_prefill_chunk,
            help="most prompt tokens of one sequence in one step; 0: only the token budget",
        ),
        add(
            "--tpot-target-ms",
            type=_integer(0),
            default=default.tpot_target_ms,
            metavar="MS",
            help="how long a step may last while sequences decode, which sizes the chunks of prompts; 0: no limit",
        ),
        add(
            "--rank-hang-timeout-ms",
            type=_integer(0),
            default=default.rank_hang_timeout_ms,
            metavar="MS",
            help="shortest standstill in a step after which one of several ranks counts as hung; 0: never",
        ),
        add("--no-prefix-cache", action="store_true", help="compute every prompt from its start"),
        add(
            "--expert-parallel",
            action="store_true",
            help="keep each expert whole on one rank, instead of a slice of each on every rank",
        ),
        add(
            "--kv-transfer",
            choices=["auto", "off", "shm", "tcp"],
            default=default.kv_transfer,
            help="what moves KV between workers; auto: shared memory on one host, TCP where there is --kv-address",
        ),
        add(
            "--weights-epoch",
            type=_integer(0),
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
    add("--metrics-port", type=_integer(0), metavar="PORT", help="(default: no metrics page)")
    add(
        "--role",
        choices=["both", "prefill", "decode"],
        default=default.role,
        help="compute prompts for others, or take the KV of long prompts from them, where KV moves",
    )
    add(
        "--kv-address",
        type=_address,
        metavar="ADDRESS",
        help="of this host, at which workers of other hosts reach its KV; unencrypted (default: none)",
    )
    add("--parent-pid", type=_integer(1), help=argparse.SUPPRESS)
    add("--spare", dest="is_spare", action="store_true", help=argparse.SUPPRESS)


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
    names["worker_id"] = given.worker_id or f"{socket.gethostname()}-{uuid.uuid4().hex[:8]}"
    return WorkerConfig(
        **names,
        model_name=given.served_model_name or model_dir.resolve().name,
        shard=_shard(given),
        enable_prefix_cache=not given.no_prefix_cache,
        drain_timeout_s=given.drain_timeout,
        regroup_timeout_s=given.regroup_timeout,
    )


def _shard(given: argparse.Namespace) -> Shard:
    """This rank's place: from the flags, or with `env://` from what torchrun sets."""
    size, rank = given.tp, given.rank
    if urlparse(given.rendezvous).scheme == "env":
        size = int(os.environ.get("WORLD_SIZE", "1")) if size is None else size
        rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    size = 1 if size is None else size
    rank = 0 if rank is None and size == 1 else rank
    if rank is None or rank >= size:
        raise ConfigError(f"--rank: must be 0 to {size - 1} with --tp {size}", key="rank")
    if size > 1 and not given.rendezvous:
        raise ConfigError(f"--rendezvous: needed with --tp {size}", key="rendezvous")
    return Shard(rank, size)


def parse_bytes(text: str) -> int:
    """Reads a size such as `4GiB`, `500MB` or `1048576`."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 4GiB or 500MB")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


def _address(text: str) -> str:
    """An argument type: an IP address."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not an IP address") from error


def _integer(least: int) -> Any:
    """An argument type: a whole number of at least `least`."""

    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return value

    parse.__name__ = "whole number"
    return parse
