"""How rank 0 hands each plan to the other ranks: length-prefixed messages over one socket per rank.

A gloo broadcast of a plan costs 400 µs, a local socket 20. The sockets also tell at once who died: an end without a
goodbye is a lost rank. A second socket per rank, its pulse, is watched while the first one's owner computes.

All ranks together are a generation. When one is lost rank 0 parts from the others, they come again, and with a
replacement of the lost one they are the next generation.
"""

import contextlib
import hmac
import os
import secrets
import select
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol
from urllib.parse import urlparse

from orchestra.errors import InternalError

MESSAGE_BYTES_MAX = 64 << 20
CONNECT_TIMEOUT_S = 60.0
# Whoever connects says at once who it is.
HELLO_TIMEOUT_S = 5.0
# A rank that does not take a message for so long hangs: the step could not go on without it either.
SEND_TIMEOUT_S = 60.0
# Longest path of a Unix socket, without its closing zero byte.
UNIX_PATH_BYTES_MAX = 107

_KEY_ADDRESS = "plan-channel/address"
_KEY_TOKEN = "plan-channel/token"  # noqa: S105 (the name of the key, not the token)
_TOKEN_BYTES = 32
_LENGTH = struct.Struct("<I")
# Rank, and which of its two sockets it is.
_HELLO = struct.Struct("<II")
_PLANS, _PULSE = 0, 1
# Generation, and its number of KV blocks.
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


class RankLostError(InternalError):
    """The process at the other end of a plan channel is gone."""


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
        self._size = size
        # The token keeps a stranger on the network from taking the place of a rank.
        self._token = secrets.token_bytes(_TOKEN_BYTES)
        # Open as long as this rank lives: lost ranks are replaced through it.
        self._open = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            self._listener = stack.enter_context(_listen(rendezvous_url, stack))
            stack.callback(self.part)
            self._listener.listen(2 * size)
            store.set(_KEY_TOKEN, self._token.hex())
            store.set(_KEY_ADDRESS, _address_text(self._listener))
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

    def gather(
        self,
        timeout_s: float,
        num_blocks: int = 0,
        on_arrival: Callable[[], bool] = lambda: True,
    ) -> None:
        """Waits until every other rank is connected, and tells them that they are the next generation.

        Args:
            timeout_s: how long to wait.
            num_blocks: KV blocks of the ranks that stayed; 0: there is none.
            on_arrival: called now and then, and when a rank has come; false ends the wait.

        Raises:
            RankLostError: not every rank came in time, or the wait was ended.
        """
        deadline = time.monotonic() + timeout_s
        while not self.others <= self.present:
            left = deadline - time.monotonic()
            if not on_arrival() or left <= 0:
                missing = sorted(self.others - self.present)
                raise RankLostError(f"ranks {missing} did not come within {timeout_s:g} s")
            self._meet(min(left, _LOOK_UP_S))
        on_arrival()
        self.generation += 1
        self.broadcast(_WELCOME.pack(self.generation, num_blocks))

    def part(self) -> None:
        """Ends the generation without a goodbye: the other ranks leave what they wait in, and come again."""
        for connection in [*self.pulses.values(), *self._peers.values()]:
            connection.close()
        self.pulses.clear()
        self._peers.clear()

    def broadcast(self, message: bytes) -> None:
        """Sends a message to every other rank."""
        for rank, peer in self._peers.items():
            _send(peer, message, f"rank {rank}")

    def collect(self) -> list[bytes]:
        """Waits for one message from each other rank; returns them in the order of the ranks."""
        return [_receive(peer, f"rank {rank}") for rank, peer in sorted(self._peers.items())]

    def check(self) -> None:
        """Finds out, without waiting, whether every rank is still there.

        Raises:
            RankLostError: one is not.
        """
        peers = {peer.fileno(): rank for rank, peer in self._peers.items()}
        readable, _, _ = select.select(list(peers), [], [], 0)
        if readable:
            # Ranks speak only when collected from, so this is the end of a stream.
            raise RankLostError(f"rank {peers[readable[0]]} is gone")

    def close(self) -> None:
        """Says goodbye: the other ranks end as planned."""
        for peer in self._peers.values():
            with contextlib.suppress(RankLostError):
                _send(peer, b"", "")
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
            hello = _receive_exactly(connection, _TOKEN_BYTES + _HELLO.size)
        except OSError:
            hello = b""
        if not hmac.compare_digest(hello[:_TOKEN_BYTES], self._token):
            connection.close()
            return
        _prepare(connection)
        rank, purpose = _HELLO.unpack(hello[_TOKEN_BYTES:])
        if purpose == _PULSE:
            self.pulses[rank] = connection
            return
        # Plans come first: whoever had the place is gone, or was given up.
        self._forget(rank)
        self._peers[rank] = connection

    def _forget(self, rank: int) -> None:
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
            self.pulse = self._connect(_PULSE)
        except OSError as error:
            raise RankLostError(f"rank 0 is gone: {error}") from error
        welcome = _receive(self._socket, "rank 0")
        self.generation, self.num_blocks = _WELCOME.unpack(welcome)

    def _connect(self, purpose: int) -> socket.socket:
        if self._address.startswith("unix:"):
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(CONNECT_TIMEOUT_S)
            connection.connect(self._address.removeprefix("unix:"))
        else:
            host, port = self._address.removeprefix("tcp:").rsplit(":", 1)
            connection = socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S)
        connection.sendall(self._token + _HELLO.pack(self._rank, purpose))
        _prepare(connection)
        return connection

    def send(self, message: bytes) -> None:
        """Answers rank 0's `collect`."""
        _send(self._socket, message, "rank 0")

    def receive(self) -> bytes | None:
        """Waits for rank 0's next message; None: rank 0 said goodbye.

        Raises:
            RankLostError: rank 0 ended without a goodbye.
        """
        return _receive(self._socket, "rank 0") or None

    def close(self) -> None:
        """Ends the connections; to rank 0 this rank is then lost."""
        self._socket.close()
        self.pulse.close()


