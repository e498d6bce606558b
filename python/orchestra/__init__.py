"""Orchestra serves large language models from many accelerators as if they were one machine.

Importing the package starts nothing and needs neither torch nor grpc:

- `Scheduler` and `AsyncScheduler` decide inside your own program which worker takes a request;
- `BufferManager` holds memory whose blocks other processes read and write;
- `Client` talks to a running router (it imports grpc when it is first used);
- `errors` holds everything that is raised.
"""

from typing import TYPE_CHECKING, Any

from orchestra import errors
from orchestra._core import __version__, init_logging
from orchestra.memory import BufferManager
from orchestra.scheduler import (
    AsyncScheduler,
    Placement,
    Reservation,
    Scheduler,
    SchedulerConfig,
)

if TYPE_CHECKING:
    from orchestra.client import Client

__all__ = [
    "AsyncScheduler",
    "BufferManager",
    "Client",
    "Placement",
    "Reservation",
    "Scheduler",
    "SchedulerConfig",
    "__version__",
    "errors",
    "init_logging",
]


def __getattr__(name: str) -> Any:
    # grpc takes a fifth of a second to import, which a program that only schedules need not wait for.
    if name == "Client":
        from orchestra.client import Client

        return Client
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
