"""The supervisor's side of the fork server: keeps it running, and has it start ranks."""

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Mapping, Sequence
from io import FileIO
from typing import Any

from orchestra import _core
from orchestra.errors import UnsupportedError
from orchestra.serve.child import Child, StatusHandler, describe_exit
from orchestra.serve.console import Console
from orchestra.serve.forked_process import ForkedProcess
from orchestra.serve.options import ServeOptions
from orchestra.serve.restarts import EXIT_FAILED, EXIT_INVALID_CONFIG

STOP_GRACE_S = 5.0
PAUSE_S = 5.0
# It answers in milliseconds once it has imported everything, which takes seconds, and minutes from a slow disk.
ANSWER_TIMEOUT_S = 120.0
ANSWER_BYTES_MAX = 4096


class ForkServer:
    """The fork server of one `orchestra serve`.

    Args:
        options: what was asked for.
        environment: added to ours; the ranks have it too.
        console: for lines.
    """

    def __init__(
        self, options: ServeOptions, environment: Mapping[str, str], console: Console
    ) -> None:
        self.console = console
        self._options = options
        self._environment = environment
        self._child: Child | None = None
        self._orders: socket.socket | None = None
        self._has_tried = asyncio.Event()
        self._turn = asyncio.Lock()

    async def run(self) -> None:
        """Keeps it running until cancelled; returns where there can be none, or is to be none."""
        if not self._options.has_fork_server or not self._is_possible():
            self._has_tried.set()
            return
        while True:
            try:
                status = await self._run_once()
                end = describe_exit(status)
            except OSError as error:
                status, end = EXIT_FAILED, f"could not be started: {error}"
            # The ranks need not wait for another one; what is wrong with the configuration they will say, too.
            self._has_tried.set()
            if status == EXIT_INVALID_CONFIG:
                return
            self.console.line(f"fork server {end}; starting another in {PAUSE_S:g} s")
            await asyncio.sleep(PAUSE_S)

    async def start(
        self,
        name: str,
        command: Sequence[str],
        on_status: StatusHandler,
        environment: Mapping[str, str],
    ) -> Child:
        """Starts `orchestra COMMAND…`, a worker's: forked, or anew where nobody can fork."""
        await self._has_tried.wait()
        async with self._turn:
            forked = await self._fork(command[1:], environment)
        if forked is None:
            return await Child.start(name, command, self.console, on_status, environment)
        return Child(name, forked, self.console, on_status)

    def _is_possible(self) -> bool:
        try:
            _core.adopt_orphans(False)
        except (OSError, UnsupportedError) as error:
            self.console.line(f"no fork server, each rank imports torch by itself: {error}")
            return False
        return True

    async def _run_once(self) -> int:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with ours:
            with theirs:
                self._child = await Child.start(
                    *("fork server", ["fork-server", str(self._options.model_dir)], self.console),
                    on_status=_ignore,
                    environment=self._environment,
                    stdin=theirs.fileno(),
                )
            self._orders = ours
            self._has_tried.set()
            try:
                return await self._child.wait()
            finally:
                await self._child.stop(STOP_GRACE_S)
                # Whoever waits for an answer reads first what there is.
                async with self._turn:
                    self._orders = None

    async def _fork(
        self, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> ForkedProcess | None:
        """Orders a rank; None: there is no fork server, or it ended, or it has no process to give."""
        if self._orders is None or self._child is None:
            return None
        parent = ["--parent-pid", str(os.getpid())]
        order = {"arguments": [*arguments, *parent], "environment": dict(environment)}
        with contextlib.ExitStack() as pipes:

            def pipe() -> list[FileIO]:
                return [
                    pipes.enter_context(FileIO(end, mode))
                    for end, mode in zip(os.pipe(), "rw", strict=True)
                ]

            (output, its_output), (errors, its_errors) = pipe(), pipe()
            # A rank is ours as soon as the process between it and the fork server has ended.
            _core.adopt_orphans(True)
            try:
                streams = [its_output.fileno(), its_errors.fileno()]
                socket.send_fds(self._orders, [json.dumps(order).encode()], streams)
                answer = await _answer(self._orders, self._child)
            except OSError:
                answer = {}
            finally:
                _core.adopt_orphans(False)
            if "error" in answer:
                self.console.line(f"fork server: {answer['error']}")
            if "pid" not in answer:
                return None
            return await ForkedProcess.adopt(
                answer["pid"], os.dup(output.fileno()), os.dup(errors.fileno())
            )


async def _answer(orders: socket.socket, child: Child) -> dict[str, Any]:
    """What the fork server answers; nothing where it has ended without.

    Raises:
        OSError: the same.
    """
    loop = asyncio.get_running_loop()
    readable = asyncio.Event()
    loop.add_reader(orders, readable.set)
    try:
        await asyncio.wait_for(readable.wait(), ANSWER_TIMEOUT_S)
    except (asyncio.TimeoutError, asyncio.CancelledError) as error:
        # What it has forked and not told us of ends before it runs.
        child.kill()
        if isinstance(error, asyncio.CancelledError):
            raise
        await readable.wait()
    finally:
        loop.remove_reader(orders)
    answer = orders.recv(ANSWER_BYTES_MAX)
    parsed: dict[str, Any] = json.loads(answer) if answer else {}
    return parsed


def _ignore(_status: dict[str, Any]) -> None:
    """A fork server has nothing to say."""
