"""Closed-loop clients that keep the router's queue full, and the kills in between."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from tests.chaos.client import Told, ask
from tests.chaos.workers import Worker
from tests.faults.processes import Engine, Router, eventually
from tests.soak.cases import Case, Cases
from tests.soak.ledger import End, Ledger

NUM_WORKERS = 3
# More than may run and wait, so that some are refused.
NUM_CLIENTS = 96
KILL_EVERY_S = 5.0
RESTART_AFTER_S = 1.0
# Shares of requests whose clients leave: in a stream, and before anything came.
LEAVE_SHARE = 0.05
LEAVE_EARLY_SHARE = 0.03


class LeftError(Exception):
    """The client has heard enough."""


class Fleet:
    """What is behind the router: mock workers, and mock engines."""

    def __init__(self, router: Router, engines: list[Engine]) -> None:
        self.router = router
        self.engines = engines
        self.numbers = iter(range(1, 1 << 20))
        self.workers: list[Worker] = []
        self.start_workers()

    def start_workers(self) -> None:
        """Fills the workers up, and waits until the router has all of them."""
        while len(self.workers) < NUM_WORKERS:
            self.workers.append(Worker(self.router, next(self.numbers)))
        eventually(lambda: self.num_up() == (NUM_WORKERS, len(self.engines)), 60)

    def num_up(self) -> tuple[float, float]:
        """Workers and engines that the router has."""
        return self.router.metric("orchestra_workers"), self.router.metric("orchestra_engine_up")

    def kill_workers(self) -> None:
        """All of them."""
        while self.workers:
            self.workers.pop().kill()

    def start_anew(self) -> None:
        """Kills everything and starts it again, so that nothing is left of what was between it and the router."""
        self.kill_workers()
        for engine in self.engines:
            engine.kill()
        eventually(lambda: self.num_up() == (0, 0))
        for engine in self.engines:
            engine.start()
        self.start_workers()


class Load:
    """Clients and the one that kills, until told to stop."""

    def __init__(self, fleet: Fleet, seed: int) -> None:
        self.fleet = fleet
        self.draw = random.Random(seed)
        self.cases = Cases(seed)
        self.ledger = Ledger()
        self.kills: Counter[str] = Counter()
        self.continued = 0
        self.is_over = False

    async def run(self, seconds: float, watch: Callable[[], None]) -> None:
        """All of it; `watch` runs beside it in a thread of its own, from time to time."""
        seeds = [self.draw.randrange(1 << 30) for _ in range(NUM_CLIENTS)]
        clients = [asyncio.create_task(self.client(seed)) for seed in seeds]
        killing = asyncio.create_task(self.kill())
        watching = asyncio.create_task(asyncio.to_thread(watch))
        await asyncio.wait([killing, watching], timeout=seconds, return_when="FIRST_EXCEPTION")
        self.is_over = True
        await asyncio.gather(*clients, killing, watching)

    async def client(self, seed: int) -> None:
        """Asks one thing after another."""
        draw = random.Random(seed)
        while not self.is_over:
            number = self.ledger.begin()
            case = self.cases.draw(draw, number)
            end, told = await self.one(case, draw)
            self.continued += len(told.changes)
            self.ledger.end(number, end, f"status {told.status}, error {told.error or '-'}")
            if end is End.REFUSED:
                await asyncio.sleep(draw.uniform(0.2, 1.0))

    async def one(self, case: Case, draw: random.Random) -> tuple[End, Told]:
        """One answer, checked word by word, or the part that the client stays for."""
        told = Told()
        pieces = draw.randint(1, 10) if case.streams and draw.random() < LEAVE_SHARE else 0
        left = 0

        def speaker_of(event: dict[str, Any]) -> str:
            nonlocal left
            left += 1
            if left == pieces:
                raise LeftError
            return str(event.get("system_fingerprint", ""))

        asking = ask(
            self.fleet.router.address, case.path, case.body, told, speaker_of, case.headers
        )
        patience_s = draw.uniform(0.02, 0.5) if draw.random() < LEAVE_EARLY_SHARE else None
        try:
            await asyncio.wait_for(asking, patience_s)
        except LeftError:
            return End.LEFT, told
        except TimeoutError:
            return End.LEFT_EARLY if told.status == 0 else End.LEFT, told
        if case.is_right(told) and told.status == 200:
            return End.WHOLE, told
        return (End.REFUSED if told.status == 429 else End.WRONG), told

    async def kill(self) -> None:
        """A worker or an engine every few seconds; what was killed is back before the next."""
        started = time.monotonic()
        while not self.is_over:
            done = sum(self.kills.values())
            await asyncio.sleep(max(0.0, started + (done + 1) * KILL_EVERY_S - time.monotonic()))
            if self.draw.random() < 0.5:
                self.kills["worker"] += 1
                workers = self.fleet.workers
                workers.pop(self.draw.randrange(len(workers))).kill()
                await asyncio.sleep(RESTART_AFTER_S)
                await asyncio.to_thread(self.fleet.start_workers)
            else:
                self.kills["engine"] += 1
                engine = self.draw.choice(self.fleet.engines)
                engine.kill()
                await asyncio.sleep(RESTART_AFTER_S)
                await asyncio.to_thread(engine.start)


@contextlib.contextmanager
def ended(fleet: Fleet) -> Iterator[Fleet]:
    """The fleet, whose workers end with the block."""
    try:
        yield fleet
    finally:
        fleet.kill_workers()
