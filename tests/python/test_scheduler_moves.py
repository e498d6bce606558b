"""`Scheduler`: workers that give each other KV, and reservations that say what is to come from whom."""

import pytest

from orchestra import Reservation, Scheduler, errors
from orchestra.scheduler import KvExchange, WorkerRole

MODEL = "demo"
SHAPE = KvExchange(layout="bf16", bytes_per_block=1000)
PROMPT = list(range(1000))


def add_worker(
    scheduler: Scheduler,
    name: str,
    role: WorkerRole = "both",
    shape: KvExchange | None = SHAPE,
) -> None:
    scheduler.add_worker(
        name, model=MODEL, num_blocks=1000, max_model_len=4096, kv_exchange=shape, role=role
    )


def hold_prompt(scheduler: Scheduler, worker: str) -> None:
    """The worker has the prompt's KV, and is too busy for another request."""
    scheduler.kv_stored(worker, scheduler.block_hashes(worker, PROMPT))
    scheduler.update_load(
        worker, num_running=200, num_waiting=0, kv_blocks_used=0, queued_prefill_tokens=9000
    )


def num_reservations(scheduler: Scheduler) -> dict[str, int]:
    return {worker.name: worker.num_reservations for worker in scheduler.workers()}


def test_a_worker_fetches_from_who_holds_the_blocks() -> None:
    scheduler = Scheduler()
    for name in ("holder", "taker"):
        add_worker(scheduler, name)
    hold_prompt(scheduler, "holder")
    with scheduler.route(PROMPT, model=MODEL) as reservation:
        assert reservation.worker == "taker"
        fetch = reservation.fetch
        assert fetch is not None
        assert (fetch.source, fetch.num_blocks) == ("holder", 62)
        assert 0 < fetch.saved_tokens < 62 * 16
        assert "holder" in repr(fetch)
        assert reservation.split is None
        assert reservation.move_wait_s == 5.0, "nobody knows yet how long anything takes"
        assert not reservation.split_done()
        assert reservation.fetch_done(62 * 16)
        assert reservation.prefill_done()
    assert not reservation.fetch_done(62 * 16)
    scheduler.check_integrity()


@pytest.mark.parametrize("shape", [None, KvExchange(layout="fp8", bytes_per_block=1000)])
def test_workers_of_other_blocks_fetch_nothing(shape: KvExchange | None) -> None:
    scheduler = Scheduler()
    add_worker(scheduler, "holder")
    add_worker(scheduler, "other", shape=shape)
    hold_prompt(scheduler, "holder")
    with scheduler.route(PROMPT, model=MODEL, exclude=["holder"]) as reservation:
        assert reservation.worker == "other"
        assert (reservation.fetch, reservation.move_wait_s) == (None, 0.0)
        assert not reservation.fetch_done(16)


def route_split(scheduler: Scheduler) -> Reservation:
    """A request to a worker that decodes another one already."""
    add_worker(scheduler, "p", "prefill")
    add_worker(scheduler, "d", "decode")
    scheduler.update_load(
        "d", num_running=8, num_waiting=0, kv_blocks_used=8, queued_prefill_tokens=0
    )
    reservation = scheduler.route(PROMPT, model=MODEL)
    split = reservation.split
    assert split is not None
    assert (reservation.worker, split.helper, split.num_blocks) == ("d", "p", 62)
    assert "helper='p'" in repr(split).replace('"', "'")
    assert num_reservations(scheduler) == {"p": 1, "d": 1}
    return reservation


def test_a_long_prompt_is_computed_by_a_helper_whose_room_goes_when_it_is_done() -> None:
    scheduler = Scheduler()
    reservation = route_split(scheduler)
    assert (reservation.fetch, reservation.move_wait_s) == (None, 60.0)
    assert reservation.split_done()
    assert not reservation.split_done()
    assert num_reservations(scheduler) == {"p": 0, "d": 1}
    assert reservation.release()
    scheduler.check_integrity()


@pytest.mark.parametrize("end", ["release", "finish", "drop"])
def test_a_helpers_room_goes_with_the_reservation(end: str) -> None:
    scheduler = Scheduler()
    reservation = route_split(scheduler)
    if end == "release":
        reservation.release()
    if end == "finish":
        reservation.finish(3)
    del reservation
    assert num_reservations(scheduler) == {"p": 0, "d": 0}
    scheduler.check_integrity()


def test_waits_are_bounded_by_the_settings() -> None:
    scheduler = Scheduler({"split_wait_max_ms": 700})
    assert route_split(scheduler).move_wait_s == pytest.approx(0.7)
    for field in ("fetch_wait_max_ms", "split_wait_max_ms"):
        for value in (0, 60_001):
            with pytest.raises(errors.ConfigError) as raised:
                Scheduler({field: value})
            assert raised.value.key == field


@pytest.mark.parametrize(
    ("terms", "field"),
    [
        ({"role": "writer"}, "role"),
        ({"kv_exchange": KvExchange(layout="", bytes_per_block=1)}, "kv_exchange.layout"),
        ({"kv_exchange": KvExchange("l", 0)}, "kv_exchange.bytes_per_block"),
    ],
)
def test_what_no_worker_can_be_is_refused(terms: dict[str, object], field: str) -> None:
    scheduler = Scheduler()
    with pytest.raises(errors.InvalidRequestError, match=field.rsplit(".", 1)[-1]):
        scheduler.add_worker("w", model=MODEL, num_blocks=9, max_model_len=99, **terms)  # type: ignore[arg-type]
    assert scheduler.workers() == []
