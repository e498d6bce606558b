"""`BufferManager`: registered memory whose blocks other processes may read and write, from where they lie.

    with BufferManager(transports=["shm", "tcp"]) as manager:
        pool = manager.create_pool(block_bytes=64 << 10, max_bytes=1 << 30)
        blocks = pool.alloc(256)
        with blocks.memoryview(0) as view:
            view[:5] = b"hello"
        blocks.seal()

A thread drives the manager and sleeps while there is nothing to do; it never needs the interpreter. All methods are
safe to call from any thread, and free the interpreter while they move bytes or wait. docs/memory.md says what is
promised about a block, and docs/transports.md what each transport can prove.
"""

import atexit
import os
import site
import sysconfig
import time
import weakref
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from orchestra import _core
from orchestra._core import BlockPool, BlockSet, BlockView, Grant, Registration, RemoteGrant
from orchestra.errors import ShuttingDownError
from orchestra.memory_types import MemoryEvent, MemoryStats, TransferOptions, TransferStats
from orchestra.memory_waits import Doorbells

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "BlockPool",
    "BlockSet",
    "BlockView",
    "BufferManager",
    "Grant",
    "MemoryEvent",
    "MemoryStats",
    "Registration",
    "RemoteGrant",
    "Transfer",
    "TransferOptions",
    "TransferStats",
]


_INFINIBAND = Path("/dev/infiniband")


def _keep_verbs_out() -> None:
    """Has UCX, which NIXL loads, leave its InfiniBand modules alone where there is no card.

    With drivers for one they end the process at its exit. UCX reads the environment once, when it is loaded; a choice
    of the user's own stays.
    """
    if not _INFINIBAND.exists():
        os.environ.setdefault("UCX_MODULES", "^ib")


