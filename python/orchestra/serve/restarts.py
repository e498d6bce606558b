"""When a process that ended is started again, and when that is hopeless."""

from collections.abc import Iterable

# Three failed starts in a row of something that never ran: the next would fail alike.
FAILED_STARTS_MAX = 3
BACKOFF_FIRST_S = 0.5
BACKOFF_MAX_S = 30.0
# Something that ran this long was well: its next failure counts as the first.
HEALTHY_AFTER_S = 60.0

# `invalid_config` as a process ends with it (EX_USAGE of sysexits.h): a restart changes nothing.
EXIT_INVALID_CONFIG = 64


EXIT_FAILED = 1


class GaveUpError(Exception):
    """A process cannot be kept running.

    Args:
        end: which process, and how it ended.
        last_words: the last lines that it wrote.
        exit_status: what it ended with.
    """

    def __init__(self, end: str, last_words: Iterable[str], exit_status: int) -> None:
        super().__init__("\n    ".join([end, *last_words]))
        self.exit_code = EXIT_INVALID_CONFIG if exit_status == EXIT_INVALID_CONFIG else EXIT_FAILED


class Restarts:
    """Counts the failures of one process or group, and says how long to wait before the next start."""

    def __init__(self) -> None:
        self._was_ready = False
        self._failures = 0

    def ready(self) -> None:
        """It works."""
        self._was_ready = True

    def failed(self, exit_status: int, ran_s: float) -> float | None:
        """Records one end; returns the seconds to wait before the next start, None to give up."""
        self._failures = 1 if ran_s >= HEALTHY_AFTER_S else self._failures + 1
        hopeless = exit_status == EXIT_INVALID_CONFIG or self._failures >= FAILED_STARTS_MAX
        if hopeless and not self._was_ready:
            return None
        return min(BACKOFF_FIRST_S * 2.0 ** (self._failures - 1), BACKOFF_MAX_S)
