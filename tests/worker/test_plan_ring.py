"""Plans through shared memory between real processes, which are killed and stopped in the middle."""

import logging
import os
import signal
import socket
import struct
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from orchestra.errors import InternalError
from orchestra.worker import plan_ring, plan_socket
from orchestra.worker.plan_channel import Follower, Leader
from orchestra.worker.plan_ring import RingReceiver, RingSender
from orchestra.worker.plan_socket import MESSAGE_BYTES_MAX, RankLostError
from tests.worker import plan_process
from tests.worker.forked import RANKS

TIMEOUT_S = 60
pytestmark = pytest.mark.timeout(120)

# Where things lie in the memory of a ring of 256 KiB: see `rust/kernels/src/ring/region.rs`.
WRITTEN_AT, TAKEN_AT, FIRST_MESSAGE_AT = 32, 128, 256 << 10

FollowingRank = tuple[BaseProcess, Connection]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


class Ranks:
    """Rank 0 in this process, the others in their own."""

    def __init__(self, folder: Path, size: int, pool: ThreadPoolExecutor) -> None:
        self._folder, self._size = folder, size
        self.others = {rank: self.start(rank) for rank in range(1, size)}
        self._store = plan_process.open_store(folder, size)
        meet = (folder / "meet").as_uri()
        self.leader = pool.submit(Leader, self._store, size, meet).result(TIMEOUT_S)
        assert self.leader.near == set(self.others)
        assert [hear(told) for _, told in self.others.values()] == [0] * (size - 1)

    def start(self, rank: int) -> FollowingRank:
        """A process of a rank, and what it tells."""
        heard, told = RANKS.Pipe(duplex=False)
        arguments = (self._folder, self._size, rank, told)
        process = RANKS.Process(target=plan_process.follow, args=arguments, daemon=True)
        process.start()
        return process, heard

    def signal(self, rank: int, number: signal.Signals) -> None:
        """Sends a rank a signal."""
        os.kill(self.others[rank][0].pid or 0, number)

    def close(self) -> None:
        """Ends all, whatever state they are in."""
        for process, _ in self.others.values():
            process.kill()
            process.join()
        self.leader.close()


@pytest.fixture
def ranks(tmp_path: Path, pool: ThreadPoolExecutor) -> Iterator[Ranks]:
    group = Ranks(tmp_path, 3, pool)
    yield group
    group.close()


def hear(told: Connection) -> Any:
    assert told.poll(TIMEOUT_S)
    return told.recv()


def await_sleep(process: BaseProcess) -> None:
    """Waits until a process sleeps, as it does for good when nothing comes."""
    stat = Path(f"/proc/{process.pid}/stat")
    while stat.read_text().rsplit(") ", 1)[1][0] != "S":
        time.sleep(0.001)


# === waiting ===


def test_who_waits_long_uses_no_time(ranks: Ranks) -> None:
    ranks.leader.broadcast(b"first")
    for process, told in ranks.others.values():
        assert hear(told)
        await_sleep(process)
    time.sleep(0.5)
    ranks.leader.broadcast(b"second")
    for _, told in ranks.others.values():
        message, spent_s = hear(told)
        assert message == b"second"
        # Of half a second; a poll every few milliseconds would cost as much.
        assert spent_s < 0.005


def test_messages_reach_who_sleeps_and_who_does_not(ranks: Ranks, pool: ThreadPoolExecutor) -> None:
    messages = [bytes([number % 256]) * (number * 97 % 5000) for number in range(1, 2000)]

    def hear_all(told: Connection) -> list[object]:
        return [hear(told)[0] for _ in messages]

    hearing = [pool.submit(hear_all, told) for _, told in ranks.others.values()]
    for number, message in enumerate(messages):
        ranks.leader.broadcast(message)
        if number % 100 == 0:
            time.sleep(0.002)
    assert [heard.result(TIMEOUT_S) for heard in hearing] == [messages] * 2


def test_a_goodbye_ends_the_processes(ranks: Ranks) -> None:
    ranks.leader.close()
    for process, told in ranks.others.values():
        assert hear(told)[0] is None
        process.join(TIMEOUT_S)
        assert process.exitcode == 0


# === lost ranks ===


@pytest.mark.parametrize("is_asleep", [True, False])
def test_a_killed_rank_0_ends_the_wait(
    is_asleep: bool,
    tmp_path: Path,
    pool: ThreadPoolExecutor,
) -> None:
    heard, told = RANKS.Pipe(duplex=False)
    process = RANKS.Process(target=plan_process.lead, args=(tmp_path, 2, told), daemon=True)
    process.start()
    store = plan_process.open_store(tmp_path, 2)
    follower = Follower(store, 1)
    assert hear(heard) == "sent"
    if not is_asleep:
        process.kill()
        process.join()
    # What it sent before counts.
    assert follower.receive() == b"plan"
    receiving = pool.submit(follower.receive)
    if is_asleep:
        with pytest.raises(TimeoutError):
            receiving.result(0.05)
        process.kill()
        process.join()
    with pytest.raises(RankLostError, match="rank 0 is gone"):
        receiving.result(TIMEOUT_S)
    follower.close()


