"""`BufferManager` between two real processes, over every transport that is here, and with real signals."""

import asyncio
import contextlib
import gc
import importlib.util
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import uvloop

from orchestra import BufferManager, errors
from orchestra.memory import BlockPool, RemoteGrant, TransferOptions, TransferStats
from tests.python.memory_peer import BLOCK_BYTES, POOL_BYTES, Peer, fill, holds, until

US, THEM = "us", "them"

TRANSPORTS = ["shm", "tcp"]
if any(importlib.util.find_spec(name) for name in ("nixl_cu12", "nixl_cu13")):
    TRANSPORTS.append("nixl:UCX")

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    runner: Run = request.param
    return runner


class Two:
    """This process and a peer, connected both ways."""

    def __init__(self, transport: str) -> None:
        self.peer = Peer(transport)
        self.manager = BufferManager(transports=[transport])
        self.pool: BlockPool = self.manager.create_pool(
            block_bytes=BLOCK_BYTES, max_bytes=POOL_BYTES
        )
        self.manager.connect(THEM, self.peer.ask("metadata"))
        self.peer.ask("connect", US, self.manager.metadata())

    def granted(self, blocks: int, rights: str, ttl: float = 20.0) -> RemoteGrant:
        """What the peer grants of a set of its blocks."""
        asked = time.monotonic()
        data = self.peer.ask("grant", blocks, US, rights, ttl)
        return self.manager.open_grant(data, owner=THEM, asked=asked)

    def all_come_back(self) -> None:
        """Waits until every block of this process is free again."""
        gc.collect()
        until(lambda: self.pool.stats()["free"] == self.pool.stats()["num_blocks"])
        self.pool.check_integrity()


@pytest.fixture
def two(request: pytest.FixtureRequest) -> Iterator[Two]:
    two = Two(request.param)
    with two.peer, two.manager:
        yield two


on_all = pytest.mark.parametrize("two", TRANSPORTS, indirect=True)
on_our_own = pytest.mark.parametrize("two", ["shm", "tcp"], indirect=True)
on_tcp = pytest.mark.parametrize("two", ["tcp"], indirect=True)
on_shm = pytest.mark.parametrize("two", ["shm"], indirect=True)


@on_all
def test_blocks_go_there_and_back(two: Two, run: Run) -> None:
    async def main() -> None:
        source = two.pool.alloc(12)
        fill(source, 40)
        target = two.peer.ask("alloc", 12)
        grant = two.granted(target, "write")
        assert (grant.num_blocks, grant.block_bytes, grant.rights) == (12, BLOCK_BYTES, "write")
        assert 0 < grant.expires_in <= 20
        stats: TransferStats = await two.manager.put(source, grant, notify=b"request 42")
        assert (stats.blocks, stats.bytes) == (12, 12 * BLOCK_BYTES)
        event = two.peer.ask("event")
        assert (event.kind, event.peer, event.grant) == ("arrived", US, grant.id)
        assert (event.payload, event.rights, event.ends_grant) == (b"request 42", "write", True)
        assert two.peer.ask("holds", target, 40)

        there = two.peer.ask("alloc", 5, 90)
        back = two.pool.alloc(7)
        await two.manager.get(two.granted(there, "read"), back, start=1, count=5)
        read = two.pool.alloc(5)
        await two.manager.get(two.granted(there, "read"), read)
        assert holds(read, 90)

    run(main())


@on_all
def test_part_of_a_block_and_several_transfers_under_one_grant(two: Two) -> None:
    source = two.pool.alloc(4)
    fill(source, 10)
    target = two.peer.ask("alloc", 4)
    grant = two.granted(target, "write")
    half = BLOCK_BYTES // 2
    for part in ((0, half), (half, BLOCK_BYTES)):
        two.manager.put(source, grant, part=part, ends_grant=False).wait(20)
        assert not two.peer.ask("event").ends_grant
    # Block 3 again, into block 0 of the grant, as the last use.
    two.manager.put(source, grant, start=3, count=1, first=0).wait(20)
    last = two.peer.ask("event")
    assert (last.ends_grant, last.num_blocks) == (True, 1)
    assert two.peer.ask("first_bytes", target) == [13, 11, 12, 13]


