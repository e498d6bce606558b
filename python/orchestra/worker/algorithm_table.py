"""Which way of adding up between nodes is the fastest for which size of message, as measured over the very group."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

# Messages that are measured: from what a decode step adds up to what a chunk of a prompt does.
SIZES_BYTES = (4 << 10, 32 << 10, 256 << 10, 2 << 20)
# The fastest of so many counts, taken in turns.
ROUNDS = 3
# No further size is begun after so long: where it takes so long, bytes are what counts.
MEASURE_S_MAX = 1.0


class Algorithm(Enum):
    """A way to add up; all of them give the same bits."""

    GATHER = "gather"
    """Every rank sends every other all of its numbers: one message after the other, most bytes."""
    EXCHANGE = "exchange"
    """Each rank adds up its share of the numbers and sends that to every other: two messages, fewer bytes."""
    BY_NODE = "by-node"
    """Shares are added up inside each node, then between ranks of the same place, then joined inside each node."""


@dataclass(frozen=True)
class AlgorithmTable:
    """The fastest algorithm by the size of a message."""

    rows: tuple[tuple[int, Algorithm], ...]
    """Largest message, bytes, and its algorithm, in ascending order; the last one is for everything larger too."""

    def pick(self, num_bytes: int) -> Algorithm:
        """The algorithm for a message."""
        for largest, algorithm in self.rows:
            if num_bytes <= largest:
                return algorithm
        return self.rows[-1][1]

    def encode(self) -> str:
        """The text that `decode` reads."""
        return json.dumps([[largest, algorithm.value] for largest, algorithm in self.rows])

    @classmethod
    def decode(cls, text: str) -> "AlgorithmTable":
        """Reads what `encode` wrote."""
        return cls(tuple((int(largest), Algorithm(name)) for largest, name in json.loads(text)))


def measure(
    run: Callable[[Algorithm, Tensor], None],
    algorithms: Sequence[Algorithm],
    agree: Callable[[bool], bool],
    device: torch.device,
) -> AlgorithmTable:
    """Measures the algorithms; every rank of the group calls it.

    Args:
        run: adds up a tensor by an algorithm.
        algorithms: to compare; the last is the one that sends the fewest bytes.
        agree: waits for all ranks and gives all of them what the first one says.
        device: where tensors live.

    Returns:
        What this rank has measured: which of the ranks' tables is taken is the caller's business.
    """
    began = time.monotonic()
    for algorithm in algorithms:
        run(algorithm, torch.zeros(SIZES_BYTES[0] // 4, device=device))
    fastest: list[Algorithm] = []
    for size in SIZES_BYTES:
        seconds = dict.fromkeys(algorithms, float("inf"))
        numbers = torch.zeros(size // 4, device=device)
        for _ in range(ROUNDS):
            for algorithm in algorithms:
                agree(True)
                start = time.monotonic()
                run(algorithm, numbers)
                # Over when it is over on every rank.
                agree(True)
                seconds[algorithm] = min(seconds[algorithm], time.monotonic() - start)
        fastest.append(min(seconds, key=seconds.__getitem__))
        if not agree(time.monotonic() - began < MEASURE_S_MAX):
            fastest.append(algorithms[-1])
            break
    # Each size stands for messages up to half way to the next, by ratio.
    half_way = (SIZES_BYTES[1] // SIZES_BYTES[0]) ** 0.5
    borders = [int(size * half_way) for size in SIZES_BYTES]
    return AlgorithmTable(tuple(zip(borders, fastest, strict=False)))