class BufferManager:
    """Pools of registered memory, the peers that may touch it, and transfers between them.

    Args:
        transports: What moves bytes: `shm`, `tcp`, `nixl:UCX` or `nixl:LIBFABRIC`. None is chosen in another's place.
        memlock: `require` refuses pools that the process may not lock in memory, before any library tries.
        tcp_listen: Address and port for peers; port 0 takes a free one.
        tcp_advertise: What peers are told instead, where they cannot reach `tcp_listen`.
        limits: `inflight_bytes_max`, `max_transfers`, `max_grants`, `max_blocks_per_grant`, `max_quarantined_blocks`,
            `max_lease_s`, `lease_grace_s`, `max_payload_bytes`, `max_registrations`, `idle_registration_bytes_max`,
            where other limits than the usual ones are wanted.

    Raises:
        ConfigError: A setting is wrong; `key` names it.
        TransportUnavailableError: The library of a transport is missing, too old or a stub.
    """

    def __init__(
        self,
        *,
        transports: Sequence[str] = ("shm",),
        memlock: Literal["require", "ignore"] = "ignore",
        tcp_listen: str | None = None,
        tcp_advertise: str | None = None,
        limits: Mapping[str, float] | None = None,
    ) -> None:
        config: dict[str, Any] = {
            **(limits or {}),
            "transports": list(transports),
            "memlock": memlock,
            "site_packages": [*site.getsitepackages(), sysconfig.get_path("platlib")],
        }
        if tcp_listen is not None:
            config["tcp_listen"] = tcp_listen
        if tcp_advertise is not None:
            config["tcp_advertise"] = tcp_advertise
        if any(transport.startswith("nixl") for transport in transports):
            _keep_verbs_out()
        self._core = _core.BufferManager(config)
        self._doorbells = Doorbells()
        _open.add(self)

    def create_pool(self, **settings: int | bool | str) -> BlockPool:
        """Makes a pool and registers its first slabs with every transport.

        Peers learn of slabs when they connect, so pools are made before that.

        Args:
            **settings: `tier`, where the blocks lie: `"dram"`, `"pinned"` for host memory that NVIDIA devices reach
                directly, or `"vram:0"` and so on for a device's own, which needs NIXL; `block_bytes`; `max_bytes`, and
                `slab_bytes` where several slabs shall make it up; `initial_slabs`, the others are added when blocks run
                out; `huge_pages`; `prefault_threads`; `numa_node`, where it shall not be the kernel's choice;
                `defragment_bytes_per_s`, above 0 to keep it in long runs in the background.

        Raises:
            ConfigError: A setting is wrong; `key` names it.
            MemlockTooLowError: With `memlock="require"`, the process may not lock as much.
            TierUnavailableError: The tier needs a driver or a device that is not there.
            UnsupportedError: A transport cannot reach memory of this tier.
            OverloadedError: The device has not as much memory left.
        """
        return self._core.create_pool(settings)

    # === peers ===

    def metadata(self, transport: str | None = None) -> bytes:
        """What a peer needs to connect to this process over a transport, the first one where none is named.

        Who has it can read and write the slabs: give it to peers alone.
        """
        return self._core.metadata(self._transport(transport))

    def connect(self, peer: str, metadata: bytes, *, transport: str | None = None) -> None:
        """Connects to the process that gave out `metadata`, and calls it `peer` from now on.

        Takes milliseconds, and up to 5 s where the peer does not answer: `asyncio.to_thread` in an event loop.

        Raises:
            InvalidRequestError: A peer of this name is connected, or the metadata cannot be read.
        """
        self._core.connect(peer, self._transport(transport), metadata)

    def disconnect(self, peer: str) -> bool:
        """Ends a connection and its transfers.

        Returns:
            Whether it is proven that nothing of the peer's touches memory here any more. Else its blocks wait, and so
            does its name: ask again, or call `confirm_gone` where the process is known to be dead.
        """
        return self._core.disconnect(peer)

    def confirm_gone(self, peer: str) -> None:
        """Tells that a disconnected peer's process is dead, so that nothing of its touches memory any more."""
        self._core.confirm_gone(peer)

    # === memory of others ===

    def register(self, memory: Any) -> Registration:
        """Registers bytes that something else has made, so that `put` and `get` move them from and to where they lie.

        A registration keeps its memory. When it is released, by `release()`, `with` or with the last reference, the
        manager keeps both for the next time, up to `idle_registration_bytes_max`: registering the same bytes again, or
        some of them, costs a look-up. `invalidate` ends that.

        Args:
            memory: A tensor in host memory that speaks DLPack, such as numpy's and torch's, or a writable buffer;
                without gaps. Nobody keeps others from writing to it, or from reading it before a `get` is over.

        Raises:
            InvalidRequestError: It is empty, has gaps, or lies elsewhere; `key` is `memory`.
            OverloadedError: There are `max_registrations`, and all are held.
            MemlockTooLowError: With `memlock="require"`, the process may not lock as much.
        """
        return self._core.register(memory)

    def invalidate(self, memory: Any) -> int:
        """Ends the registrations of what overlaps these bytes, and lets go of their memory.

        One that somebody holds is refused with `StaleHandleError` by new transfers, and goes with its last holder.

        Returns:
            How many there were.
        """
        return self._core.invalidate(memory)

    # === grants and transfers ===

    def grant(
        self, blocks: BlockSet, *, to: str, rights: Literal["read", "write"] = "write", ttl: float
    ) -> Grant:
        """Lets a peer read sealed blocks, or fill blocks, for `ttl` seconds. Send it what `encode()` gives.

        Raises:
            BlockInUseError: A block is not sealed and shall be read, or is or is viewed and shall be filled.
            InvalidRequestError: There is no such peer, or `ttl` is out of range.
            OverloadedError: As many grants are open, or blocks in quarantine, as may.
        """
        return self._core.grant(blocks, to, rights, ttl)

    def open_grant(self, data: bytes, *, owner: str, asked: float) -> RemoteGrant:
        """Reads what the peer `owner` has granted.

        Args:
            data: What its `Grant.encode` gave.
            owner: The peer, by the name that it has here.
            asked: What `time.monotonic()` said when the grant was asked for, or at the latest before it was encoded:
                clocks are not shared, so this is from when on its time is counted.
        """
        return self._core.open_grant(data, owner, time.monotonic() - asked)

    def put(
        self,
        blocks: BlockSet | Registration,
        grant: RemoteGrant,
        **options: "Unpack[TransferOptions]",
    ) -> "Transfer":
        """Writes sealed blocks into blocks that a peer has granted. It begins at once: await it, or `wait()` for it.

        Args:
            blocks: What is written; of a registration, its bytes as blocks of the grant's size, one after the other.
            grant: Where to.
            **options: `TransferOptions`: `notify`, `timeout`, which blocks, and which part of them.

        Raises:
            GrantEndedError: The grant has ended, or is for reading.
            BlockInUseError: A block is not sealed.
            OverloadedError: As many transfers are under way, or blocks in quarantine, as may.
        """
        how = _core.TransferOptions(**options)
        if isinstance(blocks, Registration):
            transfer = self._core.put_from(blocks, grant, how)
        else:
            transfer = self._core.put(blocks, grant, how)
        return Transfer(transfer, self._doorbells)

    def get(
        self,
        grant: RemoteGrant,
        blocks: BlockSet | Registration,
        **options: "Unpack[TransferOptions]",
    ) -> "Transfer":
        """Reads blocks that a peer has granted into blocks that are being filled; options and errors as for `put`."""
        how = _core.TransferOptions(**options)
        if isinstance(blocks, Registration):
            transfer = self._core.get_into(grant, blocks, how)
        else:
            transfer = self._core.get(grant, blocks, how)
        return Transfer(transfer, self._doorbells)

    # === events ===

    def take_event(self) -> MemoryEvent | None:
        """The next event, or `None` where there is none now.

        At most 1,024 wait here; peers' transfers stay unfinished on their side while there are more.
        """
        row = self._core.take_event()
        return None if row is None else MemoryEvent(**row)

    def wait_event(self, timeout: float | None = None) -> MemoryEvent | None:
        """Waits for the next event in this thread; `None` where none came within `timeout` seconds.

        Raises:
            ShuttingDownError: The manager was closed.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while (event := self.take_event()) is None:
            if self._core.is_closed:
                raise ShuttingDownError("the buffer manager is closed")
            left = None if end is None else max(end - time.monotonic(), 0.0)
            if left == 0.0:
                return None
            self._core.wait_event(left)
        return event

    async def next_event(self) -> MemoryEvent:
        """Waits for the next event. Cancelling the wait loses none.

        Raises:
            ShuttingDownError: The manager was closed.
        """
        while (event := self.take_event()) is None:
            if self._core.is_closed:
                raise ShuttingDownError("the buffer manager is closed")
            await self._doorbells.wait_for_events(self._core.listen)
        return event

    # === state ===

    def stats(self) -> MemoryStats:
        """Counts now."""
        return MemoryStats(**self._core.stats())

    def close(self) -> None:
        """Ends every transfer and every connection, and the thread; again does nothing.

        Transfers under way end with `PeerGoneError`. Blocks, and views of them, stay readable while they are held.
        """
        self._core.close()

    def __enter__(self) -> "BufferManager":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _transport(self, name: str | None) -> str:
        """A transport as the core calls it: without its backend."""
        return self._core.transports[0] if name is None else name.partition(":")[0]


_open: weakref.WeakSet[BufferManager] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Ends the threads that drive managers: what libraries take down at exit must not be at work then."""
    for manager in list(_open):
        manager.close()


