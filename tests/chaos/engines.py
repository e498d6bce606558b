"""Foreign engines: mock engines that are killed, stopped and spoilt while clients stream through the router."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import sys
import time
from collections import Counter, defaultdict, deque
from pathlib import Path
from typing import Any

from tests.chaos.client import Change, Told, ask
from tests.chaos.report import Report
from tests.faults.clients import CHAT, Asked
from tests.faults.processes import Engine, Router, running_engine, running_router

# Kinds, which are continued in different ways, and how many words they put into one event.
KINDS = (("vllm", 1), ("vllm", 1), ("vllm", 3), ("sglang", 1), ("sglang", 2), ("llama.cpp", 1))
# So many can take a request at any time.
HEALTHY = 3
NUM_CLIENTS = 24
PAUSE_S = 0.05
# What strikes a stream that runs, and what waits for the next request.
SUDDEN = ("reset", "fin", "garbage", "garbage_chunk", "truncated", "early_end", "hang_stream")
BEFORE_HEAD: dict[str, dict[str, object]] = {
    "reset first": {"fault": "reset"},
    "fin first": {"fault": "fin"},
    "garbage_json": {"fault": "garbage_json"},
    "hang_headers": {"fault": "hang_headers"},
    **{f"status {code}": {"fault": "status", "status": code} for code in (500, 503, 429)},
}
SIGNALS = ("SIGKILL", "SIGSTOP")
# Faults of an engine that are remembered; a replay is blamed on the one nearest in time to its engine's last word.
MAX_BLAMED = 16
PATHS = (CHAT, "/v1/completions")
# So many faults at once are no sick pool that wants to be spared, and none is allowed to cost an answer.
FLAGS = (
    *("--engine-stall-timeout", "500ms", "--engine-ttft-timeout", "500ms"),
    *("--engine-answer-timeout", "3s", "--engine-max-attempts", "10"),
    *("--engine-retry-percent", "100", "--max-replays", "50"),
)


class Chaos:
    """Engines, a router, clients, and what is done to them."""

    def __init__(self, router: Router, engines: list[Engine], seed: int, faults: int) -> None:
        self.router = router
        self.engines = {f"mock-{engine.port}": engine for engine in engines}
        self.draw = random.Random(seed)
        self.num_faults = faults
        self.report = Report()
        # The last faults of each engine that end streams, with their times.
        self.blamed: defaultdict[str, deque[tuple[str, float]]] = defaultdict(
            lambda: deque(maxlen=MAX_BLAMED)
        )
        # Engines that are down, or are about to be.
        self.down: set[str] = set()
        self.streaming: Counter[str] = Counter()
        self.is_over = False
        self.repairs: set[asyncio.Task[None]] = set()

    async def run(self) -> Report:
        """All of it."""
        seeds = [self.draw.randrange(1 << 30) for _ in range(NUM_CLIENTS)]
        clients = [asyncio.create_task(self.client(seed)) for seed in seeds]
        await self.inject()
        self.is_over = True
        await asyncio.gather(*clients, *self.repairs)
        return self.report

    async def client(self, seed: int) -> None:
        """Asks one thing after another until the faults are over."""
        draw = random.Random(seed)
        while not self.is_over:
            asked = Asked(
                draw.randint(10, 120),
                draw.choice(PATHS),
                text=f"{draw.choice(('Short.', 'A long one. ' * 100))} {draw.random()}",
                seed=draw.randrange(1 << 30),
            )
            await self.one(asked, streams=draw.random() < 0.9)

    async def one(self, asked: Asked, *, streams: bool) -> None:
        """One answer, checked word by word."""
        told = Told()
        known = ""

        def speaker_of(event: dict[str, Any]) -> str:
            nonlocal known
            speaker = str(event.get("system_fingerprint", ""))
            if streams and speaker != known:
                self.streaming[known] -= 1
                self.streaming[speaker] += 1
                known = speaker
            return speaker

        await ask(self.router.address, asked.path, asked.body(stream=streams), told, speaker_of)
        self.streaming[known] -= 1
        if streams:
            self.report.gaps += told.gaps
        for change in told.changes:
            self.report.replays[self.blame(change)].append(change.gap_s)
        if (told.text, told.finish, told.is_done) == (asked.answer, "length", True):
            self.report.whole += 1
        else:
            self.report.lost.append(self.loss(asked, told))

    def blame(self, change: Change) -> str:
        """The fault behind a change of engines."""
        suspects = self.blamed[change.speaker]
        nearest = min(
            suspects, key=lambda one: abs(one[1] - change.last_at), default=("unknown", 0)
        )
        return nearest[0]

    def loss(self, asked: Asked, told: Told) -> str:
        """How an answer is wrong."""
        right = asked.answer
        same = next(
            (at for at, (a, b) in enumerate(zip(told.text, right, strict=False)) if a != b),
            min(len(told.text), len(right)),
        )
        blamed = [self.blame(change) for change in told.changes]
        return (
            f"{asked.path} seed {asked.seed}: status {told.status}, error {told.error or '-'}, "
            f"{same} of {len(right)} bytes right, {len(told.text)} came, continued after {blamed}"
        )

    async def inject(self) -> None:
        """One fault after another, each on an engine that is up."""
        faults = (*SUDDEN, *BEFORE_HEAD, *SIGNALS, "exit")
        while sum(self.report.injected.values()) < self.num_faults:
            await asyncio.sleep(self.draw.expovariate(1 / PAUSE_S))
            fault = self.draw.choice(faults)
            is_deadly = fault in SIGNALS or fault == "exit"
            # Where all engines refuse, a router has to as well: some are sound at any time.
            sound = await asyncio.to_thread(self.sound)
            up = sound
            if fault in SUDDEN or fault == "exit":
                up = [name for name in up if self.streaming[name] > 0]
            if not up or len(sound) <= HEALTHY:
                continue
            name = self.draw.choice(up)
            if fault not in BEFORE_HEAD:
                self.blamed[name].append((fault, time.monotonic()))
            self.report.injected[fault] += 1
            if is_deadly:
                self.down.add(name)
                self.repairs.add(asyncio.create_task(self.strike_down(name, fault)))
            else:
                order = BEFORE_HEAD.get(fault, {"fault": fault, "now": True})
                with contextlib.suppress(OSError):
                    await asyncio.to_thread(self.engines[name].arm, **order)  # type: ignore[arg-type]
            done = sum(self.report.injected.values())
            if done % 100 == 0:
                lost = len(self.report.lost)
                print(f"  {done} faults, {self.report.whole} whole, {lost} lost", file=sys.stderr)

    def sound(self) -> list[str]:
        """Engines that are up and have no fault in wait for the next request."""
        found = []
        for name, engine in self.engines.items():
            with contextlib.suppress(OSError):
                if name not in self.down and not engine.counters()["armed"]:
                    found.append(name)
        return found

    async def strike_down(self, name: str, fault: str) -> None:
        """Ends or stops an engine, and brings it back."""
        engine = self.engines[name]
        pause_s = self.draw.uniform(0.2, 1.5)
        if fault == "SIGSTOP":
            engine.send_signal(signal.SIGSTOP)
            await asyncio.sleep(pause_s)
            engine.send_signal(signal.SIGCONT)
        else:
            if fault == "exit":
                with contextlib.suppress(OSError):
                    await asyncio.to_thread(engine.arm, "exit", now=True)
                # It exits before its next word; if it has none to say, it is helped.
                await asyncio.sleep(0.1)
            await asyncio.to_thread(engine.kill)
            await asyncio.sleep(pause_s)
            await asyncio.to_thread(engine.start)
        # Until the router has seen it come back, it is no healthy one.
        await asyncio.sleep(0.5)
        self.down.discard(name)


def run(folder: Path, seed: int, faults: int) -> Report:
    """Starts everything, breaks it, and says how that went."""
    pace = ("--ttft", "5ms", "--itl", "5ms", "--words", "10000")
    with contextlib.ExitStack() as stack:
        engines = [
            stack.enter_context(
                running_engine("--kind", kind, "--words-per-event", str(words), *pace)
            )
            for kind, words in KINDS
        ]
        router = stack.enter_context(running_router(folder, engines, *FLAGS))
        report = asyncio.run(Chaos(router, engines, seed, faults).run())
        assert router.metric("orchestra_requests_running") == 0
    return report
