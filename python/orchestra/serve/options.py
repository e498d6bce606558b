"""The options of `orchestra serve`, and every check that can be made before a process is started."""

import argparse
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path

from orchestra.errors import ConfigError
from orchestra.worker.argument_types import parse_layer_split
from orchestra.worker.command_line import add_engine_arguments, add_parallel_arguments
from orchestra.worker.sharding import Stage

MODEL_FILES = ("config.json", "tokenizer.json")


@dataclass(frozen=True)
class ServeOptions:
    """What `orchestra serve` was asked for."""

    model_dir: Path
    """A checkpoint directory in the Hugging Face layout."""
    tp: int
    """Ranks per stage of a worker, each with its shard of the stage's layers."""
    stages: int
    """Stages of each worker's pipeline."""
    contexts: int
    """Times that each stage is there, to divide long prompts."""
    replicas: int
    """Workers, each with the whole model; where there are prefill workers, these and the decode workers."""
    prefill: int
    """Of them, how many compute prompts for the others; they are the first ones."""
    host: str
    """Address of the two client doors."""
    port: int
    """OpenAI HTTP; 0: any free port."""
    grpc_port: int
    """`orchestra.v1` over gRPC; 0: any free port."""
    drain_timeout_s: float
    """How long running requests may go on after a signal to stop."""
    has_fork_server: bool
    """Whether ranks are forked from a process that has imported torch."""
    print_addresses: bool
    """When ready, write one JSON line with the addresses instead of lines for a person."""
    worker_arguments: tuple[str, ...]
    """Further arguments of every rank."""

    @property
    def num_ranks(self) -> int:
        """Ranks of each worker."""
        return self.tp * self.contexts * self.stages

    @property
    def has_replaceable_ranks(self) -> bool:
        """Whether the ranks of a worker can go on with another one in the place of one that was lost."""
        return self.num_ranks > 1 and self.num_ranks == self.tp

    def arguments_of(self, index: int) -> list[str]:
        """Arguments of one worker, those of every rank included."""
        arguments = list(self.worker_arguments)
        if self.prefill:
            arguments += ["--role", "prefill" if index < self.prefill else "decode"]
        elif self.replicas == 1 and "--kv-transfer" not in arguments:
            # Nobody is there to exchange KV with, and memory that is not shared may have huge pages.
            arguments += ["--kv-transfer", "off"]
        return arguments

    @property
    def model_name(self) -> str:
        """The name that clients use."""
        arguments = self.worker_arguments
        if "--served-model-name" in arguments:
            return arguments[arguments.index("--served-model-name") + 1]
        return self.model_dir.resolve().name

    def ip_address(self) -> str:
        """The address that `host` stands for.

        Raises:
            UsageError: it stands for none.
        """
        try:
            found = socket.getaddrinfo(self.host, None, type=socket.SOCK_STREAM)
        except OSError as error:
            raise UsageError(f"--host {self.host}: {error.strerror}") from error
        return str(found[0][4][0])


class UsageError(Exception):
    """An option is wrong; the message says which and why."""


class AddressInUseError(Exception):
    """Another process listens on a port that was asked for."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of `orchestra serve`."""
    parser.add_argument(
        "model_dir",
        type=Path,
        metavar="MODEL_DIR",
        help="checkpoint directory (Hugging Face layout)",
    )
    parser.add_argument(
        "--tp", type=_positive, default=1, help="ranks that share each layer (default: 1)"
    )
    add_parallel_arguments(parser)
    parser.add_argument("--replicas", type=_positive, help="workers (default: 1)")
    parser.add_argument(
        "--prefill",
        type=_positive,
        metavar="N",
        help="workers that compute long prompts for others; with --decode, instead of --replicas",
    )
    parser.add_argument(
        "--decode",
        type=_positive,
        metavar="M",
        help="workers that are given the KV of long prompts; with --prefill, instead of --replicas",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)"
    )
    parser.add_argument(
        "--port", type=_port, default=8000, help="OpenAI HTTP (default: 8000; 0: any)"
    )
    parser.add_argument(
        "--grpc-port", type=_port, help="gRPC (default: the port after --port; 0: any)"
    )
    parser.add_argument(
        "--drain-timeout",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="how long running requests may go on after Ctrl-C (default: 30)",
    )
    parser.add_argument(
        "--no-fork-server",
        action="store_true",
        help="start each rank as a process that imports torch itself, instead of forking it from one that has",
    )
    parser.add_argument(
        "--print-addresses",
        action="store_true",
        help="when ready, write one JSON line instead of lines for a person",
    )
    add_engine_arguments(parser)


