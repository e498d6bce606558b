"""Computations that stop wherever they need a sum over the ranks, and two ways to run them.

What meets a sum inside is a generator that yields the tensor and goes on when its sum has taken its place. So one text
of a layer serves both ways: each sum before what follows it, or several computations in turns, one of which goes on
while the sums of the others are under way (two batches overlapped, as SGLang has it, or Domino's halves of a batch).
"""

import contextlib
from collections import deque
from collections.abc import Generator, Sequence
from typing import TypeVar

from torch import Tensor

from orchestra.worker import recording
from orchestra.worker.parallel import Communicator, Overlapping

Result = TypeVar("Result")

Summing = Generator[Tensor, None, Result]
"""Yields what is to be replaced by its sum over the ranks before it goes on."""


def run(computation: Summing[Result], communicator: Communicator) -> Result:
    """Runs a computation to its end, each sum before what follows it."""
    is_shared = communicator.shard.size > 1
    try:
        while True:
            tensor = next(computation)
            if is_shared:
                recording.all_reduce(communicator, tensor)
    except StopIteration as end:
        result: Result = end.value
        return result


def run_in_turns(computations: Sequence[Summing[Result]], group: Overlapping) -> list[Result]:
    """Runs computations in turns, each from one sum to the next.

    The turns are strict, so that every rank begins the sums in the same order, and that no computation ever is behind
    a later one. No sum is under way when this is left, be it by an error.
    """
    results: dict[int, Result] = {}
    waiting = deque((place, it, _nothing) for place, it in enumerate(computations))
    try:
        while waiting:
            place, computation, finish = waiting[0]
            finish()
            waiting.popleft()
            try:
                tensor = next(computation)
            except StopIteration as end:
                results[place] = end.value
                continue
            waiting.append((place, computation, group.start_all_reduce(tensor)))
    finally:
        for _, _, finish in waiting:
            with contextlib.suppress(Exception):
                finish()
    return [results[place] for place in range(len(computations))]


def _nothing() -> None:
    """There is no sum before the first turn."""
