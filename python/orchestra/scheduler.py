"""`Scheduler` and `AsyncScheduler`: Orchestra's decisions inside your own program, with no server and no torch.

Register workers and route token sequences to them, or register GPUs and place gangs on them. A decision reserves what
it promises, so the next decision sees it; give it back with `with`, with `release()`, or by dropping it.

    scheduler = Scheduler()
    scheduler.add_worker("gpu-0", model="demo", num_blocks=4096, max_model_len=8192)
    with scheduler.route(token_ids, model="demo", max_tokens=64) as reservation:
        send_to(reservation.worker)

Everything here is safe to call from any thread. `AsyncScheduler` adds waiting for room; it works with any event loop,
uvloop included, and from several at once.
"""

import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from orchestra import _core
from orchestra._core import KvFetch, KvSplit, Placement, Reservation
from orchestra.errors import DeadlineExceededError, InvalidRequestError, OrchestraError
from orchestra.scheduler_gpus import DomainMemory, GpuSpec, PlaceOptions, place_request
from orchestra.scheduler_registry import Registry, encode_token_ids
from orchestra.scheduler_types import (
    AdmissionClass,
    Candidate,
    Explanation,
    Ineligible,
    KvEvent,
    KvExchange,
    RouteOptions,
    RoutePolicy,
    SchedulerConfig,
    SchedulerStats,
    Snapshot,
    TokenIds,
    WorkerRole,
    WorkerSpec,
    WorkerStats,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "AdmissionClass",
    "AsyncScheduler",
    "Candidate",
    "DomainMemory",
    "Explanation",
    "GpuSpec",
    "Ineligible",
    "KvEvent",
    "KvExchange",
    "KvFetch",
    "KvSplit",
    "PlaceOptions",
    "Placement",
    "Reservation",
    "RouteOptions",
    "RoutePolicy",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerStats",
    "Snapshot",
    "TokenIds",
    "WorkerRole",
    "WorkerSpec",
    "WorkerStats",
]


class Scheduler(Registry):
    """Chooses workers for requests and GPUs for gangs.

    Args:
        config: Limits, as a `SchedulerConfig` or as a mapping with some of its fields.

    Raises:
        ConfigError: A setting is wrong; `key` names it.
    """

    def __init__(self, config: SchedulerConfig | Mapping[str, int | str] | None = None) -> None:
        super().__init__(config, None)

    def route(self, token_ids: TokenIds, **options: "Unpack[RouteOptions]") -> Reservation:
        """Places a request on the worker that the policy chooses and reserves for it.

        Workers that have room now come first; where none has, the best one takes the request all the same and
        queues it. `AsyncScheduler.acquire` waits for room instead.

        Args:
            token_ids: The prompt.
            **options: `RouteOptions`: `model`, which must be given, `max_tokens`, `salt`, `lora`, `exclude` and others.

        Raises:
            InvalidRequestError: The prompt is empty or a value is out of range.
            ModelNotFoundError: No worker serves the model on the request's terms; `key` names the term.
            ContextTooLongError: No worker could ever hold prompt and output.
            WorkerUnavailableError: Every worker of the model is draining or excluded.
            OverloadedError: As many reservations are held as may be.
        """
        return self._core.route(_core.RouteRequest(encode_token_ids(token_ids), **options))

    def decide_batch(
        self, prompts: TokenIds, ends: Sequence[int], **options: "Unpack[RouteOptions]"
    ) -> list[Reservation | OrchestraError]:
        """Routes many requests at once: in order, each seeing the reservations of those before it.

        The interpreter's lock is free meanwhile, and prompts in one 32-bit buffer are not looked at token by token in
        Python.

        Args:
            prompts: The token ids of all prompts, end to end.
            ends: Where each prompt ends in `prompts`; the last one is its length.
            **options: As for `route`, for all of them.

        Returns:
            For each a reservation, or the error that refuses it.

        Raises:
            InvalidRequestError: `ends` does not fit `prompts`, or a token id is out of range. Nothing was decided.
        """
        request = _core.RouteRequest((), **options)
        return self._core.decide_batch(request, encode_token_ids(prompts), ends)  # type: ignore[return-value]  # only these

    def place(self, **options: "Unpack[PlaceOptions]") -> Placement:
        """Takes memory on a gang of GPUs, all or nothing.

        Args:
            **options: `PlaceOptions`: `num_gpus` and `bytes_per_gpu`, which must be given, `num_stages`, `layout`,
                `priority` and others.

        Raises:
            InvalidRequestError: A value is out of range, or the gang would not fit if all memory were free.
            WorkerUnavailableError: It does not fit now.
            OverloadedError: As many placements are held as may be.
        """
        return self._core.place(place_request(options))

    def place_batch(self, requests: Sequence[PlaceOptions]) -> list[Placement | OrchestraError]:
        """Places gangs that arrived together: by priority, then the largest first, which packs better.

        Returns:
            For each, in the order of the requests, a placement or the error that refuses it.
        """
        batch = [place_request(options) for options in requests]
        return self._core.place_batch(batch)  # type: ignore[return-value]  # only these


_Held = TypeVar("_Held", Reservation, Placement)