@on_all
def test_what_a_grant_does_not_allow_is_refused_before_anything_moves(two: Two) -> None:
    source, target = two.pool.alloc(2), two.peer.ask("alloc", 2, 50)
    reading = two.granted(target, "read")
    with pytest.raises(errors.GrantEndedError):
        two.manager.put(source, reading)
    writing = two.granted(two.peer.ask("alloc", 2), "write")
    with pytest.raises(errors.BlockInUseError, match="sealed"):
        two.manager.put(source, writing)
    fill(source, 1)
    wrongs: list[TransferOptions] = [{"first": 1}, {"start": 2}, {"count": 3}, {"count": 0}]
    for wrong in wrongs:
        with pytest.raises(errors.InvalidRequestError) as raised:
            two.manager.put(source, writing, **wrong)
        assert raised.value.limit == 2
    with pytest.raises(errors.InvalidRequestError) as raised:
        two.manager.put(source, writing, notify=bytes(1025))
    assert raised.value.key == "notify"
    for timeout in (0.0, -1.0, float("nan")):
        with pytest.raises(errors.InvalidRequestError) as raised:
            two.manager.put(source, writing, timeout=timeout)
        assert raised.value.key == "timeout"
    for part in ((0, 0), (5, BLOCK_BYTES + 1)):
        with pytest.raises(errors.InvalidRequestError) as raised:
            two.manager.put(source, writing, part=part)
        assert raised.value.key == "part"
    with pytest.raises(TypeError):
        two.manager.put(source, writing, ttl=1.0)  # type: ignore[call-arg]
    with BufferManager() as other:
        others = other.create_pool(block_bytes=BLOCK_BYTES, max_bytes=2 << 20).alloc(2)
        with pytest.raises(errors.StaleHandleError):
            two.manager.put(others, writing)
    assert two.manager.put(source, writing).wait(20).blocks == 2


@on_shm
def test_a_grant_that_has_ended_is_neither_used_nor_believed(two: Two) -> None:
    mine = two.pool.alloc(3)
    for ttl in (0.0, 1000.0, float("inf")):
        with pytest.raises(errors.InvalidRequestError) as raised:
            two.manager.grant(mine, to=THEM, ttl=ttl)
        assert raised.value.key == "ttl"
    grant = two.manager.grant(mine, to=THEM, ttl=0.05)
    with pytest.raises(errors.BlockInUseError):
        mine.seal()
    event = two.manager.wait_event(20)
    assert event is not None
    assert (event.kind, event.peer, event.grant) == ("grant_expired", None, grant.id)
    # Nobody has said that the peer writes no more: the blocks are lost to their owner, and used by nobody.
    assert two.manager.stats().quarantined_blocks == 3
    assert mine.state(0) is None
    with pytest.raises(errors.StaleHandleError):
        mine.memoryview(0)
    with pytest.raises(errors.GrantEndedError):
        grant.revoke()
    grant.settle()
    del mine
    two.all_come_back()
    source = two.pool.alloc(1)
    fill(source, 1)
    asked = time.monotonic() - 30.0
    theirs = two.peer.ask("grant", two.peer.ask("alloc", 1), US, "write", 20.0)
    late = two.manager.open_grant(theirs, owner=THEM, asked=asked)
    assert late.expires_in == 0.0
    with pytest.raises(errors.GrantEndedError):
        two.manager.put(source, late)


@on_our_own
def test_a_late_transfer_is_stale_at_its_owner(two: Two) -> None:
    source = two.pool.alloc(2)
    fill(source, 1)
    grant = two.granted(two.peer.ask("alloc", 2), "write")
    two.peer.ask("revoke")
    assert two.peer.ask("stats").quarantined_blocks == 2
    assert two.manager.put(source, grant).wait(20).blocks == 2
    event = two.peer.ask("event")
    assert (event.kind, event.grant, event.num_blocks) == ("stale", grant.id, 0)
    # "Done" is the proof that the blocks had waited for.
    assert two.peer.ask("stats").quarantined_blocks == 0


@on_our_own
def test_a_killed_peer_fails_transfers_and_every_block_comes_back(two: Two, run: Run) -> None:
    async def main() -> None:
        source = two.pool.alloc(128)
        fill(source, 1)
        mine = two.pool.alloc(64)
        two.manager.grant(mine, to=THEM, ttl=20.0)
        grant = two.granted(two.peer.ask("alloc", 128), "write")
        puts = [two.manager.put(source, grant, ends_grant=False) for _ in range(100)]
        waits = [asyncio.ensure_future(put) for put in puts]
        await waits[0]
        two.peer.kill()
        ended = await asyncio.gather(*waits, return_exceptions=True)
        kinds = {type(one) for one in ended}
        assert kinds <= {TransferStats, errors.PeerGoneError}
        assert errors.PeerGoneError in kinds
        with pytest.raises(errors.PeerGoneError):
            await two.manager.put(source, grant)

    run(main())
    until(lambda: two.manager.disconnect(THEM))
    assert two.manager.stats().quarantined_blocks == 0
    assert two.manager.stats().open_grants == 0
    two.all_come_back()
    # The name is free again, for another process.
    with Peer(two.manager._core.transports[0]) as fresh:
        two.manager.connect(THEM, fresh.ask("metadata"))
        fresh.ask("connect", US, two.manager.metadata())
        blocks = two.pool.alloc(1)
        fill(blocks, 3)
        data = fresh.ask("grant", fresh.ask("alloc", 1), US, "write", 20.0)
        grant = two.manager.open_grant(data, owner=THEM, asked=time.monotonic())
        assert two.manager.put(blocks, grant).wait(20).blocks == 1


