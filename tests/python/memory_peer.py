"""The other process of the buffer manager's tests: has a manager and a pool, and does what it is told."""

import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import numpy as np

from orchestra import BufferManager
from orchestra.memory import BlockSet, Grant, MemoryEvent, MemoryStats

PATIENCE = 20.0
BLOCK_BYTES = 64 << 10
POOL_BYTES = 32 << 20


def until(condition: Callable[[], bool]) -> None:
    """Asks again until the condition holds; for what another process or thread does in its own time."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.001)


def fill(blocks: BlockSet, seed: int) -> None:
    """Writes what tells blocks and seeds apart, and seals."""
    for at in range(len(blocks)):
        with blocks.memoryview(at) as view:
            view[:] = bytes([(seed + at) % 251]) * BLOCK_BYTES
    blocks.seal()


def holds(blocks: BlockSet, seed: int) -> bool:
    """Whether all blocks hold what `fill` writes."""
    for at in range(len(blocks)):
        with blocks.memoryview(at) as view:
            if not (np.frombuffer(view, np.uint8) == (seed + at) % 251).all():
                return False
    return True


class Rig:
    """What runs in the other process."""

    def __init__(self, transport: str) -> None:
        self.manager = BufferManager(transports=[transport])
        self.pool = self.manager.create_pool(block_bytes=BLOCK_BYTES, max_bytes=POOL_BYTES)
        self.sets: list[BlockSet] = []
        self.grants: list[Grant] = []

    def metadata(self) -> bytes:
        return self.manager.metadata()

    def connect(self, name: str, metadata: bytes) -> None:
        self.manager.connect(name, metadata)

    def disconnect(self, name: str) -> bool:
        return self.manager.disconnect(name)

    def alloc(self, n: int, seed: int | None = None) -> int:
        blocks = self.pool.alloc(n)
        if seed is not None:
            fill(blocks, seed)
        self.sets.append(blocks)
        return len(self.sets) - 1

    def drop(self) -> None:
        """Forgets all sets; their numbers stay."""
        self.grants.clear()
        for blocks in self.sets:
            with blocks:
                pass

    def grant(self, which: int, to: str, rights: str, ttl: float) -> bytes:
        self.grants.append(self.manager.grant(self.sets[which], to=to, rights=rights, ttl=ttl))  # type: ignore[arg-type]
        return self.grants[-1].encode()

    def revoke(self) -> None:
        self.grants[-1].revoke()

    def event(self) -> MemoryEvent | None:
        return self.manager.wait_event(PATIENCE)

    def holds(self, which: int, seed: int) -> bool:
        return holds(self.sets[which], seed)

    def first_bytes(self, which: int) -> list[int]:
        blocks = self.sets[which]
        first = []
        for at in range(len(blocks)):
            with blocks.memoryview(at) as view:
                first.append(view[0])
        return first

    def stats(self) -> MemoryStats:
        return self.manager.stats()

    def memlock_of_a_poor_process(self) -> tuple[str, int, int]:
        """What a pool is refused with where this process may lock one MiB."""
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
        if os.getuid() == 0:
            os.setuid(65534)
        try:
            BufferManager(memlock="require").create_pool(max_bytes=4 << 20)
        except Exception as error:
            return type(error).__name__, getattr(error, "limit", 0), getattr(error, "current", 0)
        return "nothing", 0, 0


class Peer:
    """The other process, seen from here. Killed at the end of its `with` block."""

    def __init__(self, transport: str) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, transport), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, command: str, *arguments: Any) -> Any:
        """Has a method of `Rig` called there."""
        self._pipe.send((command, arguments))
        assert self._pipe.poll(PATIENCE), f"no answer to {command}"
        answer = self._pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def __enter__(self) -> "Peer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.kill()
        self.process.close()
        self._pipe.close()


def _serve(pipe: "Connection[Any, Any]", transport: str) -> None:
    rig = Rig(transport)
    while True:
        try:
            command, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(getattr(rig, command)(*arguments))
        except Exception as error:
            pipe.send(error)
