"""`BufferManager.register`: tensors and buffers of others as one side of transfers."""

import gc
import time
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from orchestra import BufferManager, errors
from orchestra.memory import BlockPool, BlockSet, RemoteGrant

BLOCK_BYTES = 4096


class Two:
    """A manager, and another that grants it blocks."""

    def __init__(self, transport: str) -> None:
        self.ours = BufferManager(transports=[transport])
        self.theirs = BufferManager(transports=[transport])
        self.pool: BlockPool = self.theirs.create_pool(block_bytes=BLOCK_BYTES, max_bytes=2 << 20)
        self.ours.connect("them", self.theirs.metadata())
        self.theirs.connect("us", self.ours.metadata())

    def grant(self, blocks: BlockSet, rights: Any) -> RemoteGrant:
        asked = time.monotonic()
        data = self.theirs.grant(blocks, to="us", rights=rights, ttl=20.0).encode()
        return self.ours.open_grant(data, owner="them", asked=asked)

    def put(self, memory: Any, **options: Any) -> bytes:
        """What blocks hold after `memory` was put into them."""
        with self.ours.register(memory) as registration:
            blocks = self.pool.alloc(options.get("count", registration.nbytes // BLOCK_BYTES))
            transfer = self.ours.put(registration, self.grant(blocks, "write"), **options)
        transfer.wait(20)
        event = self.theirs.wait_event(20)
        assert event is not None
        assert event.kind == "arrived"
        blocks.seal()
        return b"".join(blocks.read(at) for at in range(len(blocks)))


@pytest.fixture(params=["shm", "tcp"])
def two(request: pytest.FixtureRequest) -> Iterator[Two]:
    two = Two(request.param)
    with two.ours, two.theirs:
        yield two


def test_arrays_tensors_and_buffers_are_put_from_where_they_lie(two: Two) -> None:
    torch = pytest.importorskip("torch")
    array = np.arange(2 * BLOCK_BYTES // 2, dtype=np.int16).reshape(4, -1)
    assert two.put(array) == array.tobytes()
    assert two.put(array[1:3]) == array[1:3].tobytes()
    stats = two.ours.stats()
    assert (stats.registration_hits, stats.registration_misses) == (1, 1)
    array.setflags(write=False)
    assert two.put(array) == array.tobytes()
    tensor = torch.arange(BLOCK_BYTES, dtype=torch.float32)
    assert two.put(tensor, start=1, count=2) == tensor.numpy().tobytes()[4096:12288]
    assert two.put(bytearray(b"ab" * BLOCK_BYTES)) == b"ab" * BLOCK_BYTES


def test_a_peers_blocks_are_got_into_an_array(two: Two) -> None:
    blocks = two.pool.alloc(2)
    blocks.write(0, b"first")
    blocks.write(1, b"second")
    blocks.seal()
    array = np.zeros(3 * BLOCK_BYTES, np.uint8)
    with two.ours.register(array) as registration:
        assert (registration.nbytes, registration.readonly) == (3 * BLOCK_BYTES, False)
        two.ours.get(two.grant(blocks, "read"), registration, start=1).wait(20)
    assert not array[:BLOCK_BYTES].any()
    assert array[BLOCK_BYTES:].tobytes() == blocks.read(0) + blocks.read(1)
    array.setflags(write=False)
    grant = two.grant(blocks, "read")
    with two.ours.register(array) as registration:
        assert registration.readonly
        with pytest.raises(errors.InvalidRequestError, match="writable") as raised:
            two.ours.get(grant, registration, start=1)
    assert raised.value.key == "memory"


class Owned(np.ndarray[Any, Any]):
    """An array that can be watched."""


def test_memory_is_kept_for_the_next_time_until_it_is_invalidated() -> None:
    with BufferManager() as manager:
        array = np.zeros(BLOCK_BYTES, np.uint8).view(Owned)
        alive = weakref.ref(array)
        registration = manager.register(array)
        again = manager.register(array)
        registration.release()
        stats = manager.stats()
        assert (stats.registrations, stats.registrations_held) == (1, 1)
        assert (stats.registration_hits, stats.registered_bytes) == (1, BLOCK_BYTES)
        again.release()
        assert manager.stats().registrations_held == 0
        other = array[:10]
        del array
        gc.collect()
        assert manager.stats().registrations == 1
        assert manager.invalidate(other) == 1
        assert manager.invalidate(other) == 0
        del other
        gc.collect()
        assert alive() is None
        assert manager.stats().registrations == 0


def test_a_buffer_cannot_go_while_it_is_registered() -> None:
    with BufferManager(limits={"idle_registration_bytes_max": 0}) as manager:
        buffer = bytearray(BLOCK_BYTES)
        registration = manager.register(buffer)
        with pytest.raises(BufferError):
            buffer.extend(b"more")
        registration.release()
        buffer.extend(b"more")
        stats = manager.stats()
        assert (stats.registrations, stats.registration_evictions) == (0, 1)


def test_what_was_invalidated_or_released_starts_no_transfer(two: Two) -> None:
    array = np.zeros(BLOCK_BYTES, np.uint8)
    grant = two.grant(two.pool.alloc(1), "write")
    registration = two.ours.register(array)
    assert two.ours.invalidate(array) == 1
    with pytest.raises(errors.StaleHandleError):
        two.ours.put(registration, grant)
    registration.release()
    with pytest.raises(errors.StaleHandleError):
        two.ours.put(registration, grant)
    with pytest.raises(ValueError, match="released"):
        _ = registration.readonly
    with two.ours.register(array) as registration:
        for options in ({"count": 2}, {"start": 1}, {"start": 2}, {"start": 1 << 62}):
            with pytest.raises(errors.InvalidRequestError):
                two.ours.put(registration, grant, **options)  # type: ignore[arg-type]  # of the right types
        with pytest.raises(errors.StaleHandleError):
            two.theirs.put(registration, grant)


@pytest.mark.parametrize(
    "memory",
    [
        b"read-only",
        bytearray(),
        np.zeros((4, 4))[:, :2],
        np.zeros(0),
        memoryview(bytearray(100))[::2],
    ],
    ids=["read-only", "empty", "gaps", "empty-array", "strided"],
)
def test_what_is_no_piece_of_memory_is_refused(memory: Any) -> None:
    with BufferManager() as manager:
        with pytest.raises(errors.InvalidRequestError) as raised:
            manager.register(memory)
        assert raised.value.key == "memory"
        with pytest.raises(TypeError):
            manager.register(7)


def test_there_are_no_more_registrations_than_may_be() -> None:
    with BufferManager(limits={"max_registrations": 1}) as manager:
        with (
            manager.register(np.zeros(10)),
            pytest.raises(errors.OverloadedError, match="registrations") as raised,
        ):
            manager.register(np.zeros(20))
        assert raised.value.limit == 1
        with manager.register(np.zeros(20)):
            assert manager.stats().registration_evictions == 1
    with pytest.raises(errors.ConfigError) as wrong:
        BufferManager(limits={"max_registrations": 0})
    assert wrong.value.key == "max_registrations"
