"""Sending tokens to experts and adding up what comes back, against a loop over tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from orchestra import _core
from orchestra.errors import ConfigError, InvalidRequestError
from orchestra.worker.expert_config import ExpertConfig
from orchestra.worker.expert_router import CpuExpertRouter, ExpertRouter
from orchestra.worker.experts import ExpertsInTurn, SparseMLP
from orchestra.worker.experts_cpu import CpuExperts
from orchestra.worker.layers import GatedMLP, Op
from orchestra.worker.linear import CpuLinear, DenseLinear
from tests.worker.conftest import MakeRank

HIDDEN = 6
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def expert(number: int) -> Op:
    """Works on each row alone and to the same bits in any company."""
    return lambda x: torch.tanh(x * (number + 1)) + number


def step(tokens: int, count: int, picks: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens `[T, 48]`, and each one's weights and experts, no two of them the same."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 48, generator=generator).to(dtype)
    weights = torch.rand(tokens, picks, generator=generator)
    chosen = torch.rand(tokens, count, generator=generator).topk(picks).indices
    return x, weights, chosen.int()


def experts_of(count: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Weights of so many experts of hidden size 48 and width 40."""
    generator = torch.Generator().manual_seed(1)

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).div(8).to(dtype)

    return [(weight(80, 48), weight(48, 40)) for _ in range(count)]


def mlp(gate_up: Tensor, down: Tensor, activation: str) -> Op:
    return GatedMLP(DenseLinear(gate_up, None), DenseLinear(down, None), activation)


def by_hand(x: Tensor, router: Tensor, config: ExpertConfig) -> Tensor:
    rows = []
    for token in x:
        probabilities = torch.softmax(router @ token, 0)
        best = sorted(range(config.count), key=lambda number: -float(probabilities[number]))
        best = best[: config.per_token]
        weights = probabilities[best]
        if config.is_normalised:
            weights = weights / weights.sum()
        rows.append(sum(w * expert(n)(token) for w, n in zip(weights, best, strict=True)))
    return torch.stack([torch.as_tensor(row) for row in rows])


@given(
    tokens=st.integers(1, 40),
    count=st.integers(1, 9),
    per_token=st.integers(1, 9),
    is_normalised=st.booleans(),
    bias=st.sampled_from([0.0, 50.0]),
    seed=st.integers(0, 1000),
)
def test_agrees_with_a_loop_over_tokens(
    tokens: int, count: int, per_token: int, is_normalised: bool, bias: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, HIDDEN, generator=generator)
    router = torch.randn(count, HIDDEN, generator=generator)
    # With the bias every token wants the same expert first: it computes them all.
    x[:, 0] = x[:, 0].abs() + 0.1
    router[seed % count, 0] += bias
    config = ExpertConfig(count, min(per_token, count), 1, is_normalised=is_normalised)
    choose = ExpertRouter(router, None, config)
    every = [expert(number) for number in range(count)]
    sparse = SparseMLP(choose, ExpertsInTurn(0, every), None)
    together = sparse(x)
    torch.testing.assert_close(together, by_hand(x, router, config), atol=1e-5, rtol=1e-5)

    # The experts of two ranks, some of whom may have none, add up to the same.
    cut = seed % (count + 1)
    parts = [
        SparseMLP(choose, ExpertsInTurn(first, own), None)(x)
        for first, own in ((0, every[:cut]), (cut, every[cut:]))
    ]
    torch.testing.assert_close(parts[0] + parts[1], together, atol=1e-5, rtol=1e-5)


