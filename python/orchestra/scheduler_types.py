"""What goes into a scheduler and what it tells: settings, specs and figures."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, Protocol, TypeAlias

from orchestra import _core

__all__ = [
    "Candidate",
    "Explanation",
    "Ineligible",
    "SchedulerConfig",
    "SchedulerStats",
    "TokenIds",
    "WorkerSpec",
    "WorkerStats",
]


class _Buffer(Protocol):
    """A one-dimensional buffer of integers, such as `array.array` or a numpy array."""

    def __len__(self) -> int: ...
    def tobytes(self) -> bytes: ...


TokenIds: TypeAlias = Sequence[int] | _Buffer
"""A sequence of token ids, or a one-dimensional buffer of them; 32-bit buffers are the fastest."""

_DEFAULTS = _core.default_scheduler_config()


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """Limits of a scheduler. The defaults are the core's own.

    Attributes:
        max_num_workers: Most workers that may be registered.
        max_num_gpus: Most GPUs that may be registered.
        max_num_reservations: Most reservations and placements held at once, counted apart.
        max_num_waiting: Most requests that may wait for room, for workers and for GPUs counted apart.
        extent_bytes: GPU memory is given out in multiples of this; a power of two.
    """

    max_num_workers: int = _DEFAULTS["max_num_workers"]
    max_num_gpus: int = _DEFAULTS["max_num_gpus"]
    max_num_reservations: int = _DEFAULTS["max_num_reservations"]
    max_num_waiting: int = _DEFAULTS["max_num_waiting"]
    extent_bytes: int = _DEFAULTS["extent_bytes"]


@dataclasses.dataclass(frozen=True)
class WorkerSpec:
    """What a worker is; fixed while it is registered.

    Attributes:
        name: Unique among the registered workers, 1 to 128 bytes.
        model: The model that it serves, 1 to 128 bytes.
        num_blocks: KV blocks in all.
        max_model_len: Most prompt and output tokens of one sequence.
        block_size: Tokens per KV block.
        max_num_seqs: Most sequences in one step.
        weights_epoch: Version of the weights; part of every KV block's identity.
    """

    name: str
    model: str
    num_blocks: int
    max_model_len: int
    block_size: int = 16
    max_num_seqs: int = 256
    weights_epoch: int = 0


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A worker that may take a request, and what that would cost.

    Attributes:
        worker: Its name.
        cost: (prefill tokens left to compute there + prefill tokens queued there) x (batch there + 1).
        has_room: Whether it could start the request now: free KV for all of it and a place in the batch.
        num_cached_tokens: Prompt tokens whose KV it holds already.
        queued_prefill_tokens: Prompt tokens that wait to be computed there.
        batch: Sequences that run or wait there.
        num_blocks: KV blocks of prompt and output together, in its block size.
        kv_blocks_free: KV blocks that nothing holds and nothing was promised.
    """

    worker: str
    cost: int
    has_room: bool
    num_cached_tokens: int
    queued_prefill_tokens: int
    batch: int
    num_blocks: int
    kv_blocks_free: int


@dataclasses.dataclass(frozen=True)
class Ineligible:
    """A worker of the right model that may not take a request, and why.

    Attributes:
        worker: Its name.
        reason: Why not.
        requested: Tokens or KV blocks that the request needs, where size is the reason.
        limit: How many the worker has in all.
    """

    worker: str
    reason: Literal["excluded", "draining", "context_too_long", "kv_too_large"]
    requested: int | None
    limit: int | None


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Why a request would go where it would go.

    Attributes:
        candidates: The best workers, best first; the first is the one that `route` would choose.
        num_more_candidates: How many more could take the request.
        ineligible: The workers of the model that could not, and why.
    """

    candidates: tuple[Candidate, ...]
    num_more_candidates: int
    ineligible: tuple[Ineligible, ...]


@dataclasses.dataclass(frozen=True)
class WorkerStats:
    """A worker's figures as routing sees them.

    Attributes:
        name: Its name.
        model: The model that it serves.
        is_draining: Whether it takes no new requests.
        batch: Sequences that run or wait there.
        queued_prefill_tokens: Prompt tokens that wait to be computed there.
        kv_blocks_free: KV blocks that nothing holds and nothing was promised.
        kv_blocks_total: KV blocks in all.
        num_cached_blocks: Blocks of its prefix cache that the scheduler knows.
        num_reservations: Reservations held on it.
    """

    name: str
    model: str
    is_draining: bool
    batch: int
    queued_prefill_tokens: int
    kv_blocks_free: int
    kv_blocks_total: int
    num_cached_blocks: int
    num_reservations: int


@dataclasses.dataclass(frozen=True)
class SchedulerStats:
    """Figures of a scheduler.

    Attributes:
        num_workers: Registered workers.
        num_draining: Of these, how many drain.
        num_index_blocks: Distinct KV blocks in the prefix index.
        num_index_entries: (block, holder) pairs in the prefix index.
        index_bytes: Memory of the prefix index.
        num_reservations: Reservations held.
        reservation_age_us_max: Age of the oldest one, microseconds: without end, it was never released.
        num_waiting_requests: Requests that wait for a worker.
        num_waiting_gangs: Gangs that wait for GPUs.
        num_decisions: Reservations made since start.
        num_gpus: Registered GPUs.
        num_placements: Placements held.
        gpu_bytes_total: GPU memory that may be given out.
        gpu_bytes_free: Of it, how much is free, in pieces of any size.
    """

    num_workers: int
    num_draining: int
    num_index_blocks: int
    num_index_entries: int
    index_bytes: int
    num_reservations: int
    reservation_age_us_max: int
    num_waiting_requests: int
    num_waiting_gangs: int
    num_decisions: int
    num_gpus: int
    num_placements: int
    gpu_bytes_total: int
    gpu_bytes_free: int
