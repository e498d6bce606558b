"""The experts of a mixture by the Rust kernels: all that tokens go to in one call."""

from collections.abc import Sequence

import torch
from torch import Tensor

from orchestra import _core
from orchestra.worker.linear import CpuLinear
from orchestra.worker.row_kernels import KERNEL_DTYPES


class CpuExperts:
    """See `experts.Experts`.

    Args:
        first: number of the rank's first expert.
        layers: of each of them gates and values side by side, and what follows; all of one shape and dtype.
        activation: applied to the gates; one of `layers.ACTIVATIONS`.
    """

    def __init__(
        self, first: int, layers: Sequence[tuple[CpuLinear, CpuLinear]], activation: str
    ) -> None:
        kernels = [(gate_up.kernel, down.kernel) for gate_up, down in layers]
        self._kernel = _core.Experts(first, activation, kernels)

    def __call__(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """See `experts.Experts`; `chosen` are `int32`."""
        x = x.contiguous()
        y = torch.empty_like(x)
        picks = (chosen.data_ptr(), weights.data_ptr(), chosen.shape[1])
        threads = torch.get_num_threads()
        self._kernel.forward(x.shape[0], x.data_ptr(), picks, y.data_ptr(), threads)
        return y


def mix(rows: Tensor, weights: Tensor) -> Tensor:
    """See `expert_exchange.Mix`; rows and weights lie without gaps."""
    tokens, picks, hidden = rows.shape
    y = rows.new_empty(tokens, hidden)
    _core.mix(
        *(KERNEL_DTYPES[rows.dtype], (tokens, picks, hidden), rows.data_ptr()),
        *(weights.data_ptr(), y.data_ptr(), torch.get_num_threads()),
    )
    return y
