"""Norms, gates and rotations by Triton: compiled where there is a GPU (`make gpu`), else in Triton's interpreter."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 (torch's own customary name)

from orchestra.worker import row_triton

pytestmark = pytest.mark.usefixtures("fast_interpreter")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(actual.float(), expected, atol=tolerance, rtol=tolerance)


def normalised(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    x = x.float()
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * weight


@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_rows_are_normalised(dtype: torch.dtype) -> None:
    x, addend, weight = random(5, 72, dtype=dtype), random(5, 72, dtype=dtype), random(72)
    out = torch.empty_like(x)
    row_triton.rms_norm(x, weight, 0.1, out=out)
    assert_close(out, normalised(x, weight, 0.1), dtype)
    total = x.clone()
    row_triton.rms_norm(total, weight, 0.1, addend=addend, out=out)
    assert_close(total, (x + addend).float(), dtype)
    assert_close(out, normalised(total, weight, 0.1), dtype)
    # Heads in place, a weight for each, the tokens apart.
    joined, weights = random(5, 7, 16, dtype=dtype), random(3, 16)
    expected, rest = normalised(joined[:, :3], weights, 0.1), joined[:, 3:].clone()
    row_triton.rms_norm(joined[:, :3], weights, 0.1, out=joined[:, :3])
    assert_close(joined[:, :3], expected, dtype)
    assert torch.equal(joined[:, 3:], rest)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("size", [40, 1500])
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_values_are_gated(dtype: torch.dtype, size: int, activation: str) -> None:
    x = random(3, 2 * size, dtype=dtype) * 3
    gates, values = x.float().chunk(2, dim=1)
    bent = F.silu(gates) if activation == "silu" else F.gelu(gates, approximate="tanh")
    actual = row_triton.gate(x, activation)
    assert_close(actual, bent * values, dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_pairs_are_rotated(dtype: torch.dtype) -> None:
    joined = random(4, 9, 24, dtype=dtype)
    heads = joined[:, :5]
    rotations = torch.polar(torch.ones(4, 1, 12, device=DEVICE), random(4, 1, 12))
    pairs = torch.view_as_complex(heads.float().reshape(4, 5, 12, 2))
    expected, rest = torch.view_as_real(pairs * rotations).flatten(2), joined[:, 5:].clone()
    row_triton.rotate(heads, rotations)
    assert_close(heads, expected, dtype)
    assert torch.equal(joined[:, 5:], rest)


def test_what_the_kernels_cannot_do_is_said() -> None:
    assert row_triton.supports(random(3, 8, dtype=torch.float16))
    assert not row_triton.supports(random(3, 8, dtype=torch.float64))
    assert not row_triton.supports(random(3, 8).t())
    assert row_triton.supports(torch.empty(50, row_triton.NUMBERS_MAX, device=DEVICE))
    assert not row_triton.supports(torch.empty(1, row_triton.NUMBERS_MAX + 1, device=DEVICE))
