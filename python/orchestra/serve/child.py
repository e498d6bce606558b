"""One child process of `orchestra serve`: started in a session of its own, read, and certainly stopped."""

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Protocol

from orchestra.serve.console import Console

TAIL_LINES = 20
# Output that is still in the pipes when the process has gone is read for this long.
LAST_OUTPUT_S = 1.0

StatusHandler = Callable[[dict[str, Any]], None]


class Process(Protocol):
    """What is asked of a process: asyncio's own has it, and one that was forked for us."""

    @property
    def pid(self) -> int:
        """Its number."""
        ...

    @property
    def returncode(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        ...

    @property
    def stdout(self) -> asyncio.StreamReader | None:
        """What it writes to standard output."""
        ...

    @property
    def stderr(self) -> asyncio.StreamReader | None:
        """What it writes to standard error."""
        ...

    async def wait(self) -> int:
        """Waits for its end, and returns its exit status."""
        ...


class Child:
    """A running process and what it last wrote.

    It leads a session of its own, so that Ctrl-C in a terminal reaches only the supervisor, which then stops
    everything in order. It gets `--parent-pid`, so that the kernel kills it when the supervisor dies.

    Args:
        name: how the process is called in lines for a person.
        process: the process.
        console: where its standard error goes, line by line.
        on_status: called with each JSON object that it writes to standard output.
    """

    def __init__(
        self,
        name: str,
        process: Process,
        console: Console,
        on_status: StatusHandler,
    ) -> None:
        self.name = name
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        self._process = process
        self._console = console
        self._on_status = on_status
        self._pumps = [
            asyncio.create_task(self._pump_errors()),
            asyncio.create_task(self._pump_status()),
        ]

    @classmethod
    async def start(
        cls,
        name: str,
        command: Sequence[str],
        console: Console,
        on_status: StatusHandler,
        environment: Mapping[str, str] | None = None,
        *,
        stdin: int = asyncio.subprocess.DEVNULL,
    ) -> "Child":
        """Starts `orchestra COMMAND…` with this interpreter; `environment` is added to ours."""
        subcommand, *arguments = command
        parent = ["--parent-pid", str(os.getpid())]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *["-m", "orchestra", subcommand, *parent, *arguments],
            stdin=stdin,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        return cls(name, process, console, on_status)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    async def wait(self) -> int:
        """Waits for the end of the process and of its output; returns its exit status, negative for a signal."""
        status = await self._process.wait()
        _, unread = await asyncio.wait(self._pumps, timeout=LAST_OUTPUT_S)
        for pump in unread:
            pump.cancel()
        return status

    async def stop(self, grace_s: float) -> None:
        """Asks the process to end, and kills it when `grace_s` seconds were not enough."""
        self._signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._process.wait(), grace_s)
        except asyncio.TimeoutError:
            self._console.line(f"{self.name} did not stop within {grace_s:g} s: killing it")
            self.kill()
        await self.wait()

    def kill(self) -> None:
        """Kills the process and what it started, now."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, number)

    async def _pump_errors(self) -> None:
        assert self._process.stderr is not None
        async for line in _lines(self._process.stderr):
            self.tail.append(line)
            self._console.line(f"[{self.name}] {line}")

    async def _pump_status(self) -> None:
        assert self._process.stdout is not None
        async for line in _lines(self._process.stdout):
            try:
                status = json.loads(line)
            except ValueError:
                status = None
            if isinstance(status, dict):
                self._on_status(status)
            else:
                self._console.line(f"[{self.name}] {line}")


async def stop_all(children: Sequence[Child], grace_s: float) -> None:
    """Stops several processes at once."""
    await asyncio.gather(*(child.stop(grace_s) for child in children))


def describe_exit(status: int) -> str:
    """How a process ended, for a person: `was killed by SIGKILL`, `exited with 1`."""
    if status >= 0:
        return f"exited with {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:  # a real-time signal has no name
        return f"was killed by signal {-status}"


async def _lines(stream: asyncio.StreamReader) -> AsyncIterator[str]:
    while True:
        try:
            raw = await stream.readline()
        except ValueError:
            # The reader has dropped what it held: a line longer than its 64 KiB.
            yield "(a line of more than 64 KiB)"
            continue
        if not raw:
            return
        yield raw.decode(errors="replace").rstrip()
