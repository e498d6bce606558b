"""What goes into a scheduler and what it tells: settings, specs and figures."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol, TypeAlias, TypedDict

from orchestra import _core

__all__ = [
    "AdmissionClass",
    "Candidate",
    "Explanation",
    "Ineligible",
    "KvEvent",
    "KvExchange",
    "RouteOptions",
    "RoutePolicy",
    "SchedulerConfig",
    "SchedulerStats",
    "Snapshot",
    "TokenIds",
    "WorkerRole",
    "WorkerSpec",
    "WorkerStats",
]


class _Buffer(Protocol):
    """A one-dimensional buffer of integers, such as `array.array` or a numpy array."""

    def __len__(self) -> int: ...
    def tobytes(self) -> bytes: ...


TokenIds: TypeAlias = Sequence[int] | _Buffer
"""A sequence of token ids, or a one-dimensional buffer of them; 32-bit buffers are the fastest."""

RoutePolicy: TypeAlias = Literal[
    "product",
    "prefix_sum",
    "load_only",
    "transfer_aware",
    "round_robin",
    "random",
    "power_of_two",
    "least_requests",
    "least_tokens",
    "consistent_hash",
]
"""How a worker is chosen; docs/routing.md has each one's formula and use."""

AdmissionClass: TypeAlias = Literal["interactive", "standard", "batch"]
"""How urgent a request is while it waits; docs/admission.md says what each gets."""

KvEvent: TypeAlias = tuple[Literal["stored", "removed", "cleared"], Sequence[int]]
"""A change of what a worker's prefix cache holds: its kind and the blocks' hashes, none where all is gone."""

_DEFAULTS = _core.default_scheduler_config()


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """Limits of a scheduler. The defaults are the core's own.

    Attributes:
        max_num_workers: Most workers that may be registered.
        max_num_gpus: Most GPUs that may be registered.
        max_num_reservations: Most reservations and placements held at once, counted apart.
        max_num_waiting: Most requests that may wait for room, for workers and for GPUs counted apart.
        max_num_waiting_per_tenant: Most requests of one tenant that may wait for a worker.
        max_num_tenants: Most tenants that are remembered while they wait for nothing, and most with a weight.
        max_overtakes: Most later requests that leave the queue before an earlier one gets its turn.
        max_tenant_overtakes: Most later requests of one tenant that go before an earlier one because they are shorter.
        max_bypasses: Most requests served elsewhere, beyond `max_overtakes`, while an overdue one finds no room.
        interactive_weight: Share of the grants for class `interactive`, 1 to 1,000.
        standard_weight: The same for class `standard`.
        batch_weight: The same for class `batch`.
        input_token_weight: What a prompt token that has to be computed counts towards its tenant's share, 1 to 100.
        output_token_weight: What an output token counts, 1 to 100.
        refuse_hopeless: Refuse a request at once that is predicted to miss its deadline.
        extent_bytes: GPU memory is given out in multiples of this; a power of two.
        policy: How a request's worker is chosen.
        seq_cost_tokens: What a sequence in the batch weighs under `prefix_sum`, in tokens of prefill.
        fetch_cost_permille: What fetching a token's KV costs under `transfer_aware`, in thousandths of computing it.
        fetch_bytes_per_s: How fast KV moves between workers that say how they exchange it, until that is learned.
        fetch_latency_us: What a fetch takes besides moving the bytes, microseconds.
        move_wait_min_ms: The shortest time that a worker waits for KV of another one before it computes for itself.
        fetch_wait_max_ms: The longest time that it waits for blocks that exist, 1 to 60,000.
        split_wait_max_ms: The longest time that it waits for blocks that another one has yet to compute, 1 to 60,000.
        split_min_tokens: Prompts of which a worker lacks fewer tokens are not computed for it elsewhere.
        lora_load_tokens: What loading a LoRA adapter costs, in tokens of prefill.
        seed: Start of the random numbers of `random` and `power_of_two`.
    """

    max_num_workers: int = _DEFAULTS["max_num_workers"]
    max_num_gpus: int = _DEFAULTS["max_num_gpus"]
    max_num_reservations: int = _DEFAULTS["max_num_reservations"]
    max_num_waiting: int = _DEFAULTS["max_num_waiting"]
    max_num_waiting_per_tenant: int = _DEFAULTS["max_num_waiting_per_tenant"]
    max_num_tenants: int = _DEFAULTS["max_num_tenants"]
    max_overtakes: int = _DEFAULTS["max_overtakes"]
    max_tenant_overtakes: int = _DEFAULTS["max_tenant_overtakes"]
    max_bypasses: int = _DEFAULTS["max_bypasses"]
    interactive_weight: int = _DEFAULTS["interactive_weight"]
    standard_weight: int = _DEFAULTS["standard_weight"]
    batch_weight: int = _DEFAULTS["batch_weight"]
    input_token_weight: int = _DEFAULTS["input_token_weight"]
    output_token_weight: int = _DEFAULTS["output_token_weight"]
    refuse_hopeless: bool = _DEFAULTS["refuse_hopeless"]
    extent_bytes: int = _DEFAULTS["extent_bytes"]
    policy: RoutePolicy = _DEFAULTS["policy"]
    seq_cost_tokens: int = _DEFAULTS["seq_cost_tokens"]
    fetch_cost_permille: int = _DEFAULTS["fetch_cost_permille"]
    fetch_bytes_per_s: int = _DEFAULTS["fetch_bytes_per_s"]
    fetch_latency_us: int = _DEFAULTS["fetch_latency_us"]
    move_wait_min_ms: int = _DEFAULTS["move_wait_min_ms"]
    fetch_wait_max_ms: int = _DEFAULTS["fetch_wait_max_ms"]
    split_wait_max_ms: int = _DEFAULTS["split_wait_max_ms"]
    split_min_tokens: int = _DEFAULTS["split_min_tokens"]
    lora_load_tokens: int = _DEFAULTS["lora_load_tokens"]
    seed: int = _DEFAULTS["seed"]


