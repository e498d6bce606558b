"""Orchestra's own workers: killed with SIGKILL one after another while clients stream through the router."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.chaos.client import Told, ask
from tests.chaos.report import Report
from tests.chaos.tokens import FIRST_TOKEN, VOCAB_SIZE, answer
from tests.faults.processes import ROOT, Router, eventually, running_router

NUM_WORKERS = 3
NUM_CLIENTS = 12
STEP_MS = 10
RESTART_AFTER_S = 0.5
ATTACHED = "orchestra_workers"
# Long enough that the router has missed a death, if it missed it.
BLAME_S = 8.0


class Worker:
    """A mock worker's process; its number tells readers who drew a token."""

    def __init__(self, router: Router, number: int) -> None:
        command = [sys.executable, "-m", "tests.chaos.mock_worker"]
        self.number = number
        self.process = subprocess.Popen(
            [*command, f"http://{router.workers}", str(number), str(STEP_MS)], cwd=ROOT
        )

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()


class Kills:
    """Workers, clients, and the one that kills."""

    def __init__(self, router: Router, seed: int, kills: int) -> None:
        self.router = router
        self.draw = random.Random(seed)
        self.num_kills = kills
        self.report = Report()
        self.numbers = iter(range(1, 1 << 20))
        self.workers: dict[str, Worker] = {}
        self.killed: dict[str, float] = {}
        self.streaming: Counter[str] = Counter()
        self.is_over = False

    async def run(self) -> Report:
        """All of it."""
        try:
            for _ in range(NUM_WORKERS):
                self.start()
            await self.all_attached()
            seeds = [self.draw.randrange(1 << 30) for _ in range(NUM_CLIENTS)]
            clients = [asyncio.create_task(self.client(seed)) for seed in seeds]
            await self.kill_one_after_another()
            self.is_over = True
            await asyncio.gather(*clients)
        finally:
            for worker in self.workers.values():
                worker.kill()
        return self.report

    def start(self) -> None:
        """One more worker."""
        worker = Worker(self.router, next(self.numbers))
        self.workers[str(worker.number)] = worker

    async def all_attached(self) -> None:
        """Waits until the router has all workers."""
        check = lambda: self.router.metric(ATTACHED) == NUM_WORKERS  # noqa: E731
        await asyncio.to_thread(eventually, check, 60)

    async def client(self, seed: int) -> None:
        """Asks one thing after another until the kills are over."""
        draw = random.Random(seed)
        while not self.is_over:
            length = draw.randint(1, 200)
            prompt = [draw.randrange(FIRST_TOKEN, VOCAB_SIZE) for _ in range(length)]
            await self.one(prompt, draw.randint(20, 120))

    async def one(self, prompt: list[int], count: int) -> None:
        """One answer, checked token by token."""
        body = {
            "model": "mock",
            "prompt": prompt,
            "max_tokens": count,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "logprobs": 0,
            "return_token_ids": True,
        }
        told = Told()
        known = ""

        def speaker_of(event: dict[str, Any]) -> str:
            nonlocal known
            (logprob, *_) = event["choices"][0]["logprobs"]["token_logprobs"]
            speaker = str(round(-logprob))
            if speaker != known:
                self.streaming[known] -= 1
                self.streaming[speaker] += 1
                known = speaker
            return speaker

        await ask(
            self.router.address, "/v1/completions", json.dumps(body).encode(), told, speaker_of
        )
        self.streaming[known] -= 1
        self.report.gaps += told.gaps
        for change in told.changes:
            # Preempted or moved answers change their worker as well; a kill is what is measured.
            is_kill = time.monotonic() - self.killed.get(change.speaker, 0.0) < BLAME_S
            self.report.replays["SIGKILL" if is_kill else "unknown"].append(change.gap_s)
        if (told.token_ids, told.finish, told.is_done) == (answer(prompt, count), "length", True):
            self.report.whole += 1
        else:
            by = [change.speaker for change in told.changes] + [told.speaker]
            self.report.lost.append(
                f"{len(prompt)} prompt tokens, {len(told.token_ids)} of {count} came, "
                f"status {told.status}, error {told.error or '-'}, by workers {by}"
            )

    async def kill_one_after_another(self) -> None:
        """Kills a worker that is streaming, starts another, and waits for it."""
        while self.report.injected["SIGKILL"] < self.num_kills:
            await asyncio.sleep(self.draw.uniform(0.02, 0.2))
            names = [name for name in self.workers if self.streaming[name] > 0]
            if not names:
                continue
            name = self.draw.choice(names)
            self.killed[name] = time.monotonic()
            self.workers.pop(name).kill()
            self.report.injected["SIGKILL"] += 1
            # The two cores of a small machine are the survivors' now; a start takes one for a while.
            await asyncio.sleep(RESTART_AFTER_S)
            self.start()
            await self.all_attached()
            done = self.report.injected["SIGKILL"]
            if done % 20 == 0:
                lost = len(self.report.lost)
                print(f"  {done} kills, {self.report.whole} whole, {lost} lost", file=sys.stderr)


def run(folder: Path, seed: int, kills: int) -> Report:
    """Starts everything, kills, and says how that went."""
    with contextlib.ExitStack() as stack:
        router = stack.enter_context(running_router(folder, []))
        report = asyncio.run(Kills(router, seed, kills).run())
        assert router.metric("orchestra_requests_running") == 0
    return report
