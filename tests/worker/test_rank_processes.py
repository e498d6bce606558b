"""Who had the place of a rank has ended when another process takes it: real processes, killed and stopped."""

import os
import select
import signal
import socket
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from orchestra.worker import rank_processes
from orchestra.worker.plan_socket import RankLostError
from orchestra.worker.rank_processes import RankProcesses
from tests.worker.forked import RANKS


def connect(path: str) -> None:
    """Takes a place, and keeps it for as long as this process lives."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        signal.pause()


class Door:
    """Where processes take the place of rank 1."""

    def __init__(self, folder: Path) -> None:
        self.processes = RankProcesses()
        self._path = str(folder / "door")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self._path)
        self._listener.listen()
        self._started: list[BaseProcess] = []
        self._connections: list[socket.socket] = []

    def arrive(self) -> BaseProcess:
        """A new process connects."""
        process = RANKS.Process(target=connect, args=(self._path,), daemon=True)
        process.start()
        self._started.append(process)
        self._connections.append(self._listener.accept()[0])
        return process

    def admit(self) -> BaseProcess:
        """A new process connects, and takes the place."""
        process = self.arrive()
        self.processes.admit(1, self._connections[-1])
        return process

    def admit_again(self) -> None:
        """The process that came last takes its own place once more."""
        self.processes.admit(1, self._connections[-1])

    def close(self) -> None:
        """Ends all."""
        for process in self._started:
            process.kill()
            process.join()
        for connection in [self._listener, *self._connections]:
            connection.close()
        self.processes.close()


@pytest.fixture
def door(tmp_path: Path) -> Iterator[Door]:
    door = Door(tmp_path)
    yield door
    door.close()


def has_ended(process: BaseProcess) -> bool:
    return process.exitcode is not None or bool(select.select([process.sentinel], [], [], 0)[0])


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_place_that_is_taken_again_ends_who_had_it(door: Door, *, is_stopped: bool) -> None:
    first = door.admit()
    assert door.processes.known == {1}
    door.admit_again()
    assert not has_ended(first), "it came again itself"
    if is_stopped:
        os.kill(first.pid or 0, signal.SIGSTOP)
    second = door.admit()
    first.join(20)
    assert first.exitcode == -signal.SIGKILL
    assert not has_ended(second)
    assert door.processes.known == {1}


def test_who_is_dead_already_is_in_nobody_s_way(door: Door) -> None:
    first = door.admit()
    first.kill()
    first.join()
    assert not has_ended(door.admit())


def test_who_does_not_end_keeps_the_place(door: Door, monkeypatch: pytest.MonkeyPatch) -> None:
    # As a process does that is stuck in the kernel.
    first = door.admit()
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda *_: None)
    monkeypatch.setattr(rank_processes, "END_TIMEOUT_S", 0.01)
    with pytest.raises(RankLostError, match="rank 1 was killed and has not ended"):
        door.admit()
    assert not has_ended(first)


def test_ranks_on_other_sockets_are_not_known() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        with socket.create_connection(address) as connection:
            processes = RankProcesses()
            processes.admit(1, connection)
            assert processes.known == set()
