"""The layouts of a linear layer compute the same."""

import pytest
import torch

from orchestra.worker.linear import CpuLinear, DenseLinear, make_linear


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 3, 32, 100])
def test_our_kernels_compute_the_same(rows: int, dtype: torch.dtype, portable: bool) -> None:
    weight, bias = torch.randn(70, 24).to(dtype), torch.randn(70).to(dtype)
    # Every other row of a wider tensor: rows need not lie side by side, nor in order.
    x = torch.randn(2 * rows, 30).to(dtype)[::2, 3:27]
    exact = DenseLinear(weight.double(), bias.double())(x.double())
    y = CpuLinear(weight, bias, portable=portable)(x)
    assert y.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(y.double(), exact, atol=tolerance, rtol=tolerance)


def test_our_kernels_take_inputs_that_lie_apart() -> None:
    weight, x = torch.randn(16, 24), torch.randn(24, 5).T
    torch.testing.assert_close(CpuLinear(weight, None)(x), x @ weight.T, atol=1e-5, rtol=1e-4)


def test_our_bf16_is_as_exact_as_torchs() -> None:
    weight, x = torch.randn(64, 1024).bfloat16(), torch.randn(9, 1024).bfloat16()
    exact = x.double() @ weight.double().T
    layers = [layer(weight, None) for layer in (DenseLinear, CpuLinear)]
    dense, ours = [(layer(x).double() - exact).abs().mean() for layer in layers]
    assert ours <= 1.5 * dense


def test_other_numbers_are_torchs() -> None:
    assert type(make_linear(torch.zeros(4, 4, dtype=torch.float16), None)) is DenseLinear
    assert type(make_linear(torch.zeros(4, 4, dtype=torch.bfloat16), None)) is CpuLinear
    assert type(make_linear(torch.zeros(4, 4), None)) is CpuLinear
