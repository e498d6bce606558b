"""`AsyncScheduler`: waiting for room on asyncio and uvloop, in order, without leaks."""

import asyncio
import gc
import threading
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest
import uvloop

from orchestra import AsyncScheduler, Reservation, Scheduler, errors
from orchestra.scheduler import AdmissionClass

MODEL = "demo"
GIB = 1 << 30

Run = Callable[[Coroutine[Any, Any, None]], None]


def _run_asyncio(main: Coroutine[Any, Any, None]) -> None:
    asyncio.run(main)


def _run_uvloop(main: Coroutine[Any, Any, None]) -> None:
    uvloop.run(main)


@pytest.fixture(params=[_run_asyncio, _run_uvloop], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    runner: Run = request.param
    return runner


@pytest.fixture
def scheduler() -> Iterator[AsyncScheduler]:
    """One worker with room for one sequence."""
    scheduler = AsyncScheduler({"max_num_waiting": 4})
    scheduler.add_worker("w", model=MODEL, num_blocks=100, max_model_len=1000, max_num_seqs=1)
    yield scheduler
    scheduler.check_integrity()
    stats = scheduler.stats()
    assert (stats.num_reservations, stats.num_waiting_requests) == (0, 0), "something leaked"


async def until(condition: Callable[[], bool]) -> None:
    """Yields to the other tasks until the condition holds; the test's timeout is the limit."""
    while not condition():  # noqa: ASYNC110 the condition is in the core, which sets no event
        await asyncio.sleep(0)


def test_route_answers_at_once(run: Run, scheduler: AsyncScheduler) -> None:
    async def main() -> None:
        with (
            await scheduler.route([1], model=MODEL) as first,
            await scheduler.route([1], model=MODEL) as second,
        ):
            assert (first.worker, second.worker) == ("w", "w")

    run(main())


def test_those_that_wait_are_served_in_order(run: Run, scheduler: AsyncScheduler) -> None:
    served: list[int] = []

    async def request(number: int) -> None:
        with await scheduler.acquire([1], model=MODEL):
            served.append(number)
            await asyncio.sleep(0)

    async def main() -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(5):
                group.create_task(request(number))

    run(main())
    assert served == [0, 1, 2, 3, 4]


def test_a_full_queue_answers_at_once(run: Run, scheduler: AsyncScheduler) -> None:
    async def main() -> None:
        with await scheduler.acquire([1], model=MODEL):
            waiting = [asyncio.ensure_future(scheduler.acquire([1], model=MODEL)) for _ in range(4)]
            await until(lambda: scheduler.stats().num_waiting_requests == 4)
            with pytest.raises(errors.OverloadedError) as full:
                await scheduler.acquire([1], model=MODEL)
            assert (full.value.current, full.value.limit) == (4, 4)
        for task in waiting:
            (await task).release()

    run(main())


def test_a_timeout_leaves_the_queue(run: Run, scheduler: AsyncScheduler) -> None:
    async def main() -> None:
        with await scheduler.acquire([1], model=MODEL):
            with pytest.raises(TimeoutError) as late:
                await scheduler.acquire([1], model=MODEL, timeout=0.01)
            assert isinstance(late.value, errors.DeadlineExceededError)
            assert scheduler.stats().num_waiting_requests == 0

    run(main())


def test_a_cancelled_wait_leaves_the_queue_and_holds_nothing(
    run: Run, scheduler: AsyncScheduler
) -> None:
    async def main() -> None:
        with await scheduler.acquire([1], model=MODEL):
            first = asyncio.ensure_future(scheduler.acquire([1], model=MODEL))
            second = asyncio.ensure_future(scheduler.acquire([1], model=MODEL))
            await until(lambda: scheduler.stats().num_waiting_requests == 2)
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            assert scheduler.stats().num_waiting_requests == 1
        (await second).release()

    run(main())


def test_a_wait_cancelled_after_it_was_granted_gives_back(
    run: Run, scheduler: AsyncScheduler
) -> None:
    async def main() -> None:
        for steps_before_cancel in range(4):
            held = await scheduler.acquire([1], model=MODEL)
            task = asyncio.ensure_future(scheduler.acquire([1], model=MODEL))
            await until(lambda: scheduler.stats().num_waiting_requests == 1)
            held.release()  # grants: the outcome is on its way to the task
            for _ in range(steps_before_cancel):
                await asyncio.sleep(0)
            task.cancel()
            outcome = (await asyncio.gather(task, return_exceptions=True))[0]
            if isinstance(outcome, Reservation):
                outcome.release()
            # Whatever the moment, nothing stays reserved, so the next one gets in.
            (await scheduler.acquire([1], model=MODEL, timeout=5)).release()

    run(main())


@pytest.mark.parametrize("event", ["release", "add_worker", "end_of_drain", "load", "drop"])
def test_everything_that_makes_room_wakes(run: Run, scheduler: AsyncScheduler, event: str) -> None:
    async def main() -> None:
        held: list[Reservation] = []
        if event == "end_of_drain":
            scheduler.set_draining("w")
        elif event == "load":
            report = {"num_waiting": 0, "kv_blocks_used": 0, "queued_prefill_tokens": 0}
            scheduler.update_load("w", num_running=1, **report)
        else:
            held.append(await scheduler.acquire([1], model=MODEL))
        task = asyncio.ensure_future(scheduler.acquire([1], model=MODEL))
        await until(lambda: scheduler.stats().num_waiting_requests == 1)
        if event == "release":
            held[0].release()
        elif event == "drop":
            held.clear()
            gc.collect()
        elif event == "add_worker":
            scheduler.add_worker("v", model=MODEL, num_blocks=100, max_model_len=1000)
        elif event == "end_of_drain":
            scheduler.set_draining("w", is_draining=False)
        else:
            scheduler.update_load("w", num_running=0, **report)
        (await task).release()
        for reservation in held:
            reservation.release()

    run(main())


def test_what_can_never_be_is_refused_at_once_and_while_waiting(
    run: Run, scheduler: AsyncScheduler
) -> None:
    async def main() -> None:
        with pytest.raises(errors.ModelNotFoundError):
            await scheduler.acquire([1], model="other")
        with await scheduler.acquire([1], model=MODEL):
            with pytest.raises(errors.ContextTooLongError):
                await scheduler.acquire(range(999), model=MODEL)
            task = asyncio.ensure_future(scheduler.acquire([1], model=MODEL))
            await until(lambda: scheduler.stats().num_waiting_requests == 1)
            scheduler.remove_worker("w")
            with pytest.raises(errors.ModelNotFoundError):
                await task

    run(main())


def test_gangs_wait_too(run: Run, scheduler: AsyncScheduler) -> None:
    scheduler.add_gpu("g", domain="d", node="n", memory_bytes=GIB)

    async def main() -> None:
        with await scheduler.place(num_gpus=1, bytes_per_gpu=GIB):
            with pytest.raises(errors.DeadlineExceededError):
                await scheduler.place(num_gpus=1, bytes_per_gpu=GIB, timeout=0.01)
            with pytest.raises(errors.InvalidRequestError):
                await scheduler.place(num_gpus=2, bytes_per_gpu=GIB)
            task = asyncio.ensure_future(scheduler.place(num_gpus=1, bytes_per_gpu=GIB))
            await until(lambda: scheduler.stats().num_waiting_gangs == 1)
        with await task as placement:
            assert placement.gpus == (("g", 0, GIB),)

    run(main())


def test_room_made_by_another_thread_wakes(run: Run, scheduler: AsyncScheduler) -> None:
    async def main() -> None:
        held = await scheduler.acquire([1], model=MODEL)
        task = asyncio.ensure_future(scheduler.acquire([1], model=MODEL))
        await until(lambda: scheduler.stats().num_waiting_requests == 1)
        await asyncio.get_running_loop().run_in_executor(None, held.release)
        (await task).release()

    run(main())


def test_several_loops_share_one_scheduler(run: Run) -> None:
    shared = Scheduler()
    shared.add_worker("w", model=MODEL, num_blocks=100, max_model_len=1000, max_num_seqs=2)
    failures: list[BaseException] = []

    async def client(scheduler: AsyncScheduler) -> None:
        for _ in range(20):
            with await scheduler.acquire([1], model=MODEL):
                assert scheduler.workers()[0].num_reservations <= 2
                await asyncio.sleep(0)

    async def main() -> None:
        scheduler = AsyncScheduler(scheduler=shared)
        await asyncio.gather(*(client(scheduler) for _ in range(5)))

    def thread() -> None:
        try:
            run(main())
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=thread) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not failures
    shared.check_integrity()
    assert shared.stats().num_decisions == 400
    assert shared.stats().num_reservations == 0


