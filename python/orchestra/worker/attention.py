"""Attention over the paged KV cache, in torch alone: runs on any device, in any dtype."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own customary name)

from orchestra.worker.kv_cache import KvCache
from orchestra.worker.plan import StepPlan

# Decoding sequences share one padded batch while that wastes at most this many tokens (a second batch costs about as
# much as reading them), or less than the tokens it is for.
PADDED_TOKENS_FREE = 512
# Largest mask of one call, numbers: longer chunks are computed in pieces.
MASK_NUMBERS_MAX = 1 << 22


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


@dataclass(frozen=True)
class _Cached:
    """Sequences of equally many new tokens, which attend over what the cache holds.

    The query heads that share a KV head are laid beside the new tokens (`tokens * group` rows per KV head): one
    matrix product then reads the keys once, instead of once per query head.
    """

    rows: slice | Tensor
    """The tokens, sequence after sequence: all of a range, or `int64[batch * tokens]`."""
    batch: int
    tokens: int
    """New tokens of each sequence."""
    runs: Tensor
    """`int64[2 * batch * num_kv_heads * width]`: which (block, key or value, head) to gather, in that order."""
    mask: Tensor | None
    """Added to the scores, `[batch, 1, tokens * group, width * block_size]`; None: every position counts."""


class TorchPagedAttention:
    """The fallback backend: gathers a sequence's blocks and hands them to torch's fused attention.

    Args:
        cache: this rank's.
        num_heads: query heads of this rank.
        device: of the tensors.
    """

    def __init__(self, cache: KvCache, num_heads: int, device: torch.device) -> None:
        spec = cache.spec
        self._block_size = spec.block_size
        self._num_kv_heads = spec.num_kv_heads
        self._group = num_heads // spec.num_kv_heads
        self._head_dim = spec.head_dim
        self._dtype = spec.dtype
        self._device = device
        layers = [cache.layer(index) for index in range(spec.num_layers)]
        # The two views of a layer: its vectors, for writing, and its runs of `block_size` vectors, for reading.
        self._vectors = [layer.view(-1, spec.head_dim) for layer in layers]
        self._runs = [layer.view(-1, spec.block_size * spec.head_dim) for layer in layers]
        # [2 * num_kv_heads]: the runs of a block are numbered keys first, head by head.
        self._heads = np.arange(2 * spec.num_kv_heads)
        self._written = torch.empty(0, dtype=torch.int64)
        self._cached: list[_Cached] = []
        self._fresh: list[slice] = []
        self._listener: LayerListener | None = None
        self._watched_step: int | None = None

    def watch(self, listener: LayerListener) -> None:
        """See `AttentionBackend`."""
        self._listener = listener

    def prepare(self, plan: StepPlan) -> None:
        """Sorts the sequences into what is computed in one call each."""
        self._watched_step = plan.step_id if plan.fills_blocks else None
        blocks, offsets = np.divmod(plan.slot_mapping.astype(np.int64), self._block_size)
        runs = blocks[:, None] * len(self._heads) + self._heads
        self._written = self._to_device((runs * self._block_size + offsets[:, None]).reshape(-1))
        self._cached = []
        self._fresh = []
        lengths = np.diff(plan.query_start)
        longer = np.flatnonzero(lengths != 1)
        num_decodes = int(longer[0]) if longer.size else len(lengths)
        if num_decodes:
            self._prepare_decodes(plan, num_decodes)
        for sequence in range(num_decodes, len(lengths)):
            start, stop = int(plan.query_start[sequence]), int(plan.query_start[sequence + 1])
            if plan.context_lens[sequence] == stop - start:
                self._fresh.append(slice(start, stop))
            else:
                self._prepare_chunk(plan, sequence, start, stop)

    def forward(self, layer: int, query: Tensor, key_value: Tensor) -> Tensor:
        """Computes one layer; see `AttentionBackend`."""
        vectors = key_value.reshape(-1, self._head_dim)
        self._vectors[layer].index_copy_(0, self._written, vectors)
        if self._watched_step is not None and self._listener is not None:
            self._listener(self._watched_step, layer)
        runs = self._runs[layer]
        if len(self._cached) == 1 and not self._fresh:
            return self._attend_cached(self._cached[0], query, runs)
        tokens, width = query.shape[0], query.shape[1] * self._head_dim
        output = torch.empty((tokens, width), dtype=query.dtype, device=query.device)
        for cached in self._cached:
            output[cached.rows] = self._attend_cached(cached, query[cached.rows], runs)
        for rows in self._fresh:
            output[rows] = self._attend_fresh(query[rows], key_value[rows])
        return output

    def _attend_cached(self, part: _Cached, query: Tensor, runs: Tensor) -> Tensor:
        """`query`: `[batch * tokens, num_heads, head_dim]`; returns its `[batch * tokens, num_heads * head_dim]`."""
        kv_heads, group, head_dim = self._num_kv_heads, self._group, self._head_dim
        context = runs.index_select(0, part.runs)
        key, value = context.view(2, part.batch, kv_heads, -1, head_dim).unbind(0)
        if part.tokens == 1:
            folded = query.reshape(part.batch, kv_heads, group, head_dim)
            attended = F.scaled_dot_product_attention(folded, key, value, part.mask)
            return attended.reshape(part.batch, -1)
        folded = query.view(part.batch, part.tokens, kv_heads, group, head_dim).transpose(1, 2)
        folded = folded.reshape(part.batch, kv_heads, -1, head_dim)
        attended = F.scaled_dot_product_attention(folded, key, value, part.mask)
        attended = attended.view(part.batch, kv_heads, part.tokens, group, head_dim)
        return attended.transpose(1, 2).reshape(part.batch * part.tokens, -1)

    def _attend_fresh(self, query: Tensor, key_value: Tensor) -> Tensor:
        """A whole prompt, or its first chunk: nothing of the sequence was in the cache before."""
        tokens, kv_heads = query.shape[0], self._num_kv_heads
        # [kv_heads, group, tokens, head_dim]; the keys of a group are one memory seen `group` times.
        folded = query.view(tokens, kv_heads, self._group, self._head_dim).permute(1, 2, 0, 3)
        spread = (kv_heads, self._group, tokens, self._head_dim)
        key = key_value[:, :kv_heads].transpose(0, 1).unsqueeze(1).expand(spread)
        value = key_value[:, kv_heads:].transpose(0, 1).unsqueeze(1).expand(spread)
        attended = F.scaled_dot_product_attention(folded, key, value, is_causal=True)
        return attended.permute(2, 0, 1, 3).reshape(tokens, -1)

    # === layout of a step ===

    def _prepare_decodes(self, plan: StepPlan, count: int) -> None:
        contexts = plan.context_lens[:count]
        widths = -(-contexts // self._block_size)
        used, widest = int(widths.sum()), int(widths.max())
        padding = (widest * count - used) * self._block_size
        if padding <= max(PADDED_TOKENS_FREE, used * self._block_size):
            self._add_decodes(plan, slice(0, count), count, widest)
            return
        # Buckets by the power of two of the width: at most half of a batch is padding, and there are few batches.
        buckets = np.ceil(np.log2(widths)).astype(np.int64)
        for bucket in np.unique(buckets):
            sequences = np.flatnonzero(buckets == bucket)
            self._add_decodes(plan, sequences, len(sequences), int(widths[sequences].max()))

    def _add_decodes(
        self, plan: StepPlan, sequences: slice | NDArray[np.int64], count: int, width: int
    ) -> None:
        contexts = plan.context_lens[sequences]
        rows = sequences if isinstance(sequences, slice) else self._to_device(sequences)
        mask = None
        if (contexts < width * self._block_size).any():
            mask = self._mask(contexts, width).view(count, 1, 1, -1)
        runs = self._runs_of(plan.block_tables[sequences, :width])
        self._cached.append(_Cached(rows, count, 1, runs, mask))

    def _prepare_chunk(self, plan: StepPlan, sequence: int, start: int, stop: int) -> None:
        """One sequence's new tokens behind what the cache holds of it, in pieces of bounded masks."""
        context = int(plan.context_lens[sequence])
        width = -(-context // self._block_size)
        runs = self._runs_of(plan.block_tables[sequence : sequence + 1, :width])
        piece = max(1, MASK_NUMBERS_MAX // (width * self._block_size * self._group))
        for first in range(start, stop, piece):
            rows = slice(first, min(first + piece, stop))
            tokens = rows.stop - rows.start
            # The token at row `stop - 1` sees the whole context, the one before it a token less.
            seen = np.arange(rows.start, rows.stop) - (stop - 1) + context
            mask = self._mask(seen.repeat(self._group), width)
            shaped = mask.view(1, 1, tokens * self._group, -1)
            self._cached.append(_Cached(rows, 1, tokens, runs, shaped))

    def _runs_of(self, block_tables: NDArray[np.int32]) -> Tensor:
        """The runs of `[batch, width]` blocks, ordered by key or value, sequence, head, block."""
        blocks = block_tables.astype(np.int64)[None, :, None, :] * len(self._heads)
        heads = self._heads.reshape(2, 1, self._num_kv_heads, 1)
        return self._to_device((blocks + heads).reshape(-1))

    def _mask(self, seen: NDArray[np.integer], width: int) -> Tensor:
        """`[n, width * block_size]`: 0 at the first `seen` (`[n]`) positions, minus infinity behind."""
        positions = torch.arange(width * self._block_size, device=self._device)
        mask = torch.zeros((len(seen), len(positions)), dtype=self._dtype, device=self._device)
        return mask.masked_fill_(positions >= self._to_device(seen).unsqueeze(1), float("-inf"))

    def _to_device(self, array: NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self._device, non_blocking=True)
