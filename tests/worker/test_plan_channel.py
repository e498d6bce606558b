"""Between the ranks, through shared memory and over sockets: order, bounds, and who notices whose end."""

import socket
import struct
import threading
from collections.abc import Container, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from orchestra._core import MessageRingReader
from orchestra.errors import InternalError
from orchestra.worker import plan_channel, plan_ring
from orchestra.worker.plan_channel import NO_TERMS, CacheTerms, Follower, Leader
from orchestra.worker.plan_socket import MESSAGE_BYTES_MAX, RankLostError

TIMEOUT_S = 20
TERMS = CacheTerms(7, "/proc/1/fd/2")


class Store:
    """`torch.distributed.Store`, in memory."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._changed = threading.Condition()

    def set(self, key: str, value: str, /) -> None:
        with self._changed:
            self._values[key] = value
            self._changed.notify_all()

    def get(self, key: str, /) -> bytes:
        with self._changed:
            assert self._changed.wait_for(lambda: key in self._values, TIMEOUT_S)
            return self._values[key].encode()


Group = tuple[Leader, list[Follower]]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as executor:
        yield executor


def see_no_memory(monkeypatch: pytest.MonkeyPatch, far: Container[int]) -> None:
    """Lets ranks be as in containers of their own."""

    def open_ring(address: str, reader: int, *rest: int) -> MessageRingReader:
        if reader + 1 in far:
            raise InternalError("open shared memory: No such file or directory")
        return MessageRingReader(address, reader, *rest)

    monkeypatch.setattr(plan_ring, "MessageRingReader", open_ring)


@pytest.fixture(params=["unix", "long path", "tcp", "far", "mixed"])
def group(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    pool: ThreadPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Group]:
    far = {"far": {1, 2}, "mixed": {2}}.get(request.param, set())
    see_no_memory(monkeypatch, far)
    folder = tmp_path / ("long" * 30) if request.param == "long path" else tmp_path
    folder.mkdir(exist_ok=True)
    url = "tcp://127.0.0.1:1" if request.param == "tcp" else (folder / "meet").as_uri()
    store = Store()
    leading: Future[Leader] = pool.submit(Leader, store, 3, url)
    following = [pool.submit(Follower, store, rank) for rank in (2, 1)]
    leader = leading.result(TIMEOUT_S)
    followers = [future.result(TIMEOUT_S) for future in reversed(following)]
    assert leader.near == {1, 2} - far
    yield leader, followers
    for follower in followers:
        follower.close()
    leader.close()
    # Nothing is left behind where the ranks met.
    assert list(folder.iterdir()) == []


def test_messages_arrive_whole_and_in_order(group: Group, pool: ThreadPoolExecutor) -> None:
    leader, followers = group
    messages = [b"x", b"plan" * 100_000, bytes(range(256)), bytes(MESSAGE_BYTES_MAX), b"y"]

    def receive_all(follower: Follower) -> list[bytes | None]:
        return [follower.receive() for _ in messages]

    received = [pool.submit(receive_all, follower) for follower in followers]
    for message in messages:
        leader.broadcast(message)
    assert [future.result(TIMEOUT_S) for future in received] == [messages, messages]


def test_answers_come_in_the_order_of_the_ranks(group: Group) -> None:
    leader, followers = group
    followers[1].send(b"two")
    followers[0].send(b"one")
    assert leader.collect() == [b"one", b"two"]


def test_goodbye_is_no_loss(group: Group) -> None:
    leader, followers = group
    leader.check()
    leader.close()
    assert [follower.receive() for follower in followers] == [None, None]


def test_leader_notices_a_lost_rank(group: Group) -> None:
    leader, followers = group
    followers[1].close()
    with pytest.raises(RankLostError, match="rank 2"):
        leader.check()


def test_leader_cannot_send_to_lost_ranks(group: Group) -> None:
    leader, followers = group
    for follower in followers:
        follower.close()
    # What is sent first may still fit a buffer; more than any buffer holds does not.
    with pytest.raises(RankLostError, match=r"takes no message|are gone"):
        leader.broadcast(bytes(MESSAGE_BYTES_MAX))


def test_follower_notices_a_lost_leader(group: Group) -> None:
    leader, followers = group
    for peer in leader._peers.values():
        peer.shutdown(socket.SHUT_RDWR)
    for follower in followers:
        with pytest.raises(RankLostError, match="rank 0"):
            follower.receive()


def test_leader_notices_a_rank_lost_before_its_answer(group: Group) -> None:
    leader, followers = group
    followers[0].close()
    with pytest.raises(RankLostError, match="rank 1"):
        leader.collect()


def test_announced_size_is_bounded(
    tmp_path: Path, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    see_no_memory(monkeypatch, {1})
    store = Store()
    leading = pool.submit(Leader, store, 2, (tmp_path / "meet").as_uri())
    follower = Follower(store, 1)
    leader = leading.result(TIMEOUT_S)
    leader._peers[1].sendall(struct.pack("<I", MESSAGE_BYTES_MAX + 1))
    with pytest.raises(RankLostError, match="announced"):
        follower.receive()
    follower.close()
    leader.close()


def test_stranger_takes_no_place(tmp_path: Path, pool: ThreadPoolExecutor) -> None:
    store = Store()
    leading = pool.submit(Leader, store, 2, "tcp://127.0.0.1:1")
    host, port = store.get("plan-channel/address").decode().removeprefix("tcp:").split(":")
    for greeting in (b"\x00" * 40, b"short"):
        with socket.create_connection((host, int(port)), TIMEOUT_S) as stranger:
            stranger.sendall(greeting)
            stranger.shutdown(socket.SHUT_WR)
            assert stranger.recv(1) == b""
    follower = Follower(store, 1)
    leader = leading.result(TIMEOUT_S)
    leader.broadcast(b"hello")
    assert follower.receive() == b"hello"
    leader.close()
    follower.close()


def test_missing_rank_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_channel, "CONNECT_TIMEOUT_S", 0.05)
    with pytest.raises(RankLostError, match=r"ranks \[1, 2\] did not come"):
        Leader(Store(), 3, (tmp_path / "meet").as_uri())


# === generations ===


def test_ranks_that_part_meet_again_as_the_next_generation(
    group: Group, pool: ThreadPoolExecutor
) -> None:
    leader, followers = group
    assert [(it.generation, it.terms) for it in followers] == [(0, NO_TERMS)] * 2
    leader.part()
    for follower in followers:
        with pytest.raises(RankLostError, match="rank 0"):
            follower.receive()
    rejoining = [pool.submit(follower.rejoin) for follower in followers]
    leader.gather(TIMEOUT_S, TERMS)
    for future in rejoining:
        future.result(TIMEOUT_S)
    assert [(it.generation, it.terms) for it in followers] == [(1, TERMS), (1, TERMS)]
    leader.broadcast(b"a plan")
    assert [follower.receive() for follower in followers] == [b"a plan"] * 2


def test_a_replacement_takes_the_place_of_a_lost_rank(tmp_path: Path) -> None:
    store = Store()
    with ThreadPoolExecutor(4) as pool:
        leading = pool.submit(Leader, store, 3, (tmp_path / "meet").as_uri())
        lost, stays = (pool.submit(Follower, store, rank) for rank in (1, 2))
        leader = leading.result(TIMEOUT_S)
        lost.result(TIMEOUT_S).close()
        leader.part()
        rejoining = pool.submit(stays.result(TIMEOUT_S).rejoin)
        seen: list[set[int]] = []

        def look() -> bool:
            seen.append(leader.present)
            return True

        gathering = pool.submit(leader.gather, TIMEOUT_S, TERMS, look)
        replacement = Follower(store, 1)
        gathering.result(TIMEOUT_S)
        rejoining.result(TIMEOUT_S)
    assert (replacement.generation, replacement.terms) == (1, TERMS)
    assert seen[-1] == {1, 2}
    leader.broadcast(b"a plan")
    assert [it.receive() for it in (replacement, stays.result())] == [b"a plan"] * 2
    replacement.close()
    stays.result().close()
    leader.close()


def test_a_rank_that_goes_while_others_are_awaited_is_awaited_too(group: Group) -> None:
    leader, followers = group
    leader.part()
    with ThreadPoolExecutor(1) as pool:
        rejoining = pool.submit(followers[0].rejoin)
        arrived: list[set[int]] = []

        def look() -> bool:
            if leader.present not in arrived[-1:]:
                arrived.append(leader.present)
            if arrived[-1] == {1}:
                # It is waiting for its welcome when it dies.
                leader.pulses[1].shutdown(socket.SHUT_RDWR)
            return len(arrived) < 3

        with pytest.raises(RankLostError, match=r"ranks \[1, 2\] did not come"):
            leader.gather(TIMEOUT_S, TERMS, look)
        assert arrived == [set(), {1}, set()]
        with pytest.raises(RankLostError):
            rejoining.result(TIMEOUT_S)
