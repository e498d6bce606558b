"""The part of `_core` that is `orchestra.memory`. For type checkers alone: there is no such module at run time."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal, final

from orchestra._core_types import FragRow, PoolRow

@final
class BufferManager:
    """Registered memory, who may touch it, and what moves; driven by a thread of its own."""

    def __new__(cls, config: Mapping[str, Any]) -> BufferManager: ...
    def create_pool(self, settings: Mapping[str, int | bool | str]) -> BlockPool: ...
    @property
    def transports(self) -> list[str]:
        """The transports' names, in the order in which they were given."""

    def metadata(self, transport: str) -> bytes: ...
    def connect(self, peer: str, transport: str, metadata: bytes) -> None: ...
    def disconnect(self, peer: str) -> bool:
        """Whether it is proven that nothing of the peer's touches memory here any more."""

    def confirm_gone(self, peer: str) -> None: ...
    def grant(self, blocks: BlockSet, to: str, rights: str, ttl_s: float) -> Grant: ...
    def open_grant(self, data: bytes, owner: str, age_s: float) -> RemoteGrant: ...
    def put(self, blocks: BlockSet, grant: RemoteGrant, options: TransferOptions) -> Transfer: ...
    def get(self, grant: RemoteGrant, blocks: BlockSet, options: TransferOptions) -> Transfer: ...
    def take_event(self) -> dict[str, Any] | None:
        """The next event, or `None` where there is none now."""

    def listen(self, chime: Chime) -> bool:
        """Has the chime rung when there are events; `True` where there are some, or where none will come any more."""

    def wait_event(self, timeout_s: float | None) -> None:
        """Waits until there is an event, none will come any more, or the time is over."""

    def stats(self) -> dict[str, Any]: ...
    @property
    def is_closed(self) -> bool: ...
    def close(self) -> None:
        """Ends every transfer and every connection, and the thread. Again does nothing."""

@final
class BlockPool:
    """Blocks of one size. Made by `BufferManager.create_pool`."""

    @property
    def tier(self) -> str:
        """Where its blocks lie: `"dram"`, `"pinned"`, or `"vram:"` and the number of the device."""

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""

    @property
    def slab_bytes(self) -> int:
        """Bytes of a slab, the unit of registration."""

    @property
    def max_bytes(self) -> int:
        """Bytes of all slabs that there may be."""

    def alloc(self, n: int) -> BlockSet:
        """Takes `n` blocks, together where that is possible, and adds slabs where blocks run out.

        Raises:
            PoolExhaustedError: Fewer are free. Nothing was taken.
        """

    def frag(self) -> FragRow:
        """How scattered free and used blocks are: scores from 0, nothing to gain, to 1."""

    def defrag(self, max_bytes: int) -> int:
        """Moves sealed blocks that nobody holds into longer runs, at most `max_bytes` of them.

        Returns:
            How many blocks lie elsewhere now.
        """

    def stats(self) -> PoolRow:
        """Blocks by state. Looks at every block."""

    def check_integrity(self) -> None:
        """Panics where the pool's books do not agree. For tests."""

@final
class BlockSet:
    """Blocks that belong together. Freed by `free()`, at the end of a `with` block, or with the last reference.

    Blocks are known by their number in the set, also when they are moved.
    """

    def __len__(self) -> int: ...
    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""

    @property
    def num_runs(self) -> int:
        """Runs of neighbours that the blocks lie in: as many descriptors as a transfer of all of them needs."""

    def extend(self, n: int) -> None:
        """Takes `n` blocks more, behind the last where there is room.

        Raises:
            PoolExhaustedError: Fewer are free. Nothing was taken.
        """

    def truncate(self, len: int) -> None:
        """Frees the blocks from number `len` on."""

    def seal(self) -> None:
        """From now on the blocks may be read, sent and moved, and are never written.

        Raises:
            BlockInUseError: A block is sealed already, or something may still write it: a view, a grant, a transfer.
        """

    def state(self, at: int) -> Literal["writing", "sealed"] | None:
        """Where a block stands; `None` where it was lost to quarantine."""

    def write(self, at: int, data: bytes, offset: int = 0) -> None:
        """Copies bytes into a block that is being filled, in whatever kind of memory it lies.

        Raises:
            BlockInUseError: The block is sealed, or somebody else fills it.
            InvalidRequestError: The bytes do not fit behind `offset`.
        """

    def read(self, at: int, offset: int = 0, length: int | None = None) -> bytes:
        """Copies bytes out of a sealed block, in whatever kind of memory it lies; all from `offset` on unless said.

        Raises:
            BlockInUseError: The block is still being filled.
            InvalidRequestError: The range is not inside the block.
        """

    def view(self, at: int) -> BlockView:
        """A block as a tensor of bytes; see `memoryview`."""

    def memoryview(self, at: int) -> memoryview:
        """A block's bytes where they lie: writable while it is filled, read-only once it is sealed.

        The block is held while the memoryview, a slice or an array of it lives: it is not moved, and not used for
        anything else even where it is freed. One that is filled has one view at a time, and can be neither sealed nor
        granted meanwhile.

        Raises:
            BlockInUseError: The block is being filled, by another view, a peer or a transfer.
            StaleHandleError: The block was freed, or lost to quarantine.
            BufferError: The block lies on a device, where the processor cannot reach it.
        """

    def free(self) -> None:
        """Frees the blocks. One that is held is used again when the last hold ends.

        Raises:
            StaleHandleError: They were freed before.
        """

    def __enter__(self) -> BlockSet: ...
    def __exit__(
        self,
        *_exception: type[BaseException] | BaseException | TracebackType | None,
    ) -> None: ...