def test_a_token_does_not_depend_on_its_company() -> None:
    # Whole numbers: a sum of them is the same in every order.
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-3, 4, (16, 64), generator=generator).bfloat16()
    router = torch.randint(-3, 4, (8, 64), generator=generator).float() / 64
    choose = ExpertRouter(router, None, ExpertConfig(8, 3, 1, is_normalised=True))
    sparse = SparseMLP(choose, ExpertsInTurn(0, [expert(number) for number in range(8)]), None)
    whole = sparse(x)
    for size in (2, 6, 16):
        parts = torch.cat([sparse(part) for part in torch.split(x, size)])
        assert torch.equal(parts, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_kernels_compute_what_torch_does(dtype: torch.dtype, activation: str) -> None:
    x, weights, chosen = step(40, 7, 3, dtype)
    layers = experts_of(4, dtype)
    cpu = CpuExperts(
        2, [(CpuLinear(up, None), CpuLinear(down, None)) for up, down in layers], activation
    )
    by_torch = ExpertsInTurn(2, [mlp(*pair, activation) for pair in layers])
    expected = by_torch(x, weights, chosen.long())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(cpu(x, weights, chosen), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.usefixtures("fast_interpreter")
@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_triton_computes_what_torch_does(dtype: torch.dtype, tokens: int) -> None:
    from orchestra.worker.experts_triton import TritonExperts, mix

    x, weights, chosen = (it.to(DEVICE) for it in step(tokens, 7, 3, dtype))
    chosen = chosen.long()
    layers = [(up.to(DEVICE), down.to(DEVICE)) for up, down in experts_of(4, dtype)]
    triton = TritonExperts.stack(2, len(layers), layers, "silu")
    by_torch = ExpertsInTurn(2, [mlp(*pair, "silu") for pair in layers])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    actual, expected = triton(x, weights, chosen), by_torch(x, weights, chosen)
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
    # What each pick makes of its token, added up as a call does.
    pairs = triton(
        x.repeat_interleave(3, 0), torch.ones(3 * tokens, 1, device=DEVICE), chosen.view(-1, 1)
    )
    assert torch.equal(mix(pairs.view(tokens, 3, -1), weights), actual)
    # One expert for everybody, and one whom nobody wants.
    chosen = chosen.clamp(max=2)
    actual, expected = triton(x, weights, chosen), by_torch(x, weights, chosen)
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        ExpertConfig(12, 3, 1),
        ExpertConfig(12, 3, 1, is_normalised=True, scale=2.5),
        ExpertConfig(12, 4, 1, num_groups=4, groups_per_token=2),
        ExpertConfig(
            12, 4, 1, num_groups=4, groups_per_token=2, is_sigmoid=True, has_choice_bias=True
        ),
    ],
)
def test_both_routers_choose_alike(config: ExpertConfig, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(50, 24, generator=generator).to(dtype)
    weight = torch.randn(12, 24, generator=generator)
    bias = torch.randn(12, generator=generator) if config.has_choice_bias else None
    weights, chosen = CpuExpertRouter(weight, bias, config)(x)
    expected_weights, expected = ExpertRouter(weight, bias, config)(x)
    assert torch.equal(chosen.long(), expected)
    torch.testing.assert_close(weights, expected_weights)


def test_layers_of_other_numbers_are_refused() -> None:
    wide, narrow = (
        CpuLinear(torch.zeros(8, 4, dtype=dtype), None).kernel
        for dtype in (torch.float32, torch.bfloat16)
    )
    down = CpuLinear(torch.zeros(4, 4), None).kernel
    with pytest.raises(InvalidRequestError, match="layers: are not all of the same numbers"):
        _core.Experts(0, "silu", [(wide, down), (narrow, down)])
    with pytest.raises(InvalidRequestError, match="down does not fit gates and values"):
        _core.Experts(0, "silu", [(wide, wide)])
    with pytest.raises(InvalidRequestError, match="linear: does not compute in float32"):
        _core.ExpertRouter(
            *(narrow, None, 1),
            is_sigmoid=False,
            groups=(1, 1),
            is_normalised=False,
            scale=1.0,
        )


def test_only_experts_lie_whole_on_a_rank(make_rank: MakeRank) -> None:
    with pytest.raises(ConfigError, match=r"--expert-parallel: LlamaForCausalLM has no experts"):
        make_rank("llama", expert_parallel=True)
