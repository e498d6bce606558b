"""The layouts of a linear layer compute the same."""

import pytest
import torch

from orchestra.worker import linear
from orchestra.worker.linear import DenseLinear, PackedLinear, has_packed_bf16, make_linear


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 32, 100])
def test_packed_weights_compute_the_same(rows: int, has_bias: bool) -> None:
    # fp32, which oneDNN packs on any CPU: what differs in bf16 is its kernel, not our call.
    weight, x = torch.randn(40, 24), torch.randn(rows, 24)
    bias = torch.randn(40) if has_bias else None
    expected = DenseLinear(weight, bias)(x)
    torch.testing.assert_close(PackedLinear(weight, bias)(x), expected, atol=1e-5, rtol=1e-4)


def test_weights_are_packed_where_that_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[torch.dtype] = []
    monkeypatch.setattr(linear, "PackedLinear", lambda weight, _bias: packed.append(weight.dtype))
    for has_kernels in (False, True):
        monkeypatch.setattr(linear, "has_packed_bf16", lambda answer=has_kernels: answer)
        for dtype in (torch.float32, torch.bfloat16):
            make_linear(torch.zeros(4, 4, dtype=dtype), None)
    assert packed == [torch.bfloat16]


@pytest.mark.skipif(not has_packed_bf16(), reason="this CPU has no bf16 kernels of oneDNN")
def test_packed_bf16_is_as_exact_as_dense() -> None:
    weight, x = torch.randn(64, 128), torch.randn(9, 128)
    expected = x @ weight.T
    layers = [layer(weight.bfloat16(), None) for layer in (DenseLinear, PackedLinear)]
    dense, packed = [(layer(x.bfloat16()).float() - expected).abs().mean() for layer in layers]
    assert packed <= 1.1 * dense
