"""Workers, prompts and figures that both sides of the comparison share."""

import array
import dataclasses
import random
import statistics

BLOCK_SIZE = 16
MODEL = "model"
MAX_TOKENS = 64
NUM_PROMPTS = 256


@dataclasses.dataclass(frozen=True)
class Cell:
    """One line of the table.

    Attributes:
        num_workers: Registered workers, alike.
        num_blocks: Blocks of 16 tokens in each prompt; all prompts share the first half.
        cycles: Measured cycles in one turn.
    """

    num_workers: int
    num_blocks: int
    cycles: int

    @property
    def name(self) -> str:
        """As the table shows it."""
        return f"{self.num_workers} x {self.num_blocks}"

    def prompts(self, seed: int) -> list[list[int]]:
        """Token ids of the prompts."""
        draw = random.Random(seed)
        half = self.num_blocks * BLOCK_SIZE // 2
        shared = [draw.randrange(1 << 17) for _ in range(half)]
        return [shared + [draw.randrange(1 << 17) for _ in range(half)] for _ in range(NUM_PROMPTS)]


def default_cells() -> list[Cell]:
    """From a node to the largest cell."""
    return [
        Cell(8, 16, 400),
        Cell(8, 128, 400),
        Cell(64, 128, 400),
        Cell(512, 128, 300),
        Cell(1024, 16, 300),
        Cell(1024, 128, 300),
        Cell(1024, 1024, 100),
        Cell(8192, 128, 100),
    ]


@dataclasses.dataclass
class Times:
    """Microseconds of single cycles."""

    samples: list[float] = dataclasses.field(default_factory=list)

    def at(self, quantile: float) -> float:
        """The sample at a quantile; 0.5 is the median."""
        if quantile == 0.5:
            return statistics.median(self.samples)
        return sorted(self.samples)[min(len(self.samples) - 1, int(len(self.samples) * quantile))]


def as_buffer(prompt: list[int]) -> "array.array[int]":
    """The prompt as a buffer of 32-bit integers, which is what a tokenizer hands over."""
    return array.array("I", prompt)
