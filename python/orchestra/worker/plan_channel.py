"""How rank 0 hands each plan to the other ranks: through memory that they share, or over one socket per rank.

The sockets are there in any case. Ranks on other machines, or that cannot see rank 0's memory, get their plans through
them; the others are rung awake by them; and all answer through them. They also tell at once who died: an end without a
goodbye is a lost rank. A second socket per rank, its pulse, is watched while the first one's owner computes.

All ranks together are a generation. When one is lost rank 0 parts from the others, they come again, and with a
replacement of the lost one they are the next generation.
"""

import contextlib
import hmac
import secrets
import select
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from orchestra.worker import plan_ring
from orchestra.worker.plan_socket import (
    MESSAGE_BYTES_MAX,
    RankLostError,
    address_text,
    listen,
    prepare,
    receive,
    receive_exactly,
    send,
)
from orchestra.worker.rank_processes import RankProcesses

CONNECT_TIMEOUT_S = 60.0
# Whoever connects says at once who it is.
HELLO_TIMEOUT_S = 5.0

_KEY_ADDRESS = "plan-channel/address"
_KEY_TOKEN = "plan-channel/token"  # noqa: S105 (the name of the key, not the token)
_TOKEN_BYTES = 32
# Rank, and which of its two sockets it is.
_HELLO = struct.Struct("<II")
_PLANS, _PULSE = 0, 1
# Generation and number of KV blocks; then the address of their memory.
_WELCOME = struct.Struct("<QQ")
# How often a wait for ranks looks up whether it is still wanted.
_LOOK_UP_S = 0.1


class Store(Protocol):
    """What is needed of `torch.distributed.Store`."""

    def set(self, key: str, value: str, /) -> None:
        """Publishes a value."""
        ...

    def get(self, key: str, /) -> bytes:
        """Waits for a value."""
        ...


@dataclass(frozen=True)
class CacheTerms:
    """What the ranks that stay tell those that replace others of their caches."""

    num_blocks: int = 0
    """KV blocks of each; 0: nobody has stayed."""
    memory: str = ""
    """Where the caches of all ranks lie together, as `KvPool.address`; empty: each has its own memory."""


NO_TERMS = CacheTerms()


class Leader:
    """Rank 0's end: two connections to each other rank, of which `pulses` has the second.

    Args:
        store: where the address and the token are published.
        size: ranks in the group, this one included.
        rendezvous_url: says whether the ranks share a machine.

    Raises:
        RankLostError: not every rank came in time.
    """

    def __init__(self, store: Store, size: int, rendezvous_url: str) -> None:
        self.generation = -1
        self.pulses: dict[int, socket.socket] = {}
        self._peers: dict[int, socket.socket] = {}
        # Messages go to some of them through the ring, to the others over their socket.
        self._ring: plan_ring.RingSender | None = None
        self._near: set[int] = set()
        self._far: dict[int, socket.socket] = {}
        self._size = size
        self._processes = RankProcesses()
        # The token keeps a stranger on the network from taking the place of a rank.
        self._token = secrets.token_bytes(_TOKEN_BYTES)
        # Open as long as this rank lives: lost ranks are replaced through it.
        self._open = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            self._listener = stack.enter_context(listen(rendezvous_url, stack))
            stack.callback(self._processes.close)
            stack.callback(self.part)
            self._listener.listen(2 * size)
            store.set(_KEY_TOKEN, self._token.hex())
            store.set(_KEY_ADDRESS, address_text(self._listener))
            self.gather(CONNECT_TIMEOUT_S)
            self._open = stack.pop_all()

    @property
    def others(self) -> set[int]:
        """Every rank but this one."""
        return set(range(1, self._size))

    @property
    def present(self) -> set[int]:
        """The other ranks that are connected."""
        return self._peers.keys() & self.pulses.keys()

    @property
    def near(self) -> set[int]:
        """Of the ranks of this generation, those that see this one's memory."""
        return set(self._near)

    @property
    def has_one_process_each(self) -> bool:
        """Whether no process that was given up can outlive the one that takes its place."""
        return self._processes.known == self.others

    def gather(
        self,
        timeout_s: float,
        terms: CacheTerms = NO_TERMS,
        on_arrival: Callable[[], bool] = lambda: True,
    ) -> None:
        """Waits until every other rank is connected, and tells them that they are the next generation.

        Args:
            timeout_s: how long to wait.
            terms: of the ranks that stayed.
            on_arrival: called now and then, and when a rank has come; false ends the wait.

        Raises:
            RankLostError: not every rank came in time, or the wait was ended.
        """
        deadline = time.monotonic() + timeout_s
        if self._ring is None:
            self._ring = plan_ring.make_ring(self._size)
        while not self.others <= self.present:
            left = deadline - time.monotonic()
            if not on_arrival() or left <= 0:
                missing = sorted(self.others - self.present)
                raise RankLostError(f"ranks {missing} did not come within {timeout_s:g} s")
            self._meet(min(left, _LOOK_UP_S))
        on_arrival()
        self.generation += 1
        self._far = {rank: it for rank, it in self._peers.items() if rank not in self._near}
        if self._ring is not None:
            for rank in self._near:
                self._ring.admit(rank, self._peers[rank])
        welcome = _WELCOME.pack(self.generation, terms.num_blocks) + terms.memory.encode()
        for rank, peer in self._peers.items():
            send(peer, welcome, f"rank {rank}")

    def part(self) -> None:
        """Ends the generation without a goodbye: the other ranks leave what they wait in, and come again."""
        for connection in [*self.pulses.values(), *self._peers.values()]:
            connection.close()
        for connections in (self.pulses, self._peers, self._near, self._far):
            connections.clear()
        # Who was lost with this generation may still see its ring, and has no part in the next one's.
        self._ring = None

    def broadcast(self, message: bytes) -> None:
        """Sends a message to every other rank."""
        assert len(message) <= MESSAGE_BYTES_MAX
        if self._ring is not None:
            self._ring.send(message)
        for rank, peer in self._far.items():
            send(peer, message, f"rank {rank}")

    def collect(self) -> list[bytes]:
        """Waits for one message from each other rank; returns them in the order of the ranks."""
        return [receive(peer, f"rank {rank}") for rank, peer in sorted(self._peers.items())]

    def receive(self, rank: int) -> bytes:
        """Waits for the next message of one rank."""
        return receive(self._peers[rank], f"rank {rank}")

    def has_message(self, rank: int) -> bool:
        """Whether `receive` would find something, be it the end of the stream."""
        readable, _, _ = select.select([self._peers[rank]], [], [], 0)
        return bool(readable)

    def check(self) -> None:
        """Finds out, without waiting, whether every rank is still there. Only while no step is in flight.

        Raises:
            RankLostError: one is not.
        """
        peers = {peer.fileno(): rank for rank, peer in self._peers.items()}
        readable, _, _ = select.select(list(peers), [], [], 0)
        if readable:
            # Ranks speak only when collected from, or of a step; so this is the end of a stream.
            raise RankLostError(f"rank {peers[readable[0]]} is gone")

    def close(self) -> None:
        """Says goodbye: the other ranks end as planned."""
        if self._ring is not None:
            with contextlib.suppress(RankLostError):
                self._ring.send(b"")
        for peer in self._far.values():
            with contextlib.suppress(RankLostError):
                send(peer, b"", "")
        self.part()
        self._open.close()

    def _meet(self, timeout_s: float) -> None:
        """Takes one connection in, or notices that one has ended."""
        poller = select.poll()
        poller.register(self._listener, select.POLLIN)
        for pulse in self.pulses.values():
            poller.register(pulse, select.POLLRDHUP)
        for descriptor, _ in poller.poll(timeout_s * 1000):
            if descriptor == self._listener.fileno():
                self._accept()
                continue
            for rank, pulse in list(self.pulses.items()):
                if pulse.fileno() == descriptor:
                    self._forget(rank)

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.settimeout(HELLO_TIMEOUT_S)
        try:
            hello = receive_exactly(connection, _TOKEN_BYTES + _HELLO.size)
        except OSError:
            hello = b""
        if not hmac.compare_digest(hello[:_TOKEN_BYTES], self._token):
            connection.close()
            return
        rank, purpose = _HELLO.unpack(hello[_TOKEN_BYTES:])
        if purpose == _PULSE:
            prepare(connection)
            self.pulses[rank] = connection
            return
        try:
            is_near = plan_ring.invite(self._ring, connection)
        except (OSError, RankLostError):
            connection.close()
            return
        prepare(connection)
        # Plans come first: whoever had the place is gone, or was given up.
        self._forget(rank)
        try:
            self._processes.admit(rank, connection)
        except RankLostError:
            connection.close()
            raise
        self._peers[rank] = connection
        if is_near:
            self._near.add(rank)

    def _forget(self, rank: int) -> None:
        self._near.discard(rank)
        for connections in (self.pulses, self._peers):
            if rank in connections:
                connections.pop(rank).close()


