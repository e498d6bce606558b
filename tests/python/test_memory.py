"""`BufferManager` in one process: blocks, views of them, tensors, settings and errors."""

import asyncio
import gc
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from orchestra import BufferManager, errors
from orchestra.memory import BlockPool, BlockSet

BLOCK_BYTES = 4096


@pytest.fixture
def manager() -> Iterator[BufferManager]:
    with BufferManager() as manager:
        yield manager


@pytest.fixture
def pool(manager: BufferManager) -> Iterator[BlockPool]:
    pool = manager.create_pool(block_bytes=BLOCK_BYTES, max_bytes=2 << 20)
    yield pool
    gc.collect()
    pool.check_integrity()
    assert pool.stats()["free"] == pool.stats()["num_blocks"], "a block was lost"


def sealed(pool: BlockPool, n: int, byte: int = 7) -> BlockSet:
    blocks = pool.alloc(n)
    for at in range(n):
        with blocks.memoryview(at) as view:
            view[:] = bytes([byte]) * BLOCK_BYTES
    blocks.seal()
    return blocks


# === views ===


def test_bytes_are_written_and_read_where_they_lie(pool: BlockPool) -> None:
    blocks = pool.alloc(2)
    with blocks.memoryview(1) as view:
        assert (len(view), view.format, view.readonly) == (BLOCK_BYTES, "B", False)
        view[:5] = b"hello"
    blocks.seal()
    with blocks.memoryview(1) as view:
        assert (bytes(view[:6]), view.readonly) == (b"hello\0", True)
        with pytest.raises(TypeError):
            view[0] = 1


def test_a_block_that_is_filled_has_one_view_and_is_not_sealed_under_it(pool: BlockPool) -> None:
    blocks = pool.alloc(1)
    view = blocks.memoryview(0)
    with pytest.raises(errors.BlockInUseError):
        blocks.memoryview(0)
    with pytest.raises(errors.BlockInUseError):
        blocks.seal()
    view.release()
    blocks.seal()
    assert blocks.state(0) == "sealed"


def test_a_freed_block_is_not_used_again_before_the_last_slice_of_its_view_is_gone(
    pool: BlockPool,
) -> None:
    blocks = sealed(pool, pool.stats()["num_blocks"])
    view = blocks.memoryview(3)
    part = np.frombuffer(view[100:200], np.uint8)
    view.release()
    blocks.free()
    stats = pool.stats()
    assert (stats["limbo"], stats["free"]) == (1, stats["num_blocks"] - 1)
    # All the others are taken and written: the one that is looked at is not among them.
    others = sealed(pool, stats["free"], byte=9)
    with pytest.raises(errors.PoolExhaustedError) as exhausted:
        pool.alloc(1)
    assert (exhausted.value.limit, exhausted.value.current) == (0, 1)
    assert (part == 7).all()
    del part
    pool.alloc(1).free()
    others.free()


