"""Which steps take the likeliest token of every row, so that nobody needs the rows themselves."""

from collections.abc import Sequence

from orchestra.worker.plan import SequenceStart, StepPlan


class LikeliestOnly:
    """Remembers the sampler slots that do more than take the likeliest token. Every rank does, and finds the same."""

    def __init__(self) -> None:
        self._others: set[int] = set()

    def start(self, starts: Sequence[SequenceStart]) -> None:
        """Sequences take their slots."""
        for start in starts:
            if start.is_likeliest_only:
                self._others.discard(start.slot)
            else:
                self._others.add(start.slot)

    def is_all_of(self, plan: StepPlan) -> bool:
        """Whether a step's samples want their likeliest tokens, and no log-probabilities."""
        return plan.num_top_logprobs < 0 and self._others.isdisjoint(plan.sample_slots.tolist())
