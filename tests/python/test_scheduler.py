"""`Scheduler`: routing, placing, giving back, and use from many threads."""

import array
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from orchestra import Scheduler, SchedulerConfig, errors
from orchestra.scheduler import TokenIds

MODEL = "demo"
EXTENT = 64 << 20


def add_worker(scheduler: Scheduler, name: str, **changes: int) -> None:
    sizes = {"num_blocks": 1000, "max_model_len": 4096, **changes}
    scheduler.add_worker(name, model=MODEL, **sizes)  # type: ignore[arg-type]  # sizes only


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    scheduler = Scheduler()
    add_worker(scheduler, "a")
    add_worker(scheduler, "b")
    yield scheduler
    scheduler.check_integrity()


# === routing ===


def test_a_reservation_is_held_by_the_block(scheduler: Scheduler) -> None:
    with scheduler.route(range(100), model=MODEL, max_tokens=28) as reservation:
        assert reservation.worker == "a"
        assert (reservation.num_cached_tokens, reservation.num_blocks) == (0, 8)
        worker, other = scheduler.workers()
        assert (worker.batch, worker.queued_prefill_tokens, worker.kv_blocks_free) == (1, 100, 992)
        assert other.batch == 0
        assert reservation.prefill_done()
        assert not reservation.prefill_done()
        assert scheduler.workers()[0].queued_prefill_tokens == 0
    assert scheduler.stats().num_reservations == 0
    assert not reservation.release()


def test_a_reservation_is_given_back_when_the_block_raises(scheduler: Scheduler) -> None:
    with pytest.raises(ZeroDivisionError), scheduler.route([1], model=MODEL):
        raise ZeroDivisionError
    assert scheduler.stats().num_reservations == 0


def test_a_dropped_reservation_is_given_back(scheduler: Scheduler) -> None:
    reservation = scheduler.route([1], model=MODEL)
    assert scheduler.stats().num_reservations == 1
    del reservation
    gc.collect()
    assert scheduler.stats().num_reservations == 0


def test_a_burst_spreads_over_the_workers(scheduler: Scheduler) -> None:
    held = [scheduler.route(range(64), model=MODEL) for _ in range(6)]
    assert sorted(reservation.worker for reservation in held) == ["a"] * 3 + ["b"] * 3


def test_a_prefix_hit_attracts_the_request(scheduler: Scheduler) -> None:
    prompt = list(range(100))
    scheduler.kv_stored("b", scheduler.block_hashes("b", prompt))
    assert scheduler.route(prompt, model=MODEL).num_cached_tokens == 96
    # A salt isolates, a removal is seen, and so is a flush.
    assert scheduler.route(prompt, model=MODEL, salt="tenant").num_cached_tokens == 0
    scheduler.kv_removed("b", scheduler.block_hashes("b", prompt)[3:])
    best = scheduler.explain(prompt, model=MODEL).candidates[0]
    assert (best.worker, best.num_cached_tokens) == ("b", 48)
    scheduler.kv_cleared("b")
    assert scheduler.explain(prompt, model=MODEL).candidates[0].num_cached_tokens == 0
    assert scheduler.stats().num_index_entries == 0


@pytest.mark.parametrize(
    "token_ids",
    [
        list(range(40)),
        tuple(range(40)),
        range(40),
        array.array("i", range(40)),
        array.array("I", range(40)),
        array.array("q", range(40)),
        np.arange(40, dtype=np.int32),
        np.arange(40, dtype=np.uint32),
        np.arange(40, dtype=np.int64),
        np.arange(80, dtype=np.int32)[::2] // 2,
        np.repeat(np.arange(40, dtype=np.int32), 2)[::2],
    ],
    ids=lambda value: f"{type(value).__name__}-{getattr(value, 'dtype', '')}",
)
def test_token_ids_come_as_sequences_and_buffers(scheduler: Scheduler, token_ids: TokenIds) -> None:
    assert scheduler.block_hashes("a", token_ids) == scheduler.block_hashes("a", list(range(40)))


@pytest.mark.parametrize(
    "token_ids",
    [[-1], [1 << 31], [1 << 40], array.array("i", [-1]), np.array([-1], dtype=np.int64)],
    ids=repr,
)
def test_token_ids_out_of_range_are_refused(scheduler: Scheduler, token_ids: TokenIds) -> None:
    with pytest.raises(errors.InvalidRequestError) as raised:
        scheduler.route(token_ids, model=MODEL)
    assert raised.value.key == "token_ids"


@pytest.mark.parametrize("token_ids", ["text", [1.5], np.ones(3), np.ones((2, 2), dtype=np.int32)])
def test_what_is_no_token_sequence_is_a_type_error(
    scheduler: Scheduler, token_ids: TokenIds
) -> None:
    with pytest.raises(TypeError):
        scheduler.route(token_ids, model=MODEL)


def test_refusals_change_nothing(scheduler: Scheduler) -> None:
    before = scheduler.workers()
    with pytest.raises(errors.ModelNotFoundError):
        scheduler.route([1], model="other")
    with pytest.raises(errors.ContextTooLongError, match="4097 tokens"):
        scheduler.route(range(4000), model=MODEL, max_tokens=97)
    with pytest.raises(errors.InvalidRequestError, match="max_tokens"):
        scheduler.route([1], model=MODEL, max_tokens=0)
    with pytest.raises(errors.InvalidRequestError, match="registered already"):
        add_worker(scheduler, "a")
    with pytest.raises(errors.InvalidRequestError, match="not registered"):
        scheduler.set_draining("nobody")
    assert scheduler.workers() == before


