"""Whether a process that stands still wants to run and is not let: what the kernel counts tells that from a hang."""

import socket
import time
from pathlib import Path

from orchestra.worker.plan_socket import peer_pid

# Share of the time that some thread has waited for a core: more is no hang but a machine with too much to do.
STARVED_SHARE = 0.25


class Starvation:
    """Looks at one process, from one question to the next.

    Args:
        pid: of the process; 0: it is not on this machine, or nobody knows.
        proc: where the kernel's files are.
    """

    def __init__(self, pid: int, proc: Path = Path("/proc")) -> None:
        self._tasks = proc / str(pid) / "task" if pid > 0 else None
        self._began = 0.0
        self._waited_s = 0.0

    @classmethod
    def of(cls, connection: socket.socket) -> "Starvation":
        """Of the process that opened the other end of a Unix socket; of any other socket nothing is known."""
        return cls(peer_pid(connection) or 0)

    def begin(self) -> None:
        """Starts to look."""
        self._began, self._waited_s = time.monotonic(), self._waited()

    def is_starved(self) -> bool:
        """Whether the process has waited for a core since `begin`, instead of doing nothing or too much."""
        waited_s = self._waited() - self._waited_s
        return waited_s > STARVED_SHARE * (time.monotonic() - self._began)

    def _waited(self) -> float:
        """Seconds that its threads have waited for a core; 0 where that is not known."""
        if self._tasks is None:
            return 0.0
        total = 0
        try:
            for task in self._tasks.iterdir():
                # Nanoseconds on a core, nanoseconds waiting for one, turns.
                total += int((task / "schedstat").read_text().split()[1])
        except (OSError, ValueError, IndexError):
            return 0.0
        return total / 1e9
