"""A child process that somebody else has forked for us."""

import asyncio
import contextlib
import os
import signal
from io import FileIO


class ForkedProcess:
    """What asyncio's own class says of a process that it started, of one that it did not.

    Args:
        pid: its number, and that of its group.
        stdout: what it writes to standard output.
        stderr: what it writes to standard error.
    """

    def __init__(
        self, pid: int, stdout: asyncio.StreamReader, stderr: asyncio.StreamReader
    ) -> None:
        self.pid = pid
        self.stdout = stdout
        self.stderr = stderr
        self.returncode: int | None = None
        self._descriptor = os.pidfd_open(pid)
        self._ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._descriptor, self._on_end)

    @classmethod
    async def adopt(cls, pid: int, output: int, errors: int) -> "ForkedProcess":
        """Takes over a child, and the ends of the pipes that it writes to."""
        return cls(pid, await _read(output), await _read(errors))

    async def wait(self) -> int:
        """Waits for its end; returns its exit status, negative for a signal."""
        await self._ended.wait()
        assert self.returncode is not None
        return self.returncode

    def _on_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)
        # What it started. As long as nobody has waited for it, its number is not given to another.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        self.returncode = os.waitstatus_to_exitcode(status)
        self._ended.set()


async def _read(pipe: int) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), FileIO(pipe)
    )
    return reader
