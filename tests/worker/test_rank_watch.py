"""How a lost rank is told from a slow one: real sockets and processes, and collectives that a test plays."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from orchestra.worker import rank_watch
from orchestra.worker import starvation as starvation_module
from orchestra.worker.rank_watch import FollowerWatch, LeaderWatch, Patience
from orchestra.worker.renewable_group import Progress, RenewableGroup
from orchestra.worker.sharding import Shard
from orchestra.worker.starvation import Starvation, visit

TIMEOUT_S = 20
SIZE = 3


class Gate:
    """A group whose collectives wait until they are let through, or aborted."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.is_open = threading.Event()
        self.is_aborted = threading.Event()

    def all_reduce(self, _tensor: Tensor) -> None:
        while not self.is_open.wait(0.005):
            if self.is_aborted.is_set():
                raise RuntimeError("aborted")

    def start_all_reduce(self, tensor: Tensor) -> Callable[[], None]:
        return lambda: self.all_reduce(tensor)

    def gather_columns(self, _tensor: Tensor) -> Tensor | None:
        raise NotImplementedError

    def abort(self) -> None:
        self.is_aborted.set()

    def close(self) -> None:
        pass


class Ranks:
    """Rank 0 with its watch, and two others, in this process."""

    def __init__(self, least_s: float) -> None:
        self.gates = [Gate(Shard(rank, SIZE)) for rank in range(SIZE)]
        self.groups = [RenewableGroup(it.shard, self.gate_of(it.shard), 0) for it in self.gates]
        self.hung: list[int] = []
        ours, theirs = zip(*(socket.socketpair() for _ in range(SIZE - 1)), strict=True)
        self.pulses = dict(enumerate(theirs, start=1))
        patience = Patience(least_s)
        patience.learn(1, 0.001)
        self.watch = LeaderWatch(
            dict(enumerate(ours, start=1)), self.groups[0], patience, self.hung.append
        )
        self.followers: dict[int, FollowerWatch] = {}
        self._sockets = [*ours, *theirs]

    def gate_of(self, shard: Shard) -> Callable[[int], Gate]:
        """Forms the only group that a rank has here."""
        return lambda _generation: self.gates[shard.rank]

    def start(self, *followers: int) -> None:
        """Starts rank 0's watch, and these pulses."""
        self.watch.start()
        for rank in followers:
            self.followers[rank] = FollowerWatch(self.pulses[rank], self.groups[rank])
            self.followers[rank].start()

    def close(self) -> None:
        """Ends all of it."""
        self.watch.left()
        for watch in (self.watch, *self.followers.values()):
            watch.stop()
        for connection in self._sockets:
            connection.close()


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    # All ranks are this process, and whether it is starved is the machine's business.
    monkeypatch.setattr(Starvation, "of", lambda _connection: Starvation(0))
    monkeypatch.setattr(Starvation, "of_this", lambda: Starvation(0))
    made = Ranks(least_s=0.3)
    yield made
    made.close()


def enter(group: RenewableGroup) -> threading.Thread:
    """A thread that enters a collective and leaves it when it is aborted."""

    def run() -> None:
        with contextlib.suppress(RuntimeError):
            group.all_reduce(None)  # type: ignore[arg-type]

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_a_dead_rank_ends_the_collectives_of_all_others(ranks: Ranks) -> None:
    ranks.start(2)
    waiting = [enter(ranks.groups[rank]) for rank in (0, 2)]
    ranks.pulses[1].close()
    for thread in waiting:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
    assert ranks.watch.is_lost(TIMEOUT_S)
    assert ranks.followers[2].is_lost(TIMEOUT_S)
    assert ranks.watch.lost == [1]
    assert ranks.hung == []


def beat(ranks: Ranks, rank: int) -> None:
    """Sends what a rank's pulse says now."""
    if rank not in ranks.followers:
        ranks.followers[rank] = FollowerWatch(ranks.pulses[rank], ranks.groups[rank])
    assert ranks.followers[rank]._beat()


def hung(ranks: Ranks, waiting: tuple[int, ...], beating: tuple[int, ...] = (1, 2)) -> list[int]:
    """Who is blamed for a step that stands still, with 0.2 s from one beat to the next.

    Args:
        ranks: of which nobody gets on.
        waiting: those of them that are in a collective.
        beating: those whose pulse still beats.
    """
    inside = [enter(ranks.groups[rank]) for rank in waiting]
    while not all(ranks.groups[rank].progress().is_waiting for rank in waiting):
        time.sleep(0.001)
    ranks.watch.begin_step(1)
    found: list[int] = []
    for _ in range(5):
        for rank in beating:
            beat(ranks, rank)
        found = found or ranks.watch._find_hung(0.2)
    for rank in waiting:
        ranks.groups[rank].abort()
    for thread in inside:
        thread.join(TIMEOUT_S)
    return found