def _listen(rendezvous_url: str, stack: contextlib.ExitStack) -> socket.socket:
    """A listening socket that the other ranks can reach; Unix sockets go when `stack` closes."""
    url = urlparse(rendezvous_url)
    if url.scheme != "file":
        # torchrun's MASTER_ADDR is the machine of rank 0, by a name that the others know.
        host = url.hostname or os.environ.get("MASTER_ADDR") or socket.gethostname()
        return socket.create_server((socket.gethostbyname(host), 0))
    folder = Path(url.path).parent
    name = f"plan-{secrets.token_hex(4)}.sock"
    if len(bytes(folder / name)) > UNIX_PATH_BYTES_MAX:
        # The temporary directory lies deep; the loopback costs a few microseconds more.
        return socket.create_server(("127.0.0.1", 0))
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(folder / name))
    stack.callback((folder / name).unlink, missing_ok=True)
    return listener


def _address_text(listener: socket.socket) -> str:
    address = listener.getsockname()
    return f"unix:{address}" if isinstance(address, str) else f"tcp:{address[0]}:{address[1]}"


def _prepare(connection: socket.socket) -> None:
    if connection.family != socket.AF_UNIX:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # Blocking, with a limit on sending only: between two requests a rank rightly waits for hours.
    connection.settimeout(None)
    limit = struct.pack("ll", int(SEND_TIMEOUT_S), 0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def _send(connection: socket.socket, message: bytes, receiver: str) -> None:
    assert len(message) <= MESSAGE_BYTES_MAX
    try:
        connection.sendall(_LENGTH.pack(len(message)) + message)
    except OSError as error:
        raise RankLostError(f"{receiver} takes no message: {error}") from error


def _receive(connection: socket.socket, sender: str) -> bytes:
    try:
        (length,) = _LENGTH.unpack(_receive_exactly(connection, _LENGTH.size))
        if length > MESSAGE_BYTES_MAX:
            raise RankLostError(f"{sender} announced a message of {length} bytes")
        return _receive_exactly(connection, length)
    except OSError as error:
        raise RankLostError(f"{sender} is gone: {error}") from error


def _receive_exactly(connection: socket.socket, length: int) -> bytes:
    """Reads `length` bytes, or raises `ConnectionError` where the stream ends before."""
    buffer = bytearray(length)
    view = memoryview(buffer)
    while view:
        received = connection.recv_into(view)
        if received == 0:
            raise ConnectionError("the stream ended")
        view = view[received:]
    return bytes(buffer)