def test_a_grant_to_a_closed_loop_goes_to_the_next(
    scheduler: AsyncScheduler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop that is closed without cancelling its tasks must not swallow the room."""
    reported: list[object] = []
    monkeypatch.setattr("sys.unraisablehook", reported.append)
    held = asyncio.run(scheduler.acquire([1], model=MODEL))
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda *_: None)  # that a task was pending is the point
    abandoned = loop.create_task(scheduler.acquire([1], model=MODEL))
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()

    async def main() -> None:
        task = asyncio.ensure_future(scheduler.acquire([1], model=MODEL))
        await until(lambda: scheduler.stats().num_waiting_requests == 2)
        held.release()
        (await task).release()

    asyncio.run(main())
    assert len(reported) == 1, "the closed loop is reported, not ignored"
    coroutine = abandoned.get_coro()
    assert coroutine is not None
    coroutine.close()


def test_config_and_scheduler_exclude_each_other() -> None:
    with pytest.raises(TypeError):
        AsyncScheduler({}, scheduler=Scheduler())


# === whose turn it is ===


async def wait_in_turn(
    scheduler: AsyncScheduler, *waits: tuple[str, AdmissionClass], max_tokens: int = 16
) -> list[int]:
    """Lets the waits begin in this order while the worker is busy; the order in which they were served."""
    served: list[int] = []

    async def wait(number: int, tenant: str, admission_class: AdmissionClass) -> None:
        with await scheduler.acquire(
            [1],
            model=MODEL,
            max_tokens=max_tokens,
            tenant=tenant,
            admission_class=admission_class,
        ):
            served.append(number)

    with await scheduler.acquire([1], model=MODEL):
        tasks = []
        for number, (tenant, admission_class) in enumerate(waits):
            tasks.append(asyncio.ensure_future(wait(number, tenant, admission_class)))
            await until(lambda: scheduler.stats().num_waiting_requests == len(tasks))
    await asyncio.gather(*tasks)
    return served


def test_urgent_requests_go_first(run: Run, scheduler: AsyncScheduler) -> None:
    async def main() -> None:
        waits = [("", "batch"), ("", "standard"), ("", "interactive")]
        assert await wait_in_turn(scheduler, *waits) == [2, 1, 0]  # type: ignore[arg-type]  # these are literals

    run(main())


def test_tenants_take_turns_by_weight(run: Run, scheduler: AsyncScheduler) -> None:
    async def main() -> None:
        flood: tuple[str, AdmissionClass] = ("flood", "standard")
        calm: tuple[str, AdmissionClass] = ("calm", "standard")
        assert await wait_in_turn(scheduler, flood, flood, flood, calm) == [0, 3, 1, 2]
        scheduler.set_tenant_weight("heavy", 10_000)
        heavy: tuple[str, AdmissionClass] = ("heavy", "standard")
        light: tuple[str, AdmissionClass] = ("light", "standard")
        assert await wait_in_turn(scheduler, light, light, heavy, heavy) == [0, 2, 3, 1]

    run(main())
    with pytest.raises(errors.InvalidRequestError) as wrong:
        scheduler.set_tenant_weight("heavy", 0)
    assert wrong.value.key == "weight"


def test_finish_settles_what_a_request_used(run: Run) -> None:
    scheduler = AsyncScheduler()
    scheduler.add_worker("w", model=MODEL, num_blocks=100, max_model_len=1000, max_num_seqs=1)
    served: list[int] = []

    async def wait(number: int, tenant: str) -> None:
        held = await scheduler.acquire([1], model=MODEL, max_tokens=900, tenant=tenant)
        served.append(number)
        if tenant == "modest":
            assert held.finish(1)
        assert held.release() == (tenant == "greedy"), "finished is released"

    async def main() -> None:
        tasks = []
        with await scheduler.acquire([1], model=MODEL):
            for number, tenant in enumerate(["modest"] * 3 + ["greedy"] * 2):
                tasks.append(asyncio.ensure_future(wait(number, tenant)))
                await until(lambda: scheduler.stats().num_waiting_requests == len(tasks))
        await asyncio.gather(*tasks)

    run(main())
    # Had the modest one kept silent too, the two would have taken turns to the end.
    assert served == [0, 3, 1, 2, 4]


def test_a_deadline_ends_the_wait_and_a_past_one_refuses_it(
    run: Run, scheduler: AsyncScheduler
) -> None:
    async def main() -> None:
        for deadline_s in (0, -1.5):
            with pytest.raises(errors.DeadlineExceededError):
                await scheduler.acquire([1], model=MODEL, deadline_s=deadline_s)
        with pytest.raises(errors.InvalidRequestError) as wrong:
            await scheduler.acquire([1], model=MODEL, deadline_s=float("nan"))
        assert wrong.value.key == "deadline_s"
        with await scheduler.acquire([1], model=MODEL, deadline_s=float("inf")):
            with pytest.raises(errors.DeadlineExceededError):
                await scheduler.acquire([1], model=MODEL, deadline_s=0.01, timeout=60)
            assert scheduler.stats().num_waiting_requests == 0

    run(main())


def test_a_prediction_refuses_what_would_come_too_late(run: Run) -> None:
    scheduler = AsyncScheduler({"refuse_hopeless": True})
    scheduler.add_worker("w", model=MODEL, num_blocks=100, max_model_len=1000, max_num_seqs=1)

    async def main() -> None:
        assert scheduler.predict_ttft([1], model=MODEL) is None
        with await scheduler.acquire([1] * 100, model=MODEL) as first:
            # So that the prompt has taken some time. uvloop's clock stands still within a turn: 1 ms can be none.
            await asyncio.sleep(0.01)
            assert first.prefill_done()
        assert scheduler.workers()[0].prefill_tokens_per_s > 0
        predicted = scheduler.predict_ttft([1] * 900, model=MODEL)
        assert predicted is not None
        assert predicted > 0.005
        with pytest.raises(errors.DeadlineExceededError, match="predicted"):
            await scheduler.acquire([1] * 900, model=MODEL, deadline_s=predicted / 2)
        (await scheduler.acquire([1] * 900, model=MODEL, deadline_s=60 + predicted)).release()

    run(main())
    scheduler.check_integrity()


def test_an_admission_class_that_is_none_is_refused(run: Run, scheduler: AsyncScheduler) -> None:
    async def main() -> None:
        with pytest.raises(errors.InvalidRequestError) as wrong:
            await scheduler.acquire([1], model=MODEL, admission_class="urgent")  # type: ignore[arg-type]  # that it is wrong
        assert wrong.value.key == "admission_class"
        with pytest.raises(errors.InvalidRequestError) as wrong:
            await scheduler.acquire([1], model=MODEL, tenant="x" * 129)
        assert wrong.value.key == "tenant"

    run(main())


def test_small_requests_go_on_beside_a_large_one_that_waits(run: Run) -> None:
    scheduler = AsyncScheduler()
    for name in ("a", "b"):
        scheduler.add_worker(name, model=MODEL, num_blocks=40, max_model_len=1000)

    async def main() -> None:
        def acquire(blocks: int) -> Coroutine[Any, Any, Reservation]:
            return scheduler.acquire([1], model=MODEL, max_tokens=16 * blocks - 1)

        running = [await acquire(30), await acquire(30)]
        large = asyncio.ensure_future(acquire(40))
        await until(lambda: scheduler.stats().num_waiting_requests == 1)
        small = [await acquire(5), await acquire(5)]
        assert small[0].worker == small[1].worker, "the other one is held for the large request"
        for reservation in running + small:
            reservation.release()
        (await large).release()

    run(main())
    scheduler.check_integrity()
