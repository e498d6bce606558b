"""Whether a process that stands still wants to run and is not let: that tells a busy machine from a hang.

For those that wait while another runs on their core, the kernel counts. Of a virtual core that its host has stopped it
knows nothing before that runs again: until then the thread on it counts as one that runs. So it is looked for by going
there.
"""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from orchestra.worker.plan_socket import peer_pid

# Share of the time that some thread has waited for a core: more is no hang but a machine with too much to do.
STARVED_SHARE = 0.25
# Where `proc(5)` has the core of a thread, counted from its state.
_CORE = 36


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
        self._stopped_s = 0.0

    @classmethod
    def of(cls, connection: socket.socket) -> "Starvation":
        """Of the process that opened the other end of a Unix socket; of any other socket nothing is known."""
        return cls(peer_pid(connection) or 0)

    @classmethod
    def of_this(cls) -> "Starvation":
        """Of the process that asks."""
        return cls(os.getpid())

    def begin(self) -> None:
        """Starts to look."""
        self._began, self._waited_s, self._stopped_s = time.monotonic(), self._waited(), 0.0

    def look(self) -> None:
        """Goes to the cores on which the process runs, as far as the kernel knows, and waits for those that do not.

        To be called every now and then after `begin`, since what a host stops goes on without a trace.
        """
        if cores := self._cores():
            began = time.monotonic()
            visit(cores)
            self._stopped_s += time.monotonic() - began

    def is_starved(self) -> bool:
        """Whether the process, or a core of it, has waited since `begin`, instead of doing nothing or too much."""
        waited_s = self._waited() - self._waited_s + self._stopped_s
        return waited_s > STARVED_SHARE * (time.monotonic() - self._began)

    def _waited(self) -> float:
        """Seconds that its threads have waited for a core; 0 where that is not known."""
        try:
            # Nanoseconds on a core, nanoseconds waiting for one, turns.
            return sum(int(counts.split()[1]) for counts in self._read("schedstat")) / 1e9
        except (OSError, ValueError, IndexError):
            return 0.0

    def _cores(self) -> set[int]:
        """On which its threads run; none where that is not known."""
        try:
            # The state is behind the thread's name, which is in brackets and may have brackets too.
            fields = [counts.rpartition(")")[2].split() for counts in self._read("stat")]
            return {int(its[_CORE]) for its in fields if its[0] == "R"}
        except (OSError, ValueError, IndexError):
            return set()

    def _read(self, name: str) -> Iterator[str]:
        """What the kernel says of each thread."""
        for task in () if self._tasks is None else self._tasks.iterdir():
            yield (task / name).read_text()


def visit(cores: set[int]) -> None:
    """Runs on each of the cores, one after the other."""
    ours = os.sched_getaffinity(0)
    for stay in (*({core} for core in cores), ours):
        # Perhaps it is one that this process may not use, or it may not choose at all.
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, stay)