class Transfer:
    """A transfer under way: await it, or `wait()` for it. Cancelling the task that awaits it gives it up.

    To give it up is no promise that bytes stop: its blocks wait until that is proven. It is also given up when the last
    reference to it goes.
    """

    def __init__(self, core: _core.Transfer, doorbells: Doorbells) -> None:
        self._core = core
        self._doorbells = doorbells

    @property
    def is_over(self) -> bool:
        """Whether it has ended, one way or the other."""
        return self._core.is_over

    def abort(self) -> None:
        """Gives it up; it ends a moment later with `TransferTimeoutError`. What is over stays as it is."""
        self._core.abort()

    def wait(self, timeout: float | None = None) -> TransferStats:
        """Waits for its end in this thread.

        Raises:
            TimeoutError: It was not over within `timeout` seconds. It goes on; see `abort`.
            PeerGoneError: The peer died, or closed the connection.
            TransferTimeoutError: It was given up before it was over.
            TransferFailedError: The transport failed.
            StaleHandleError: A block at either end is not what was granted.
        """
        if not self._core.wait(timeout):
            raise TimeoutError(f"the transfer was not over within {timeout} s")
        return self._result()

    def __await__(self) -> Generator[Any, None, TransferStats]:
        return self._end().__await__()

    async def _end(self) -> TransferStats:
        try:
            while not self._core.is_over:
                await self._doorbells.wait(self._core.wake)
        except BaseException:
            self._core.abort()
            raise
        return self._result()

    def _result(self) -> TransferStats:
        row = self._core.result()
        assert row is not None, "it is over"
        return TransferStats(**row)
