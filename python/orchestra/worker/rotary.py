"""Rotary position embedding as one complex multiplication.

Checkpoints pair element `i` of a head with element `i + head_dim / 2`. Here the rows of the query and key projections
are put in pairs when they are loaded (`interleave`), so that a pair is one complex number and a rotation one product:
the scores, sums over the whole head, are the same, and the five small kernels of the usual form become one.
"""

import math

import torch
from torch import Tensor

from orchestra.worker import row_kernels
from orchestra.worker.rope_config import RopeConfig


def interleave(rows: Tensor, head_dim: int, rotary_dim: int) -> Tensor:
    """Reorders the rows of whole heads from `a0 a1 … b0 b1 … c0 c1 …` to `a0 b0 a1 b1 … c0 c1 …`.

    Args:
        rows: `[heads * head_dim, …]`: rows of a query or key projection, its bias, or a norm's weight.
        head_dim: rows of one head.
        rotary_dim: how many of them are rotated, the first ones; the rest (`c`) stays where it is.
    """
    heads = rows.view(-1, head_dim, *rows.shape[1:])
    first, second = heads[:, :rotary_dim].chunk(2, dim=1)
    paired = torch.stack([first, second], dim=2).flatten(1, 2)
    return torch.cat([paired, heads[:, rotary_dim:]], dim=1).reshape(rows.shape)


def inverse_frequencies(rope: RopeConfig, rotary_dim: int, max_positions: int) -> Tensor:
    """Radians per position of each pair, `float32[rotary_dim / 2]`.

    `dynamic` changes nothing up to the length that the model is configured for, and longer sequences do not run.

    Args:
        rope: which rotation.
        rotary_dim: rotated elements of a head.
        max_positions: longest sequence that will run. It decides between the two sets of `longrope`, once and for all:
            were each sequence's own length to decide, its cached keys would be wrong when it grows past the bound.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(frequencies, rope)
    if rope.kind == "yarn":
        return _yarn(frequencies, rope)
    if rope.kind == "longrope":
        is_long = max_positions > rope.original_max_position_embeddings
        return frequencies / torch.tensor(rope.long_factor if is_long else rope.short_factor)
    return frequencies


class RotaryTable:
    """The rotation of every position, `complex64[max_positions, head_dim / 2]`.

    Pairs that are not rotated are multiplied by 1.
    """

    def __init__(
        self, rope: RopeConfig, head_dim: int, max_positions: int, device: torch.device
    ) -> None:
        rotary_dim = rope.rotary_dim(head_dim)
        positions = torch.arange(max_positions, dtype=torch.float32)
        angles = torch.outer(positions, inverse_frequencies(rope, rotary_dim, max_positions))
        rotated = torch.polar(torch.full_like(angles, rope.attention_factor), angles)
        rest = torch.ones(max_positions, (head_dim - rotary_dim) // 2, dtype=rotated.dtype)
        table = torch.cat([rotated, rest], dim=1).to(device)
        # [max_positions, head_dim], as kernels see it.
        self._table = torch.view_as_real(table).flatten(1)

    def __call__(self, positions: Tensor) -> Tensor:
        """The rotations of `int64[T]` positions, `complex64[T, 1, head_dim / 2]`."""
        if row_kernels.can_look_up(self._table, positions):
            turned = row_kernels.look_up(self._table, positions)
        else:
            turned = self._table.index_select(0, positions)
        return torch.view_as_complex(turned.view(len(positions), 1, -1, 2))


def rotate(heads: Tensor, rotations: Tensor) -> None:
    """Rotates in place.

    Args:
        heads: `[T, heads, head_dim]`, pairs interleaved; may be a view.
        rotations: from `RotaryTable`.
    """
    if row_kernels.supports(heads) and row_kernels.has_whole_heads(heads):
        row_kernels.rotate(heads, rotations)
        return
    tokens, count, head_dim = heads.shape
    pairs = heads.view(tokens, count, head_dim // 2, 2)
    if heads.dtype == torch.float32:
        torch.view_as_complex(pairs).mul_(rotations)
    else:
        turned = torch.view_as_complex(pairs.float()).mul_(rotations)
        pairs.copy_(torch.view_as_real(turned))


def _llama3(frequencies: Tensor, rope: RopeConfig) -> Tensor:
    """Slow rotations become `factor` times slower, fast ones stay, those between are blended."""
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
    share = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = share.clamp(0.0, 1.0)
    return (1 - kept) * frequencies / rope.factor + kept * frequencies


def _yarn(frequencies: Tensor, rope: RopeConfig) -> Tensor:
    """Like `_llama3`, but blended evenly over the pairs between two bounds (Peng et al., 2023, section 3.2)."""
    pairs = len(frequencies)

    def pair_with(turns: float) -> float:
        """The pair (a fraction) that makes so many turns in the original context."""
        ratio = rope.original_max_position_embeddings / (turns * 2 * math.pi)
        return pairs * math.log(ratio) / math.log(rope.theta)

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    width = high - low if high != low else 0.001  # a step, where nothing lies between
    slowed = ((torch.arange(pairs, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    return frequencies / rope.factor * slowed + frequencies * (1 - slowed)
