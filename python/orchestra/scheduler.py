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
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from orchestra import _core
from orchestra._core import Placement, Reservation
from orchestra.errors import DeadlineExceededError
from orchestra.scheduler_types import (
    Candidate,
    Explanation,
    Ineligible,
    SchedulerConfig,
    SchedulerStats,
    TokenIds,
    WorkerSpec,
    WorkerStats,
)

__all__ = [
    "AsyncScheduler",
    "Candidate",
    "Explanation",
    "Ineligible",
    "Placement",
    "Reservation",
    "Scheduler",
    "SchedulerConfig",
    "SchedulerStats",
    "TokenIds",
    "WorkerSpec",
    "WorkerStats",
]


class _Registry:
    """What both schedulers share: registering workers and GPUs, their reports, and reading state."""

    def __init__(
        self, config: SchedulerConfig | Mapping[str, int] | None, core: _core.Scheduler | None
    ) -> None:
        if isinstance(config, SchedulerConfig):
            config = dataclasses.asdict(config)
        self._core = _core.Scheduler(dict(config or {})) if core is None else core

    def add_worker(
        self,
        name: str,
        *,
        model: str,
        num_blocks: int,
        max_model_len: int,
        block_size: int = WorkerSpec.block_size,
        max_num_seqs: int = WorkerSpec.max_num_seqs,
        weights_epoch: int = WorkerSpec.weights_epoch,
    ) -> None:
        """Registers a worker with an empty prefix cache and no load; see `WorkerSpec`.

        Raises:
            InvalidRequestError: A value is out of range, or the name is taken.
            OverloadedError: As many workers are registered as may be.
        """
        self._core.add_worker(
            WorkerSpec(
                name=name,
                model=model,
                num_blocks=num_blocks,
                max_model_len=max_model_len,
                block_size=block_size,
                max_num_seqs=max_num_seqs,
                weights_epoch=weights_epoch,
            )
        )

    def remove_worker(self, name: str) -> bool:
        """Forgets a worker, what it cached, and every reservation on it; `False` if it is not registered."""
        return self._core.remove_worker(name)

    def set_draining(self, worker: str, *, is_draining: bool = True) -> None:
        """A draining worker takes no new requests and keeps its reservations.

        Raises:
            InvalidRequestError: No worker of this name is registered.
        """
        self._core.set_draining(worker, is_draining)

    def update_load(
        self,
        worker: str,
        *,
        num_running: int,
        num_waiting: int,
        kv_blocks_used: int,
        queued_prefill_tokens: int,
    ) -> None:
        """Takes a worker's own report of its load; without any, the reservations made here are what counts.

        Args:
            worker: Its name.
            num_running: Sequences in its running batch.
            num_waiting: Sequences accepted and not yet running.
            kv_blocks_used: KV blocks that sequences hold; blocks that are only cached count as free.
            queued_prefill_tokens: Prompt tokens accepted and not yet computed.

        Raises:
            InvalidRequestError: No worker of this name is registered.
        """
        self._core.update_load(
            worker,
            num_running=num_running,
            num_waiting=num_waiting,
            kv_blocks_used=kv_blocks_used,
            queued_prefill_tokens=queued_prefill_tokens,
        )

    def block_hashes(self, worker: str, token_ids: TokenIds, *, salt: str = "") -> list[int]:
        """Identities of the full KV blocks of `token_ids` on this worker, for `kv_stored` and `kv_removed`.

        Raises:
            InvalidRequestError: No worker of this name is registered, or a token id is out of range.
        """
        return self._core.block_hashes(worker, _encode(token_ids), salt)

    def kv_stored(self, worker: str, hashes: list[int]) -> None:
        """The worker's prefix cache holds these blocks from now on.

        Raises:
            InvalidRequestError: No worker of this name is registered.
            WorkerFailedError: It would hold more blocks than it has. Nothing changes.
        """
        self._core.kv_stored(worker, hashes)

    def kv_removed(self, worker: str, hashes: list[int]) -> None:
        """The worker's prefix cache holds these blocks no longer.

        Raises:
            InvalidRequestError: No worker of this name is registered.
        """
        self._core.kv_removed(worker, hashes)

    def kv_cleared(self, worker: str) -> None:
        """The worker's prefix cache is empty from now on.

        Raises:
            InvalidRequestError: No worker of this name is registered.
        """
        self._core.kv_cleared(worker)

    def add_gpu(self, name: str, *, domain: str, node: str, memory_bytes: int) -> None:
        """Registers a GPU, all of its memory free.

        Args:
            name: Unique among the registered GPUs, 1 to 128 bytes.
            domain: GPUs of one domain reach each other at full speed (an NVSwitch island).
            node: The machine that it is in.
            memory_bytes: Memory that may be given out; rounded down to whole extents.

        Raises:
            InvalidRequestError: A value is out of range, or the name is taken.
            OverloadedError: As many GPUs are registered as may be.
        """
        self._core.add_gpu(name, domain, node, memory_bytes)

    def remove_gpu(self, name: str) -> bool:
        """Forgets a GPU and every placement that it was part of; `False` if it is not registered."""
        return self._core.remove_gpu(name)

    def explain(
        self,
        token_ids: TokenIds,
        *,
        model: str,
        max_tokens: int = 16,
        salt: str = "",
        exclude: Iterable[str] = (),
        k: int = 8,
    ) -> Explanation:
        """The best `k` workers for a request and what each would cost. Reserves nothing; arguments as for `route`.

        Raises:
            InvalidRequestError: The prompt is empty or a value is out of range.
            ModelNotFoundError: No worker serves the model.
        """
        request = _request(token_ids, model, max_tokens, salt, exclude)
        candidates, num_more_candidates, ineligible = self._core.explain(request, k)
        return Explanation(
            candidates=tuple(Candidate(**row) for row in candidates),
            num_more_candidates=num_more_candidates,
            ineligible=tuple(Ineligible(**row) for row in ineligible),
        )

    def workers(self) -> list[WorkerStats]:
        """Every worker's figures, in order of registration."""
        return [WorkerStats(**row) for row in self._core.workers()]

    def stats(self) -> SchedulerStats:
        """Figures of the scheduler."""
        return SchedulerStats(**self._core.stats())

    def check_integrity(self) -> None:
        """Asserts every invariant of the state; for tests, it walks all of it."""
        self._core.check_integrity()


