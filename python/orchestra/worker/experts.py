"""Mixture of experts: a router sends each token to a few small MLPs, and their weighted sum takes the MLP's place."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from orchestra.worker import experts_cpu, row_kernels
from orchestra.worker.expert_exchange import ExchangedExperts, Mix
from orchestra.worker.expert_router import Router, load_router
from orchestra.worker.layers import GatedMLP, LoadContext, Op
from orchestra.worker.linear import CpuLinear, make_linear
from orchestra.worker.loader import empty_weight
from orchestra.worker.model_config import ModelConfig
from orchestra.worker.sharding import Span


class Experts(Protocol):
    """This rank's part of the experts: a slice of each, or some of them whole.

    No expert has a limit of tokens, so none is ever dropped.
    """

    def __call__(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """This rank's part of the weighted sum, `[T, H]`; the sum over the ranks is all of it.

        Args:
            x: `[T, H]`
            weights: `float32[T, per_token]`
            chosen: `[T, per_token]`, the numbers of each token's experts in the model.
        """
        ...


@dataclass(frozen=True)
class ExpertNames:
    """What a family calls the three weights of an expert."""

    gate: str
    up: str
    down: str


class SparseMLP:
    """Router and experts.

    Args:
        router: the same on every rank.
        experts: this rank's part.
        shared: its part of what every token goes to; None: there is none.
    """

    def __init__(self, router: Router, experts: Experts, shared: Op | None) -> None:
        self._router = router
        self._experts = experts
        self._shared = shared

    @classmethod
    def load(
        cls, context: LoadContext, name: str, config: ModelConfig, names: ExpertNames
    ) -> "SparseMLP":
        """Loads `name` + `.gate`, `.experts.<number>` and, where the model has them, `.shared_experts`."""
        experts, shard = config.experts, context.communicator.shard
        assert experts is not None
        router = load_router(context, f"{name}.gate", config.hidden_size, experts)
        size = experts.intermediate_size
        own, inside = Span(0, experts.count), shard.span(size)
        if context.expert_parallel:
            own, inside = shard.span(experts.count), Span(0, size)
        group = context.expert_group
        # Where the experts of each rank of the group begin, and those of the last one end.
        bounds = [own.start, own.stop]
        if group is not None:
            bounds = [own.start + bound for bound in group.shard.bounds(len(own))]
            own = Span(bounds[group.shard.rank], bounds[group.shard.rank + 1])
        parts = [
            _Expert(f"{name}.experts.{number}", size, config, names)
            for number in range(experts.count)
        ]
        for part in (*parts[: own.start], *parts[own.stop :]):
            part.leave(context)
        weights = (part.load(context, inside) for part in parts[own.start : own.stop])
        here = _make_experts(context, own, weights, config.activation)
        shared = None
        if experts.shared_size:
            together = _Expert(f"{name}.shared_experts", experts.shared_size, config, names)
            shared = _mlp(
                *together.load(context, shard.span(experts.shared_size)), config.activation
            )
        if group is None:
            return cls(router, here, shared)
        everyone = ExchangedExperts(here, _make_mix(context), bounds, group, context.device)
        return cls(router, everyone, shared)

    def __call__(self, x: Tensor) -> Tensor:
        """Maps `[T, H]` to this rank's part of `[T, H]`, which is the sum over the ranks."""
        y = self._experts(x, *self._router(x))
        return y if self._shared is None else row_kernels.add_(y, self._shared(x))


class ExpertsInTurn:
    """One expert after the other, in torch's own operations: the numbers and devices for which there is no kernel.

    Args:
        first: number of the rank's first expert.
        experts: the rank's, in order; each maps `[n, H]` to this rank's part of the sum over the ranks.
    """

    def __init__(self, first: int, experts: Sequence[Op]) -> None:
        self._own = slice(first, first + len(experts))
        self._experts = experts

    def __call__(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """See `Experts`."""
        tokens, picks = chosen.shape
        # All pairs of token and pick, sorted by expert: what one expert computes is one run of rows.
        flat = chosen.flatten()
        counts = torch.bincount(flat, minlength=self._own.stop).tolist()
        before, runs = sum(counts[: self._own.start]), counts[self._own]
        order = flat.argsort(stable=True)[before : before + sum(runs)]
        inputs = torch.split(x.index_select(0, order // picks), runs)
        # Back in the order of the tokens before they are added up, so that no sum depends on who else is in the batch.
        outputs = x.new_zeros(tokens * picks, x.shape[1])
        parts = [expert(run) for expert, run in zip(self._experts, inputs, strict=True) if len(run)]
        if parts:
            outputs.index_copy_(0, order, torch.cat(parts))
        return _mix(outputs.view(tokens, picks, -1), weights)


def _make_experts(
    context: LoadContext, own: Span, weights: Iterable[tuple[Tensor, Tensor]], activation: str
) -> Experts:
    """What computes experts of these weights, which are loaded one after the other."""
    if len(own) and _has_rust_kernels(context):
        layers = [(CpuLinear(gate_up, None), CpuLinear(down, None)) for gate_up, down in weights]
        return experts_cpu.CpuExperts(own.start, layers, activation)
    if len(own) and (kernels := _triton(context)) is not None:
        experts: Experts = kernels.TritonExperts.stack(own.start, len(own), weights, activation)
        return experts
    return ExpertsInTurn(own.start, [_mlp(*pair, activation) for pair in weights])


def _make_mix(context: LoadContext) -> Mix:
    """What adds up as those experts do."""
    if _has_rust_kernels(context):
        return experts_cpu.mix
    kernels = _triton(context)
    return _mix if kernels is None else kernels.mix


def _mix(rows: Tensor, weights: Tensor) -> Tensor:
    """See `expert_exchange.Mix`."""
    return (rows * weights.unsqueeze(-1)).sum(1).to(rows.dtype)


def _has_rust_kernels(context: LoadContext) -> bool:
    """Whether the Rust kernels compute experts."""
    return context.device.type == "cpu" and context.dtype in row_kernels.KERNEL_DTYPES


def _triton(context: LoadContext) -> ModuleType | None:
    """`experts_triton`, where its kernels do."""
    if context.device.type != "cuda" or find_spec("triton") is None:
        return None
    from orchestra.worker import experts_triton

    return experts_triton if experts_triton.supports(context.device, context.dtype) else None


def _mlp(gate_up: Tensor, down: Tensor, activation: str) -> GatedMLP:
    return GatedMLP(make_linear(gate_up, None), make_linear(down, None), activation)


class _Expert:
    """One expert in the checkpoint."""

    def __init__(self, name: str, size: int, config: ModelConfig, names: ExpertNames) -> None:
        shape = [size, config.hidden_size]
        self._inner = [(f"{name}.{part}.weight", shape) for part in (names.gate, names.up)]
        self._down = (f"{name}.{names.down}.weight", shape[::-1])

    def load(self, context: LoadContext, span: Span) -> tuple[Tensor, Tensor]:
        """A slice of it: gates and values side by side, and what follows, less the sum over the ranks."""
        gate_up = context.stacked_rows([(name, shape, [span]) for name, shape in self._inner])
        name, shape = self._down
        down = empty_weight([shape[0], len(span)], context.dtype, context.device)
        context.reader.copy_columns(name, shape, span, down)
        return gate_up, down

    def leave(self, context: LoadContext) -> None:
        """Checks it, for another rank has it."""
        for name, shape in (*self._inner, self._down):
            context.reader.leave(name, shape)
