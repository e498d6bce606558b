"""Norms, gates and rotations in one pass and one call each, where torch makes several.

By the Rust kernels on a CPU, by Triton's on a GPU. Each function says with `supports` whether it can; what it gives a
row depends on that row alone, to the bit.
"""

from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from orchestra import _core

# What the kernels compute with, by the names that they know.
KERNEL_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def supports(x: Tensor) -> bool:
    """Whether the kernels can compute with such a tensor: fp32 or bf16 on a CPU, its last dimension without gaps.

    On a GPU as `row_triton.supports` says.
    """
    if x.device.type == "cuda":
        kernels = _triton()
        return kernels is not None and bool(kernels.supports(x))
    return x.device.type == "cpu" and x.dtype in KERNEL_DTYPES and x.stride(-1) == 1


def rms_norm(
    x: Tensor, weight: Tensor, epsilon: float, *, addend: Tensor | None = None, out: Tensor
) -> None:
    """Normalises the last dimension of `[T, size]` or `[T, heads, size]` into `out`, which may be `x`.

    Args:
        x: the heads of a token without gaps, the tokens anywhere.
        weight: `float32[size]` or `float32[heads, size]`.
        epsilon: added to the mean of the squares.
        addend: `[T, size]` without gaps: `x` becomes the sum first.
        out: of the shape of `x`.
    """
    if x.device.type == "cuda" and (kernels := _triton()) is not None:
        kernels.rms_norm(x, weight, epsilon, addend=addend, out=out)
        return
    groups = 1 if x.dim() == 2 else x.shape[1]
    _core.rms_norm(
        KERNEL_DTYPES[x.dtype],
        (x.shape[0], groups, x.shape[-1]),
        (x.data_ptr(), x.stride(0)),
        None if addend is None else addend.data_ptr(),
        (weight.data_ptr(), epsilon),
        (out.data_ptr(), out.stride(0)),
        torch.get_num_threads(),
    )


def gate(x: Tensor, activation: str) -> Tensor:
    """`[T, 2 * size]` without gaps to `[T, size]`: the second half times the bent first half.

    Args:
        x: gates and values side by side.
        activation: `silu` or `gelu_pytorch_tanh`.
    """
    if x.device.type == "cuda" and (kernels := _triton()) is not None:
        gated: Tensor = kernels.gate(x, activation)
        return gated
    y = x.new_empty(x.shape[0], x.shape[1] // 2)
    _core.gate(
        *(KERNEL_DTYPES[x.dtype], (y.shape[0], y.shape[1]), activation),
        *(x.data_ptr(), y.data_ptr(), torch.get_num_threads()),
    )
    return y


def can_look_up(table: Tensor, places: Tensor) -> bool:
    """Whether `look_up` takes them."""
    is_table = table.device.type == "cpu" and table.dtype in KERNEL_DTYPES and table.is_contiguous()
    return is_table and places.dtype == torch.int64 and places.is_contiguous()


def look_up(table: Tensor, places: Tensor, *, first: int = 0, scale: float | None = None) -> Tensor:
    """Rows of a table on the CPU, `[T, size]`.

    Args:
        table: `[rows, size]`, fp32 or bf16, without gaps.
        places: `int64[T]`, counted from `first` on; those outside the table give zeros.
        first: the place of the table's first row.
        scale: multiplies the numbers, which are rounded again; None: they are copied as they are.
    """
    y = table.new_empty(places.shape[0], table.shape[1])
    _core.look_up(
        KERNEL_DTYPES[table.dtype],
        (table.data_ptr(), table.shape[0], table.shape[1]),
        (places.data_ptr(), places.shape[0]),
        *(first, scale, y.data_ptr(), torch.get_num_threads()),
    )
    return y


def add_(x: Tensor, addend: Tensor) -> Tensor:
    """Adds `addend` to `x`, both `[T, size]`, in place; returns `x`."""
    if x.device.type != "cpu" or x.dtype not in KERNEL_DTYPES or not _are_whole(x, addend):
        return x.add_(addend)
    _core.add(
        *(KERNEL_DTYPES[x.dtype], (x.shape[0], x.shape[1])),
        *(x.data_ptr(), addend.data_ptr(), torch.get_num_threads()),
    )
    return x


def rotate(heads: Tensor, rotations: Tensor) -> None:
    """Rotates in place.

    Args:
        heads: `[T, heads, head_dim]`, pairs interleaved; the heads of a token without gaps, the tokens anywhere.
        rotations: `complex64[T, 1, head_dim / 2]`, without gaps.
    """
    if heads.device.type == "cuda" and (kernels := _triton()) is not None:
        kernels.rotate(heads, rotations)
        return
    tokens, count, size = heads.shape
    _core.rotate(
        KERNEL_DTYPES[heads.dtype],
        (tokens, count, size),
        (heads.data_ptr(), heads.stride(0)),
        rotations.data_ptr(),
        torch.get_num_threads(),
    )


def has_whole_heads(x: Tensor) -> bool:
    """Whether the heads of a token of `[T, heads, size]` are one run of numbers."""
    return x.stride(1) == x.shape[2] or x.shape[1] == 1


def _are_whole(x: Tensor, addend: Tensor) -> bool:
    return x.is_contiguous() and addend.is_contiguous() and addend.dtype == x.dtype


@cache
def _triton() -> ModuleType | None:
    """The kernels of GPUs, where Triton is installed."""
    if find_spec("triton") is None:
        return None
    from orchestra.worker import row_triton

    return row_triton