class Scheduler(_Registry):
    """Chooses workers for requests and GPUs for gangs.

    Args:
        config: Limits, as a `SchedulerConfig` or as a mapping with some of its fields.

    Raises:
        ConfigError: A setting is wrong; `key` names it.
    """

    def __init__(self, config: SchedulerConfig | Mapping[str, int] | None = None) -> None:
        super().__init__(config, None)

    def route(
        self,
        token_ids: TokenIds,
        *,
        model: str,
        max_tokens: int = 16,
        salt: str = "",
        exclude: Iterable[str] = (),
    ) -> Reservation:
        """Places a request on the worker of least cost and reserves for it.

        Workers that have room now come first; where none has, the best one takes the request all the same and
        queues it. `AsyncScheduler.acquire` waits for room instead.

        Args:
            token_ids: The prompt.
            model: The model.
            max_tokens: Most output tokens.
            salt: Isolates the prefix cache: requests share KV only where it is equal.
            exclude: Names of workers that may not take it, for example because they failed it before.

        Raises:
            InvalidRequestError: The prompt is empty or a value is out of range.
            ModelNotFoundError: No worker serves the model.
            ContextTooLongError: No worker could ever hold prompt and output.
            WorkerUnavailableError: Every worker of the model is draining or excluded.
            OverloadedError: As many reservations are held as may be.
        """
        return self._core.route(_request(token_ids, model, max_tokens, salt, exclude))

    def place(self, *, num_gpus: int, bytes_per_gpu: int) -> Placement:
        """Takes a contiguous piece of memory on each of `num_gpus` GPUs of one domain.

        Raises:
            InvalidRequestError: A value is out of range, or the gang would not fit if all memory were free.
            WorkerUnavailableError: It does not fit now.
            OverloadedError: As many placements are held as may be.
        """
        return self._core.place(num_gpus, bytes_per_gpu)