def test_a_view_keeps_its_block_in_place(pool: BlockPool) -> None:
    sets = [sealed(pool, 1, byte=at % 200) for at in range(pool.stats()["num_blocks"])]
    kept = [blocks for at, blocks in enumerate(sets) if at % 2]
    for blocks in sets[::2]:
        blocks.free()
    view = kept[10].view(0)
    before = pool.frag()
    assert before["alloc_p90"] == 0.0
    assert before["largest_run"] == 1
    assert pool.defrag(1 << 30) == 0, "single blocks have nothing to gain"
    merged = pool.alloc(len(sets) // 2)
    merged.seal()
    for blocks in kept:
        if blocks is not kept[10]:
            blocks.free()
    assert pool.frag()["wire"] > 0.5
    assert pool.defrag(1 << 30) > 0
    assert pool.frag()["wire"] < 0.5
    with view.memoryview() as held:
        assert held[0] == 21 % 200
    view.release()
    assert merged.num_runs < len(sets) // 2


def test_numpy_and_torch_take_a_block_without_a_copy(pool: BlockPool) -> None:
    torch = pytest.importorskip("torch")
    blocks = pool.alloc(2)
    with blocks.view(0) as view:
        array = np.from_dlpack(view)  # type: ignore[arg-type]  # numpy wants its own stream type
        tensor = None
    assert array.dtype == np.uint8
    assert array.shape == (BLOCK_BYTES,)
    array[:4] = (1, 2, 3, 4)
    with pytest.raises(errors.BlockInUseError):
        blocks.seal()
    del array, view
    with blocks.view(1) as view:
        tensor = torch.from_dlpack(view)
    tensor.view(torch.float16).fill_(1.5)
    del tensor, view
    blocks.seal()
    with blocks.memoryview(0) as bytes_:
        assert bytes(bytes_[:5]) == b"\1\2\3\4\0"
    with blocks.view(1) as view:
        read = np.from_dlpack(view)  # type: ignore[arg-type]
        assert (read.view(np.float16) == 1.5).all()
        assert not read.flags.writeable
        with pytest.raises(BufferError, match="read-only"):
            view.__dlpack__()
        with pytest.raises(BufferError, match="copy"):
            view.__dlpack__(max_version=(1, 0), copy=True)
        with pytest.raises(BufferError, match="dram memory"):
            view.__dlpack__(max_version=(1, 0), dl_device=(2, 0))
        # A capsule that nobody takes lets its block go.
        view.__dlpack__(max_version=(1, 0))
    with pytest.raises(ValueError, match="released"):
        view.memoryview()


# === blocks ===


def test_freeing_twice_is_an_error_and_changes_nothing(pool: BlockPool) -> None:
    blocks = sealed(pool, 3)
    blocks.free()
    before = pool.stats()
    calls = (blocks.free, blocks.seal, lambda: blocks.memoryview(0), lambda: len(blocks))
    for call in calls:
        with pytest.raises(errors.StaleHandleError):
            call()
    assert pool.stats() == before
    with pool.alloc(2) as again:
        again.free()


def test_a_number_that_no_block_has_is_refused(pool: BlockPool) -> None:
    blocks = pool.alloc(2)
    with pytest.raises(errors.InvalidRequestError) as raised:
        blocks.memoryview(2)
    assert raised.value.limit == 2
    with pytest.raises(OverflowError):
        blocks.memoryview(-1)


def test_a_set_grows_behind_its_last_block_and_shrinks(manager: BufferManager) -> None:
    pool = manager.create_pool(block_bytes=1 << 20, slab_bytes=2 << 20, max_bytes=6 << 20)
    blocks = pool.alloc(1)
    blocks.extend(1)
    assert (len(blocks), blocks.num_runs, pool.stats()["num_slabs"]) == (2, 1, 1)
    blocks.extend(2)
    assert (len(blocks), pool.stats()["num_slabs"]) == (4, 2)
    with pytest.raises(errors.PoolExhaustedError) as raised:
        blocks.extend(3)
    assert (raised.value.largest_run, raised.value.quarantined) == (2, 0)
    blocks.truncate(1)
    assert (len(blocks), pool.stats()["free"]) == (1, pool.stats()["num_blocks"] - 1)


def test_the_last_reference_frees(pool: BlockPool) -> None:
    blocks = pool.alloc(5)
    assert pool.stats()["writing"] == 5
    del blocks
    gc.collect()
    assert pool.stats()["writing"] == 0


# === settings and peers ===


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"block_bytes": 0}, "block_bytes"),
        ({"slab_bytes": 4096}, "slab_bytes"),
        ({"max_bytes": 1 << 63}, "max_bytes"),
        ({"prefault_threads": 0}, "prefault_threads"),
        ({"block_byte": 4096}, "block_byte"),
        ({"max_bytes": 2 << 20, "numa_node": 900}, "numa_node"),
        ({"initial_slabs": 3, "slab_bytes": 2 << 20}, "max_slabs"),
        ({"tier": "vram"}, "tier"),
        ({"tier": "vram:0", "numa_node": 0}, "numa_node"),
    ],
)
def test_a_pool_that_cannot_be_is_refused(
    manager: BufferManager, settings: dict[str, Any], key: str
) -> None:
    with pytest.raises(errors.ConfigError, match=key) as raised:
        manager.create_pool(**settings)
    assert raised.value.key == key


