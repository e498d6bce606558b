"""How a step's attention is cut into calls: arithmetic over the plan, once per kind of layer and step."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestra.worker.kv_cache import KvCacheSpec
from orchestra.worker.model_config import AttentionRule
from orchestra.worker.plan import StepPlan

# Decoding sequences share one padded batch while that wastes at most this many tokens (a second batch costs about as
# much as reading them), or less than the tokens it is for.
PADDED_TOKENS_FREE = 512
# Largest mask of one call, numbers (with a soft cap: of its scores): longer chunks are computed in pieces.
MASK_NUMBERS_MAX = 1 << 22

# Masks of so many numbers in all are kept for a step's other layers; what is beyond is made again in each of them.
MASK_NUMBERS_KEPT = 2 * MASK_NUMBERS_MAX
# Most keys and values that one call gathers, bytes, unless a single sequence has more of them: sequences that share a
# prefix gather it once each, so that all of a step's may be many times what the cache holds.
GATHER_BYTES_MAX = 128 << 20

# Where whole prompts go through torch's own causal attention. On the CPU it gains next to nothing over the masked one,
# and adds up in another order: in bf16 a prompt's logits, and a token's experts, would depend on how it is cut.
CAUSAL_DEVICES = {"cuda"}

Int64Array = NDArray[np.int64]


@dataclass(frozen=True)
class CachedPart:
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
    mask: Callable[[], Tensor] | None
    """Gives what is added to scores, `[batch, 1, tokens * group, width * block_size]`; None: every position counts."""


@dataclass(frozen=True)
class StepLayout:
    """All calls of one step for layers of one rule."""

    cached: list[CachedPart]
    fresh: list[slice]
    """Rows of whole prompts, or their first chunks, where torch's causal attention computes them."""


