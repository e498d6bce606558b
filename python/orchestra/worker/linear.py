"""Linear layers over one weight: the seam where another number format or kernel takes the place of `F.linear`."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own customary name)

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


def make_linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The fastest linear layer for where the weight (`[out, in]`) lives and what its numbers are."""
    if weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and has_packed_bf16():
        return PackedLinear(weight, bias)
    return DenseLinear(weight, bias)


def has_packed_bf16() -> bool:
    """Whether this build of torch and this processor have oneDNN's bf16 kernels."""
    operators = torch.ops.mkldnn
    has_operators = hasattr(operators, "_reorder_linear_weight")
    return has_operators and bool(operators._is_mkldnn_bf16_supported())
