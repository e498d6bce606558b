"""Everything that Orchestra raises. One class per error code; `docs/errors.md` lists them.

Rust, the gRPC client and Python code raise the same classes, so `except orchestra.errors.OverloadedError` means the
same thing whichever way a request went.
"""

from typing import Any, ClassVar

__all__ = [
    "BY_CODE",
    "AuthenticationError",
    "BlockInUseError",
    "ConfigError",
    "ContextTooLongError",
    "DeadlineExceededError",
    "GrantEndedError",
    "InternalError",
    "InvalidRequestError",
    "MemlockTooLowError",
    "ModelNotFoundError",
    "OrchestraError",
    "OverloadedError",
    "PeerGoneError",
    "PoolExhaustedError",
    "PreemptedError",
    "RequestCancelledError",
    "ShuttingDownError",
    "StaleHandleError",
    "TierUnavailableError",
    "TransferFailedError",
    "TransferTimeoutError",
    "TransportUnavailableError",
    "UnsupportedError",
    "WorkerFailedError",
    "WorkerUnavailableError",
]


class OrchestraError(Exception):
    """Base of every error.

    Attributes:
        code: The error code, the same over HTTP, gRPC and in metrics.
        retryable: Whether the same call may succeed when it is made again.
        retry_after_ms: When to try again, milliseconds, where that is known.
        limit: The limit that was hit, where there is one.
        current: What was there, or was asked for, where that is compared with `limit`.
        worker_id: The worker that failed, where one did.
        key: The setting or the request field at fault, where there is one.
    """

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        retry_after_ms: int | None = None,
        limit: int | None = None,
        current: int | None = None,
        worker_id: str | None = None,
        key: str | None = None,
    ) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms
        self.limit = limit
        self.current = current
        self.worker_id = worker_id
        self.key = key


class InvalidRequestError(OrchestraError, ValueError):
    """The request is malformed or a value is out of range; `key` names the field."""

    code = "invalid_request"


class ContextTooLongError(InvalidRequestError):
    """Prompt and output do not fit in the model's context or in any worker's memory; see `limit` and `current`."""

    code = "context_too_long"


class AuthenticationError(OrchestraError):
    """Credentials are missing or wrong."""

    code = "unauthenticated"


class ModelNotFoundError(OrchestraError):
    """No such model is served here."""

    code = "model_not_found"


class OverloadedError(OrchestraError):
    """A queue is full; see `limit`, `current` and `retry_after_ms`."""

    code = "queue_full"
    retryable = True


class DeadlineExceededError(OrchestraError, TimeoutError):
    """The time given for the request has passed."""

    code = "deadline_exceeded"


class WorkerUnavailableError(OrchestraError):
    """No worker, or no GPU memory, could take the request now."""

    code = "no_workers"
    retryable = True


class WorkerFailedError(OrchestraError):
    """The worker failed and no other could continue; `worker_id` names it."""

    code = "worker_failed"


class PreemptedError(OrchestraError):
    """The request lost its place to one of higher priority."""

    code = "preempted_out"
    retryable = True


class RequestCancelledError(OrchestraError):
    """The caller went away. Code that is itself cancelled sees `asyncio.CancelledError` instead."""

    code = "cancelled"


class ShuttingDownError(OrchestraError):
    """The service is stopping; another may take the request."""

    code = "shutting_down"
    retryable = True


class ConfigError(OrchestraError, ValueError):
    """A setting is wrong; `key` names the first one at fault, the message names them all."""

    code = "invalid_config"


class UnsupportedError(OrchestraError):
    """Understood, and not offered."""

    code = "unsupported"


class InternalError(OrchestraError):
    """A fault of ours."""

    code = "internal"


# === registered memory: what `BufferManager` raises besides; each has the code of its parent ===


class PoolExhaustedError(OverloadedError):
    """Fewer blocks are free (`limit`) than were asked for (`current`). Nothing was taken.

    Attributes:
        largest_run: The longest run of neighbours among the free blocks.
        quarantined: Blocks that come back once it is proven that nothing writes them any more.
    """

    def __init__(
        self, message: str, *, largest_run: int = 0, quarantined: int = 0, **numbers: Any
    ) -> None:
        super().__init__(message, **numbers)
        self.largest_run = largest_run
        self.quarantined = quarantined


class StaleHandleError(InvalidRequestError):
    """The block was freed, or lost to quarantine."""


class BlockInUseError(InvalidRequestError):
    """The block is viewed, granted or part of a transfer, or is not sealed where it has to be, or is."""


class GrantEndedError(InvalidRequestError):
    """The grant has ended, was revoked, or does not allow this."""


class MemlockTooLowError(ConfigError):
    """The process may lock fewer bytes (`limit`) than its pools need (`current`)."""


class TransportUnavailableError(UnsupportedError):
    """A transport's library is missing, too old or a stub; the message says what was tried."""


class TierUnavailableError(UnsupportedError):
    """The driver of a kind of memory is missing or too old, or there is no such device; the message says which."""


class PeerGoneError(WorkerFailedError):
    """The peer died, or closed the connection."""


class TransferFailedError(WorkerFailedError):
    """The transport could not make the transfer."""


class TransferTimeoutError(DeadlineExceededError):
    """The transfer was given up before it was known to be over.

    Attributes:
        quarantined: Blocks here that cannot be used again before it is proven that nothing touches them any more.
    """

    def __init__(self, message: str, *, quarantined: int = 0, **numbers: Any) -> None:
        super().__init__(message, **numbers)
        self.quarantined = quarantined


BY_CODE: dict[str, type[OrchestraError]] = {
    error.code: error
    for error in (
        InvalidRequestError,
        ContextTooLongError,
        AuthenticationError,
        ModelNotFoundError,
        OverloadedError,
        DeadlineExceededError,
        WorkerUnavailableError,
        WorkerFailedError,
        PreemptedError,
        RequestCancelledError,
        ShuttingDownError,
        ConfigError,
        UnsupportedError,
        InternalError,
    )
}
"""The class of each code, in the order of `docs/errors.md`."""
