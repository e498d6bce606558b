"""Paged attention against the textbook's, over random batches of every mixture."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orchestra.worker import attention_layout
from orchestra.worker.attention import TorchPagedAttention
from orchestra.worker.kv_cache import KvCache, KvCacheSpec
from orchestra.worker.model_config import AttentionRule
from tests.worker.plans import PlanBuilder

CPU = torch.device("cpu")
HEAD_DIM = 8

# A sequence: tokens in the cache before the step, and new ones.
sequences = st.lists(
    st.tuples(st.integers(0, 90), st.one_of(st.just(1), st.integers(1, 40))), min_size=1, max_size=6
)


rules = st.builds(
    AttentionRule,
    window=st.sampled_from([None, 1, 16, 21, 50]),
    scale=st.sampled_from([None, 0.7]),
    soft_cap=st.sampled_from([None, 1.5]),
)


def textbook(query: Tensor, key: Tensor, value: Tensor, first: int, rule: AttentionRule) -> Tensor:
    """Attention of `[tokens, heads, d]` at positions from `first` over `[context, kv_heads, d]`."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = torch.einsum("qhd,khd->hqk", query, key) * (rule.scale or 1 / math.sqrt(HEAD_DIM))
    if rule.soft_cap is not None:
        scores = rule.soft_cap * torch.tanh(scores / rule.soft_cap)
    positions = torch.arange(first, first + query.shape[0])
    age = positions.unsqueeze(1) - torch.arange(key.shape[0])
    is_hidden = (age < 0) | (age >= (rule.window or math.inf))
    weights = scores.masked_fill(is_hidden, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


@given(
    batch=sequences,
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    waste=st.sampled_from([0, attention_layout.PADDED_TOKENS_FREE]),
    mask_limit=st.sampled_from([600, attention_layout.MASK_NUMBERS_MAX]),
    masks_kept=st.sampled_from([0, 2000, attention_layout.MASK_NUMBERS_KEPT]),
    gather_limit=st.sampled_from([1, 20_000, attention_layout.GATHER_BYTES_MAX]),
    causal=st.sampled_from([{"cpu"}, attention_layout.CAUSAL_DEVICES]),
    rule=rules,
    seed=st.integers(0, 1000),
)
@settings(max_examples=100, deadline=None)
def test_agrees_with_the_textbook(
    batch: list[tuple[int, int]],
    kv_heads: int,
    group: int,
    waste: int,
    mask_limit: int,
    masks_kept: int,
    gather_limit: int,
    causal: set[str],
    rule: AttentionRule,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    cache = KvCache(KvCacheSpec(2, kv_heads, HEAD_DIM, 16, torch.float32), 64, CPU)
    # What no sequence has written must not matter.
    cache.slab.copy_(random(*cache.slab.shape) * 100)
    # The layer under test is the second; the first has another rule, which must not leak into it.
    backend = TorchPagedAttention(cache, kv_heads * group, CPU, [AttentionRule(window=3), rule])
    builder = PlanBuilder(64, seed)
    written: dict[str, Tensor] = {}

    def run(plan: Any, names: list[str]) -> None:
        tokens = len(plan.token_ids)
        query, key_value = (
            random(tokens, kv_heads * group, HEAD_DIM),
            random(tokens, 2 * kv_heads, HEAD_DIM),
        )
        backend.prepare(plan)
        actual = backend.forward(1, query, key_value).view(tokens, -1, HEAD_DIM)
        for row, name in enumerate(names):
            start, stop = int(plan.query_start[row]), int(plan.query_start[row + 1])
            before = written.get(name, torch.empty(0, 2 * kv_heads, HEAD_DIM))
            context = torch.cat([before, key_value[start:stop]])
            written[name] = context
            expected = textbook(
                query[start:stop], context[:, :kv_heads], context[:, kv_heads:], len(before), rule
            )
            torch.testing.assert_close(actual[start:stop], expected, atol=2e-5, rtol=1e-4)

    names = [f"s{index}" for index in range(len(batch))]
    for name, (cached, new) in zip(names, batch, strict=True):
        builder.add(name, np.zeros(cached + new, np.int64).tolist())
        if cached:
            run(builder.plan({name: cached}), [name])
    with_new = {name: new for name, (_, new) in zip(names, batch, strict=True)}
    in_order = sorted(names, key=lambda name: with_new[name] > 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_layout, "PADDED_TOKENS_FREE", waste)
        patch.setattr(attention_layout, "MASK_NUMBERS_MAX", mask_limit)
        patch.setattr(attention_layout, "MASK_NUMBERS_KEPT", masks_kept)
        patch.setattr(attention_layout, "GATHER_BYTES_MAX", gather_limit)
        patch.setattr(attention_layout, "CAUSAL_DEVICES", causal)
        run(builder.plan(with_new), in_order)


def test_what_a_call_needs_is_bounded() -> None:
    spec = KvCacheSpec(1, 2, HEAD_DIM, 16, torch.float32)
    builder = PlanBuilder(300)
    builder.add("long", [1] * 3000)
    builder.plan({"long": 2000})
    builder.append("long", 1)
    for index in range(60):
        builder.add(str(index), [1] * 1601, shares="long", shared_blocks=100)
    plan = builder.plan({"long": 900, **{str(index): 1 for index in range(60)}})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_layout, "MASK_NUMBERS_MAX", 50_000)
        patch.setattr(attention_layout, "MASK_NUMBERS_KEPT", 120_000)
        patch.setattr(attention_layout, "GATHER_BYTES_MAX", 1 << 20)
        layout = attention_layout.LayoutPlanner(spec, 3, CPU).lay_out(plan, AttentionRule())
    gathered = [len(part.runs) * 16 * HEAD_DIM * 4 for part in layout.cached]
    # 60 times 1,616 tokens of 128 bytes, which no call may gather at once.
    assert sum(gathered) > 10 << 20
    assert max(gathered) <= 1 << 20
    masks = [part.mask for part in layout.cached if part.mask is not None]
    assert max(mask().numel() for mask in masks) <= 50_000
    # A mask that is kept is the same one every time.
    kept = [mask().numel() for mask in masks if mask() is mask()]
    assert 60_000 < sum(kept) <= 120_000
    assert len(kept) < len(masks)
