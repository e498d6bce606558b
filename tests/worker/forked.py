"""Processes of tests that are forked from one that has imported torch, which takes seconds."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from typing import Any

import torch

RANKS = get_context("forkserver")
# All of them at once: there is one such process for all tests of a pytest process.
RANKS.set_forkserver_preload(
    [
        f"tests.worker.{name}_process"
        for name in ("group", "moving", "node", "overlap", "plan", "rank", "symmetric")
    ]
)


@contextmanager
def forked(
    num: int, run: Callable[..., int | None], of_rank: Callable[[int], tuple[Any, ...]]
) -> Iterator[list[BaseProcess]]:
    """Starts processes of one thread each; kills those that are left at the end.

    Args:
        num: how many.
        run: what each calls; its exit status is what that returns.
        of_rank: with which arguments.
    """
    processes: list[BaseProcess] = []
    try:
        for rank in range(num):
            process: BaseProcess = RANKS.Process(
                target=_run_on_one_thread, args=(run, *of_rank(rank))
            )
            process.start()
            processes.append(process)
        yield processes
    finally:
        for started in processes:
            started.kill()
            started.join()


def exit_codes(processes: list[BaseProcess], timeout_s: float = 100.0) -> list[int | None]:
    """Waits for their ends; None for those that have not ended by then."""
    for process in processes:
        process.join(timeout_s)
    return [process.exitcode for process in processes]


def _run_on_one_thread(run: Callable[..., int | None], *arguments: Any) -> None:
    torch.set_num_threads(1)
    sys.exit(run(*arguments))
