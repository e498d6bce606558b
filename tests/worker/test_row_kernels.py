"""Norms, gates and rotations by our kernels are what the textbook says, and each row is for itself."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own customary name)

from orchestra import _core
from orchestra.errors import InvalidRequestError
from orchestra.worker import row_kernels

DTYPES = [torch.float32, torch.bfloat16]
# Multiples of a vector and others, less than one, and rows that are shared among threads.
SIZES = [1, 7, 8, 24, 100, 512]
ROWS = [1, 5, 400]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Up to the rounding of `actual`'s numbers."""
    tolerance = 1e-5 if actual.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(actual.double(), expected, atol=tolerance, rtol=tolerance)


def normalised(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    exact = x.double()
    return exact / (exact.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", ROWS)
def test_rows_are_normalised(rows: int, size: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(rows, size).to(dtype), torch.randn(size)
    y = torch.empty_like(x)
    row_kernels.rms_norm(x, weight, 0.01, out=y)
    assert_close(y, normalised(x, weight, 0.01))
    alone = torch.empty_like(x[:1])
    row_kernels.rms_norm(x[-1:].clone(), weight, 0.01, out=alone)
    assert torch.equal(alone, y[-1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_what_is_added_is_rounded_and_kept(size: int, dtype: torch.dtype) -> None:
    x, addend, weight = (
        torch.randn(9, size).to(dtype),
        torch.randn(9, size).to(dtype),
        torch.ones(size),
    )
    total, y = x + addend, torch.empty_like(x)
    row_kernels.rms_norm(x, weight, 1e-6, addend=addend, out=y)
    assert torch.equal(x, total)
    assert_close(y, normalised(total, weight, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", ROWS)
def test_rows_are_added_as_torch_does(rows: int, size: int, dtype: torch.dtype) -> None:
    x, addend = torch.randn(rows, size).to(dtype), torch.randn(rows, size).to(dtype)
    expected = x + addend
    assert row_kernels.add_(x, addend) is x
    assert torch.equal(x, expected)
    # Gaps are torch's business.
    wide = torch.zeros(rows, 2 * size, dtype=dtype)
    row_kernels.add_(wide[:, :size], addend)
    assert torch.equal(wide, torch.cat([addend, torch.zeros_like(addend)], 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [None, 7.3])
def test_rows_are_looked_up(scale: float | None, size: int, dtype: torch.dtype) -> None:
    table = torch.randn(10, size).to(dtype)
    # Before the table, in it, twice, and behind it.
    places = torch.tensor([99, 100, 109, 100, 110, -5, 104])
    expected = torch.zeros(7, size, dtype=dtype)
    expected[[1, 2, 3, 6]] = table[[0, 9, 0, 4]] if scale is None else table[[0, 9, 0, 4]] * scale
    looked_up = row_kernels.look_up(table, places, first=100, scale=scale)
    assert torch.equal(looked_up, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_are_normalised_where_they_lie(dtype: torch.dtype) -> None:
    projected = torch.randn(11, 6, 20).to(dtype)
    heads, weight = projected[:, :4], torch.randn(4, 20)
    expected, rest = normalised(heads, weight, 1e-5), projected[:, 4:].clone()
    row_kernels.rms_norm(heads, weight, 1e-5, out=heads)
    assert_close(heads, expected)
    assert torch.equal(projected[:, 4:], rest)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_values_are_gated(activation: str, size: int, dtype: torch.dtype) -> None:
    x = (torch.randn(30, 2 * size) * 4).to(dtype)
    x[0, 0], x[1, 0] = -200.0, 200.0
    gates, values = x.double().chunk(2, dim=1)
    bent = F.silu(gates) if activation == "silu" else F.gelu(gates, approximate="tanh")
    y = row_kernels.gate(x, activation)
    assert_close(y, bent * values)
    assert torch.equal(row_kernels.gate(x[-1:], activation), y[-1:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_pairs_are_rotated(dtype: torch.dtype) -> None:
    projected = torch.randn(13, 5, 12).to(dtype)
    heads, rest = projected[:, :3], projected[:, 3:].clone()
    angles = torch.polar(torch.rand(13, 1, 6) + 0.5, torch.randn(13, 1, 6))
    pairs = torch.view_as_complex(heads.double().reshape(13, 3, 6, 2))
    expected = torch.view_as_real(pairs * angles).flatten(2)
    row_kernels.rotate(heads, angles)
    assert_close(heads, expected)
    assert torch.equal(projected[:, 3:], rest)


def test_what_the_kernels_do_not_know_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="dtype"):
        _core.rotate("float16", (0, 1, 2), (0, 2), 0, 1)
    with pytest.raises(InvalidRequestError, match="activation"):
        _core.gate("float32", (0, 2), "relu", 0, 0, 1)
    assert not row_kernels.supports(torch.zeros(2, 2, dtype=torch.float64))
    assert not row_kernels.supports(torch.zeros(2, 4)[:, ::2])
