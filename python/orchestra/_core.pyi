"""The compiled core of `orchestra`. Private: use `orchestra` itself."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, final

from orchestra._core_held import KvFetch as KvFetch
from orchestra._core_held import KvSplit as KvSplit
from orchestra._core_held import Placement as Placement
from orchestra._core_held import Reservation as Reservation
from orchestra._core_held import Ticket as Ticket
from orchestra._core_kernels import KernelProgram as KernelProgram
from orchestra._core_kernels import PagedAttention as PagedAttention
from orchestra._core_kernels import SharedGroup as SharedGroup
from orchestra._core_kernels import add as add
from orchestra._core_kernels import begin_recording as begin_recording
from orchestra._core_kernels import bind_threads as bind_threads
from orchestra._core_kernels import candidates as candidates
from orchestra._core_kernels import draw as draw
from orchestra._core_kernels import end_recording as end_recording
from orchestra._core_kernels import gate as gate
from orchestra._core_kernels import likeliest_of as likeliest_of
from orchestra._core_kernels import look_up as look_up
from orchestra._core_kernels import mix as mix
from orchestra._core_kernels import rms_norm as rms_norm
from orchestra._core_kernels import rotate as rotate
from orchestra._core_kernels import softmax as softmax
from orchestra._core_layers import ExpertRouter as ExpertRouter
from orchestra._core_layers import Experts as Experts
from orchestra._core_layers import Linear as Linear
from orchestra._core_memory import BlockPool as BlockPool
from orchestra._core_memory import BlockSet as BlockSet
from orchestra._core_memory import BlockView as BlockView
from orchestra._core_memory import BufferManager as BufferManager
from orchestra._core_memory import Chime as Chime
from orchestra._core_memory import Grant as Grant
from orchestra._core_memory import Registration as Registration
from orchestra._core_memory import RemoteGrant as RemoteGrant
from orchestra._core_memory import Transfer as Transfer
from orchestra._core_memory import TransferOptions as TransferOptions
from orchestra._core_partition import plan_layer_move as plan_layer_move
from orchestra._core_process import adopt_orphans as adopt_orphans
from orchestra._core_process import die_with_parent as die_with_parent
from orchestra._core_process import error_codes as error_codes
from orchestra._core_process import init_logging as init_logging
from orchestra._core_process import run_router as run_router
from orchestra._core_ring import MessageRingReader as MessageRingReader
from orchestra._core_ring import MessageRingWriter as MessageRingWriter
from orchestra._core_types import (
    CandidateRow,
    DomainRow,
    GpuSpec,
    IneligibleRow,
    WorkerRow,
    WorkerSpec,
)

__all__ = [
    "Agent",
    "BlockPool",
    "BlockSet",
    "BlockView",
    "BufferManager",
    "Chime",
    "ExpertRouter",
    "Experts",
    "Grant",
    "KernelProgram",
    "KvFetch",
    "KvPool",
    "KvSplit",
    "Linear",
    "MessageRingReader",
    "MessageRingWriter",
    "PagedAttention",
    "PlaceRequest",
    "Placement",
    "Registration",
    "RemoteGrant",
    "Reservation",
    "RouteRequest",
    "Scheduler",
    "SharedGroup",
    "Ticket",
    "Transfer",
    "TransferOptions",
    "__version__",
    "add",
    "adopt_orphans",
    "begin_recording",
    "bind_threads",
    "candidates",
    "default_scheduler_config",
    "die_with_parent",
    "draw",
    "end_recording",
    "error_codes",
    "gate",
    "init_logging",
    "likeliest_of",
    "look_up",
    "mix",
    "plan_layer_move",
    "rms_norm",
    "rotate",
    "run_router",
    "softmax",
]

__version__: str

# === scheduler ===

def default_scheduler_config() -> dict[str, Any]:
    """The settings of a scheduler, with their defaults."""

@final
class RouteRequest:
    """A request that wants a worker; may be used again.

    `token_ids` is a sequence of integers, or the bytes of little-endian 32-bit integers.

    Raises:
        InvalidRequestError: A token id is outside 0 to 2^31 - 1, or there is no such admission class.
    """

    def __new__(
        cls,
        token_ids: Sequence[int] | bytes,
        *,
        model: str,
        max_tokens: int = 16,
        salt: str = "",
        lora: str | None = None,
        lora_version: int = 0,
        weights_epoch: int | None = None,
        slo_class: str = "",
        tolerations: Iterable[str] = ...,
        exclude: Iterable[str] = ...,
        session_key: str = "",
        tenant: str = "",
        admission_class: str = "standard",
    ) -> RouteRequest: ...

@final
class PlaceRequest:
    """A gang that wants memory; may be used again.

    Raises:
        InvalidRequestError: The layout is none of those that there are.
    """

    def __new__(
        cls,
        *,
        num_gpus: int,
        bytes_per_gpu: int,
        num_stages: int = 1,
        layout: str = "contiguous",
        paged_bytes_per_gpu: int = 0,
        priority: int = 0,
        replay_cost: int = 0,
        expires_in_us: int | None = None,
        cpu_milli: int = 0,
        host_memory_bytes: int = 0,
        nic_mbps: int = 0,
        power_watts: int = 0,
    ) -> PlaceRequest: ...

@final
class Scheduler:
    """Chooses workers for requests and GPUs for gangs. Safe to call from any thread.

    Raises:
        ConfigError: A setting is unknown or wrong; `key` names it.
    """

    def __new__(cls, config: dict[str, Any]) -> Scheduler: ...
    def route(self, request: RouteRequest) -> Reservation:
        """Places the request on the best worker, whether or not that has room now."""

    def decide_batch(
        self,
        request: RouteRequest,
        prompts: Sequence[int] | bytes,
        ends: Sequence[int],
    ) -> list[Reservation | Exception]:
        """Places many requests in order under one lock, without the interpreter.

        `prompts` lie end to end, each beginning where the one before it ends in `ends`; their other fields come from
        `request`, whose own prompt is not used. Each gets a reservation, or the exception that refuses it.
        """

    def acquire(
        self,
        request: RouteRequest,
        on_outcome: Callable[[Reservation | Exception], None],
        deadline_us: int | None,
    ) -> Reservation | Ticket:
        """A worker that has room for the request now, or a ticket.

        With a ticket, `on_outcome` is called once, from any thread, with the reservation or with the exception that
        ends the wait. Should it raise, the reservation is taken back. The first token is wanted within `deadline_us`
        microseconds; a wait that is longer ends when anything happens to the scheduler.
        """

    def predict_ttft(self, request: RouteRequest) -> int | None:
        """Predicted time to the request's first token, microseconds; `None` where it is not known."""

    def set_tenant_weight(self, tenant: str, weight: int) -> None:
        """Gives a tenant another share than the weight 100 that every tenant has."""

    def explain(
        self, request: RouteRequest, k: int
    ) -> tuple[list[CandidateRow], int, list[IneligibleRow]]:
        """The best `k` workers for the request, how many more there are, and why the others may not take it."""

    def place(self, request: PlaceRequest) -> Placement:
        """Finds and takes memory for a gang."""

    def place_batch(self, requests: Sequence[PlaceRequest]) -> list[Placement | Exception]:
        """Places gangs that arrived together, the largest first.

        Each gets a placement, or the exception that refuses it.
        """

    def acquire_gpus(
        self,
        request: PlaceRequest,
        on_outcome: Callable[[Placement | Exception], None],
    ) -> Placement | Ticket:
        """Memory for a gang, or a ticket; then `on_outcome` is called once, as by `acquire`."""

    def expire_placements(self) -> list[int]:
        """Releases the placements whose time has come; their ids."""

    def add_worker(self, spec: WorkerSpec) -> None:
        """Registers a worker with an empty prefix cache and no load."""

    def remove_worker(self, name: str) -> bool:
        """Forgets a worker, what it cached, and every reservation on it; `False` if it is not registered."""

    def set_draining(self, worker: str, is_draining: bool) -> None:
        """A draining worker takes no new requests and keeps its reservations."""

    def update_load(
        self,
        worker: str,
        *,
        num_running: int,
        num_waiting: int,
        kv_blocks_used: int,
        queued_prefill_tokens: int,
    ) -> None:
        """Takes a worker's load report."""

    def set_loras(self, worker: str, loras: Sequence[tuple[str, int]]) -> None:
        """Takes a worker's report of the adapters, by id and version, that it has in memory."""

    def block_hashes(
        self,
        worker: str,
        token_ids: Sequence[int] | bytes,
        salt: str,
        adapter: tuple[str, int] | None,
    ) -> list[int]:
        """Hashes of the full KV blocks of `token_ids` on this worker."""

    def kv_stored(self, worker: str, hashes: Sequence[int]) -> None:
        """The worker's prefix cache holds these blocks from now on."""

    def kv_removed(self, worker: str, hashes: Sequence[int]) -> None:
        """The worker's prefix cache holds these blocks no longer."""

    def kv_cleared(self, worker: str) -> None:
        """The worker's prefix cache is empty from now on."""

    def apply_kv_events(
        self, worker: str, sequence: int, events: Sequence[tuple[str, Sequence[int]]]
    ) -> bool:
        """Takes a worker's message number `sequence`: KV events by kind. Whether no message is missing."""

    def resync_kv(self, worker: str, sequence: int, hashes: Sequence[int]) -> None:
        """Takes all that the worker's prefix cache holds after its message number `sequence`."""

    def add_gpu(self, spec: GpuSpec) -> None:
        """Registers a GPU, all of its memory free."""

    def remove_gpu(self, name: str) -> bool:
        """Forgets a GPU and every placement that it was part of; `False` if it is not registered."""

    def fail_gpu(self, name: str) -> list[int]:
        """Takes a GPU out of use; the ids of the placements that it was part of, which are released."""

    def restore_gpu(self, name: str) -> None:
        """Puts a failed GPU back into use, all of its memory free."""

    def set_domain_draining(self, domain: str, is_draining: bool) -> list[int]:
        """A draining domain takes no new gangs; the ids of those that it has."""

    def set_node_limits(
        self, node: str, cpu_milli: int, host_memory_bytes: int, nic_mbps: int
    ) -> None:
        """Limits what the GPUs of a node share; 0 is no limit."""

    def set_domain_power(self, domain: str, watts: int) -> None:
        """Limits the power that the GPUs of a domain share, watts; 0 is no limit."""

    def domain_memory(self, domain: str) -> DomainRow:
        """How a domain's memory is used, and how usable the rest is."""

    def workers(self) -> list[WorkerRow]:
        """Every worker's figures, in order of registration."""

    def snapshot(self, max_age_us: int) -> tuple[int, dict[str, int], list[WorkerRow]]:
        """How old the figures are, microseconds, then what `stats` and `workers` say."""

    def stats(self) -> dict[str, int]:
        """Figures, by name."""

    def check_integrity(self) -> None:
        """Asserts every invariant; for tests. Walks all state."""