def test_a_request_never_lands_where_its_kv_cannot_fit(scheduler: Scheduler) -> None:
    add_worker(scheduler, "tiny", num_blocks=4)
    held = [scheduler.route(range(64), model=MODEL) for _ in range(50)]
    assert {reservation.worker for reservation in held} == {"a", "b"}
    reasons = scheduler.explain(range(64), model=MODEL).ineligible
    assert [(row.worker, row.reason, row.requested, row.limit) for row in reasons] == [
        ("tiny", "kv_too_large", 5, 4)
    ]


def test_draining_excluded_and_removed_workers_get_nothing(scheduler: Scheduler) -> None:
    scheduler.set_draining("a")
    reservation = scheduler.route([1], model=MODEL)
    assert reservation.worker == "b"
    with pytest.raises(errors.WorkerUnavailableError):
        scheduler.route([1], model=MODEL, exclude=["b"])
    explanation = scheduler.explain([1], model=MODEL, exclude=["b"])
    assert {row.worker: row.reason for row in explanation.ineligible} == {
        "a": "draining",
        "b": "excluded",
    }
    assert scheduler.remove_worker("b")
    assert not scheduler.remove_worker("b")
    assert not reservation.release(), "it went with its worker"


def test_a_load_report_counts(scheduler: Scheduler) -> None:
    scheduler.update_load(
        "a", num_running=2, num_waiting=1, kv_blocks_used=900, queued_prefill_tokens=50
    )
    best, other = scheduler.explain(range(10), model=MODEL).candidates
    assert (best.worker, best.cost) == ("b", 10)
    assert (other.cost, other.batch, other.kv_blocks_free) == ((10 + 50) * 4, 3, 100)
    assert scheduler.explain(range(10), model=MODEL, k=1).num_more_candidates == 1


def test_config_is_a_dataclass_a_mapping_or_nothing() -> None:
    for config in (SchedulerConfig(max_num_workers=1), {"max_num_workers": 1}):
        scheduler = Scheduler(config)
        add_worker(scheduler, "a")
        with pytest.raises(errors.OverloadedError):
            add_worker(scheduler, "b")
    assert SchedulerConfig().max_num_workers > 1


# === placing ===


def test_a_gang_is_placed_inside_one_domain() -> None:
    scheduler = Scheduler()
    for domain in ("d0", "d1"):
        for index in range(2):
            name = f"{domain}/{index}"
            scheduler.add_gpu(name, domain=domain, node=domain, memory_bytes=4 * EXTENT)
    with scheduler.place(num_gpus=2, bytes_per_gpu=3 * EXTENT) as placement:
        assert placement.gpus == (("d0/0", 0, 3 * EXTENT), ("d0/1", 0, 3 * EXTENT))
        other = scheduler.place(num_gpus=2, bytes_per_gpu=2 * EXTENT)
        assert [name for name, _, _ in other.gpus] == ["d1/0", "d1/1"]
        with pytest.raises(errors.WorkerUnavailableError, match="has 0 now"):
            scheduler.place(num_gpus=2, bytes_per_gpu=3 * EXTENT)
        with pytest.raises(errors.InvalidRequestError, match="widest domain"):
            scheduler.place(num_gpus=3, bytes_per_gpu=1)
        assert scheduler.remove_gpu("d1/0")
        assert not other.release(), "it went with its GPU"
    stats = scheduler.stats()
    assert (stats.num_placements, stats.gpu_bytes_free) == (0, 12 * EXTENT)
    scheduler.check_integrity()


# === threads, imports ===


def test_many_threads_route_and_release(scheduler: Scheduler) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for step in range(200):
                with scheduler.route(range(seed, seed + 30 + step), model=MODEL) as reservation:
                    reservation.prefill_done()
                if step % 50 == 0:
                    scheduler.check_integrity()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    stats = scheduler.stats()
    assert (stats.num_reservations, stats.num_decisions) == (0, 1600)


def test_the_gil_is_released_while_the_core_works() -> None:
    # Checking a large index takes milliseconds, in which another Python thread must get on. On a busy machine it may
    # not get a core that often; with the GIL held it would never.
    scheduler = Scheduler()
    add_worker(scheduler, "w", num_blocks=100_000)
    scheduler.kv_stored("w", list(range(100_000)))
    stamps: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.is_set():
            stamps.append(time.perf_counter())

    def overlaps() -> bool:
        stamps.clear()
        begin = time.perf_counter()
        scheduler.check_integrity()
        end = time.perf_counter()
        quarter = (end - begin) / 4
        return any(begin + quarter < stamp < end - quarter for stamp in stamps)

    ticker = threading.Thread(target=tick)
    ticker.start()
    try:
        assert any(overlaps() for _ in range(50))
    finally:
        stop.set()
        ticker.join()


def test_ten_thousand_requests_leak_nothing(scheduler: Scheduler) -> None:
    for start in range(10_000):
        scheduler.route([start, 1, 2], model=MODEL).release()
    gc.collect()
    stats = scheduler.stats()
    assert (stats.num_reservations, stats.num_index_entries) == (0, 0)


def test_importing_starts_nothing_and_needs_neither_torch_nor_grpc() -> None:
    program = """
import sys, threading
import orchestra
orchestra.Scheduler(), orchestra.AsyncScheduler()
heavy = {"torch", "grpc", "google.protobuf", "numpy", "uvloop"} & set(sys.modules)
assert not heavy, heavy
assert threading.active_count() == 1
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