class AsyncScheduler(Registry):
    """`Scheduler` for asyncio: `acquire` and `place` wait for room.

    Requests for one model share its workers by admission class and tenant, and none is overtaken more often than the
    configuration allows; docs/admission.md has the order. Gangs wait first come first served. Room comes from anything
    that happens to the scheduler, in any thread; nothing polls.

    Args:
        config: Limits, as a `SchedulerConfig` or as a mapping with some of its fields.
        scheduler: Share the workers, GPUs and reservations of this one, instead of starting empty.

    Raises:
        ConfigError: A setting is wrong; `key` names it.
    """

    def __init__(
        self,
        config: SchedulerConfig | Mapping[str, int | str] | None = None,
        *,
        scheduler: Scheduler | None = None,
    ) -> None:
        if config is not None and scheduler is not None:
            raise TypeError("give config or scheduler: a shared scheduler has its configuration")
        super().__init__(config, None if scheduler is None else scheduler._core)

    async def route(self, token_ids: TokenIds, **options: "Unpack[RouteOptions]") -> Reservation:
        """As `Scheduler.route`: decides at once, which takes microseconds."""
        return self._core.route(_core.RouteRequest(encode_token_ids(token_ids), **options))

    async def acquire(
        self,
        token_ids: TokenIds,
        *,
        timeout: float | None = None,
        deadline_s: float | None = None,
        **options: "Unpack[RouteOptions]",
    ) -> Reservation:
        """Waits until a worker has room for the request, and reserves it.

        Cancelling the wait leaves the queue and holds nothing.

        Args:
            token_ids: The prompt.
            timeout: Seconds to wait at most.
            deadline_s: Seconds in which the first token is wanted. The wait ends then; with `refuse_hopeless` it
                does not begin where the first token is predicted to come later.
            **options: As for `Scheduler.route`. `admission_class` and `tenant` say whose turn it is.

        Raises:
            DeadlineExceededError: There was no room within `timeout` or `deadline_s`, or none is expected.
            OverloadedError: As many requests wait as may; `retry_after_ms` says for how long, where that is known.
            InvalidRequestError: The prompt is empty or a value is out of range.
            ModelNotFoundError: No worker serves the model, or the last one was removed meanwhile.
            ContextTooLongError: No worker could ever hold prompt and output.
        """
        request = _core.RouteRequest(encode_token_ids(token_ids), **options)
        deadline_us = None if deadline_s is None else _micros(deadline_s)
        limits = [limit for limit in (timeout, deadline_s) if limit is not None]
        return await _wait(
            lambda on_outcome: self._core.acquire(request, on_outcome, deadline_us),
            min(limits, default=None),
        )

    async def place(
        self,
        *,
        timeout: float | None = None,
        **options: "Unpack[PlaceOptions]",
    ) -> Placement:
        """Waits until the gang fits, and takes its memory; arguments as for `Scheduler.place`.

        Cancelling the wait leaves the queue and holds nothing.

        Raises:
            DeadlineExceededError: There was no room within `timeout` seconds.
            OverloadedError: As many gangs wait as may.
            InvalidRequestError: A value is out of range, or the gang would not fit if all memory were free.
        """
        request = place_request(options)
        return await _wait(lambda on_outcome: self._core.acquire_gpus(request, on_outcome), timeout)


def _micros(deadline_s: float) -> int:
    """A deadline as the core takes it; one that is past is now, one that never comes is in a thousand years."""
    if math.isnan(deadline_s):
        raise InvalidRequestError("deadline_s must be a number of seconds", key="deadline_s")
    return int(min(max(deadline_s, 0.0), 3.2e10) * 1_000_000)


async def _wait(
    ask: Callable[[Callable[[_Held | Exception], None]], _Held | _core.Ticket],
    timeout: float | None,
) -> _Held:
    """Asks; where the answer is a ticket, waits for the outcome, which may come from any thread."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_Held] = loop.create_future()
    answer = ask(lambda outcome: _hand_over(loop, future, outcome))
    if not isinstance(answer, _core.Ticket):
        return answer
    timer = None if timeout is None else loop.call_later(timeout, _expire, future, timeout)
    try:
        return await future
    except BaseException:
        # Cancelled, timed out or refused. Nobody will take an outcome that is under way or has just arrived.
        answer.cancel()
        if future.done():
            if not future.cancelled() and future.exception() is None:
                future.result().release()
        elif not loop.is_closed():
            future.cancel()
        raise
    finally:
        if timer is not None:
            timer.cancel()


def _hand_over(
    loop: asyncio.AbstractEventLoop, future: "asyncio.Future[_Held]", outcome: _Held | Exception
) -> None:
    """Called from whichever thread made room. Raises where the loop is closed; then the outcome is taken back."""
    loop.call_soon_threadsafe(_settle, future, outcome)


def _settle(future: "asyncio.Future[_Held]", outcome: _Held | Exception) -> None:
    if future.done():
        if not isinstance(outcome, Exception):
            outcome.release()
    elif isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def _expire(future: "asyncio.Future[Any]", timeout: float) -> None:
    if not future.done():
        future.set_exception(DeadlineExceededError(f"there was no room within {timeout} s"))