def from_arguments(arguments: argparse.Namespace) -> ServeOptions:
    """Builds the options from what `add_arguments` declared.

    Raises:
        UsageError: two options do not go together.
    """
    prefill = _prefill_workers(arguments)
    if arguments.repartition != "off" and arguments.pipeline_parallel == 1:
        raise UsageError("--repartition needs stages to move layers between: --pp of at least 2")
    worker: list[str] = []
    for action in add_engine_arguments(argparse.ArgumentParser()):
        value = getattr(arguments, action.dest)
        if value != action.default:
            worker += (
                [action.option_strings[0]]
                if value is True
                else [action.option_strings[0], str(value)]
            )
    return ServeOptions(
        model_dir=arguments.model_dir,
        tp=arguments.tp,
        stages=arguments.pipeline_parallel,
        contexts=arguments.context_parallel,
        replicas=prefill + arguments.decode if prefill else arguments.replicas or 1,
        prefill=prefill,
        host=arguments.host,
        port=arguments.port,
        grpc_port=_grpc_port(arguments.port, arguments.grpc_port),
        drain_timeout_s=arguments.drain_timeout,
        has_fork_server=not arguments.no_fork_server,
        print_addresses=arguments.print_addresses,
        worker_arguments=tuple(worker),
    )


def check(options: ServeOptions) -> None:
    """Finds what would fail later and less clearly.

    Raises:
        UsageError: an option or the model directory is wrong.
        AddressInUseError: a port is taken.
    """
    _check_model(options)
    group_devices(options)
    if options.port == options.grpc_port != 0:
        raise UsageError(f"--port and --grpc-port are both {options.port}")
    for flag, port in (("--port", options.port), ("--grpc-port", options.grpc_port)):
        _check_port(options, port, flag)


def group_devices(options: ServeOptions) -> list[str | None]:
    """`CUDA_VISIBLE_DEVICES` for each worker; None where the worker runs on the CPU.

    Raises:
        UsageError: there are GPUs, but fewer than the ranks need.
    """
    arguments = options.worker_arguments
    on_cpu = "--device" in arguments and arguments[arguments.index("--device") + 1] == "cpu"
    gpus = [] if on_cpu else _visible_gpus()
    if not gpus:
        return [None] * options.replicas
    needed = options.num_ranks * options.replicas
    if needed > len(gpus):
        workers = f"--replicas {options.replicas}"
        if options.prefill:
            workers = (
                f"--prefill {options.prefill} and --decode {options.replicas - options.prefill}"
            )
        ranks = f"--tp {options.tp}"
        if options.contexts > 1:
            ranks += f", --cp {options.contexts}"
        if options.stages > 1:
            ranks += f", --pp {options.stages}"
        raise UsageError(
            f"{ranks} and {workers} need {needed} GPUs, there are {len(gpus)}"
            " (--device cpu runs without)"
        )
    size = options.num_ranks
    return [",".join(gpus[i : i + size]) for i in range(0, needed, size)]


def _prefill_workers(arguments: argparse.Namespace) -> int:
    """How many workers compute prompts for others."""
    if (arguments.prefill is None) != (arguments.decode is None):
        given, missing = ("prefill", "decode") if arguments.prefill else ("decode", "prefill")
        raise UsageError(f"--{given} needs --{missing}")
    if arguments.prefill is None:
        return 0
    if arguments.replicas is not None:
        raise UsageError("--replicas does not go with --prefill and --decode")
    return int(arguments.prefill)


def _visible_gpus() -> list[str]:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [gpu for gpu in chosen.split(",") if gpu.strip()]
    return [str(index) for index in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


def _check_model(options: ServeOptions) -> None:
    path = options.model_dir
    if not path.is_dir():
        raise UsageError(f"{path} is not a directory")
    for name in MODEL_FILES:
        if not (path / name).is_file():
            raise UsageError(
                f"{path} has no {name}: it is not a checkpoint in the Hugging Face layout"
            )
    if not any(path.glob("*.safetensors")):
        raise UsageError(f"{path} has no .safetensors file")
    try:
        config = json.loads((path / "config.json").read_text())
    except ValueError as error:
        raise UsageError(f"{path / 'config.json'} is not JSON: {error}") from error
    if not isinstance(config, dict):
        return
    heads, layers = config.get("num_attention_heads"), config.get("num_hidden_layers")
    if isinstance(heads, int) and heads % options.tp:
        raise UsageError(f"--tp {options.tp} does not divide the model's {heads} attention heads")
    if isinstance(layers, int):
        _check_stages(options, layers)


def _check_stages(options: ServeOptions, num_layers: int) -> None:
    arguments = options.worker_arguments
    split: tuple[int, ...] = ()
    if "--layer-split" in arguments:
        split = parse_layer_split(arguments[arguments.index("--layer-split") + 1])
    try:
        Stage(0, options.stages, split).layers(num_layers)
    except ConfigError as error:
        raise UsageError(str(error)) from error


def _check_port(options: ServeOptions, port: int, flag: str) -> None:
    address = options.ip_address()
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address, port))
        except OSError as error:
            reason = f"{error.strerror}; choose another with {flag}"
            raise AddressInUseError(
                f"cannot listen on {options.host} port {port}: {reason}"
            ) from error


def _grpc_port(port: int, chosen: int | None) -> int:
    if chosen is not None:
        return chosen
    return port + 1 if 0 < port < 65535 else 0


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError("must be between 0 and 65535")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError("must be a number of seconds, at least 0")
    return value
