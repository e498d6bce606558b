"""Executes one plan: the forward pass of this rank's shard and, at its end, the draw."""

import functools
from collections.abc import Callable
from typing import ParamSpec, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from orchestra.worker.attention import AttentionBackend, LayerListener
from orchestra.worker.drawn import NOTHING_DRAWN, Drawn, LatestTokens
from orchestra.worker.kv_cache import PagedCache
from orchestra.worker.logits import Logits
from orchestra.worker.models import Model
from orchestra.worker.plan import NO_COPIES, StepOutput, StepPlan
from orchestra.worker.sampler_slots import SamplerSlots
from orchestra.worker.staging import send

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def in_inference_mode(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Lets a function run in torch's inference mode.

    A thread that is in it already, as the loops of a worker are, does not enter again: of a small step that took 1 %.
    """

    @functools.wraps(function)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        if torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode():
            return function(*args, **kwargs)

    return run


class RecordedSteps(Protocol):
    """Decode steps that are recorded once and then repeated, without what Python does between the kernels."""

    def takes(self, plan: StepPlan) -> bool:
        """Whether a step can be run from a recording: a token is drawn from each of its tokens."""
        ...

    def run(self, plan: StepPlan, latest: LatestTokens | None = None) -> Logits | None:
        """Computes a step that `takes` has said yes to, attention and all; the logits are valid until the next one.

        Args:
            plan: the step.
            latest: has its pending tokens, where there may be some.

        Returns:
            What is drawn by; None on ranks that draw nothing.
        """
        ...

    def forget(self) -> None:
        """Lets go of all recordings, as must be done when the group of ranks has changed: they hold its collectives."""
        ...


class ModelRunner:
    """One rank's model, cache and sampler.

    Args:
        model: this rank's part.
        cache: this rank's.
        attention: over this rank's cache.
        slots: what this rank keeps of the sampler slots, and draws with.
        device: where the model computes.
        recorded: runs the steps that it takes; None: every step is computed anew.
    """

    def __init__(
        self,
        model: Model,
        cache: PagedCache,
        attention: AttentionBackend,
        slots: SamplerSlots,
        device: torch.device,
        recorded: RecordedSteps | None = None,
    ) -> None:
        self.recorded = recorded
        self._model = model
        self._cache = cache
        self._attention = attention
        self._slots = slots
        self._device = device

    def watch(self, listener: LayerListener) -> None:
        """Lets `listener` hear of each layer of the steps that fill blocks for other workers."""
        self._attention.watch(listener)

    def forget(self) -> None:
        """Lets go of recorded steps and of draws under way, as must be done when the group of ranks has changed."""
        self._slots.forget()
        if self.recorded is not None:
            self.recorded.forget()
        self._model.forget()

    def execute(self, plan: StepPlan) -> StepOutput:
        """Runs a step. Every rank of the group must run the same.

        Returns:
            What was drawn, in the order of the plan's samples; empty on ranks without a sampler.
        """
        drawn = self.start(plan)
        return NOTHING_DRAWN if drawn is None else drawn.fetch()

    @in_inference_mode
    def start(self, plan: StepPlan) -> Drawn | None:
        """Hands a step to the device, which runs it behind the one before. On a CPU it has run when this returns.

        Returns:
            The draws, in the order of the plan's samples, to be waited for; None where nothing is drawn.
        """
        self._slots.start(plan.starts)
        if self._slots.want_likeliest(plan):
            logits = self._compute(plan)
            return self._slots.take(None if logits is None else logits.likeliest(), plan)
        return self._slots.draw(self.forward(plan), plan)

    @in_inference_mode
    def forward(self, plan: StepPlan) -> Tensor | None:
        """Computes a step's KV and logits.

        Returns:
            `[N, vocab_size]` in the order of the plan's samples; None on ranks without a sampler, and where `N` is 0.
        """
        logits = self._compute(plan)
        return None if logits is None else logits.whole()

    def _compute(self, plan: StepPlan) -> Logits | None:
        if plan.swap_out is not NO_COPIES or plan.swap_in is not NO_COPIES:
            self._cache.copy_blocks(plan.swap_out, plan.swap_in)
        if self.recorded is not None and self.recorded.takes(plan):
            return self.recorded.run(plan, self._slots.latest)
        # The tokens to sample from: the last of each sequence that draws.
        rows = plan.query_start[plan.sample_sequences + 1] - 1
        tokens = len(plan.token_ids)
        self._attention.prepare(plan)
        inputs = np.concatenate([plan.token_ids, plan.positions, rows], dtype=np.int64)
        token_ids, positions, row_index = torch.split(
            send(inputs, self._device),
            [tokens, tokens, len(rows)],
        )
        if self._slots.latest is not None:
            self._slots.latest.fill(token_ids, plan.pending)
        chosen = None if plan.draws_from_all else row_index
        return self._model.forward(token_ids, positions, self._attention, chosen)


def warm_up_plan(num_tokens: int, block: int = 0, block_size: int = 0) -> StepPlan:
    """A step that computes zeros into a block in which nothing lies.

    Running it lets the libraries choose and build their kernels before the first request waits for them.

    Args:
        num_tokens: of its one sequence, at most the block size; 1 warms decoding up, more warm prefill up.
        block: where its KV goes.
        block_size: tokens of a block; needed for another than the first.
    """
    positions = np.arange(num_tokens, dtype=np.int32)
    zero = np.zeros(1, np.int32)
    return StepPlan(
        step_id=0,
        token_ids=np.zeros(num_tokens, np.int32),
        positions=positions,
        slot_mapping=positions + block * block_size,
        query_start=np.array([0, num_tokens], np.int32),
        context_lens=np.array([num_tokens], np.int32),
        block_tables=np.full((1, 1), block, np.int32),
        swap_out=NO_COPIES,
        swap_in=NO_COPIES,
        sample_sequences=zero,
        sample_slots=zero,
        sample_positions=zero,
        num_top_logprobs=-1,
        starts=(),
    )
