"""Keeps one worker running: its ranks start and stop together, and one that is lost is replaced."""

import asyncio
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from orchestra.serve.child import Child, StatusHandler, describe_exit, stop_all
from orchestra.serve.fork_server import ForkServer
from orchestra.serve.options import ServeOptions
from orchestra.serve.restarts import EXIT_FAILED, EXIT_INVALID_CONFIG, GaveUpError, Restarts

STOP_GRACE_S = 10.0
# The others wait so long for a replacement, which comes to them before it loads its weights.
REGROUP_TIMEOUT_S = 60.0
# Replacements in a row that the group may lose before it serves again; then it starts anew.
REPLACEMENTS_MAX = 3


class WorkerGroup:
    """The ranks of one worker.

    Args:
        index: which of the replicas.
        options: what was asked for.
        router: where rank 0 attaches, `host:port`.
        run_directory: for the files through which the ranks find each other.
        cuda_devices: `CUDA_VISIBLE_DEVICES` of the ranks; None: left as it is.
        fork_server: starts the ranks.
    """

    def __init__(
        self,
        index: int,
        options: ServeOptions,
        router: str,
        run_directory: Path,
        cuda_devices: str | None,
        fork_server: ForkServer,
    ) -> None:
        self.name = f"worker {index}"
        self.children: list[Child] = []
        self._index = index
        self._options = options
        self._router = router
        self._run_directory = run_directory
        self._environment = rank_environment(options, cuda_devices)
        self._fork_server = fork_server
        self._console = fork_server.console
        self._restarts = Restarts()
        self._attempts = 0
        self._replacements = 0
        self._loaded: dict[int, float] = {}
        self._ready_ranks: set[int] = set()

    @property
    def is_ready(self) -> bool:
        """Whether rank 0 has attached to the router."""
        return 0 in self._ready_ranks

    @property
    def loaded(self) -> float:
        """Share of the weights that is loaded, over all ranks, 0 to 1."""
        ranks = range(self._options.num_ranks)
        return sum(
            1.0 if r in self._ready_ranks else self._loaded.get(r, 0.0) for r in ranks
        ) / len(ranks)

    async def run(self) -> None:
        """Runs until cancelled.

        Raises:
            GaveUpError: the group never became ready, and would not.
        """
        while True:
            started = time.monotonic()
            last_words: Iterable[str] = ()
            try:
                rank, status = await self._run_once()
                end = f"{self.children[rank].name} {describe_exit(status)}"
                last_words = self.children[rank].tail
            except OSError as error:
                # There is no process to be had, or no place for its files; for now.
                status, end = EXIT_FAILED, f"{self.name} could not be started: {error}"
            delay_s = self._restarts.failed(status, time.monotonic() - started)
            if delay_s is None:
                raise GaveUpError(end, last_words, status)
            self._console.line(f"{end}; starting {self.name} again in {delay_s:g} s")
            await asyncio.sleep(delay_s)

    async def _run_once(self) -> tuple[int, int]:
        """Runs the group until it ends with one of its ranks; returns that rank and its exit status."""
        self._attempts += 1
        self._replacements = 0
        self._loaded.clear()
        self._ready_ranks.clear()
        self.children = []
        waits: list[asyncio.Task[int]] = []
        try:
            self._meeting_place().mkdir()
            for rank in range(self._options.num_ranks):
                self.children.append(await self._start(rank))
            waits = [asyncio.create_task(child.wait()) for child in self.children]
            while True:
                done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                ended = [rank for rank, wait in enumerate(waits) if wait in done]
                for rank in ended:
                    if not self._is_replaceable(rank, waits[rank].result()):
                        # What is left of the group has nothing to finish.
                        for child in self.children:
                            child.kill()
                        return rank, waits[rank].result()
                for rank in ended:
                    await self._replace(rank, waits[rank].result())
                    waits[rank] = asyncio.create_task(self.children[rank].wait())
        finally:
            self._ready_ranks.clear()
            for wait in waits:
                wait.cancel()
            await stop_all(self.children, STOP_GRACE_S)
            shutil.rmtree(self._meeting_place(), ignore_errors=True)

    def _is_replaceable(self, rank: int, status: int) -> bool:
        """Whether the others can go on without a rank that ended, until another has its place."""
        is_hopeless = status == EXIT_INVALID_CONFIG or self._replacements >= REPLACEMENTS_MAX
        is_possible = self._options.has_replaceable_ranks
        return rank != 0 and self.is_ready and is_possible and not is_hopeless

    async def _replace(self, rank: int, status: int) -> None:
        self._replacements += 1
        self._ready_ranks.discard(rank)
        self._loaded.pop(rank, None)
        end = f"{self.children[rank].name} {describe_exit(status)}"
        self._console.line(f"{end}; another process takes its place")
        self.children[rank] = await self._start(rank)

    async def _start(self, rank: int) -> Child:
        name, command, on_status = self._role(rank)
        return await self._fork_server.start(name, command, on_status, self._environment)

    def _role(self, rank: int) -> tuple[str, list[str], StatusHandler]:
        """What makes a process one of the ranks: its name, its command, and what hears of its status."""
        options = self._options
        command = [
            *["worker", str(options.model_dir), "--router", f"http://{self._router}"],
            *["--worker-id", f"worker-{self._index}"],
            *options.arguments_of(self._index),
        ]
        name = self.name
        if options.num_ranks > 1:
            rendezvous = f"file://{self._meeting_place() / 'rendezvous'}"
            command += ["--tp", str(options.tp), "--rank", str(rank), "--rendezvous", rendezvous]
            command += ["--pp", str(options.stages), "--cp", str(options.contexts)]
            if options.has_replaceable_ranks:
                command += ["--regroup-timeout", f"{REGROUP_TIMEOUT_S:g}"]
            name = f"{self.name} rank {rank}"

        def on_status(status: dict[str, Any]) -> None:
            self._on_status(rank, status)

        return name, command, on_status

    def _meeting_place(self) -> Path:
        # A new one per attempt: the old one's files hold the addresses of dead ranks.
        return self._run_directory / f"group-{self._index}-{self._attempts}"

    def _on_status(self, rank: int, status: dict[str, Any]) -> None:
        match status:
            case {"status": "loading", "done": int(done), "total": int(total)} if total > 0:
                self._loaded[rank] = min(done / total, 1.0)
            case {"status": "ready"}:
                self._ready_ranks.add(rank)
                if rank == 0:
                    self._restarts.ready()
                    if self._attempts > 1:
                        self._console.line(f"{self.name} is ready again")
            case {"status": "hung", "rank": int(hung)} if 0 <= hung < len(self.children):
                self._console.line(f"{self.children[hung].name} hangs: killing it")
                self.children[hung].kill()
            case {"status": "regrouped", "total_ms": int(total_ms)}:
                self._replacements = 0
                self._console.line(f"{self.name} is whole again after {total_ms} ms")
            case _:
                self._console.line(f"{self.name} wrote a status that is not understood")


def rank_environment(options: ServeOptions, cuda_devices: str | None) -> dict[str, str]:
    """What is added to the environment of a rank.

    Args:
        options: what was asked for.
        cuda_devices: `CUDA_VISIBLE_DEVICES`; None: left as it is.
    """
    environment = {} if cuda_devices is None else {"CUDA_VISIBLE_DEVICES": cuda_devices}
    if "OMP_NUM_THREADS" not in os.environ:
        # Ranks that each take every core would slow each other down.
        cores = len(os.sched_getaffinity(0))
        environment["OMP_NUM_THREADS"] = str(
            max(1, cores // (options.num_ranks * options.replicas))
        )
    return environment
