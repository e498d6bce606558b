"""What every rank keeps of the sampler slots, and what only the rank that draws does."""

from collections.abc import Sequence

from torch import Tensor

from orchestra.worker.drawn import Drawn, LatestTokens
from orchestra.worker.plan import Int32Array, SequenceStart, StepPlan
from orchestra.worker.sampler import Sampler


class SamplerSlots:
    """One rank's: which slots need whole logits, which tokens were last drawn for them, and what draws them.

    Args:
        sampler: of the last stage's first rank; None on the others.
        latest: of every rank whose steps are planned before the tokens of the one before are known, else None.
    """

    def __init__(self, sampler: Sampler | None = None, latest: LatestTokens | None = None) -> None:
        self.latest = latest
        self._sampler = sampler
        # Slots that do more than take the likeliest token. Every rank finds the same.
        self._others: set[int] = set()

    def start(self, starts: Sequence[SequenceStart]) -> None:
        """A step begins, and sequences take their slots; see `Sampler.start`."""
        for start in starts:
            if start.is_likeliest_only:
                self._others.discard(start.slot)
            else:
                self._others.add(start.slot)
        if self._sampler is not None:
            self._sampler.start(starts)

    def forget(self) -> None:
        """Lets go of draws that nobody has waited for, of steps that were given up."""
        if self._sampler is not None:
            self._sampler.forget()

    def want_likeliest(self, plan: StepPlan) -> bool:
        """Whether all of a step's samples take their likeliest tokens, and nobody asks for log-probabilities."""
        return plan.num_top_logprobs < 0 and self._others.isdisjoint(plan.sample_slots.tolist())

    def take(self, tokens: Tensor | Int32Array | None, plan: StepPlan) -> Drawn | None:
        """Takes the likeliest tokens (`[N]`) of a step; None where this rank has none, or draws nothing."""
        if tokens is None or self._sampler is None:
            return None
        return self._sampler.take(tokens, plan.sample_slots)

    def draw(self, logits: Tensor | None, plan: StepPlan) -> Drawn | None:
        """Draws a step's tokens from `[N, vocab_size]`; None where this rank has none, or draws nothing."""
        if logits is None or self._sampler is None:
            return None
        return self._sampler.draw(
            logits, plan.sample_slots, plan.sample_positions, plan.num_top_logprobs
        )
