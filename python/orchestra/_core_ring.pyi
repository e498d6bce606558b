"""The ring of messages of `_core`. For type checkers alone: there is no such module at run time.

Calls that wait do not hold the interpreter lock.
"""

from typing import final

@final
class MessageRingReader:
    """An end of a ring of messages that reads. One thread at a time.

    Args:
        address: Where the writer's memory is.
        reader: Which of the readers this is, counted from 0.
        readers: Of the ring.
        key: Of the ring.
        message_bytes_max: Longest message.

    Raises:
        ConfigError: A number is out of range; `key` names it.
        InternalError: What is at the address cannot be seen from here, or is not this ring's.
    """

    def __new__(
        cls, address: str, reader: int, readers: int, key: int, message_bytes_max: int
    ) -> MessageRingReader: ...
    def take(self, patience_ms: int) -> bytes | None:
        """The next message.

        Args:
            patience_ms: How long to wait for it, at most 500.

        Returns:
            `None` where none came: the writer then knows that this reader sleeps soundly, and has to be woken.

        Raises:
            InternalError: The ring is damaged.
        """

@final
class MessageRingWriter:
    """The end of a ring of messages that writes, in memory that the processes of one machine share. A thread at a time.

    Args:
        readers: How many may read, at most 1024.
        key: Which ring it is, a random number.
        message_bytes_max: Longest message.

    Raises:
        ConfigError: A number is out of range; `key` names it.
        InternalError: Memory cannot be had.
    """

    def __new__(cls, readers: int, key: int, message_bytes_max: int) -> MessageRingWriter: ...
    @property
    def address(self) -> str:
        """Where readers of this machine find the memory."""

    def admit(self, reader: int) -> None:
        """Takes a reader in, before the first message; others are not waited for.

        Raises:
            ConfigError: There is no such reader.
        """

    def write(self, message: bytes, start: int = 0) -> tuple[int, bool, list[int]]:
        """Writes as much of a message as there is room for, and never waits.

        Args:
            message: The message.
            start: 0, or of one that was not whole what the last call has returned.

        Returns:
            From where to go on, whether the message is whole, and the readers that slept soundly and have to be woken.

        Raises:
            InvalidRequestError: It is too long.
            InternalError: The ring is damaged.
        """

    def await_room(self) -> list[int]:
        """Waits some milliseconds, or until the slowest reader has made room; returns the readers that made none.

        Raises:
            InternalError: The ring is damaged.
        """
