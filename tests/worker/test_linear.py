"""The layouts of a linear layer compute the same."""

import pytest
import torch

from orchestra.worker import linear
from orchestra.worker.linear import (
    CpuLinear,
    DenseLinear,
    PackedLinear,
    has_packed_bf16,
    make_linear,
)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 32, 100])
def test_packed_weights_compute_the_same(rows: int, has_bias: bool) -> None:
    # fp32, which oneDNN packs on any CPU: what differs in bf16 is its kernel, not our call.
    weight, x = torch.randn(40, 24), torch.randn(rows, 24)
    bias = torch.randn(40) if has_bias else None
    expected = DenseLinear(weight, bias)(x)
    torch.testing.assert_close(PackedLinear(weight, bias)(x), expected, atol=1e-5, rtol=1e-4)


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


@pytest.mark.parametrize(
    ("has_wide", "has_bf16", "kinds"),
    [
        (False, False, [CpuLinear, CpuLinear]),
        (True, False, [DenseLinear, DenseLinear]),
        (True, True, [DenseLinear, PackedLinear]),
    ],
)
def test_the_fastest_kernels_are_chosen(
    monkeypatch: pytest.MonkeyPatch, has_wide: bool, has_bf16: bool, kinds: list[type]
) -> None:
    monkeypatch.setattr(linear, "has_avx512", lambda: has_wide)
    monkeypatch.setattr(linear, "has_packed_bf16", lambda: has_bf16)
    # Making one needs a processor that has it.
    monkeypatch.setattr(PackedLinear, "__init__", lambda *_args: None)
    for dtype, kind in zip([torch.float32, torch.bfloat16], kinds, strict=True):
        assert type(make_linear(torch.zeros(4, 4, dtype=dtype), None)) is kind
    assert type(make_linear(torch.zeros(4, 4, dtype=torch.float16), None)) is DenseLinear


@pytest.mark.skipif(not has_packed_bf16(), reason="this CPU has no bf16 kernels of oneDNN")
def test_packed_bf16_is_as_exact_as_dense() -> None:
    weight, x = torch.randn(64, 128), torch.randn(9, 128)
    expected = x @ weight.T
    layers = [layer(weight.bfloat16(), None) for layer in (DenseLinear, PackedLinear)]
    dense, packed = [(layer(x.bfloat16()).float() - expected).abs().mean() for layer in layers]
    assert packed <= 1.1 * dense
