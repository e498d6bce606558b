"""How messages reach the ranks of rank 0's own machine: through a ring in memory that they share.

Rank 0 writes a message once for all of them, and wakes those that wait for it by one call into the kernel. A rank to
which nothing comes for a while, as between two requests, sleeps on its socket, which rank 0 rings and whose end is its.
"""

import logging
import secrets
import select
import socket
import struct
import time

from orchestra._core import MessageRingReader, MessageRingWriter
from orchestra.errors import ConfigError, InternalError
from orchestra.worker import plan_socket
from orchestra.worker.plan_socket import MESSAGE_BYTES_MAX, RankLostError

# The ring's key and number of readers, and then its address. No invitation is an empty one.
_INVITATION = struct.Struct("<QI")
_YES, _NO = b"\1", b"\0"
_RING = b"\0"
# Longer than a decode step leaves a rank waiting, and no longer than rank 0's end may go unnoticed.
_PATIENCE_MS = 10
# More rings than a sleeper can have missed; any number of them wakes it once.
_RINGS_MAX = 64

logger = logging.getLogger("orchestra.worker")


class RingSender:
    """Rank 0's end, of one generation.

    Args:
        size: ranks in the group, rank 0 included.

    Raises:
        InternalError: there is no such memory to be had.
        ConfigError: the ranks are more than a ring can have.
    """

    def __init__(self, size: int) -> None:
        key = secrets.randbits(64)
        self._ring = MessageRingWriter(size - 1, key, MESSAGE_BYTES_MAX)
        self.invitation = _INVITATION.pack(key, size - 1) + self._ring.address.encode()
        """What another rank needs to find the memory."""
        self._ranks: dict[int, socket.socket] = {}
        self._ends = select.poll()

    def admit(self, rank: int, connection: socket.socket) -> None:
        """Takes a rank in that does, before the first message."""
        self._ring.admit(_reader_of(rank))
        self._ranks[rank] = connection
        self._ends.register(connection, select.POLLRDHUP)

    def send(self, message: bytes) -> None:
        """Sends a message to the ranks that were admitted.

        Raises:
            RankLostError: one of them is gone, or hangs.
        """
        if not self._ranks:
            return
        try:
            self._write(message)
        except InternalError as error:
            raise RankLostError(str(error)) from error
        # The message is on its way by now, so this look at the sockets keeps nobody waiting.
        self._check()

    def _write(self, message: bytes) -> None:
        written, is_whole, sleepers = self._ring.write(message)
        self._wake(sleepers)
        deadline = time.monotonic() + plan_socket.SEND_TIMEOUT_S
        while not is_whole:
            if late := self._ring.await_room():
                self._check()
                if time.monotonic() > deadline:
                    ranks = list(map(_rank_of, late))
                    seconds = plan_socket.SEND_TIMEOUT_S
                    raise RankLostError(f"ranks {ranks} took no message for {seconds:g} s")
                continue
            written, is_whole, sleepers = self._ring.write(message, written)
            self._wake(sleepers)
            deadline = time.monotonic() + plan_socket.SEND_TIMEOUT_S

    def _wake(self, sleepers: list[int]) -> None:
        # All of them first, whoever is lost: a goodbye may be what the others wait for.
        if lost := [rank for rank in map(_rank_of, sleepers) if not self._ring_up(rank)]:
            raise RankLostError(f"ranks {lost} are gone")

    def _ring_up(self, rank: int) -> bool:
        """Returns whether it is there."""
        try:
            self._ranks[rank].send(_RING, socket.MSG_DONTWAIT)
        except BlockingIOError:
            # It was rung many times before, and wakes.
            return True
        except OSError:
            return False
        return True

    def _check(self) -> None:
        if ended := {descriptor for descriptor, _ in self._ends.poll(0)}:
            ranks = [rank for rank, it in self._ranks.items() if it.fileno() in ended]
            raise RankLostError(f"ranks {ranks} are gone")


class RingReceiver:
    """The end of any other rank.

    Args:
        ring: what `answer` has opened.
        connection: to rank 0, over which it rings.
    """

    def __init__(self, ring: MessageRingReader, connection: socket.socket) -> None:
        self._ring = ring
        self._connection = connection

    def receive(self) -> bytes:
        """Waits for the next message.

        Raises:
            RankLostError: rank 0 is gone, or what it writes makes no sense.
        """
        try:
            has_ended = False
            while (message := self._ring.take(_PATIENCE_MS)) is None:
                # Asked for once more when it had ended: what it wrote before counts.
                if has_ended:
                    raise RankLostError("rank 0 is gone: the stream ended")
                has_ended = not self._sleep()
        except InternalError as error:
            raise RankLostError(str(error)) from error
        return message

    def _sleep(self) -> bool:
        """Waits for a ring; returns whether there was one, and not rank 0's end."""
        try:
            return bool(self._connection.recv(_RINGS_MAX))
        except OSError:
            return False


def make_ring(size: int) -> RingSender | None:
    """A ring, where this machine lets us have one."""
    try:
        return RingSender(size)
    except (InternalError, ConfigError) as error:
        logger.debug("plans go over sockets: %s", error)
        return None


def invite(ring: RingSender | None, connection: socket.socket) -> bool:
    """Asks a rank whether it sees the memory of a ring, where there is one.

    Raises:
        OSError, RankLostError: it does not answer.
    """
    plan_socket.send(connection, b"" if ring is None else ring.invitation, "the rank")
    return plan_socket.receive_exactly(connection, len(_YES)) == _YES


def answer(connection: socket.socket, rank: int) -> RingReceiver | None:
    """Takes rank 0's invitation, where it is to something that this rank can see.

    Raises:
        OSError, RankLostError: rank 0 is gone.
    """
    invitation = plan_socket.receive(connection, "rank 0")
    ring = _open(invitation, rank) if invitation else None
    connection.sendall(_NO if ring is None else _YES)
    return None if ring is None else RingReceiver(ring, connection)


def _open(invitation: bytes, rank: int) -> MessageRingReader | None:
    key, readers = _INVITATION.unpack_from(invitation)
    address = invitation[_INVITATION.size :].decode()
    try:
        return MessageRingReader(address, _reader_of(rank), readers, key, MESSAGE_BYTES_MAX)
    except (InternalError, ConfigError) as error:
        # As it is on another machine, or in another container.
        logger.debug("plans come over a socket: %s", error)
        return None


# === rank 0 does not read ===


def _reader_of(rank: int) -> int:
    return rank - 1


def _rank_of(reader: int) -> int:
    return reader + 1
