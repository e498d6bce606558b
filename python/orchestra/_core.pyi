"""The compiled core of `orchestra`. Private: use `orchestra` itself."""

from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Literal, Protocol, TypedDict, final, type_check_only

__all__ = [
    "Agent",
    "Placement",
    "Reservation",
    "RouteRequest",
    "Scheduler",
    "Ticket",
    "__version__",
    "default_scheduler_config",
    "die_with_parent",
    "error_codes",
    "init_logging",
    "run_router",
]

__version__: str

# === errors and process ===

def error_codes() -> list[tuple[str, str, bool]]:
    """Every error code, with the name of its class and whether a retry may help."""

def die_with_parent(parent_pid: int) -> None:
    """Asks the kernel to end this process, with `SIGKILL`, when the one that started it ends.

    Raises:
        UnsupportedError: The system is not Linux.
    """

def init_logging(filter: str = "info", *, json: bool = False) -> None:
    """Sends the Rust side's logs to standard error. Importing alone prints nothing; a second call changes nothing.

    Args:
        filter: A level, or directives such as `info,orchestra_agent=debug`.
        json: One JSON object per line, instead of lines for people.

    Raises:
        ConfigError: The filter cannot be read.
    """

def run_router(argv: Sequence[str]) -> int:
    """Runs a router with these command-line arguments until `SIGTERM` or `SIGINT` has stopped it.

    Returns:
        The exit status: 0 after a stop by signal, 64 for arguments that cannot be used, 1 for what failed.
    """

# === scheduler ===

@type_check_only
class _CandidateRow(TypedDict):
    worker: str
    cost: int
    has_room: bool
    num_cached_tokens: int
    queued_prefill_tokens: int
    batch: int
    num_blocks: int
    kv_blocks_free: int
    lora_load_tokens: int

@type_check_only
class _IneligibleRow(TypedDict):
    worker: str
    reason: Literal[
        "excluded",
        "draining",
        "other_weights_epoch",
        "tainted",
        "other_slo_class",
        "no_loras",
        "context_too_long",
        "kv_too_large",
    ]
    requested: int | None
    limit: int | None

@type_check_only
class _WorkerRow(TypedDict):
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

@type_check_only
class _WorkerSpec(Protocol):
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
class Reservation:
    """Room on a worker, held until it is released or the last reference to it goes.

    As a context manager it is released at the end of the block.
    """

    @property
    def worker(self) -> str:
        """The chosen worker."""

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens whose KV the worker held already."""

    @property
    def num_blocks(self) -> int:
        """KV blocks of prompt and output together, cached ones included."""

    def prefill_done(self) -> bool:
        """Tells that the prompt is computed: its tokens no longer queue on the worker.

        How long that took teaches the scheduler how fast the worker is, which predictions need.

        Returns:
            `False` where that was told before, or the reservation is gone.
        """

    def finish(self, num_output_tokens: int) -> bool:
        """Gives the room back, and charges the tenant for the output that came instead of for `max_tokens`.

        Returns:
            `False` where it is gone already: released before, or its worker was removed.
        """

    def release(self) -> bool:
        """Gives the room back.

        Returns:
            `False` where it is gone already: released before, or its worker was removed.
        """

    def __enter__(self) -> Reservation: ...
    def __exit__(
        self,
        *_exception: type[BaseException] | BaseException | TracebackType | None,
    ) -> None: ...

@final
class Placement:
    """Memory on a gang of GPUs, held until it is released or the last reference to it goes.

    As a context manager it is released at the end of the block.
    """

    @property
    def gpus(self) -> tuple[tuple[str, int, int], ...]:
        """`(name, offset_bytes, length_bytes)` of each GPU, in order of registration; all are of one domain."""

    def release(self) -> bool:
        """Gives the memory back.

        Returns:
            `False` where it is gone already: released before, or one of its GPUs was removed.
        """

    def __enter__(self) -> Placement: ...
    def __exit__(
        self,
        *_exception: type[BaseException] | BaseException | TracebackType | None,
    ) -> None: ...

@final
class Ticket:
    """A place in the queue of those that wait for room."""

    def cancel(self) -> bool:
        """Ends the wait: the callback will not be called.

        Returns:
            `False` where it was called or is about to be.
        """

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
    ) -> tuple[list[_CandidateRow], int, list[_IneligibleRow]]:
        """The best `k` workers for the request, how many more there are, and why the others may not take it."""

    def place(self, num_gpus: int, bytes_per_gpu: int) -> Placement:
        """Finds and takes memory for a gang."""

    def acquire_gpus(
        self,
        num_gpus: int,
        bytes_per_gpu: int,
        on_outcome: Callable[[Placement | Exception], None],
    ) -> Placement | Ticket:
        """Memory for a gang, or a ticket; then `on_outcome` is called once, as by `acquire`."""

    def add_worker(self, spec: _WorkerSpec) -> None:
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

    def add_gpu(self, name: str, domain: str, node: str, memory_bytes: int) -> None:
        """Registers a GPU, all of its memory free."""

    def remove_gpu(self, name: str) -> bool:
        """Forgets a GPU and every placement that it was part of; `False` if it is not registered."""

    def workers(self) -> list[_WorkerRow]:
        """Every worker's figures, in order of registration."""

    def snapshot(self, max_age_us: int) -> tuple[int, dict[str, int], list[_WorkerRow]]:
        """How old the figures are, microseconds, then what `stats` and `workers` say."""

    def stats(self) -> dict[str, int]:
        """Figures, by name."""

    def check_integrity(self) -> None:
        """Asserts every invariant; for tests. Walks all state."""

# === agent ===

@final
class Agent:
    """The worker's side of the router: takes sequences in, plans steps, sends tokens out.

    One thread drives it: `next_step`, execute, `commit`, repeat. The other calls may come from any thread.

    Args:
        config: `router`, `worker_id`, `model`, `weights_epoch`, `vocab_size`, `model_files`, `scheduler` and the
            timings of `orchestra_agent::AgentConfig`.

    Raises:
        ConfigError: A setting is unknown or wrong; `key` names it.
    """

    def __new__(cls, config: dict[str, Any]) -> Agent: ...
    def next_step(self, timeout_ms: int = 200) -> bytes | None:
        """The next step plan as one msgpack map, or `None` when there was nothing to do for `timeout_ms`.

        Raises:
            InvalidRequestError: The last step was not committed.
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
        """Hands in what the model drew for the step handed out last: `N` tokens, `K` alternatives each.

        Args:
            step_id: The plan's.
            token_ids: `int32[N]`, little-endian.
            chosen_logprobs: `float32[N]`, where the plan wants log-probabilities.
            top_ids: `int32[N, K]`, likewise.
            top_logprobs: `float32[N, K]`, likewise.

        Raises:
            InvalidRequestError: An array does not fit the plan. Nothing changes; the step can still be committed.
        """

    def fail(self, message: str) -> None:
        """Ends every sequence as failed: executing a step went wrong, so its KV cannot be trusted."""

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