def workspace_bytes(
    spec: KvCacheSpec, max_num_seqs: int, longest: int, num_layouts: int = 1
) -> int:
    """Upper bound of what one call needs beside queries and output: keys and values, a mask, scores.

    Args:
        spec: of this rank's cache.
        max_num_seqs: most sequences of one step.
        longest: sequence that will ever run, tokens.
        num_layouts: parts of a step that are laid out at a time.
    """
    blocks = -(-longest // spec.block_size) + 1
    sequence = blocks * spec.layer_block_bytes
    gathered = max(sequence, min(GATHER_BYTES_MAX, max_num_seqs * sequence))
    # Masks that are kept, of two kinds of layers; one more, or scores where a soft cap needs them, with what either is
    # made by way of.
    numbers = num_layouts * 2 * MASK_NUMBERS_KEPT + 3 * MASK_NUMBERS_MAX
    return gathered + numbers * torch.float32.itemsize


def with_whole_heads(tensor: Tensor) -> Tensor:
    """`[T, heads, head_dim]` in which a token's heads are one run of numbers; tokens may lie apart."""
    is_whole = tensor.stride()[1:] == (tensor.shape[2], 1)
    return tensor if is_whole else tensor.contiguous()


class LayoutPlanner:
    """Cuts steps into calls.

    Args:
        spec: of this rank's cache.
        group: query heads that share a KV head.
        device: of the masks and indices.
    """

    def __init__(self, spec: KvCacheSpec, group: int, device: torch.device) -> None:
        self._block_size = spec.block_size
        self._layer_block_bytes = spec.layer_block_bytes
        self._num_kv_heads = spec.num_kv_heads
        self._group = group
        self._dtype = spec.dtype
        self._device = device
        # [2 * num_kv_heads]: the runs of a block are numbered keys first, head by head.
        self._heads = np.arange(2 * spec.num_kv_heads)
        self._mask_room = 0

    def written(self, plan: StepPlan) -> Tensor:
        """Where the step's keys and values go, `int64[T * 2 * num_kv_heads]`: vectors of a layer."""
        blocks, offsets = np.divmod(plan.slot_mapping.astype(np.int64), self._block_size)
        runs = blocks[:, None] * len(self._heads) + self._heads
        return self._to_device((runs * self._block_size + offsets[:, None]).reshape(-1))

    def lay_out(self, plan: StepPlan, rule: AttentionRule) -> StepLayout:
        """Sorts the sequences into what is computed in one call each."""
        cached: list[CachedPart] = []
        fresh: list[slice] = []
        self._mask_room = MASK_NUMBERS_KEPT
        lengths = np.diff(plan.query_start)
        longer = np.flatnonzero(lengths != 1)
        num_decodes = int(longer[0]) if longer.size else len(lengths)
        if num_decodes:
            cached.extend(self._decodes(plan, num_decodes, rule))
        for sequence in range(num_decodes, len(lengths)):
            rows = slice(int(plan.query_start[sequence]), int(plan.query_start[sequence + 1]))
            tokens = rows.stop - rows.start
            # Torch's own causal attention knows neither windows nor caps.
            is_plain = rule.soft_cap is None and (rule.window is None or tokens <= rule.window)
            is_plain &= self._device.type in CAUSAL_DEVICES
            if is_plain and plan.context_lens[sequence] == tokens:
                fresh.append(rows)
            else:
                cached.extend(self._chunk(plan, sequence, rows, rule))
        return StepLayout(cached, fresh)

    # === sequences of one new token ===

    def _decodes(self, plan: StepPlan, count: int, rule: AttentionRule) -> list[CachedPart]:
        first = self._first_blocks(plan.context_lens[:count].astype(np.int64), rule)
        widths = -(-plan.context_lens[:count] // self._block_size) - first
        used, widest = int(widths.sum()), int(widths.max())
        padding = (widest * count - used) * self._block_size
        if padding <= max(PADDED_TOKENS_FREE, used * self._block_size):
            return self._bounded_parts(plan, np.arange(count), rule, first)
        # Buckets by the power of two of the width: at most half of a batch is padding, and there are few batches.
        buckets = np.ceil(np.log2(widths)).astype(np.int64)
        parts = []
        for bucket in np.unique(buckets):
            members = np.flatnonzero(buckets == bucket)
            parts.extend(self._bounded_parts(plan, members, rule, first[members]))
        return parts

    def _bounded_parts(
        self, plan: StepPlan, members: Int64Array, rule: AttentionRule, first: Int64Array
    ) -> list[CachedPart]:
        """One batch of some sequences, or several where one would gather too much."""
        widths = -(-plan.context_lens[members] // self._block_size) - first
        width = int(widths.max())
        limit = GATHER_BYTES_MAX // (width * self._layer_block_bytes)
        if rule.soft_cap is not None:
            scores = self._num_kv_heads * self._group * width * self._block_size
            limit = min(limit, MASK_NUMBERS_MAX // scores)
        limit = max(1, limit)
        parts = []
        for start in range(0, len(members), limit):
            some = members[start : start + limit]
            # Neighbours are a range, which costs no copy.
            is_range = int(some[-1]) - int(some[0]) + 1 == len(some)
            sequences = slice(int(some[0]), int(some[-1]) + 1) if is_range else some
            part = self._decode_part(plan, sequences, rule, first[start : start + limit], width)
            parts.append(part)
        return parts

    def _decode_part(
        self,
        plan: StepPlan,
        sequences: slice | Int64Array,
        rule: AttentionRule,
        first: Int64Array,
        width: int,
    ) -> CachedPart:
        """One batch: of each sequence, `width` blocks from `first` on."""
        count = len(first)
        seen = plan.context_lens[sequences] - first * self._block_size
        hidden = self._hidden(seen, rule)
        mask = None
        if hidden.any() or (seen < width * self._block_size).any():
            mask = self._lazy_mask(hidden, seen, width, (count, 1, 1, -1))
        tables = plan.block_tables[sequences]
        # Columns behind the table belong to padding, which the mask hides.
        columns = np.minimum(first[:, None] + np.arange(width), tables.shape[1] - 1)
        runs = self._runs_of(np.take_along_axis(tables, columns, axis=1))
        rows = sequences if isinstance(sequences, slice) else self._to_device(sequences)
        return CachedPart(rows, count, 1, runs, mask)

    # === sequences of several ===

    def _chunk(
        self, plan: StepPlan, sequence: int, rows: slice, rule: AttentionRule
    ) -> list[CachedPart]:
        """One sequence's new tokens behind what the cache holds of it, in pieces of bounded masks."""
        context = int(plan.context_lens[sequence])
        step = self._piece(context, rule)
        parts = []
        for start in range(rows.start, rows.stop, step):
            piece = slice(start, min(start + step, rows.stop))
            tokens = piece.stop - piece.start
            # The token at row `rows.stop - 1` sees the whole context, the one before it a token less.
            seen = np.arange(piece.start, piece.stop) - (rows.stop - 1) + context
            first = self._first_blocks(seen[:1], rule)
            begin, end = int(first[0]), -(-int(seen[-1]) // self._block_size)
            seen = (seen - begin * self._block_size).repeat(self._group)
            shape = (1, 1, tokens * self._group, -1)
            mask = self._lazy_mask(self._hidden(seen, rule), seen, end - begin, shape)
            runs = self._runs_of(plan.block_tables[sequence : sequence + 1, begin:end])
            parts.append(CachedPart(piece, 1, tokens, runs, mask))
        return parts

    def _piece(self, context: int, rule: AttentionRule) -> int:
        """New tokens of one call: as many as a bounded mask has room for."""
        wide = context + self._block_size
        if rule.window is not None:
            # More tokens than a window sees at once read mostly what each alone does not.
            wide = min(wide, 2 * (rule.window + self._block_size))
        copies = 1 if rule.soft_cap is None else self._num_kv_heads
        piece = max(1, MASK_NUMBERS_MAX // (wide * self._group * copies))
        return piece if rule.window is None else min(piece, rule.window)

    # === parts of both ===

    def _first_blocks(self, seen: Int64Array, rule: AttentionRule) -> Int64Array:
        """The first block that a token has to read which has `seen` tokens up to itself."""
        if rule.window is None:
            return np.zeros(len(seen), np.int64)
        return np.maximum(seen - rule.window, 0) // self._block_size

    def _hidden(self, seen: Int64Array, rule: AttentionRule) -> Int64Array:
        """How many positions at the beginning of what is read lie before the window."""
        if rule.window is None:
            return np.zeros(len(seen), np.int64)
        return np.maximum(seen - rule.window, 0)

    def _runs_of(self, block_tables: NDArray[np.int32]) -> Tensor:
        """The runs of `[batch, width]` blocks, ordered by key or value, sequence, head, block."""
        blocks = block_tables.astype(np.int64)[None, :, None, :] * len(self._heads)
        heads = self._heads.reshape(2, 1, self._num_kv_heads, 1)
        return self._to_device((blocks + heads).reshape(-1))

    def _lazy_mask(
        self, hidden: Int64Array, seen: Int64Array, width: int, shape: tuple[int, ...]
    ) -> Callable[[], Tensor]:
        """`_mask` in the shape of the scores: made now while there is room to keep it, else whenever one asks."""

        def make() -> Tensor:
            return self._mask(hidden, seen, width).view(shape)

        numbers = len(seen) * width * self._block_size
        if numbers > self._mask_room:
            return make
        self._mask_room -= numbers
        mask = make()
        return lambda: mask

    def _mask(self, hidden: Int64Array, seen: Int64Array, width: int) -> Tensor:
        """`[n, width * block_size]`: 0 from position `hidden` (`[n]`) up to `seen`, minus infinity around."""
        positions = torch.arange(width * self._block_size, device=self._device)
        mask = torch.zeros((len(seen), len(positions)), dtype=self._dtype, device=self._device)
        mask.masked_fill_(positions >= self._to_device(seen).unsqueeze(1), float("-inf"))
        if hidden.any():
            mask.masked_fill_(positions < self._to_device(hidden).unsqueeze(1), float("-inf"))
        return mask

    def _to_device(self, array: NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(array.astype(np.int64)).to(self._device, non_blocking=True)
