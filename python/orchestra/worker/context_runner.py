"""Runs a rank's part of steps that are divided among ranks, and keeps the KV of the other parts."""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from orchestra.worker.attention import AttentionBackend, LayerListener
from orchestra.worker.attention_layout import LayoutPlanner
from orchestra.worker.context_parallel import (
    divide,
    part_of,
    rows_of,
    without_samples,
)
from orchestra.worker.expert_exchange import ExpertGroup
from orchestra.worker.kv_cache import PagedCache
from orchestra.worker.logits import Logits
from orchestra.worker.models import Model
from orchestra.worker.plan import StepPlan
from orchestra.worker.runner import ModelRunner
from orchestra.worker.sampler_slots import SamplerSlots
from orchestra.worker.sharding import Shard


class ContextGroup(Protocol):
    """The collective of the ranks that divide steps."""

    def all_gather(self, part: Tensor) -> Tensor:
        """Every rank's `[n, ...]` in the order of the ranks, `[size, n, ...]`."""
        ...

    def close(self) -> None:
        """Leaves the group."""
        ...


@dataclass(frozen=True)
class _OtherPart:
    rank: int
    num_tokens: int
    written: Tensor
    """`int64[num_tokens * 2 * num_kv_heads]`: where its keys and values go, vectors of a layer."""


class ContextAttention:
    """An attention backend that first gathers the KV of the tokens that other ranks compute.

    Args:
        inner: attends from this rank's tokens.
        cache: this rank's, of which `inner` reads.
        group: of the ranks that divide steps.
        shard: this rank's place in it.
        min_tokens: fewest tokens of prompts in a step that are divided.
        experts: the same ranks, where they have the experts between them.
    """

    def __init__(
        self,
        inner: AttentionBackend,
        cache: PagedCache,
        group: ContextGroup,
        shard: Shard,
        min_tokens: int,
        experts: ExpertGroup | None,
    ) -> None:
        self._inner = inner
        self._group = group
        self._experts = experts
        self._shard = shard
        self._min_tokens = min_tokens
        self._head_dim = cache.spec.head_dim
        layers = [cache.layer(index) for index in range(cache.spec.num_layers)]
        self._vectors = [layer.view(-1, self._head_dim) for layer in layers]
        self._planner = LayoutPlanner(cache.spec, 1, layers[0].device)
        self._others: list[_OtherPart] = []
        self._longest = 0

    def divide(self, plan: StepPlan) -> StepPlan:
        """What this rank computes of the next step; the same on every rank but for its place."""
        rank, size = self._shard.rank, self._shard.size
        parts = divide(plan.query_start, size, self._min_tokens)
        self._others = []
        if self._experts is not None:
            self._experts.is_divided = parts is not None
        if parts is None:
            # Each rank computes all of it, without a word to the others, and only one draws.
            return plan if rank == 0 else without_samples(plan)
        for other, segments in enumerate(parts):
            if other != rank:
                rows = rows_of(segments)
                slots = replace(plan, slot_mapping=plan.slot_mapping[rows])
                self._others.append(_OtherPart(other, len(rows), self._planner.written(slots)))
        own = part_of(plan, parts[rank], is_first=rank == 0)
        self._longest = max(len(own.token_ids), *(part.num_tokens for part in self._others))
        return own

    def prepare(self, plan: StepPlan) -> None:
        """Lays this rank's part out."""
        self._inner.prepare(plan)

    def watch(self, listener: LayerListener) -> None:
        """See `AttentionBackend`."""
        self._inner.watch(listener)

    def forward(self, layer: int, query: Tensor, key_value: Tensor) -> Tensor:
        """Computes one layer of this rank's part; see `AttentionBackend`."""
        if self._others:
            self._keep_others(layer, key_value)
        return self._inner.forward(layer, query, key_value)

    def _keep_others(self, layer: int, key_value: Tensor) -> None:
        """Exchanges the layer's keys and values, and writes those of the other ranks to the cache."""
        missing = self._longest - key_value.shape[0]
        if missing:
            key_value = torch.cat([key_value, key_value.new_zeros(missing, *key_value.shape[1:])])
        everyone = self._group.all_gather(key_value)
        for part in self._others:
            vectors = everyone[part.rank, : part.num_tokens].view(-1, self._head_dim)
            self._vectors[layer].index_copy_(0, part.written, vectors)


class ContextRunner(ModelRunner):
    """A `ModelRunner` that computes its rank's part of each step that is worth dividing.

    Args:
        model: this rank's part.
        cache: this rank's; that of every rank comes to hold all tokens.
        attention: over it.
        slots: what this rank keeps of the sampler slots, and draws with.
        device: where the model computes.
    """

    def __init__(
        self,
        model: Model,
        cache: PagedCache,
        attention: ContextAttention,
        slots: SamplerSlots,
        device: torch.device,
    ) -> None:
        super().__init__(model, cache, attention, slots, device)
        self._division = attention

    def _compute(self, plan: StepPlan) -> Logits | None:
        return super()._compute(self._division.divide(plan))
