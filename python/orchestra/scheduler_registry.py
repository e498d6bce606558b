"""What both schedulers share: registering workers and GPUs, taking their reports, and reading state."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from orchestra import _core
from orchestra.scheduler_gpus import GpuRegistry
from orchestra.scheduler_types import (
    Candidate,
    Explanation,
    Ineligible,
    KvEvent,
    KvExchange,
    RouteOptions,
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

__all__ = ["Registry", "encode_token_ids"]


class Registry(GpuRegistry):
    """Everything but decisions; the base of both schedulers."""

    def __init__(
        self, config: SchedulerConfig | Mapping[str, int | str] | None, core: _core.Scheduler | None
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
        taints: Iterable[str] = (),
        slo_classes: Iterable[str] = (),
        max_loras: int = WorkerSpec.max_loras,
        kv_exchange: KvExchange | None = WorkerSpec.kv_exchange,
        role: WorkerRole = WorkerSpec.role,
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
                taints=list(taints),
                slo_classes=list(slo_classes),
                max_loras=max_loras,
                kv_exchange=kv_exchange,
                role=role,
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

    def set_loras(self, worker: str, loras: Iterable[str | tuple[str, int]]) -> None:
        """Takes a worker's report of the LoRA adapters that it has in memory, instead of those known so far.

        A worker that was chosen for an adapter counts as having it from then on, until it reports otherwise.

        Args:
            worker: Its name.
            loras: Names, or names with versions; at most its `max_loras`.

        Raises:
            InvalidRequestError: No worker of this name is registered, or a name is not 1 to 128 bytes long.
            OverloadedError: More than its `max_loras`.
        """
        versioned = [(lora, 0) if isinstance(lora, str) else lora for lora in loras]
        self._core.set_loras(worker, versioned)

    def block_hashes(
        self,
        worker: str,
        token_ids: TokenIds,
        *,
        salt: str = "",
        lora: str | None = None,
        lora_version: int = 0,
    ) -> list[int]:
        """Identities of the full KV blocks of `token_ids` on this worker, for `kv_stored` and `kv_removed`.

        Raises:
            InvalidRequestError: No worker of this name is registered, or a token id is out of range.
        """
        adapter = None if lora is None else (lora, lora_version)
        return self._core.block_hashes(worker, encode_token_ids(token_ids), salt, adapter)

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

    def apply_kv_events(self, worker: str, sequence: int, events: Sequence[KvEvent]) -> bool:
        """Takes one message of a worker's numbered KV events.

        A message that came before changes nothing. Where a number is left out, nobody knows what the worker dropped
        since: its cache counts as empty until `resync_kv`, or until an event clears it.

        Args:
            worker: Its name.
            sequence: The message's number; the first may have any, and each that follows has the next one.
            events: In order.

        Returns:
            Whether no message is missing; where it is `False`, ask the worker for all that it holds.

        Raises:
            InvalidRequestError: No worker of this name is registered, or an event is none.
            WorkerFailedError: It would hold more blocks than it has. Its cache counts as empty then.
        """
        return self._core.apply_kv_events(worker, sequence, events)

    def resync_kv(self, worker: str, sequence: int, hashes: Sequence[int]) -> None:
        """Takes all that a worker's prefix cache holds after its message number `sequence`.

        Raises:
            InvalidRequestError: No worker of this name is registered.
            WorkerFailedError: It would hold more blocks than it has. Nothing changes.
        """
        self._core.resync_kv(worker, sequence, hashes)

    def set_tenant_weight(self, tenant: str, weight: int) -> None:
        """Gives a tenant another share of what `AsyncScheduler.acquire` grants than the weight 100 that all have.

        Args:
            tenant: Its name, at most 128 bytes.
            weight: 1 to 10,000; 200 is twice the usual share. 100 takes the weight back.

        Raises:
            InvalidRequestError: A value is out of range.
            OverloadedError: As many tenants have a weight as may.
        """
        self._core.set_tenant_weight(tenant, weight)

    def predict_ttft(self, token_ids: TokenIds, **options: "Unpack[RouteOptions]") -> float | None:
        """Predicted seconds from now to a request's first token; arguments as for `route`.

        Returns:
            `None` where no worker takes it, or nothing is known yet: `Reservation.prefill_done` teaches speeds.

        Raises:
            InvalidRequestError: A token id is out of range.
        """
        request = _core.RouteRequest(encode_token_ids(token_ids), **options)
        micros = self._core.predict_ttft(request)
        return None if micros is None else micros / 1_000_000

    def explain(
        self, token_ids: TokenIds, *, k: int = 8, **options: "Unpack[RouteOptions]"
    ) -> Explanation:
        """The best `k` workers for a request and what each would cost. Reserves nothing; arguments as for `route`.

        Raises:
            InvalidRequestError: The prompt is empty or a value is out of range.
            ModelNotFoundError: No worker serves the model.
        """
        request = _core.RouteRequest(encode_token_ids(token_ids), **options)
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

    def snapshot(self, *, max_age_s: float = 0.01) -> Snapshot:
        """`stats` and `workers` as they were at most `max_age_s` seconds ago, for dashboards and metrics.

        All readers share one copy, so however many there are and however often they read, decisions wait for at most
        one copy in that time.
        """
        age_us, stats, rows = self._core.snapshot(int(max_age_s * 1e6))
        workers = tuple(WorkerStats(**row) for row in rows)
        return Snapshot(age_s=age_us / 1e6, stats=SchedulerStats(**stats), workers=workers)

    def check_integrity(self) -> None:
        """Asserts every invariant of the state; for tests, it walks all of it."""
        self._core.check_integrity()


def encode_token_ids(token_ids: TokenIds) -> Sequence[int] | bytes:
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
