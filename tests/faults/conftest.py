"""Two engines and a router, fresh for each test: the tests break them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.processes import Engine, Router, build, eventually, running_engine, running_router


@dataclass
class Fleet:
    """A router and the engines behind it."""

    router: Router
    engines: list[Engine]

    def busy(self) -> Engine:
        """The one engine that has a request now."""
        found: list[Engine] = []

        def look() -> bool:
            found[:] = [engine for engine in self.engines if engine.counters()["running"]]
            return bool(found)

        eventually(look)
        (engine,) = found
        return engine

    def sum(self, counter: str) -> int:
        """A counter over all engines that run."""
        return sum(
            engine.counters()[counter] for engine in self.engines if engine.process.poll() is None
        )


StartFleet = Callable[..., Fleet]


def pytest_runtestloop(session: pytest.Session) -> None:
    """Builds the programs before the first test: the time that takes belongs to none of them."""
    here = Path(__file__).parent
    if not session.config.option.collectonly and any(
        item.path.is_relative_to(here) for item in session.items
    ):
        build()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[StartFleet]:
    """Starts engines and a router in front of them; all end with the test."""
    with contextlib.ExitStack() as stack:

        def start_fleet(
            count: int = 2, engine: tuple[str, ...] = (), router: tuple[str, ...] = ()
        ) -> Fleet:
            engines = [stack.enter_context(running_engine(*engine)) for _ in range(count)]
            return Fleet(stack.enter_context(running_router(tmp_path, engines, *router)), engines)

        yield start_fleet


# An engine's pace: slow enough to be caught in the middle.
PACED = ("--ttft", "10ms", "--itl", "10ms")
