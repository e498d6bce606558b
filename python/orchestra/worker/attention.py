"""Attention over the paged KV cache, in torch alone: runs on any device, in any dtype."""

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own customary name)

from orchestra.worker.attention_layout import CachedPart, LayoutPlanner, StepLayout
from orchestra.worker.kv_cache import PagedCache
from orchestra.worker.model_config import AttentionRule
from orchestra.worker.plan import StepPlan

# Called with the step's id and the layer when the new KV of the layer is in the cache.
LayerListener = Callable[[int, int], None]


class AttentionBackend(Protocol):
    """Writes the new KV of a step to the cache and attends over it."""

    def prepare(self, plan: StepPlan) -> None:
        """Lays out the next step; called once, before its first layer."""
        ...

    def watch(self, listener: LayerListener) -> None:
        """From now on `listener` hears of each layer of the steps whose plan says `fills_blocks`."""
        ...

    def forward(self, layer: int, query: Tensor, key_value: Tensor) -> Tensor:
        """Computes one layer.

        Args:
            layer: index in this rank's cache.
            query: `[T, num_heads, head_dim]`.
            key_value: `[T, 2 * num_kv_heads, head_dim]`, the keys, then the values.

        Returns:
            `[T, num_heads * head_dim]`.
        """
        ...


class WatchedLayers:
    """What backends have in common: somebody who hears of the layers of some steps."""

    _listener: LayerListener | None = None
    _watched_step: int | None = None

    def watch(self, listener: LayerListener) -> None:
        """See `AttentionBackend`."""
        self._listener = listener

    @property
    def is_watched(self) -> bool:
        """Whether somebody hears of each layer of the step that was prepared last."""
        return self._watched_step is not None and self._listener is not None

    def _begin_step(self, plan: StepPlan) -> None:
        self._watched_step = plan.step_id if plan.fills_blocks else None

    def _announce(self, layer: int) -> None:
        """Says that a layer's new KV is in the cache."""
        if self._watched_step is not None and self._listener is not None:
            self._listener(self._watched_step, layer)


class TorchPagedAttention(WatchedLayers):
    """The fallback backend: gathers a sequence's blocks and hands them to torch's fused attention.

    Args:
        cache: this rank's.
        num_heads: query heads of this rank.
        device: of the tensors.
        rules: what each layer's tokens see and how scores are made; none: every layer is plain.
    """

    def __init__(
        self,
        cache: PagedCache,
        num_heads: int,
        device: torch.device,
        rules: Sequence[AttentionRule] = (),
    ) -> None:
        spec = cache.spec
        self._num_kv_heads = spec.num_kv_heads
        self._group = num_heads // spec.num_kv_heads
        self._head_dim = spec.head_dim
        self._rules = list(rules) or [AttentionRule()] * spec.num_layers
        layers = [cache.layer(index) for index in range(spec.num_layers)]
        # The two views of a layer: its vectors, for writing, and its runs of `block_size` vectors, for reading.
        self._vectors = [layer.view(-1, spec.head_dim) for layer in layers]
        self._runs = [layer.view(-1, spec.block_size * spec.head_dim) for layer in layers]
        self._planner = LayoutPlanner(spec, self._group, device)
        self._written = torch.empty(0, dtype=torch.int64)
        self._layouts: dict[AttentionRule, StepLayout] = {}

    def prepare(self, plan: StepPlan) -> None:
        """Lays the step out, once for each kind of layer."""
        self._begin_step(plan)
        self._written = self._planner.written(plan)
        self._layouts = {rule: self._planner.lay_out(plan, rule) for rule in set(self._rules)}

    def forward(self, layer: int, query: Tensor, key_value: Tensor) -> Tensor:
        """Computes one layer; see `AttentionBackend`."""
        vectors = key_value.reshape(-1, self._head_dim)
        self._vectors[layer].index_copy_(0, self._written, vectors)
        self._announce(layer)
        runs, rule = self._runs[layer], self._rules[layer]
        layout = self._layouts[rule]
        if len(layout.cached) == 1 and not layout.fresh:
            return self._attend_cached(layout.cached[0], query, runs, rule)
        tokens, width = query.shape[0], query.shape[1] * self._head_dim
        output = torch.empty((tokens, width), dtype=query.dtype, device=query.device)
        for part in layout.cached:
            output[part.rows] = self._attend_cached(part, query[part.rows], runs, rule)
        for rows in layout.fresh:
            output[rows] = self._attend_fresh(query[rows], key_value[rows], rule)
        return output

    def _attend_cached(
        self, part: CachedPart, query: Tensor, runs: Tensor, rule: AttentionRule
    ) -> Tensor:
        """`query`: `[batch * tokens, num_heads, head_dim]`; returns its `[batch * tokens, num_heads * head_dim]`."""
        kv_heads, group, head_dim = self._num_kv_heads, self._group, self._head_dim
        context = runs.index_select(0, part.runs)
        key, value = context.view(2, part.batch, kv_heads, -1, head_dim).unbind(0)
        mask = None if part.mask is None else part.mask()
        if part.tokens == 1:
            folded = query.reshape(part.batch, kv_heads, group, head_dim)
            attended = _attend(folded, key, value, mask, rule)
            return attended.reshape(part.batch, -1)
        folded = query.view(part.batch, part.tokens, kv_heads, group, head_dim).transpose(1, 2)
        folded = folded.reshape(part.batch, kv_heads, -1, head_dim)
        attended = _attend(folded, key, value, mask, rule)
        attended = attended.view(part.batch, kv_heads, part.tokens, group, head_dim)
        return attended.transpose(1, 2).reshape(part.batch * part.tokens, -1)

    def _attend_fresh(self, query: Tensor, key_value: Tensor, rule: AttentionRule) -> Tensor:
        """A whole prompt, or its first chunk: nothing of the sequence was in the cache before."""
        tokens, kv_heads = query.shape[0], self._num_kv_heads
        # [kv_heads, group, tokens, head_dim]; the keys of a group are one memory seen `group` times.
        folded = query.view(tokens, kv_heads, self._group, self._head_dim).permute(1, 2, 0, 3)
        spread = (kv_heads, self._group, tokens, self._head_dim)
        key = key_value[:, :kv_heads].transpose(0, 1).unsqueeze(1).expand(spread)
        value = key_value[:, kv_heads:].transpose(0, 1).unsqueeze(1).expand(spread)
        attended = F.scaled_dot_product_attention(
            folded, key, value, is_causal=True, scale=rule.scale
        )
        return attended.permute(2, 0, 1, 3).reshape(tokens, -1)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rule: AttentionRule
) -> Tensor:
    """Softmax attention, all `[batch, heads, n, head_dim]`; torch's fused one where no cap bends the scores."""
    if rule.soft_cap is None:
        return F.scaled_dot_product_attention(query, key, value, mask, scale=rule.scale)
    scale = 1 / math.sqrt(query.shape[-1]) if rule.scale is None else rule.scale
    scores = torch.matmul(query, key.transpose(-1, -2)).float()
    scores.mul_(scale / rule.soft_cap).tanh_().mul_(rule.soft_cap)
    if mask is not None:
        scores.add_(mask)
    return torch.matmul(scores.softmax(-1).to(value.dtype), value)