@final
class BlockView:
    """A block's bytes where they lie, for `numpy.from_dlpack`, `torch.from_dlpack` and `memoryview()`.

    What is made from a view holds the block for itself, so the view may be released before it.
    """

    @property
    def nbytes(self) -> int:
        """Bytes of the block."""

    @property
    def readonly(self) -> bool:
        """Whether the block is sealed."""

    @property
    def tier(self) -> str:
        """Where the bytes lie: `"dram"`, `"pinned"`, or `"vram:"` and the number of the device."""

    def memoryview(self) -> memoryview:
        """The bytes as a memoryview, which holds the block by itself.

        Raises:
            BufferError: They lie on a device.
        """

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...
    def release(self) -> None:
        """Ends this view. Memoryviews and tensors that came from it hold the block on."""

    def __enter__(self) -> BlockView: ...
    def __exit__(
        self,
        *_exception: type[BaseException] | BaseException | TracebackType | None,
    ) -> None: ...

@final
class Grant:
    """What a peer may do with blocks of this process. It lasts as long as it was given for, with or without this."""

    @property
    def id(self) -> int:
        """Its number, by which events name it."""

    @property
    def rights(self) -> Literal["read", "write"]:
        """What it allows."""

    @property
    def num_blocks(self) -> int:
        """How many blocks."""

    def encode(self) -> bytes:
        """What the peer needs, with the time that is left of it now. Bytes of your own channel carry it there."""

    def revoke(self) -> None:
        """Ends it before its time. What the peer has under way is not stopped: its blocks wait in quarantine.

        Raises:
            GrantEndedError: It has ended already.
        """

    def settle(self) -> None:
        """Ends it on the peer's word, by whatever way that came, that it has and will have nothing under way.

        Raises:
            GrantEndedError: It has ended already.
        """

@final
class RemoteGrant:
    """What a peer has granted to this process. Made by `BufferManager.open_grant`."""

    @property
    def id(self) -> int:
        """The owner's number for it."""

    @property
    def owner(self) -> str:
        """The peer that gave it."""

    @property
    def rights(self) -> Literal["read", "write"]:
        """What it allows."""

    @property
    def num_blocks(self) -> int:
        """How many blocks."""

    @property
    def block_bytes(self) -> int:
        """Bytes of each; transfers need as many at both ends."""

    @property
    def expires_in(self) -> float:
        """Seconds that are left of it."""

@final
class TransferOptions:
    """How a transfer is made; may be used again."""

    def __new__(
        cls,
        *,
        notify: bytes = b"",
        timeout: float = 5.0,
        start: int = 0,
        count: int | None = None,
        first: int = 0,
        part: tuple[int, int] | None = None,
        ends_grant: bool = True,
    ) -> TransferOptions: ...

@final
class Transfer:
    """A transfer. It is given up when the last reference to it goes before its end."""

    @property
    def is_over(self) -> bool: ...
    def wake(self, chime: Chime, number: int) -> bool:
        """Has the wait of this number of a chime ended when it is over; `True` where it is."""

    def wait(self, timeout_s: float | None) -> bool:
        """Waits for the end; `False` where it did not come in time."""

    def result(self) -> dict[str, Any] | None:
        """What it did, or the exception for how it failed; `None` while it is not over."""

    def abort(self) -> None:
        """Gives it up. It ends a moment later; bytes may still move, and blocks wait for proof that none do."""

@final
class Chime:
    """A descriptor that is readable while waits of one event loop are over."""

    def __new__(cls) -> Chime: ...
    def fileno(self) -> int: ...
    def take(self) -> list[int]:
        """The numbers of the waits that are over."""