_Held = TypeVar("_Held", Reservation, Placement)


class AsyncScheduler(_Registry):
    """`Scheduler` for asyncio: `acquire` and `place` wait for room, first come first served.

    Requests for one model wait in one queue, gangs in another; nobody overtakes, so nobody starves. Room comes from
    anything that happens to the scheduler, in any thread; nothing polls.

    Args:
        config: Limits, as a `SchedulerConfig` or as a mapping with some of its fields.
        scheduler: Share the workers, GPUs and reservations of this one, instead of starting empty.

    Raises:
        ConfigError: A setting is wrong; `key` names it.
    """

    def __init__(
        self,
        config: SchedulerConfig | Mapping[str, int] | None = None,
        *,
        scheduler: Scheduler | None = None,
    ) -> None:
        if config is not None and scheduler is not None:
            raise TypeError("give config or scheduler: a shared scheduler has its configuration")
        super().__init__(config, None if scheduler is None else scheduler._core)

    async def route(
        self,
        token_ids: TokenIds,
        *,
        model: str,
        max_tokens: int = 16,
        salt: str = "",
        exclude: Iterable[str] = (),
    ) -> Reservation:
        """As `Scheduler.route`: decides at once, which takes microseconds."""
        return self._core.route(_request(token_ids, model, max_tokens, salt, exclude))

    async def acquire(
        self,
        token_ids: TokenIds,
        *,
        model: str,
        max_tokens: int = 16,
        salt: str = "",
        exclude: Iterable[str] = (),
        timeout: float | None = None,
    ) -> Reservation:
        """Waits until a worker has room for the request, and reserves it; arguments as for `Scheduler.route`.

        Cancelling the wait leaves the queue and holds nothing.

        Raises:
            DeadlineExceededError: There was no room within `timeout` seconds.
            OverloadedError: As many requests wait as may.
            InvalidRequestError: The prompt is empty or a value is out of range.
            ModelNotFoundError: No worker serves the model, or the last one was removed meanwhile.
            ContextTooLongError: No worker could ever hold prompt and output.
        """
        request = _request(token_ids, model, max_tokens, salt, exclude)
        return await _wait(lambda on_outcome: self._core.acquire(request, on_outcome), timeout)

    async def place(
        self,
        *,
        num_gpus: int,
        bytes_per_gpu: int,
        timeout: float | None = None,
    ) -> Placement:
        """Waits until the gang fits, and takes its memory; arguments as for `Scheduler.place`.

        Cancelling the wait leaves the queue and holds nothing.

        Raises:
            DeadlineExceededError: There was no room within `timeout` seconds.
            OverloadedError: As many gangs wait as may.
            InvalidRequestError: A value is out of range, or the gang would not fit if all memory were free.
        """
        return await _wait(
            lambda on_outcome: self._core.acquire_gpus(num_gpus, bytes_per_gpu, on_outcome), timeout
        )


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


def _request(
    token_ids: TokenIds, model: str, max_tokens: int, salt: str, exclude: Iterable[str]
) -> _core.RouteRequest:
    return _core.RouteRequest(model, _encode(token_ids), max_tokens, salt, list(exclude))


def _encode(token_ids: TokenIds) -> Sequence[int] | bytes:
    """Buffers of 32-bit integers travel as bytes; everything else as it is."""
    if isinstance(token_ids, (list, tuple)):
        return token_ids
    try:
        view = memoryview(token_ids)  # type: ignore[arg-type]  # Buffer has no type before Python 3.12
    except TypeError:
        return token_ids  # type: ignore[return-value]  # a sequence, or refused by the core
    if view.ndim == 1 and view.itemsize == 4 and view.format in ("i", "I", "l", "L"):
        return view.tobytes()
    return view.tolist()
