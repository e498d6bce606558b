"""Linear layers over one weight: the seam where another number format or kernel takes the place of `F.linear`."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own customary name)

from orchestra import _core
from orchestra.worker.row_kernels import KERNEL_DTYPES

# Rows that oneDNN lays a packed weight out for: a decode batch. Prefill is as fast with it as with any other.
PACKED_FOR_ROWS = 32


class DenseLinear:
    """`x @ weight.T + bias`."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """Maps `[n, in]` to `[n, out]`."""
        return F.linear(x, self._weight, self._bias)


class PackedLinear:
    """The same, the weight laid out once as oneDNN's kernels want it: twice as fast for decode batches in bf16."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_FOR_ROWS)
        self._bias = bias
        self._compute = torch.ops.mkldnn._linear_pointwise.default

    def __call__(self, x: Tensor) -> Tensor:
        """Maps `[n, in]` to `[n, out]`."""
        y: Tensor = self._compute(x, self._weight, self._bias, "none", [], "")
        return y


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
        self._kernel = _core.Linear(
            (self._out, self._in),
            KERNEL_DTYPES[weight.dtype],
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            portable=portable,
        )

    def __call__(self, x: Tensor) -> Tensor:
        """Maps `[n, in]` to `[n, out]`."""
        if x.stride(1) != 1:
            x = x.contiguous()
        y = x.new_empty(x.shape[0], self._out)
        self._kernel.forward(
            x.shape[0], (x.data_ptr(), x.stride(0)), y.data_ptr(), torch.get_num_threads()
        )
        return y


def make_linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The fastest linear layer for where the weight (`[out, in]`) lives and what its numbers are."""
    if weight.device.type != "cpu" or weight.dtype not in KERNEL_DTYPES:
        return DenseLinear(weight, bias)
    if has_avx512():
        # Twice as wide as our kernels, which are written for AVX2.
        is_packed = weight.dtype == torch.bfloat16 and has_packed_bf16()
        return PackedLinear(weight, bias) if is_packed else DenseLinear(weight, bias)
    return CpuLinear(weight, bias)


def has_avx512() -> bool:
    """Whether torch's own kernels have wider vectors here than ours."""
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


def has_packed_bf16() -> bool:
    """Whether this build of torch and this processor have oneDNN's bf16 kernels."""
    operators = torch.ops.mkldnn
    has_operators = hasattr(operators, "_reorder_linear_weight")
    return has_operators and bool(operators._is_mkldnn_bf16_supported())