WorkerRole: TypeAlias = Literal["both", "prefill", "decode"]
"""What a worker is there for: whole requests; prompts of requests that run elsewhere; or whole requests whose long
prompts others should compute. It matters only among workers that exchange KV."""


@dataclasses.dataclass(frozen=True)
class KvExchange:
    """What the KV blocks of two workers must have in common for one to read the other's.

    Attributes:
        layout: Shape of a block, in the workers' own words; 1 to 256 bytes.
        bytes_per_block: Bytes of a block, at least 1.
    """

    layout: str
    bytes_per_block: int


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
        taints: It takes only requests that tolerate every one of these; at most 16.
        slo_classes: It takes only requests of one of these service classes; any where there are none. At most 16.
        max_loras: LoRA adapters that it holds at a time; 0: it serves none.
        kv_exchange: Workers where this is equal can give each other KV; `None`: it gives and takes none.
        role: What it is there for.
    """

    name: str
    model: str
    num_blocks: int
    max_model_len: int
    block_size: int = 16
    max_num_seqs: int = 256
    weights_epoch: int = 0
    taints: Sequence[str] = ()
    slo_classes: Sequence[str] = ()
    max_loras: int = 0
    kv_exchange: KvExchange | None = None
    role: WorkerRole = "both"


class _Model(TypedDict):
    model: str


class RouteOptions(_Model, total=False):
    """Everything about a request but its prompt.

    Attributes:
        model: The model; required.
        max_tokens: Most output tokens; 16 unless given.
        salt: Isolates the prefix cache: requests share KV only where it is equal.
        lora: The adapter that it runs with. A worker without it costs `lora_load_tokens` more.
        lora_version: The adapter's version; part of its KV blocks' identity.
        weights_epoch: Only workers with this version of the weights.
        slo_class: Its service class; workers reserved for others do not take it.
        tolerations: Taints that do not keep it away; at most 64.
        exclude: Names of workers that may not take it, for example because they failed it before.
        session_key: What `consistent_hash` keeps together; where it is not given, prompts of one first block.
        tenant: Whose request it is, at most 128 bytes; tenants share what `acquire` grants.
        admission_class: How urgent it is while it waits in `acquire`; `standard` unless given.
    """

    max_tokens: int
    salt: str
    lora: str | None
    lora_version: int
    weights_epoch: int | None
    slo_class: str
    tolerations: Iterable[str]
    exclude: Iterable[str]
    session_key: str
    tenant: str
    admission_class: AdmissionClass


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A worker that may take a request, and what that would cost.

    Attributes:
        worker: Its name.
        cost: The policy's formula; that of `load_only` where the policy has none.
        has_room: Whether it could start the request now: free KV for all of it and a place in the batch.
        num_cached_tokens: Prompt tokens whose KV it holds already.
        queued_prefill_tokens: Prompt tokens that wait to be computed there.
        batch: Sequences that run or wait there.
        num_blocks: KV blocks of prompt and output together, in its block size.
        kv_blocks_free: KV blocks that nothing holds and nothing was promised.
        lora_load_tokens: What loading the request's adapter there costs, in tokens of prefill.
    """

    worker: str
    cost: int
    has_room: bool
    num_cached_tokens: int
    queued_prefill_tokens: int
    batch: int
    num_blocks: int
    kv_blocks_free: int
    lora_load_tokens: int


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
    reason: Literal[
        "excluded",
        "draining",
        "other_weights_epoch",
        "tainted",
        "other_slo_class",
        "no_loras",
        "prefill_only",
        "context_too_long",
        "kv_too_large",
    ]
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
        is_kv_in_step: Whether none of its numbered KV events is missing; see `Scheduler.apply_kv_events`.
        num_reservations: Reservations held on it.
        prefill_tokens_per_s: Prompt tokens that it computes in a second, learned from `prefill_done`; 0: unknown.
    """

    name: str
    model: str
    is_draining: bool
    batch: int
    queued_prefill_tokens: int
    kv_blocks_free: int
    kv_blocks_total: int
    num_cached_blocks: int
    is_kv_in_step: bool
    num_reservations: int
    prefill_tokens_per_s: int


@dataclasses.dataclass(frozen=True)
class SchedulerStats:
    """Figures of a scheduler.

    Attributes:
        num_workers: Registered workers.
        num_draining: Of these, how many drain.
        num_index_blocks: Distinct KV blocks in the prefix index.
        num_index_entries: (block, holder) pairs in the prefix index.
        index_bytes: Memory of the prefix index.
        num_kv_gaps: Times that messages of a worker's numbered KV events were missing.
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
    num_kv_gaps: int
    num_reservations: int
    reservation_age_us_max: int
    num_waiting_requests: int
    num_waiting_gangs: int
    num_decisions: int
    num_gpus: int
    num_placements: int
    gpu_bytes_total: int
    gpu_bytes_free: int


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Figures of a moment ago.

    Attributes:
        age_s: How long ago, seconds.
        stats: What `stats` said.
        workers: What `workers` said.
    """

    age_s: float
    stats: SchedulerStats
    workers: tuple[WorkerStats, ...]
