"""The sockets between rank 0 and the other ranks: length-prefixed messages, and whose end is the end of a rank."""

import contextlib
import os
import secrets
import socket
import struct
from pathlib import Path
from urllib.parse import urlparse

from orchestra.errors import InternalError

MESSAGE_BYTES_MAX = 64 << 20
# A rank that does not take a message for so long hangs: the step could not go on without it either.
SEND_TIMEOUT_S = 60.0
# Longest path of a Unix socket, without its closing zero byte.
UNIX_PATH_BYTES_MAX = 107

_LENGTH = struct.Struct("<I")
# Process, user and group of the other end, as SO_PEERCRED tells them.
_CREDENTIALS = struct.Struct("3i")


class RankLostError(InternalError):
    """The process at the other end of a plan channel is gone."""


def peer_pid(connection: socket.socket) -> int | None:
    """The process that opened the other end of a Unix socket; of any other socket nothing is known."""
    if connection.family != socket.AF_UNIX:
        return None
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(found)[0])


def listen(rendezvous_url: str, stack: contextlib.ExitStack) -> socket.socket:
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


def address_text(listener: socket.socket) -> str:
    """What the other ranks are told of it."""
    address = listener.getsockname()
    return f"unix:{address}" if isinstance(address, str) else f"tcp:{address[0]}:{address[1]}"


def prepare(connection: socket.socket) -> None:
    """Sets what a connection needs once its ends know each other."""
    if connection.family != socket.AF_UNIX:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    # Blocking, with a limit on sending only: between two requests a rank rightly waits for hours.
    connection.settimeout(None)
    limit = struct.pack("ll", int(SEND_TIMEOUT_S), 0)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)


def send(connection: socket.socket, message: bytes, receiver: str) -> None:
    """Sends a message.

    Raises:
        RankLostError: it is not taken.
    """
    assert len(message) <= MESSAGE_BYTES_MAX
    try:
        connection.sendall(_LENGTH.pack(len(message)) + message)
    except OSError as error:
        raise RankLostError(f"{receiver} takes no message: {error}") from error


def receive(connection: socket.socket, sender: str) -> bytes:
    """Waits for a message.

    Raises:
        RankLostError: the stream ends before.
    """
    try:
        (length,) = _LENGTH.unpack(receive_exactly(connection, _LENGTH.size))
        if length > MESSAGE_BYTES_MAX:
            raise RankLostError(f"{sender} announced a message of {length} bytes")
        return receive_exactly(connection, length)
    except OSError as error:
        raise RankLostError(f"{sender} is gone: {error}") from error


def receive_exactly(connection: socket.socket, length: int) -> bytes:
    """Reads `length` bytes, or raises `ConnectionError` where the stream ends before."""
    buffer = bytearray(length)
    view = memoryview(buffer)
    while view:
        received = connection.recv_into(view)
        if received == 0:
            raise ConnectionError("the stream ended")
        view = view[received:]
    return bytes(buffer)