def test_a_rank_without_a_pulse_hangs(ranks: Ranks) -> None:
    assert hung(ranks, waiting=(0, 2), beating=(2,)) == [1]


def test_a_rank_that_computes_for_ever_hangs_and_not_those_that_wait_for_it(ranks: Ranks) -> None:
    assert hung(ranks, waiting=(0, 2)) == [1]


def test_a_rank_that_computes_beside_its_sums_does_not_wait(ranks: Ranks) -> None:
    gate, group = ranks.gates[1], ranks.groups[1]
    gate.is_open.set()
    tensor = torch.zeros(1)
    finish = [group.start_all_reduce(tensor) for _ in range(2)]
    assert group.progress() == Progress(2, 0, is_waiting=False)
    finish[0]()
    assert group.progress() == Progress(2, 0, is_waiting=False)
    # The other ranks need a sum of it, for which it has not yet done its part.
    assert hung(ranks, waiting=(0, 2)) == [1]
    gate.is_open.clear()
    gate.is_aborted.set()
    with pytest.raises(RuntimeError, match="aborted"):
        finish[1]()
    assert group.progress() == Progress(2, 0, is_waiting=True)


def test_rank_0_too_can_be_the_one(ranks: Ranks) -> None:
    assert hung(ranks, waiting=(1, 2)) == [0]


def test_where_all_wait_for_each_other_all_are_replaced(ranks: Ranks) -> None:
    assert hung(ranks, waiting=(0, 1, 2)) == [1, 2]


def test_a_hung_rank_is_reported_and_ends_the_collectives_of_all_others(ranks: Ranks) -> None:
    ranks.start()
    inside = enter(ranks.groups[0])
    ranks.watch.begin_step(1)
    assert ranks.watch.is_lost(TIMEOUT_S)
    inside.join(TIMEOUT_S)
    assert not inside.is_alive()
    assert ranks.hung == ranks.watch.lost == [1, 2]


def get_on(ranks: Ranks) -> None:
    """Both other ranks do something, and say so."""
    for rank in (1, 2):
        ranks.gates[rank].is_open.set()
        enter(ranks.groups[rank]).join()
        beat(ranks, rank)


def stand_still(ranks: Ranks) -> None:
    """Both other ranks say that they have done nothing."""
    for rank in (1, 2):
        beat(ranks, rank)


def test_a_rank_that_gets_on_is_slow_and_does_not_hang(ranks: Ranks) -> None:
    ranks.watch.begin_step(1)
    for _ in range(10):
        get_on(ranks)
        assert ranks.watch._find_hung(0.2) == []
    found = []
    for _ in range(3):
        stand_still(ranks)
        found.append(ranks.watch._find_hung(0.2))
    # The patience is 0.3 s, and both compute, each by itself.
    assert found == [[], [1, 2], [1, 2]]
    for rank in (1, 2):
        with ranks.groups[rank].step():
            pass
    for _ in range(10):
        stand_still(ranks)
        assert ranks.watch._find_hung(0.2) == [], "a rank that owes nothing may stand still"


def test_a_step_may_wait_for_the_one_before(ranks: Ranks) -> None:
    ranks.watch.begin_step(1)
    ranks.watch.begin_step(1)
    found = []
    for _ in range(3):
        stand_still(ranks)
        found.append(ranks.watch._find_hung(0.25))
    # 0.3 s for each of them.
    assert found == [[], [], [1, 2]]
    ranks.watch.end_step(1, 0.001)
    get_on(ranks)
    for _ in range(3):
        found.append(ranks.watch._find_hung(0.25))
        stand_still(ranks)
    assert found[3:] == [[], [], [1, 2]]
    ranks.watch.end_step(1, 0.001)
    assert ranks.watch._find_hung(0.25) == [], "nothing is in flight"


def test_a_starved_rank_is_waited_for_but_not_for_ever(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Starvation, "is_starved", lambda _self: True)
    ranks.watch.begin_step(1)
    for _ in range(int(rank_watch.PATIENCE_MAX_S / 0.2) - 1):
        stand_still(ranks)
        assert ranks.watch._find_hung(0.2) == []
    found = []
    for _ in range(4):
        stand_still(ranks)
        found += ranks.watch._find_hung(0.2)
    assert found[:2] == [1, 2]


@pytest.mark.parametrize(("waiting", "found"), [((1, 2), []), ((0, 2), [1])])
def test_rank_0_is_waited_for_where_it_is_the_one_and_starved(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, waiting: tuple[int, ...], found: list[int]
) -> None:
    monkeypatch.setattr(ranks.watch._starvations[0], "is_starved", lambda: True)
    assert hung(ranks, waiting) == found