@on_shm
def test_a_stopped_peer_is_written_all_the_same(two: Two) -> None:
    source = two.pool.alloc(8)
    fill(source, 70)
    target = two.peer.ask("alloc", 8)
    grant = two.granted(target, "write")
    # The first byte maps the peer's memory, which takes an answer of its; what follows takes none.
    two.manager.put(source, grant, count=1, part=(0, 1), ends_grant=False).wait(20)
    two.peer.signal(signal.SIGSTOP)
    assert two.manager.put(source, grant).wait(20).blocks == 8
    two.peer.signal(signal.SIGCONT)
    assert two.peer.ask("event").ends_grant is False
    assert two.peer.ask("event").num_blocks == 8
    assert two.peer.ask("holds", target, 70)


@on_tcp
def test_a_stopped_peer_costs_the_deadline_and_blocks_wait_until_it_goes_on(two: Two) -> None:
    source = two.pool.alloc(256)
    fill(source, 7)
    grant = two.granted(two.peer.ask("alloc", 256), "write")
    two.peer.signal(signal.SIGSTOP)
    put = two.manager.put(source, grant, timeout=0.2)
    with pytest.raises(TimeoutError, match="not over"):
        put.wait(0.01)
    with pytest.raises(errors.TransferTimeoutError) as raised:
        put.wait(20)
    assert raised.value.quarantined == 256
    source.free()
    stats = two.pool.stats()
    assert stats["free"] == stats["num_blocks"] - 256, "bytes of them may still be sent"
    assert two.manager.stats().quarantined_blocks == 256
    two.peer.signal(signal.SIGCONT)
    two.all_come_back()
    assert two.manager.stats().unproven_transfers == 0


@on_tcp
def test_cancelling_a_task_gives_its_transfer_up(two: Two, run: Run) -> None:
    async def main() -> None:
        source = two.pool.alloc(256)
        fill(source, 7)
        grant = two.granted(two.peer.ask("alloc", 256), "write")
        two.peer.signal(signal.SIGSTOP)
        put = two.manager.put(source, grant, timeout=30.0)

        async def hold() -> None:
            await put

        task = asyncio.create_task(hold())
        done, _ = await asyncio.wait([task], timeout=0.05)
        assert not done
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        with pytest.raises(errors.TransferTimeoutError):
            await asyncio.to_thread(put.wait, 20.0)
        assert two.manager.stats().unproven_transfers == 1

        dropped = two.manager.put(source, grant, timeout=30.0)
        assert two.manager.stats().active_transfers == 1
        del dropped
        until(lambda: two.manager.stats().active_transfers == 0)

    run(main())
    two.peer.signal(signal.SIGCONT)
    two.all_come_back()


@on_tcp
def test_threads_run_while_one_waits_for_a_transfer(two: Two) -> None:
    source = two.pool.alloc(256)
    fill(source, 7)
    grant = two.granted(two.peer.ask("alloc", 256), "write")
    two.peer.signal(signal.SIGSTOP)
    put = two.manager.put(source, grant, timeout=30.0)
    seen = 0

    async def main() -> None:
        nonlocal seen
        waiting = asyncio.create_task(asyncio.to_thread(put.wait, 20.0))
        while seen < 1000:
            seen += 1
            await asyncio.sleep(0)
        assert not waiting.done()
        put.abort()
        with pytest.raises(errors.TransferTimeoutError):
            await waiting

    asyncio.run(main())
    assert seen == 1000
    two.peer.signal(signal.SIGCONT)


@on_our_own
def test_closing_ends_transfers_under_way(two: Two) -> None:
    async def main() -> None:
        source = two.pool.alloc(256)
        fill(source, 7)
        grant = two.granted(two.peer.ask("alloc", 256), "write")
        puts = [two.manager.put(source, grant, ends_grant=False) for _ in range(50)]
        tasks = [asyncio.ensure_future(put) for put in puts]
        await asyncio.to_thread(two.manager.close)
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(one) for one in ended} <= {TransferStats, errors.PeerGoneError}
        with pytest.raises(errors.ShuttingDownError):
            two.manager.put(source, grant)

    asyncio.run(main())


