"""The processes that have the places of ranks: one each, of which the one before has ended.

A rank that hung and was given up may wake up in the middle of its step. What it then does to memory that only its own
process has harms nobody; memory that it shares with the ranks of the next generation it must not live to see.
"""

import contextlib
import os
import select
import signal
import socket

from orchestra.worker.plan_socket import RankLostError, peer_pid

# A process that was killed is gone by then, or stuck in the kernel.
END_TIMEOUT_S = 10.0


class RankProcesses:
    """Those of the ranks that come over Unix sockets, by their number; rank 0's end of them has it."""

    def __init__(self) -> None:
        self._processes: dict[int, tuple[int, int]] = {}
        """Their numbers, and descriptors that mean them for ever."""

    @property
    def known(self) -> set[int]:
        """The ranks whose places cannot be taken while their processes live."""
        return set(self._processes)

    def admit(self, rank: int, connection: socket.socket) -> None:
        """The process that has connected takes a place; whoever had it is killed, if it lives.

        Raises:
            RankLostError: it does not end.
        """
        process = _peer(connection)
        had = self._processes.get(rank)
        if had is not None and process is not None and had[0] == process[0] and _is_alive(had[1]):
            os.close(process[1])
            return
        if had is not None:
            _end(rank, had[1])
            os.close(self._processes.pop(rank)[1])
        if process is not None:
            self._processes[rank] = process

    def close(self) -> None:
        """Lets go of them, alive or not."""
        while self._processes:
            os.close(self._processes.popitem()[1][1])


def _peer(connection: socket.socket) -> tuple[int, int] | None:
    """The process at the other end; None where that cannot be known."""
    number = peer_pid(connection)
    if number is None:
        return None
    try:
        # It lives: it waits for an answer on this connection.
        return number, os.pidfd_open(number)
    except OSError:
        return None


def _is_alive(descriptor: int) -> bool:
    return not _has_ended(descriptor, 0.0)


def _has_ended(descriptor: int, timeout_s: float) -> bool:
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    return bool(poller.poll(timeout_s * 1000))


def _end(rank: int, descriptor: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    if not _has_ended(descriptor, END_TIMEOUT_S):
        raise RankLostError(f"rank {rank} was killed and has not ended for {END_TIMEOUT_S:g} s")
