"""Norms, gates and rotations by Triton kernels, on NVIDIA GPUs: one launch each, where torch makes several."""

from functools import cache

import torch
import triton
from torch import Tensor

from orchestra.worker import row_triton_kernels as kernels
from orchestra.worker.attention_triton import CAPABILITY_MIN, DTYPES

# Numbers of a token that one program holds.
NUMBERS_MAX = 32768
_GATE_BLOCK = 1024


def supports(x: Tensor) -> bool:
    """Whether the kernels can compute with such a tensor: fp32, bf16 or fp16, its last dimension without gaps."""
    is_there = x.device.type != "cuda" or is_new_enough(x.device)
    return is_there and x.dtype in DTYPES and x.stride(-1) == 1 and x[:1].numel() <= NUMBERS_MAX


def rms_norm(
    x: Tensor, weight: Tensor, epsilon: float, *, addend: Tensor | None = None, out: Tensor
) -> None:
    """Normalises the last dimension of `[T, size]` or `[T, heads, size]` into `out`, which may be `x`.

    Args:
        x: the heads of a token without gaps, the tokens anywhere.
        weight: `float32[size]` or `float32[heads, size]`, without gaps.
        epsilon: added to the mean of the squares.
        addend: of the shape of `x`, without gaps: `x` becomes the sum first.
        out: of the shape of `x`, laid out like it.
    """
    groups, size = (1 if x.dim() == 2 else x.shape[1]), x.shape[-1]
    kernels.rms_norm[(x.shape[0], groups)](
        *(x, weight, x if addend is None else addend, out),
        *(epsilon, x.stride(0), out.stride(0)),
        GROUPS=groups,
        SIZE=size,
        SIZE_PADDED=triton.next_power_of_2(size),
        IS_ONE_WEIGHT=weight.dim() == 1,
        HAS_ADDEND=addend is not None,
        num_warps=4 if size <= 2048 else 8,
    )


def gate(x: Tensor, activation: str) -> Tensor:
    """`[T, 2 * size]` without gaps to `[T, size]`: the second half times the bent first half.

    Args:
        x: gates and values side by side.
        activation: `silu` or `gelu_pytorch_tanh`.
    """
    size = x.shape[1] // 2
    y = x.new_empty(x.shape[0], size)
    grid = (x.shape[0], triton.cdiv(size, _GATE_BLOCK))
    kernels.gate[grid](x, y, SIZE=size, BLOCK=_GATE_BLOCK, IS_SILU=activation == "silu")
    return y


def rotate(heads: Tensor, rotations: Tensor) -> None:
    """Rotates in place.

    Args:
        heads: `[T, heads, head_dim]`, pairs interleaved; the heads of a token without gaps, the tokens anywhere.
        rotations: `complex64[T, 1, head_dim / 2]`, without gaps.
    """
    tokens, count, head_dim = heads.shape
    pairs = head_dim // 2
    kernels.rotate[(tokens,)](
        *(heads, torch.view_as_real(rotations), heads.stride(0)),
        COUNT=count,
        COUNT_PADDED=triton.next_power_of_2(count),
        PAIRS=pairs,
        PAIRS_PADDED=triton.next_power_of_2(pairs),
    )


@cache
def is_new_enough(device: torch.device) -> bool:
    """Whether an NVIDIA GPU has what the kernels are compiled to."""
    return torch.cuda.get_device_capability(device) >= CAPABILITY_MIN
