"""Shapes of what goes in and out of `_core`. For type checkers alone: there is no such module when the program runs."""

from collections.abc import Iterable
from typing import Literal, Protocol, TypedDict

class CandidateRow(TypedDict):
    worker: str
    cost: int
    has_room: bool
    num_cached_tokens: int
    queued_prefill_tokens: int
    batch: int
    num_blocks: int
    kv_blocks_free: int
    lora_load_tokens: int

class IneligibleRow(TypedDict):
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

class WorkerRow(TypedDict):
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

class DomainRow(TypedDict):
    num_gpus: int
    num_gpus_out_of_use: int
    num_gpus_empty: int
    bytes_total: int
    bytes_free: int
    bytes_stranded: int
    unusable_p50_ratio: float
    unusable_p90_ratio: float
    emptiable_ratio: float

class GpuSpec(Protocol):
    # What `add_gpu` reads from its argument.
    @property
    def name(self) -> str: ...
    @property
    def domain(self) -> str: ...
    @property
    def node(self) -> str: ...
    @property
    def rack(self) -> str | None: ...
    @property
    def memory_bytes(self) -> int: ...

class KvExchange(Protocol):
    # What `add_worker` reads from its argument's `kv_exchange`.
    @property
    def layout(self) -> str: ...
    @property
    def bytes_per_block(self) -> int: ...

class WorkerSpec(Protocol):
    # What `add_worker` reads from its argument.
    @property
    def name(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def weights_epoch(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def num_blocks(self) -> int: ...
    @property
    def max_num_seqs(self) -> int: ...
    @property
    def max_model_len(self) -> int: ...
    @property
    def taints(self) -> Iterable[str]: ...
    @property
    def slo_classes(self) -> Iterable[str]: ...
    @property
    def max_loras(self) -> int: ...
    @property
    def kv_exchange(self) -> KvExchange | None: ...
    @property
    def role(self) -> str: ...

class FragRow(TypedDict):
    alloc_p50: float
    alloc_p90: float
    wire: float
    slab: float
    largest_run: int
    live_blocks: int
    descriptors: int

class PoolRow(TypedDict):
    num_blocks: int
    num_slabs: int
    free: int
    writing: int
    sealed: int
    limbo: int
    quarantined: int