def test_a_manager_that_cannot_be_is_refused() -> None:
    for transports in (["carrier-pigeon"], ["shm", "shm"], ["shm:fast"]):
        with pytest.raises(errors.ConfigError) as raised:
            BufferManager(transports=transports)
        assert raised.value.key == "transports"
    with pytest.raises(errors.ConfigError) as raised:
        BufferManager(transports=["tcp"], tcp_listen="nowhere")
    assert raised.value.key == "tcp_listen"
    with pytest.raises(errors.ConfigError) as raised:
        BufferManager(limits={"max_grants": 0})
    assert raised.value.key == "max_grants"
    with pytest.raises(errors.ConfigError) as raised:
        BufferManager(limits={"max_grant": 1})
    assert raised.value.key == "max_grant"


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCHESTRA_NIXL_LIB", "/nowhere/libnixl_capi.so")
    with pytest.raises(errors.TransportUnavailableError, match=r"/nowhere/libnixl_capi\.so"):
        BufferManager(transports=["nixl:UCX"])


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("_Bool nixl_capi_is_stub(void) { return 1; }", "stub"),
        # A release from before a function that is called.
        ("_Bool nixl_capi_is_stub(void) { return 0; }", "undefined symbol: nixl_capi_"),
        ("int another_library;", "undefined symbol: nixl_capi_is_stub"),
    ],
)
def test_a_library_that_is_not_the_real_one_is_named_and_others_work(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, reason: str
) -> None:
    library = tmp_path / "libnixl_capi.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(library)],
        input=source.encode(),
        check=True,
    )
    monkeypatch.setenv("ORCHESTRA_NIXL_LIB", str(library))
    with pytest.raises(errors.TransportUnavailableError, match=reason):
        BufferManager(transports=["nixl:UCX"])
    with BufferManager(transports=["shm", "tcp"]) as manager:
        manager.create_pool(block_bytes=4096, max_bytes=1 << 20)


@pytest.mark.parametrize(
    ("has_card", "chosen", "transport", "expected"),
    [
        (False, None, "nixl:UCX", "^ib"),
        (False, "ib", "nixl:UCX", "ib"),
        (True, None, "nixl:UCX", None),
        (False, None, "shm", None),
    ],
)
def test_ucx_leaves_infiniband_alone_where_there_is_no_card(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    has_card: bool,
    chosen: str | None,
    transport: str,
    expected: str | None,
) -> None:
    monkeypatch.setattr("orchestra.memory._INFINIBAND", tmp_path / ("" if has_card else "none"))
    monkeypatch.setenv("ORCHESTRA_NIXL_LIB", "/nowhere/libnixl_capi.so")
    monkeypatch.setenv("UCX_MODULES", chosen or "")
    if chosen is None:
        monkeypatch.delenv("UCX_MODULES")
    # It is set before the library is looked for.
    with pytest.raises(errors.ConfigError):
        BufferManager(transports=[transport], limits={"max_grants": 0})
    assert os.environ.get("UCX_MODULES") == expected


def test_peers_that_are_not_there_are_named(manager: BufferManager, pool: BlockPool) -> None:
    blocks = pool.alloc(1)
    for call in (
        lambda: manager.disconnect("nobody"),
        lambda: manager.grant(blocks, to="nobody", ttl=1.0),
        lambda: manager.open_grant(b"", owner="nobody", asked=time.monotonic()),
    ):
        with pytest.raises(errors.InvalidRequestError) as raised:
            call()
        assert raised.value.key == "peer"
    with pytest.raises(errors.InvalidRequestError) as raised:
        manager.connect("somebody", b"no metadata")
    assert raised.value.key == "metadata"
    with pytest.raises(errors.InvalidRequestError):
        manager.metadata("nixl:UCX")


# === closing ===


def test_closing_ends_waits_and_leaves_views_alone(pool: BlockPool) -> None:
    with BufferManager() as manager:
        other = manager.create_pool(block_bytes=BLOCK_BYTES, max_bytes=2 << 20)
        view = sealed(other, 1).memoryview(0)
        refused: list[BaseException] = []

        def wait() -> None:
            try:
                manager.wait_event()
            except errors.ShuttingDownError as error:
                refused.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
    thread.join(20)
    assert len(refused) == 1
    manager.close()
    assert view[0] == 7
    for call in (lambda: other.alloc(1), manager.metadata, lambda: manager.create_pool()):
        with pytest.raises(errors.ShuttingDownError):
            call()


def test_a_task_that_waits_for_events_ends_with_the_manager() -> None:
    async def main() -> None:
        manager = BufferManager()
        task = asyncio.create_task(manager.next_event())
        await asyncio.sleep(0)
        await asyncio.to_thread(manager.close)
        with pytest.raises(errors.ShuttingDownError):
            await task

    asyncio.run(main())


def test_no_event_within_the_time_is_none(manager: BufferManager) -> None:
    assert manager.wait_event(0.01) is None
    assert manager.take_event() is None

    async def main() -> None:
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(manager.next_event(), 0.01)

    asyncio.run(main())
