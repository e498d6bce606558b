"""What `_core` does to a process. For type checkers alone: there is no such module at run time."""

from collections.abc import Sequence

def error_codes() -> list[tuple[str, str, bool]]:
    """Every error code, with the name of its class and whether a retry may help."""

def adopt_orphans(adopts: bool) -> None:
    """Makes this process the parent of those whose own parent ends and who descend from it, or leaves them to another.

    Raises:
        UnsupportedError: The system is not Linux.
        OSError: It does not know such a thing.
    """

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
