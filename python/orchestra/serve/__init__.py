"""`orchestra serve`: router and workers on this machine, supervised, with nothing else installed."""

import argparse
import asyncio
import sys

from orchestra.serve.console import Console
from orchestra.serve.options import (
    AddressInUseError,
    ServeOptions,
    UsageError,
    add_arguments,
    check,
    from_arguments,
)
from orchestra.serve.restarts import EXIT_FAILED, EXIT_INVALID_CONFIG
from orchestra.serve.supervisor import Supervisor

__all__ = ["ServeOptions", "add_arguments", "main", "serve"]


def main(arguments: argparse.Namespace) -> int:
    """Runs `orchestra serve` with parsed arguments; returns the exit code."""
    try:
        options = from_arguments(arguments)
        check(options)
    except UsageError as error:
        print(f"orchestra serve: {error}", file=sys.stderr)
        return EXIT_INVALID_CONFIG
    except AddressInUseError as error:
        print(f"orchestra serve: {error}", file=sys.stderr)
        return EXIT_FAILED
    return serve(options)


def serve(options: ServeOptions) -> int:
    """Serves until a signal comes; returns the exit code."""

    async def run() -> int:
        return await Supervisor(options, Console(sys.stderr), Console(sys.stdout)).run()

    try:
        import uvloop
    except ImportError:  # not on this platform
        return asyncio.run(run())
    return uvloop.run(run())
