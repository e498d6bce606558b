"""Linear layers over one weight: the seam where another number format or kernel takes the place of `F.linear`."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own customary name)

from orchestra import _core
from orchestra.worker.row_kernels import KERNEL_DTYPES


class DenseLinear:
    """`x @ weight.T + bias`."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """Maps `[n, in]` to `[n, out]`."""
        return F.linear(x, self._weight, self._bias)


class CpuLinear:
    """The same, by the Rust kernels: a row's result is the same to the bit whatever else is in the batch.

    Args:
        weight: `[out, in]`, fp32 or bf16, on the CPU. It is copied.
        bias: `[out]`, of the same dtype.
        portable: whether to leave away what only some processors can, for comparisons.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, portable: bool = False) -> None:
        weight = weight.contiguous()
        self._out, self._in = weight.shape
        self.kernel = _core.Linear(
            (self._out, self._in),
            KERNEL_DTYPES[weight.dtype],
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            portable=portable,
        )
        """What computes it."""

    def __call__(self, x: Tensor) -> Tensor:
        """Maps `[n, in]` to `[n, out]`."""
        if x.stride(1) != 1:
            x = x.contiguous()
        y = x.new_empty(x.shape[0], self._out)
        self.kernel.forward(
            x.shape[0], (x.data_ptr(), x.stride(0)), y.data_ptr(), torch.get_num_threads()
        )
        return y


class HeadLinears:
    """A linear layer of its own for each head.

    Args:
        weight: `[heads, out, in]`.
    """

    def __init__(self, weight: Tensor) -> None:
        self._heads = [make_linear(head, None) for head in weight]

    def __call__(self, x: Tensor) -> Tensor:
        """Maps `[n, heads, in]` to `[n, heads, out]`."""
        return torch.stack([head(x[:, at]) for at, head in enumerate(self._heads)], dim=1)


class DenseHeadLinears:
    """The same, in one product of torch's."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = weight.transpose(1, 2).contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        """Maps `[n, heads, in]` to `[n, heads, out]`."""
        return torch.bmm(x.transpose(0, 1), self._weight).transpose(0, 1)


def make_head_linears(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Linear layers for heads, `[heads, out, in]`, by the rule of `make_linear`."""
    if weight.device.type == "cpu" and weight.dtype in KERNEL_DTYPES:
        return HeadLinears(weight)
    return DenseHeadLinears(weight)


def make_linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The linear layer for where the weight (`[out, in]`) lives and what its numbers are.

    On the CPU never torch's: what oneDNN gives for a row depends on how many others there are.
    """
    if weight.device.type == "cpu" and weight.dtype in KERNEL_DTYPES:
        return CpuLinear(weight, bias)
    return DenseLinear(weight, bias)
