"""Mixture of experts: a router sends each token to a few small MLPs, and their weighted sum takes the MLP's place."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestra.worker.expert_router import ExpertRouter
from orchestra.worker.layers import GatedMLP, LoadContext, Op
from orchestra.worker.linear import make_linear
from orchestra.worker.loader import empty_weight
from orchestra.worker.model_config import ModelConfig
from orchestra.worker.sharding import Span


@dataclass(frozen=True)
class ExpertNames:
    """What a family calls the three weights of an expert."""

    gate: str
    up: str
    down: str


class SparseMLP:
    """The router and this rank's part of the experts: a slice of each, or some of them whole.

    No expert has a limit of tokens, so none is ever dropped.

    Args:
        router: the same on every rank.
        first: number of the rank's first expert.
        experts: the rank's, in order; each maps `[n, H]` to this rank's part of the sum over the ranks.
        shared: the same, for every token; None: there is none.
    """

    def __init__(
        self,
        router: ExpertRouter,
        first: int,
        experts: Sequence[Op],
        shared: Op | None,
    ) -> None:
        self._router = router
        self._own = slice(first, first + len(experts))
        self._experts = experts
        self._shared = shared

    @classmethod
    def load(
        cls, context: LoadContext, name: str, config: ModelConfig, names: ExpertNames
    ) -> "SparseMLP":
        """Loads `name` + `.gate`, `.experts.<number>` and, where the model has them, `.shared_experts`."""
        experts, shard = config.experts, context.communicator.shard
        assert experts is not None
        router = ExpertRouter.load(context, f"{name}.gate", config.hidden_size, experts)
        size = experts.intermediate_size
        own, inside = Span(0, experts.count), shard.span(size)
        if context.expert_parallel:
            own, inside = shard.span(experts.count), Span(0, size)
        loaded = []
        for number in range(experts.count):
            expert = _Expert(f"{name}.experts.{number}", size, config, names)
            if own.start <= number < own.stop:
                loaded.append(expert.load(context, inside))
            else:
                expert.leave(context)
        shared = None
        if experts.shared_size:
            together = _Expert(f"{name}.shared_experts", experts.shared_size, config, names)
            shared = together.load(context, shard.span(experts.shared_size))
        return cls(router, own.start, loaded, shared)

    def __call__(self, x: Tensor) -> Tensor:
        """Maps `[T, H]` to this rank's part of `[T, H]`, which is the sum over the ranks."""
        weights, chosen = self._router(x)
        tokens, picks = chosen.shape
        # All pairs of token and pick, sorted by expert: what one expert computes is one run of rows.
        flat = chosen.flatten()
        counts = torch.bincount(flat, minlength=self._router.config.count).tolist()
        before, runs = sum(counts[: self._own.start]), counts[self._own]
        order = flat.argsort(stable=True)[before : before + sum(runs)]
        inputs = torch.split(x.index_select(0, order // picks), runs)
        # Back in the order of the tokens before they are added up, so that no sum depends on who else is in the batch.
        outputs = x.new_zeros(tokens * picks, x.shape[1])
        parts = [expert(run) for expert, run in zip(self._experts, inputs, strict=True) if len(run)]
        if parts:
            outputs.index_copy_(0, order, torch.cat(parts))
        y = outputs.view(tokens, picks, -1).mul_(weights.unsqueeze(-1)).sum(1)
        if self._shared is not None:
            y.add_(self._shared(x))
        return y


class _Expert:
    """One expert in the checkpoint."""

    def __init__(self, name: str, size: int, config: ModelConfig, names: ExpertNames) -> None:
        shape = [size, config.hidden_size]
        self._activation = config.activation
        self._inner = [(f"{name}.{part}.weight", shape) for part in (names.gate, names.up)]
        self._down = (f"{name}.{names.down}.weight", shape[::-1])

    def load(self, context: LoadContext, span: Span) -> GatedMLP:
        """A slice of it, without the sum over the ranks, which all experts share."""
        gate_up = context.stacked_rows([(name, shape, [span]) for name, shape in self._inner])
        name, shape = self._down
        down = empty_weight([shape[0], len(span)], context.dtype, context.device)
        context.reader.copy_columns(name, shape, span, down)
        linears = make_linear(gate_up, None), make_linear(down, None)
        return GatedMLP(*linears, self._activation)

    def leave(self, context: LoadContext) -> None:
        """Checks it, for another rank has it."""
        for name, shape in (*self._inner, self._down):
            context.reader.leave(name, shape)
