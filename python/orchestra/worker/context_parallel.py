"""Divides the tokens of a step's long prompts among ranks that each have the whole model, or the same shard of it.

Every rank computes some tokens through all layers. In each layer the keys and values of all of them are gathered, so
that the cache of every rank holds every token; then a rank attends from its own tokens over the cache (context
parallelism by all-gather: Llama 3, section 3.3.2). What passes keys around in a ring adds up a token's attention in
an order that depends on the ranks, and what exchanges heads (DeepSpeed-Ulysses) leaves each rank with the KV of some
heads only; here a token's numbers are those that a single rank computes, whatever the division, and any later step
may be computed anywhere.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from orchestra.worker.plan import Int32Array, StepPlan
from orchestra.worker.sharding import Span

# Shorter runs of a sequence's tokens stay whole, for each rank that they could be divided among.
RUN_TOKENS_PER_RANK_MIN = 4
# One row alone is multiplied in another order than several.
ROWS_MIN = 2

_NOTHING = np.empty(0, np.int32)


@dataclass(frozen=True)
class Segment:
    """Neighbouring tokens of one sequence."""

    sequence: int
    """Row of the plan."""
    tokens: Span
    """By their place in the step."""


def divide(query_start: Int32Array, size: int, min_tokens: int) -> list[list[Segment]] | None:
    """Divides a step's tokens so that every rank has as much to compute.

    A later token of a prompt attends over more, so each rank gets a piece from the first half and the one that
    mirrors it in the second: with three ranks `0 1 2 2 1 0`. Decoding sequences and short runs are rank 0's, which
    gets less of the long ones instead. The last token of every sequence is rank 0's too: it has the sampler.

    Args:
        query_start: `[S + 1]` of the plan.
        size: ranks.
        min_tokens: fewest tokens of long runs that are worth it.

    Returns:
        Each rank's segments in the order of the step; None where every rank is to compute the whole step.
    """
    lengths = np.diff(query_start)
    is_long = lengths >= size * RUN_TOKENS_PER_RANK_MIN
    num_long = int(lengths[is_long].sum())
    if size == 1 or num_long < min_tokens:
        return None
    num_tokens = int(query_start[-1])
    # Rank 0's share of the long runs, then where each other rank's begins.
    first = max(0, num_tokens // size - (num_tokens - num_long))
    edges = [0, *(first + (num_long - first) * rank // (size - 1) for rank in range(size))]
    ranks: list[list[Segment]] = [[] for _ in range(size)]
    for sequence, (start, length) in enumerate(zip(query_start, lengths, strict=False)):
        if not is_long[sequence]:
            ranks[0].append(Segment(sequence, Span(int(start), int(start) + int(length))))
            continue
        for rank, span in _zigzag(int(length), edges):
            ranks[rank].append(Segment(sequence, span.after(int(start))))
    has_enough = all(sum(len(part.tokens) for part in parts) >= ROWS_MIN for parts in ranks)
    return ranks if has_enough else None


def _zigzag(length: int, edges: Sequence[int]) -> list[tuple[int, Span]]:
    """The pieces of one run, in order; `edges` are the ranks' shares of all long runs, from 0 to their sum."""
    size = len(edges) - 1
    # From the front:  0 | bounds[1] | bounds[2] ... length / 2, and the same from the back. Rank 0 has both ends.
    bounds = [0, *(max(1, length * edge // (2 * edges[-1])) for edge in edges[1:])]
    front = [(rank, Span(bounds[rank], bounds[rank + 1])) for rank in range(size - 1)]
    back = [(rank, Span(length - span.stop, length - span.start)) for rank, span in front]
    middle = (size - 1, Span(bounds[size - 1], length - bounds[size - 1]))
    pieces = [*front, middle, *reversed(back)]
    return [(rank, span) for rank, span in pieces if len(span) > 0]


def rows_of(segments: Sequence[Segment]) -> NDArray[np.int64]:
    """The tokens of some segments, by their place in the step."""
    return np.concatenate([np.arange(part.tokens.start, part.tokens.stop) for part in segments])


def part_of(plan: StepPlan, segments: Sequence[Segment], *, is_first: bool) -> StepPlan:
    """What one rank computes, as a plan in which each segment is a sequence.

    Args:
        plan: the whole step.
        segments: of the rank.
        is_first: whether it is rank 0, which keeps the samples.
    """
    rows = rows_of(segments)
    sequences = np.array([part.sequence for part in segments])
    ends = np.array([part.tokens.stop for part in segments])
    part = replace(
        plan,
        token_ids=plan.token_ids[rows],
        positions=plan.positions[rows],
        slot_mapping=plan.slot_mapping[rows],
        query_start=np.cumsum([0, *(len(part.tokens) for part in segments)], dtype=np.int32),
        context_lens=plan.positions[ends - 1] + np.int32(1),
        block_tables=plan.block_tables[sequences],
    )
    if not is_first:
        return without_samples(part)
    # A sequence's last token is the end of one of rank 0's segments.
    sampled = np.searchsorted(ends, plan.query_start[plan.sample_sequences + 1])
    return replace(part, sample_sequences=sampled.astype(np.int32))


def without_samples(plan: StepPlan) -> StepPlan:
    """A step that ends with its KV."""
    return replace(
        plan, sample_sequences=_NOTHING, sample_slots=_NOTHING, sample_positions=_NOTHING
    )