class Follower:
    """The end of a rank that is not rank 0. `pulse` is what rank 0 watches.

    Args:
        store: where rank 0 publishes its address.
        rank: of this process, at least 1.

    Raises:
        RankLostError: rank 0 is gone, or gave up waiting for the others.
    """

    def __init__(self, store: Store, rank: int) -> None:
        self._address = store.get(_KEY_ADDRESS).decode()
        self._token = bytes.fromhex(store.get(_KEY_TOKEN).decode())
        self._rank = rank
        self._join()

    def rejoin(self) -> None:
        """Comes again, for the next generation.

        Raises:
            RankLostError: rank 0 is gone, or gave up waiting for the others.
        """
        self.close()
        self._join()

    def _join(self) -> None:
        try:
            self._socket = self._connect(_PLANS)
            self._ring = plan_ring.answer(self._socket, self._rank)
            self.pulse = self._connect(_PULSE)
        except OSError as error:
            raise RankLostError(f"rank 0 is gone: {error}") from error
        welcome = receive(self._socket, "rank 0")
        self.generation, num_blocks = _WELCOME.unpack_from(welcome)
        self.terms = CacheTerms(num_blocks, welcome[_WELCOME.size :].decode())

    def _connect(self, purpose: int) -> socket.socket:
        if self._address.startswith("unix:"):
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(CONNECT_TIMEOUT_S)
            connection.connect(self._address.removeprefix("unix:"))
        else:
            host, port = self._address.removeprefix("tcp:").rsplit(":", 1)
            connection = socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S)
        connection.sendall(self._token + _HELLO.pack(self._rank, purpose))
        prepare(connection)
        return connection

    def send(self, message: bytes) -> None:
        """Answers rank 0's `collect`, or reports to its `receive`."""
        send(self._socket, message, "rank 0")

    def receive(self) -> bytes | None:
        """Waits for rank 0's next message; None: rank 0 said goodbye.

        Raises:
            RankLostError: rank 0 ended without a goodbye.
        """
        if self._ring is not None:
            return self._ring.receive() or None
        return receive(self._socket, "rank 0") or None

    def close(self) -> None:
        """Ends the connections; to rank 0 this rank is then lost."""
        self._socket.close()
        self.pulse.close()
