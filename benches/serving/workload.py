"""What both systems are asked to do: seeded prompts in cells of fixed shape."""

from __future__ import annotations

import random
import statistics
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cell:
    """One row of the table: a closed loop of `concurrency` clients over `num_requests` requests."""

    name: str
    concurrency: int
    num_requests: int
    prompt_tokens: int
    output_tokens: int
    shared_prefix_tokens: int = 0

    def prompts(self, seed: int, vocab_size: int) -> list[list[int]]:
        """Token-id prompts that no other seed repeats, so that no prefix cache helps across repeats.

        Args:
            seed: Chooses the prompts; equal seeds give equal prompts to both systems.
            vocab_size: Ids are drawn from the middle of the vocabulary, clear of special tokens.
        """
        # A random model answers any tokens; a string seed keeps cells apart from each other.
        draw = random.Random(f"{self.name}/{seed}")
        low, high = vocab_size // 8, vocab_size - 1
        prefix = [draw.randint(low, high) for _ in range(self.shared_prefix_tokens)]
        own = self.prompt_tokens - self.shared_prefix_tokens
        return [
            prefix + [draw.randint(low, high) for _ in range(own)] for _ in range(self.num_requests)
        ]


@dataclass
class Sample:
    """One system's run of one cell."""

    elapsed_s: float
    output_tokens: int
    ttft_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    """Between a request's tokens; empty where the system does not tell them apart."""

    @property
    def tokens_per_s(self) -> float:
        """Output tokens per second over the whole closed loop."""
        return self.output_tokens / self.elapsed_s

    @property
    def ttft_p50_ms(self) -> float:
        """Median time to the first token in milliseconds."""
        return statistics.median(self.ttft_s) * 1e3


def default_cells() -> list[Cell]:
    """The cells of the published table: 128 in / 64 out at 1, 8 and 32, and a shared 512-token prefix."""
    plain = [
        Cell(f"128/64 c={concurrency}", concurrency, max(4, 2 * concurrency), 128, 64)
        for concurrency in (1, 8, 32)
    ]
    return [*plain, Cell("512 shared + 32 / 64 c=32", 32, 32, 544, 64, shared_prefix_tokens=512)]