def test_patience_follows_what_steps_of_a_kind_have_taken() -> None:
    patience = Patience(0.3)
    assert patience.of(1) == rank_watch.PATIENCE_MAX_S
    patience.learn(1, 0.01)
    assert patience.of(1) == 0.3
    patience.learn(1, 0.1)
    assert patience.of(1) == pytest.approx(rank_watch.SLACK * 0.1)
    # 64 times the tokens: at most 64 times the time.
    assert patience.of(64) == pytest.approx(rank_watch.SLACK * 6.4)
    patience.learn(64, 0.5)
    assert patience.of(64) == pytest.approx(rank_watch.SLACK * 0.5)
    for _ in range(1000):
        patience.learn(1, 0.001)
    assert patience.of(1) == 0.3
    assert patience.of(1 << 20) == rank_watch.PATIENCE_MAX_S
    assert Patience(0.0).of(1) == float("inf")


# === starvation ===


def counted(proc: Path, pid: int, waits_ns: list[int]) -> None:
    """What the kernel would count of a process's threads."""
    for number, waited in enumerate(waits_ns):
        task = proc / str(pid) / "task" / str(number)
        task.mkdir(parents=True, exist_ok=True)
        (task / "schedstat").write_text(f"123 {waited} 4\n")


def test_waiting_for_a_core_is_starvation_and_standing_still_is_none(tmp_path: Path) -> None:
    counted(tmp_path, 7, [1000, 2000])
    starvation = Starvation(7, tmp_path)
    starvation.begin()
    assert not starvation.is_starved()
    counted(tmp_path, 7, [1000, 60 * 10**9])
    assert starvation.is_starved()
    # A process that has ended, or is elsewhere, is not excused.
    for pid in (8, 0):
        absent = Starvation(pid, tmp_path)
        absent.begin()
        assert not absent.is_starved()


def runs(proc: Path, pid: int, thread: int, name: str, state: str, core: int) -> None:
    """What the kernel would say of a thread."""
    task = proc / str(pid) / "task" / str(thread)
    task.mkdir(parents=True, exist_ok=True)
    fields = ["0"] * 49
    fields[0], fields[36] = state, str(core)
    (task / "stat").write_text(f"{thread} ({name}) {' '.join(fields)}\n")


def test_a_core_that_its_host_has_stopped_is_starvation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visited: list[set[int]] = []

    def visit(cores: set[int]) -> None:
        visited.append(cores)
        # The one that stands still.
        if 5 in cores:
            time.sleep(0.05)

    monkeypatch.setattr(starvation_module, "visit", visit)
    counted(tmp_path, 7, [0, 0, 0])
    runs(tmp_path, 7, 0, "python) R 4 (", "S", 3)
    runs(tmp_path, 7, 1, "omp", "R", 4)
    runs(tmp_path, 7, 2, "omp", "R", 5)
    starvation = Starvation(7, tmp_path)
    starvation.begin()
    starvation.look()
    assert visited == [{4, 5}]
    assert starvation.is_starved()
    runs(tmp_path, 7, 2, "omp", "R", 4)
    starvation.begin()
    for _ in range(10):
        starvation.look()
        time.sleep(0.001)
    assert visited[1:] == [{4}] * 10
    assert not starvation.is_starved()
    # Of who is not here nothing is known.
    for pid in (8, 0):
        Starvation(pid, tmp_path).look()
    assert visited[11:] == []


def test_a_process_that_computes_is_found_on_its_core_and_a_visit_leaves_no_trace() -> None:
    ours = os.sched_getaffinity(0)
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            core = max(ours)
            os.sched_setaffinity(process.pid, {core})
            deadline = time.monotonic() + TIMEOUT_S
            while Starvation(process.pid)._cores() != {core}:
                assert time.monotonic() < deadline
            # One that nobody has is passed over.
            visit({core, 1 << 14})
        finally:
            process.kill()
    assert os.sched_getaffinity(0) == ours


def test_the_kernel_counts_no_wait_of_a_stopped_process() -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")
        listener.listen()
        connect = "import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect('\\0'+sys.argv[1]); s.recv(1)"
        name = listener.getsockname()[1:].decode()
        with subprocess.Popen([sys.executable, "-c", connect, name]) as process:
            connection, _ = listener.accept()
            try:
                starvation = Starvation.of(connection)
                os.kill(process.pid, signal.SIGSTOP)
                _, status = os.waitpid(process.pid, os.WUNTRACED)
                assert os.WIFSTOPPED(status)
                starvation.begin()
                time.sleep(0.05)
                assert not starvation.is_starved()
            finally:
                process.kill()
                connection.close()