# === agent ===

@final
class KvPool:
    """The memory of a worker's KV cache, which other workers can reach: `numpy.asarray` sees its bytes.

    Args:
        config: `num_layers`, `num_blocks`, `layer_block_bytes`, `layout`, `transports` (`auto`, `shm` or `tcp`) and
            `address`.

    Raises:
        ConfigError: A setting is unknown or wrong, or the memory is more than one registration may have; `key`
            names it.
        UnsupportedError: Memory or a transport cannot be had.
    """

    def __new__(cls, config: dict[str, Any]) -> KvPool: ...
    @property
    def address(self) -> str:
        """The path by which other processes of this machine and user can open and map the memory."""
    @property
    def __array_interface__(self) -> dict[str, Any]:
        """Where the bytes lie."""

@final
class Agent:
    """The worker's side of the router: takes sequences in, plans steps, sends tokens out.

    One thread drives it: `next_step`, execute, `commit`, repeat. The other calls may come from any thread.

    Args:
        config: `router`, `worker_id`, `model`, `weights_epoch`, `vocab_size`, `model_files`, `scheduler` and the
            timings of `orchestra_agent::AgentConfig`.
        kv_pool: Memory of the worker's KV cache, where KV can move.

    Raises:
        ConfigError: A setting is unknown or wrong; `key` names it.
    """

    def __new__(cls, config: dict[str, Any], kv_pool: KvPool | None = None) -> Agent: ...
    def next_step(self, timeout_ms: int = 200) -> bytes | None:
        """The next step plan as flat arrays, or `None` when there was nothing to do for `timeout_ms`.

        Raises:
            InvalidRequestError: As many steps as may be in flight are not committed.
            ShuttingDownError: The agent was closed.
            InternalError: The agent has failed.
        """

    def commit(
        self,
        step_id: int,
        token_ids: bytes,
        chosen_logprobs: bytes = b"",
        top_ids: bytes = b"",
        top_logprobs: bytes = b"",
    ) -> None:
        """Hands in what the model drew for the oldest step not committed: `N` tokens, `K` alternatives each.

        Args:
            step_id: The plan's.
            token_ids: `int32[N]`, little-endian.
            chosen_logprobs: `float32[N]`, where the plan wants log-probabilities.
            top_ids: `int32[N, K]`, likewise.
            top_logprobs: `float32[N, K]`, likewise.

        Raises:
            InvalidRequestError: An array does not fit the plan. Nothing changes; the step can still be committed.
        """

    def layer_done(self, step_id: int, layer: int) -> None:
        """The KV of a layer, and of those before it, is where the step puts it. For plans with `fills_blocks`."""

    def fail(self, message: str) -> None:
        """Ends every sequence as failed: executing a step went wrong, so its KV cannot be trusted."""

    def start_over(self) -> None:
        """Gives up the step that was handed out, if one was, and everything computed: a part of the KV is lost.

        Every sequence ends and the stream to the router ends, so that it replays them elsewhere. The next `next_step`
        attaches again, with an empty prefix cache.

        Raises:
            ShuttingDownError: The agent was closed.
            InternalError: The agent has failed.
        """

    def drain(self) -> None:
        """Refuses new sequences from now on; those that run or wait go on."""

    def stats(self) -> dict[str, int | bool]:
        """Figures since start, by name."""

    @property
    def is_idle(self) -> bool:
        """Whether no sequence runs or waits."""

    @property
    def is_attached(self) -> bool:
        """Whether a router's stream is open."""

    def close(self) -> None:
        """Sends what is left to send and ends the stream. Again does nothing."""
