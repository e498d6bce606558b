"""Steps computed in two halves: while the sums of one are under way between the ranks, the other is computed.

The halves are the earlier and the later tokens of the step, and take turns at every sum. A sequence may be cut: its
later tokens attend in a layer when the turn of the earlier ones, which have left their KV there, is over. Each half is
a step like any other, so where a token's numbers do not depend on its batch they do not depend on the cut either.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from orchestra.worker import summing
from orchestra.worker.attention import AttentionBackend, LayerListener
from orchestra.worker.config import WorkerConfig
from orchestra.worker.context_parallel import ROWS_MIN, Segment, part_of
from orchestra.worker.logits import Logits
from orchestra.worker.models import Model
from orchestra.worker.models.decoder import Decoder, Rotations
from orchestra.worker.parallel import Communicator, Overlapping
from orchestra.worker.plan import StepPlan
from orchestra.worker.renewable_group import RenewableGroup
from orchestra.worker.sharding import Span
from orchestra.worker.summing import Summing

# Shorter pieces of a sequence stay with the rest of it.
PIECE_TOKENS_MIN = 4


def may_overlap(config: WorkerConfig) -> bool:
    """Whether a rank prepares for such steps: it shares layers with others, and the tokens with none."""
    return config.overlap_min_tokens > 0 and config.shard.size > 1 and config.context.size == 1


def overlapping(communicator: Communicator) -> Overlapping | None:
    """The communicator, where its sums can go on while something is computed."""
    if isinstance(communicator, RenewableGroup) and not isinstance(communicator.group, Overlapping):
        return None
    return communicator if isinstance(communicator, Overlapping) else None


def halve(plan: StepPlan) -> tuple[int, StepPlan, StepPlan] | None:
    """Cuts a step.

    Returns:
        How many tokens are in the first half, and both, without samples; None where there is too little to cut.
    """
    starts = plan.query_start
    num_tokens = int(starts[-1])
    middle = num_tokens // 2
    sequence = int(np.searchsorted(starts, middle, side="right")) - 1
    start, stop = int(starts[sequence]), int(starts[sequence + 1])
    cuts = [start, stop]
    if stop - start >= 2 * PIECE_TOKENS_MIN:
        cuts.append(min(max(middle, start + PIECE_TOKENS_MIN), stop - PIECE_TOKENS_MIN))
    possible = [cut for cut in cuts if min(cut, num_tokens - cut) >= ROWS_MIN]
    if not possible:
        return None
    cut = min(possible, key=lambda cut: abs(cut - middle))
    first, second = _segments(plan, Span(0, cut)), _segments(plan, Span(cut, num_tokens))
    return cut, part_of(plan, first, is_first=False), part_of(plan, second, is_first=False)


def _segments(plan: StepPlan, tokens: Span) -> list[Segment]:
    """The sequences, and parts of them, in a range of a step's tokens."""
    bounds = np.clip(plan.query_start, tokens.start, tokens.stop).tolist()
    spans = (Span(start, stop) for start, stop in pairwise(bounds))
    return [Segment(sequence, span) for sequence, span in enumerate(spans) if len(span) > 0]


class HalvedAttention:
    """An attention backend that prepares the steps that are worth it in two halves.

    Args:
        halves: two backends over the same cache, of which the first computes whole steps too.
        communicator: joins the ranks.
        min_tokens: fewest tokens of a step that is cut.
    """

    def __init__(
        self,
        halves: tuple[AttentionBackend, AttentionBackend],
        communicator: Communicator,
        min_tokens: int,
    ) -> None:
        self.halves = halves
        self.cut: int | None = None
        """How many tokens of the step are in its first half; None: it is computed whole."""
        self._communicator = communicator
        self._min_tokens = min_tokens

    def prepare(self, plan: StepPlan) -> None:
        """Lays the next step out, whole or in halves."""
        parts = halve(plan) if self._is_worth_it(plan) else None
        if parts is None:
            self.cut = None
            self.halves[0].prepare(plan)
            return
        self.cut, *plans = parts
        for half, part in zip(self.halves, plans, strict=True):
            half.prepare(part)

    def watch(self, listener: LayerListener) -> None:
        """See `AttentionBackend`; steps of which somebody hears are computed whole."""
        self.halves[0].watch(listener)

    def forward(self, layer: int, query: Tensor, key_value: Tensor) -> Tensor:
        """Computes one layer of a whole step; see `AttentionBackend`."""
        return self.halves[0].forward(layer, query, key_value)

    def _is_worth_it(self, plan: StepPlan) -> bool:
        is_long = len(plan.token_ids) >= self._min_tokens
        return is_long and not plan.fills_blocks and overlapping(self._communicator) is not None


@dataclass(frozen=True)
class OverlappedDecoder:
    """A `Model`: steps that were prepared in halves overlap their sums, all others are computed as usual."""

    decoder: Decoder
    """Computes halves."""
    usual: Model
    """Computes whole steps: the decoder, or its recording."""
    attention: HalvedAttention
    communicator: Communicator

    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: AttentionBackend, rows: Tensor | None
    ) -> Logits | None:
        """Runs one step; see `models.Model`."""
        assert attention is self.attention
        cut, decoder = self.attention.cut, self.decoder
        if cut is None:
            return self.usual.forward(token_ids, positions, self.attention.halves[0], rows)
        group = overlapping(self.communicator)
        assert group is not None
        hidden, rotations = decoder.enter(token_ids, positions)
        is_finished = rows is None or not decoder.is_last
        halves = [
            self._half(hidden[part], _rows_of(rotations, part), backend, is_finished=is_finished)
            for part, backend in zip(
                (slice(cut), slice(cut, None)), self.attention.halves, strict=True
            )
        ]
        parts = summing.run_in_turns(halves, group)
        joined = [torch.cat(pair) for pair in zip(*parts, strict=True)]
        if is_finished:
            return decoder.leave(joined[0])
        assert rows is not None
        if rows.shape[0] == 0:
            return None
        return decoder.leave(decoder.finish(*(part.index_select(0, rows) for part in joined)))

    def forget(self) -> None:
        """See `models.Model`."""
        self.usual.forget()

    def _half(
        self,
        hidden: Tensor,
        rotations: Rotations,
        attention: AttentionBackend,
        *,
        is_finished: bool,
    ) -> Summing[tuple[Tensor, ...]]:
        """One half up to the last layer's attention, or to its end."""
        attended = yield from self.decoder.attending(hidden, rotations, attention)
        if not is_finished:
            return attended
        finished = yield from self.decoder.finishing(*attended)
        return (finished,)


def _rows_of(rotations: Rotations, part: slice) -> Rotations:
    return {table: turned[part] for table, turned in rotations.items()}
