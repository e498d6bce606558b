"""The `orchestra` command. Each subcommand imports what it needs, when it runs."""

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NoReturn

EXIT_OK = 0
EXIT_INTERRUPTED = 130
# EX_USAGE of sysexits.h; the router and the workers, too, end with it when their configuration is wrong.
EXIT_USAGE = 64

# Set by `orchestra serve`: the process dies with the one that started it.
PARENT_FLAG = "--parent-pid"

# What the extra `worker` installs, as it is imported.
WORKER_MODULES = frozenset(
    ["msgpack", "numpy", "prometheus_client", "safetensors", "setproctitle", "tokenizers", "torch"]
)

USAGE = """\
usage: orchestra COMMAND …

  serve MODEL_DIR   router and workers on this machine, with nothing else to install
  router            the front alone: OpenAI HTTP and gRPC in, requests placed on workers
  worker MODEL_DIR  one rank of a worker, which attaches to a router
  fork-server       what `serve` starts ranks with; not for people
  version           print the version

`orchestra COMMAND --help` lists the options of each.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(USAGE, end="")
        return EXIT_OK if given else EXIT_USAGE
    name, *rest = given
    command = COMMANDS.get(name.removeprefix("--"))
    if command is None:
        print(f"orchestra: there is no command {name!r} (see orchestra --help)", file=sys.stderr)
        return EXIT_USAGE
    try:
        return command(rest)
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


class _Parser(argparse.ArgumentParser):
    """Reports a bad argument in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_USAGE, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _serve(arguments: list[str]) -> int:
    from orchestra import serve

    parser = _Parser("orchestra serve", description="Serves a checkpoint from this machine.")
    serve.add_arguments(parser)
    return serve.main(parser.parse_args(arguments))


def _router(arguments: list[str]) -> int:
    from orchestra import _core

    # Python's own handler would turn the orderly stop that the router makes of Ctrl-C into a KeyboardInterrupt.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    return _core.run_router(_bind_to_parent(arguments))


def _worker(arguments: list[str]) -> int:
    return _run_worker_code("orchestra.worker.__main__", arguments)


def _fork_server(arguments: list[str]) -> int:
    return _run_worker_code("orchestra.worker.fork_server", arguments)


def _run_worker_code(module: str, arguments: list[str]) -> int:
    """Calls `main` of a module that needs what the extra `worker` installs."""
    own = _bind_to_parent(arguments)
    try:
        code: int = import_module(module).main(own)
    except ModuleNotFoundError as error:
        if error.name not in WORKER_MODULES:
            raise
        print(
            f"orchestra worker: {error}; install it with: pip install 'orchestra[worker]'",
            file=sys.stderr,
        )
        return EXIT_USAGE
    return code


def _version(_arguments: list[str]) -> int:
    from orchestra import __version__

    print(f"orchestra {__version__}")
    return EXIT_OK


def _bind_to_parent(arguments: list[str]) -> list[str]:
    """Takes `--parent-pid N` off the front, and asks the kernel to end this process with that one."""
    if arguments[:1] != [PARENT_FLAG]:
        return arguments
    from orchestra import _core

    _core.die_with_parent(int(arguments[1]))
    return arguments[2:]


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "serve": _serve,
    "router": _router,
    "worker": _worker,
    "fork-server": _fork_server,
    "version": _version,
}
