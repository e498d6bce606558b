"""Rotary position embedding as one complex multiplication.

Checkpoints pair element `i` of a head with element `i + head_dim / 2`. Here the rows of the query and key projections
are put in pairs when they are loaded (`interleave`), so that a pair is one complex number and a rotation one product:
the scores, sums over the whole head, are the same, and the five small kernels of the usual form become one.
"""

import math

import torch
from torch import Tensor

from orchestra.worker.model_config import RopeConfig


def interleave(rows: Tensor, head_dim: int) -> Tensor:
    """Reorders the rows of whole heads from `a0 a1 … b0 b1 …` to `a0 b0 a1 b1 …`.

    Args:
        rows: `[heads * head_dim, …]`: rows of a query or key projection, its bias, or a norm's weight.
        head_dim: rows of one head.
    """
    rest = rows.shape[1:]
    return rows.view(-1, 2, head_dim // 2, *rest).transpose(1, 2).reshape(rows.shape)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position of each pair of a head, `float32[head_dim / 2]`."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        return _llama3(frequencies, rope)
    return frequencies


class RotaryTable:
    """The rotation of every position, `complex64[max_positions, head_dim / 2]`."""

    def __init__(
        self, rope: RopeConfig, head_dim: int, max_positions: int, device: torch.device
    ) -> None:
        positions = torch.arange(max_positions, dtype=torch.float32)
        angles = torch.outer(positions, inverse_frequencies(rope, head_dim))
        self._table = torch.polar(torch.ones_like(angles), angles).to(device)

    def __call__(self, positions: Tensor) -> Tensor:
        """The rotations of `int64[T]` positions, `complex64[T, 1, head_dim / 2]`."""
        return self._table.index_select(0, positions).unsqueeze(1)


def rotate(heads: Tensor, rotations: Tensor) -> None:
    """Rotates in place.

    Args:
        heads: `[T, heads, head_dim]`, pairs interleaved; may be a view.
        rotations: from `RotaryTable`.
    """
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
