"""Sending tokens to experts and adding up what comes back, against a loop over tokens."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from orchestra.errors import ConfigError
from orchestra.worker.expert_config import ExpertConfig
from orchestra.worker.expert_router import ExpertRouter
from orchestra.worker.experts import SparseMLP
from orchestra.worker.layers import Op
from tests.worker.conftest import MakeRank

HIDDEN = 6


def expert(number: int) -> Op:
    """Works on each row alone and to the same bits in any company."""
    return lambda x: torch.tanh(x * (number + 1)) + number


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
    sparse = SparseMLP(choose, 0, every, None)
    together = sparse(x)
    torch.testing.assert_close(together, by_hand(x, router, config), atol=1e-5, rtol=1e-5)

    # The experts of two ranks, some of whom may have none, add up to the same.
    cut = seed % (count + 1)
    parts = [
        SparseMLP(choose, first, own, None)(x)
        for first, own in ((0, every[:cut]), (cut, every[cut:]))
    ]
    torch.testing.assert_close(parts[0] + parts[1], together, atol=1e-5, rtol=1e-5)


def test_a_token_does_not_depend_on_its_company() -> None:
    # Whole numbers: a sum of them is the same in every order.
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(-3, 4, (16, 64), generator=generator).bfloat16()
    router = torch.randint(-3, 4, (8, 64), generator=generator).float() / 64
    choose = ExpertRouter(router, None, ExpertConfig(8, 3, 1, is_normalised=True))
    sparse = SparseMLP(choose, 0, [expert(number) for number in range(8)], None)
    whole = sparse(x)
    for size in (2, 6, 16):
        parts = torch.cat([sparse(part) for part in torch.split(x, size)])
        assert torch.equal(parts, whole)


def test_only_experts_lie_whole_on_a_rank(make_rank: MakeRank) -> None:
    with pytest.raises(ConfigError, match=r"--expert-parallel: LlamaForCausalLM has no experts"):
        make_rank("llama", expert_parallel=True)
