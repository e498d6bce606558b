"""The likeliest tokens of logits that ranks share are those of the logits in one piece."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orchestra.worker import sampling
from orchestra.worker.logits import SharedLogits, WholeLogits
from orchestra.worker.sampler_slots import SamplerSlots
from orchestra.worker.sharding import Shard
from tests.worker.plans import PlanBuilder, sampling_start
from tests.worker.test_logits import prompt


class Collecting:
    """The ranks of a group one after the other, the first one last."""

    def __init__(self, size: int) -> None:
        self.shard = Shard(0, size)
        self.parts: list[Tensor] = []

    def all_reduce(self, tensor: Tensor) -> None:
        raise AssertionError(tensor)

    def gather_columns(self, tensor: Tensor) -> Tensor | None:
        self.parts.insert(0, tensor.clone())
        return torch.cat(self.parts, dim=-1) if self.shard.rank == 0 else None

    def close(self) -> None:
        pass


def shared(logits: Tensor, size: int) -> tuple[Tensor, Collecting]:
    """The likeliest tokens of logits whose columns are shared out, and what the ranks have said."""
    rows, vocab = logits.shape
    group = Collecting(size)
    for rank in reversed(range(size)):
        group.shard = Shard(rank, size)
        span = group.shard.padded_span(vocab)
        # Padding is computed from zeros, and would be the largest where all else is negative.
        part = torch.zeros(rows, group.shard.padded_rows(vocab), dtype=logits.dtype)
        part[:, : len(span)] = logits[:, span.start : span.stop]
        tokens = SharedLogits(part, vocab, group).likeliest()
        assert (tokens is None) == (rank > 0)
    assert tokens is not None
    return tokens, group


@settings(deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 40),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**32 - 1),
)
def test_the_likeliest_of_parts_is_that_of_the_whole(
    size: int, rows: int, vocab: int, dtype: torch.dtype, seed: int
) -> None:
    # Few different numbers, so that equals are common; some are none, or as small as can be.
    choices = np.array([-7.0, -3.5, -3.0, -np.inf, np.nan])
    drawn = np.random.default_rng(seed).choice(choices, (rows, vocab))
    logits = torch.from_numpy(drawn).to(dtype)
    tokens, _ = shared(logits, size)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == WholeLogits(logits).likeliest().tolist()
    for row, token in zip(drawn, tokens, strict=True):
        if not np.isnan(row).all():
            assert token == np.flatnonzero(row == np.nanmax(row))[0]


@pytest.mark.parametrize("size", [2, 3])
def test_one_number_of_a_row_crosses_over(size: int) -> None:
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(1))
    tokens, group = shared(logits, size)
    assert tokens.tolist() == sampling.argmax(logits).tolist()
    assert [part.shape for part in group.parts] == [(5, 1)] * size


@pytest.mark.parametrize(
    "overrides",
    [
        {"temperature": 0.5},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"logit_bias_ids": [3], "logit_bias_values": [1.0]},
    ],
    ids=str,
)
def test_whatever_edits_logits_needs_all_of_them(overrides: dict[str, object]) -> None:
    slots = SamplerSlots()
    builder = PlanBuilder(8)
    for name in "ab":
        builder.add(name, prompt(5))
    plan = builder.plan({"a": 5, "b": 5})
    slots.start([sampling_start(0), sampling_start(1, **overrides)])
    assert not slots.want_likeliest(plan)
    builder.append("a", 1)
    assert slots.want_likeliest(builder.plan({"a": 1})), "nothing of the other sequence runs"
    # The slot goes to another sequence.
    slots.start([sampling_start(1, top_p=0.5, seed=7)])
    assert slots.want_likeliest(plan)


def test_log_probabilities_need_all_logits() -> None:
    slots = SamplerSlots()
    builder = PlanBuilder(8)
    builder.add("a", prompt(5))
    slots.start([sampling_start(0)])
    assert not slots.want_likeliest(builder.plan({"a": 5}, num_top_logprobs=0))