def test_several_event_loops_share_a_manager() -> None:
    two = Two("shm")
    with two.peer, two.manager:
        grants = [two.granted(two.peer.ask("alloc", 4), "write") for _ in range(3)]

        async def move(grant: RemoteGrant) -> int:
            source = two.pool.alloc(4)
            fill(source, 5)
            return (await two.manager.put(source, grant)).blocks

        async def main() -> None:
            moves = [asyncio.to_thread(asyncio.run, move(grant)) for grant in grants]
            assert await asyncio.gather(*moves) == [4, 4, 4]

        asyncio.run(main())
        two.all_come_back()


@on_shm
def test_a_pool_that_may_not_be_locked_is_refused_before_any_library_tries(two: Two) -> None:
    refused = two.peer.ask("memlock_of_a_poor_process")
    assert refused == ("MemlockTooLowError", 1 << 20, 4 << 20)


@on_our_own
def test_a_storm_of_reconnects_leaves_nothing_behind(two: Two) -> None:
    source = two.pool.alloc(2)
    fill(source, 5)
    for round_ in range(100):
        grant = two.granted(two.peer.ask("alloc", 2), "write")
        if round_ % 10 == 0:
            assert two.manager.put(source, grant).wait(20).blocks == 2
        # One side goes first, in turns; each is asked until it can prove that the other is quiet.
        ends: list[Callable[[], bool]] = [
            lambda: two.manager.disconnect(THEM),
            lambda: bool(two.peer.ask("disconnect", US)),
        ]
        are_quiet = [False, False]
        while not all(are_quiet):
            for at in (round_ % 2, 1 - round_ % 2):
                are_quiet[at] = are_quiet[at] or ends[at]()
        with pytest.raises(errors.InvalidRequestError):
            two.manager.put(source, grant)
        two.peer.ask("drop")
        two.manager.connect(THEM, two.peer.ask("metadata"))
        two.peer.ask("connect", US, two.manager.metadata())
    stats = two.peer.ask("stats")
    assert (stats.open_grants, stats.quarantined_blocks, stats.unproven_peers) == (0, 0, 0)
    source.free()
    two.all_come_back()


@on_our_own
def test_a_pool_whose_blocks_are_all_in_quarantine_recovers(two: Two) -> None:
    blocks = two.pool.stats()["num_blocks"]
    mine = two.pool.alloc(blocks)
    grant = two.manager.grant(mine, to=THEM, ttl=20.0)
    grant.revoke()
    with pytest.raises(errors.PoolExhaustedError) as exhausted:
        two.pool.alloc(1)
    assert (exhausted.value.limit, exhausted.value.quarantined) == (0, blocks)
    del mine
    gc.collect()
    assert two.pool.stats()["quarantined"] == blocks
    two.peer.kill()
    until(lambda: two.manager.disconnect(THEM))
    two.all_come_back()
    assert len(two.pool.alloc(blocks)) == blocks


@pytest.mark.parametrize(
    "two", [name for name in TRANSPORTS if name.startswith("nixl")], indirect=True
)
def test_a_peer_killed_under_nixl_is_gone_once_that_is_confirmed(two: Two) -> None:
    source = two.pool.alloc(64)
    fill(source, 3)
    mine = two.pool.alloc(8)
    two.manager.grant(mine, to=THEM, ttl=20.0)
    grant = two.granted(two.peer.ask("alloc", 64), "write")
    assert two.manager.put(source, grant, ends_grant=False).wait(20).blocks == 64
    two.peer.kill()
    put = two.manager.put(source, grant, timeout=2.0)
    # Whether a put into the dead fails or is done all the same is the fabric's choice; that it ends is not.
    with contextlib.suppress(
        errors.PeerGoneError, errors.TransferFailedError, errors.TransferTimeoutError
    ):
        put.wait(20)
    assert two.manager.disconnect(THEM) is False, "nothing of NIXL's can prove it"
    assert two.manager.stats().unproven_peers == 1
    del mine
    gc.collect()
    assert two.pool.stats()["free"] < two.pool.stats()["num_blocks"] - 64
    two.manager.confirm_gone(THEM)
    source.free()
    two.all_come_back()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_program_may_end_with_a_manager_open(transport: str) -> None:
    script = f"""
from orchestra import BufferManager
manager = BufferManager(transports=[{transport!r}])
blocks = manager.create_pool(block_bytes=4096, max_bytes=2 << 20).alloc(1)
view = blocks.memoryview(0)
"""
    done = subprocess.run([sys.executable, "-c", script], timeout=50, check=False)
    assert done.returncode == 0
