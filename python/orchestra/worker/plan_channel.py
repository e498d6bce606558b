"""How rank 0 hands each plan to the other ranks: length-prefixed messages over one socket per rank.

A gloo broadcast of a plan costs 400 µs, a local socket 20. The sockets also tell at once who died: an end without a
goodbye is a lost rank.
"""

import contextlib
import hmac
import os
import secrets
import select
import socket
import struct
from pathlib import Path
from typing import Protocol
from urllib.parse import urlparse

from orchestra.errors import InternalError

MESSAGE_BYTES_MAX = 64 << 20
CONNECT_TIMEOUT_S = 60.0
# A rank that does not take a message for so long hangs: the step could not go on without it either.
SEND_TIMEOUT_S = 60.0
# Longest path of a Unix socket, without its closing zero byte.
UNIX_PATH_BYTES_MAX = 107

_KEY_ADDRESS = "plan-channel/address"
_KEY_TOKEN = "plan-channel/token"  # noqa: S105 (the name of the key, not the token)
_TOKEN_BYTES = 32
_LENGTH = struct.Struct("<I")
_RANK = struct.Struct("<I")


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
    """Rank 0's end: one connection to each other rank.

    Args:
        store: where the address and the token are published.
        size: ranks in the group, this one included.
        rendezvous_url: says whether the ranks share a machine.

    Raises:
        RankLostError: not every rank came in time.
    """

    def __init__(self, store: Store, size: int, rendezvous_url: str) -> None:
        self._peers: dict[int, socket.socket] = {}
        # The token keeps a stranger on the network from taking the place of a rank.
        token = secrets.token_bytes(_TOKEN_BYTES)
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(_listen(rendezvous_url, stack))
            listener.listen(size)
            listener.settimeout(CONNECT_TIMEOUT_S)
            store.set(_KEY_TOKEN, token.hex())
            store.set(_KEY_ADDRESS, _address_text(listener))
            while len(self._peers) < size - 1:
                self._accept(listener, token, size)

    def broadcast(self, message: bytes) -> None:
        """Sends a message to every other rank."""
        for rank, peer in self._peers.items():
            _send(peer, message, f"rank {rank}")

    def collect(self) -> list[bytes]:
        """Waits for one message from each other rank; returns them in the order of the ranks."""
        return [_receive(peer, f"rank {rank}") for rank, peer in sorted(self._peers.items())]

    def receive(self, rank: int) -> bytes:
        """Waits for the next message of one rank."""
        return _receive(self._peers[rank], f"rank {rank}")

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
        for peer in self._peers.values():
            with contextlib.suppress(RankLostError):
                _send(peer, b"", "")
            peer.close()
        self._peers.clear()

    def _accept(self, listener: socket.socket, token: bytes, size: int) -> None:
        try:
            peer, _ = listener.accept()
        except TimeoutError as error:
            missing = sorted(set(range(1, size)) - self._peers.keys())
            raise RankLostError(
                f"ranks {missing} did not come within {CONNECT_TIMEOUT_S:g} s"
            ) from error
        peer.settimeout(CONNECT_TIMEOUT_S)
        try:
            hello = _receive_exactly(peer, _TOKEN_BYTES + _RANK.size)
        except OSError:
            hello = b""
        if not hmac.compare_digest(hello[:_TOKEN_BYTES], token):
            peer.close()
            return
        _prepare(peer)
        self._peers[_RANK.unpack(hello[_TOKEN_BYTES:])[0]] = peer


class Follower:
    """The end of a rank that is not rank 0.

    Args:
        store: where rank 0 publishes its address.
        rank: of this process, at least 1.
    """

    def __init__(self, store: Store, rank: int) -> None:
        address = store.get(_KEY_ADDRESS).decode()
        token = bytes.fromhex(store.get(_KEY_TOKEN).decode())
        if address.startswith("unix:"):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.settimeout(CONNECT_TIMEOUT_S)
            self._socket.connect(address.removeprefix("unix:"))
        else:
            host, port = address.removeprefix("tcp:").rsplit(":", 1)
            self._socket = socket.create_connection((host, int(port)), CONNECT_TIMEOUT_S)
        self._socket.sendall(token + _RANK.pack(rank))
        _prepare(self._socket)

    def send(self, message: bytes) -> None:
        """Answers rank 0's `collect`, or reports to its `receive`."""
        _send(self._socket, message, "rank 0")

    def receive(self) -> bytes | None:
        """Waits for rank 0's next message; None: rank 0 said goodbye.

        Raises:
            RankLostError: rank 0 ended without a goodbye.
        """
        return _receive(self._socket, "rank 0") or None

    def close(self) -> None:
        """Ends the connection; to rank 0 this rank is then lost."""
        self._socket.close()


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