def test_a_stopped_rank_holds_the_writer_up_and_a_killed_one_frees_it(
    ranks: Ranks, pool: ThreadPoolExecutor
) -> None:
    ranks.signal(2, signal.SIGSTOP)
    sending: Future[None] = pool.submit(ranks.leader.broadcast, bytes(MESSAGE_BYTES_MAX))
    with pytest.raises(TimeoutError):
        sending.result(0.05)
    ranks.signal(2, signal.SIGKILL)
    with pytest.raises(RankLostError, match=r"ranks \[2\] are gone"):
        sending.result(TIMEOUT_S)


def test_a_rank_that_hangs_is_named(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_socket, "SEND_TIMEOUT_S", 0.2)
    ranks.signal(1, signal.SIGSTOP)
    with pytest.raises(RankLostError, match=r"ranks \[1\] took no message for 0.2 s"):
        ranks.leader.broadcast(bytes(MESSAGE_BYTES_MAX))


def test_a_killed_rank_is_found_by_the_next_message(ranks: Ranks) -> None:
    process, _ = ranks.others[1]
    process.kill()
    process.join()
    with pytest.raises(RankLostError, match="rank"):
        ranks.leader.broadcast(b"plan")
    # The other one has it.
    assert hear(ranks.others[2][1])[0] == b"plan"


def test_a_replacement_joins_the_next_ring(ranks: Ranks) -> None:
    process, _ = ranks.others[1]
    process.kill()
    process.join()
    ranks.leader.part()
    ranks.others[1] = ranks.start(1)
    ranks.leader.gather(TIMEOUT_S)
    assert ranks.leader.near == {1, 2}
    assert [hear(told) for _, told in ranks.others.values()] == [1, 1]
    ranks.leader.broadcast(b"plan")
    assert [hear(told)[0] for _, told in ranks.others.values()] == [b"plan"] * 2


# === what is not to be trusted ===


@pytest.fixture
def ring() -> Iterator[tuple[RingSender, RingReceiver, Path]]:
    """Two ends, and where the memory is."""
    with ExitStack() as stack:
        ours, theirs = (stack.enter_context(it) for it in socket.socketpair())
        sender = RingSender(2)
        with ThreadPoolExecutor(1) as pool:
            answering = pool.submit(plan_ring.answer, theirs, 1)
            assert plan_ring.invite(sender, ours)
        receiver = answering.result()
        assert receiver is not None
        sender.admit(1, ours)
        yield sender, receiver, Path(sender.invitation[12:].decode())


def write_over(memory: Path, at: int, number: int) -> None:
    with memory.open("r+b", buffering=0) as file:
        file.seek(at)
        file.write(struct.pack("<I", number))


def test_a_damaged_length_is_an_error(ring: tuple[RingSender, RingReceiver, Path]) -> None:
    sender, receiver, memory = ring
    sender.send(b"plan")
    write_over(memory, FIRST_MESSAGE_AT, MESSAGE_BYTES_MAX + 1)
    with pytest.raises(RankLostError, match="the ring is damaged: a message of 67108865 bytes"):
        receiver.receive()


def test_a_damaged_position_is_an_error(ring: tuple[RingSender, RingReceiver, Path]) -> None:
    sender, receiver, memory = ring
    write_over(memory, WRITTEN_AT, 1 << 30)
    with pytest.raises(RankLostError, match="the ring is damaged: 1073745920 bytes"):
        receiver.receive()
    write_over(memory, TAKEN_AT, 1)
    with pytest.raises(RankLostError, match="the ring is damaged: reader 0"):
        sender.send(b"plan")


def test_rings_that_come_late_wake_once(
    ring: tuple[RingSender, RingReceiver, Path], pool: ThreadPoolExecutor
) -> None:
    sender, receiver, _ = ring
    for _ in range(3):
        assert receiver._ring.take(1) is None
        sender.send(b"plan")
        assert receiver._ring.take(1) == b"plan"
    receiving = pool.submit(receiver.receive)
    with pytest.raises(TimeoutError):
        receiving.result(0.05)
    sender.send(b"another")
    assert receiving.result(TIMEOUT_S) == b"another"


def test_another_ring_at_the_same_address_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    with ExitStack() as stack:
        ours, theirs = (stack.enter_context(it) for it in socket.socketpair())
        sender = RingSender(2)
        # As on another machine, where the same process number has the same file open.
        strange = struct.pack("<QI", 1, 1) + sender.invitation[12:]
        plan_socket.send(ours, strange, "the rank")
        with caplog.at_level(logging.DEBUG, "orchestra.worker"):
            assert plan_ring.answer(theirs, 1) is None
        assert caplog.messages == [
            "plans come over a socket: the shared memory cannot be used: it is another ring's"
        ]
        assert ours.recv(1) == b"\0"


def test_without_shared_memory_there_is_no_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise InternalError("make shared memory: Function not implemented")

    monkeypatch.setattr(plan_ring, "MessageRingWriter", refuse)
    assert plan_ring.make_ring(2) is None
