"""How a rank is told to stop, and how long what runs may go on."""

import os
import signal
import time
from types import FrameType
from typing import Protocol


class StopSignals:
    """SIGTERM and SIGINT: the first asks to stop, the second (or the first before `is_serving`) ends the process.

    Args:
        drain_timeout_s: how long running sequences may go on after the first.
    """

    def __init__(self, drain_timeout_s: float) -> None:
        self.drain_timeout_s = drain_timeout_s
        self.is_requested = False
        self.is_serving = False

    def install(self) -> None:
        """Takes both signals over."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self.is_requested or not self.is_serving:
            os._exit(128 + number)
        self.is_requested = True


class Drainable(Protocol):
    """What is needed of `orchestra._core.Agent`."""

    @property
    def is_idle(self) -> bool:
        """Whether no sequence runs or waits."""
        ...

    def drain(self) -> None:
        """Refuses new sequences."""
        ...


class Drain:
    """Lets what runs finish, for a limited time that begins with the first question."""

    def __init__(self, agent: Drainable, timeout_s: float) -> None:
        self._agent = agent
        self._timeout_s = timeout_s
        self._deadline: float | None = None

    def is_over(self) -> bool:
        """Whether nothing is left to finish, or no time to finish it in."""
        if self._deadline is None:
            self._agent.drain()
            self._deadline = time.monotonic() + self._timeout_s
        return self._agent.is_idle or time.monotonic() > self._deadline
