"""Paged attention against the textbook's, over random batches of every mixture."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orchestra.errors import ConfigError
from orchestra.worker import attention_layout
from orchestra.worker.attention import AttentionBackend, TorchPagedAttention
from orchestra.worker.attention_choice import make_attention
from orchestra.worker.attention_cpu import CpuPagedAttention
from orchestra.worker.attention_flashinfer import FlashInferPagedAttention
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
    scores = torch.einsum("qhd,khd->hqk", query, key) * (
        rule.scale or 1 / math.sqrt(query.shape[-1])
    )
    if rule.soft_cap is not None:
        scores = rule.soft_cap * torch.tanh(scores / rule.soft_cap)
    positions = torch.arange(first, first + query.shape[0])
    age = positions.unsqueeze(1) - torch.arange(key.shape[0])
    is_hidden = (age < 0) | (age >= (rule.window or math.inf))
    weights = scores.masked_fill(is_hidden, -math.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


class FlashInferStandIn:
    """In place of the library's wrapper, which needs a GPU: reads what it is given as the library's manual says."""

    def __init__(self, workspace: Tensor) -> None:
        assert workspace.dtype == torch.uint8

    def plan(
        self, starts: Tensor, page_starts: Tensor, pages: Tensor, last: Tensor, /, **options: Any
    ) -> None:
        assert {array.dtype for array in (starts, page_starts, pages, last)} == {torch.int32}
        assert options["causal"]
        assert options["disable_split_kv"]
        self.arrays = [array.tolist() for array in (starts, page_starts, pages, last)]
        self.options = options

    def run(self, query: Tensor, cache: Tensor) -> Tensor:
        starts, page_starts, pages, last = self.arrays
        left, size = self.options["window_left"], self.options["page_size"]
        window = None if left < 0 else left + 1
        rule = AttentionRule(window, self.options["sm_scale"], self.options["logits_soft_cap"])
        parts = []
        for row in range(len(last)):
            # [2, kv_heads, pages * page_size, head_dim], of which the last page may be filled in part.
            read = cache[pages[page_starts[row] : page_starts[row + 1]]].permute(1, 2, 0, 3, 4)
            length = read.shape[2] * size - size + last[row]
            key, value = read.flatten(2, 3)[:, :, :length].transpose(1, 2)
            own = query[starts[row] : starts[row + 1]]
            parts.append(textbook(own, key, value, length - len(own), rule))
        return torch.cat(parts)


def make_backend(
    name: str, cache: KvCache, num_heads: int, rules: list[AttentionRule]
) -> AttentionBackend:
    if name == "torch":
        return TorchPagedAttention(cache, num_heads, CPU, rules)
    if name == "flashinfer":
        return FlashInferPagedAttention(cache, num_heads, CPU, rules, FlashInferStandIn)
    return CpuPagedAttention(cache, num_heads, rules, portable=name == "portable")


@pytest.mark.parametrize("name", ["torch", "cpu", "portable", "flashinfer"])
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
@settings(max_examples=60, deadline=None)
def test_agrees_with_the_textbook(
    name: str,
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
    backend = make_backend(name, cache, kv_heads * group, [AttentionRule(window=3), rule])
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


@pytest.mark.parametrize("name", ["cpu", "portable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "window"),
    [(6, 2, 72, None), (3, 3, 8, 20), (33, 1, 16, None), (4, 2, 64, 33)],
)
def test_no_bit_depends_on_batch_or_cut(
    name: str, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, window: int | None
) -> None:
    generator = torch.Generator().manual_seed(head_dim)
    tokens = 150
    query = torch.randn(tokens, heads, head_dim, generator=generator).to(dtype)
    key_value = torch.randn(tokens, 2 * kv_heads, head_dim, generator=generator).to(dtype)
    rules = [AttentionRule(window=window)]

    def run(cuts: list[int], mates: int, threads: int) -> Tensor:
        """The sequence in steps that end at `cuts`, beside others of one new token each."""
        cache = KvCache(KvCacheSpec(1, kv_heads, head_dim, 16, dtype), 64, CPU)
        # Nothing that lies behind a sequence's end, or in other blocks, may be multiplied even by 0.
        cache.slab.fill_(math.nan)
        backend = make_backend(name, cache, heads, rules)
        builder = PlanBuilder(64, seed=mates)
        for mate in range(mates):
            builder.add(f"m{mate}", [0] * 200)
        builder.add("s", [0] * tokens)
        parts = []
        torch.set_num_threads(threads)
        for begin, end in zip([0, *cuts], [*cuts, tokens], strict=False):
            # Sequences of one new token come first, as in every plan.
            news = {f"m{mate}": 1 for mate in range(mates)} | {"s": end - begin}
            backend.prepare(builder.plan(news))
            padding = torch.randn(mates, heads, head_dim, generator=generator).to(dtype)
            other = torch.randn(mates, 2 * kv_heads, head_dim, generator=generator).to(dtype)
            queries = torch.cat([padding, query[begin:end]])
            parts.append(
                backend.forward(0, queries, torch.cat([other, key_value[begin:end]]))[mates:]
            )
        return torch.cat(parts)

    try:
        whole = run([], 0, threads=1)
        assert not whole.isnan().any()
        for cuts, mates, threads in (
            ([1, 2, 3], 0, 1),
            ([17, 64, 90, 149], 3, 2),
            (list(range(100, 150)), 1, 2),
        ):
            torch.testing.assert_close(run(cuts, mates, threads), whole, rtol=0, atol=0)
        expected = textbook(
            query.float(),
            key_value[:, :kv_heads].float(),
            key_value[:, kv_heads:].float(),
            0,
            rules[0],
        )
        tolerance = 2e-5 if dtype == torch.float32 else 1e-2
        actual = whole.view(tokens, heads, head_dim).float()
        torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
    finally:
        torch.set_num_threads(1)


def test_twins_agree() -> None:
    generator = torch.Generator().manual_seed(5)
    query = torch.randn(70, 4, 64, generator=generator)
    key_value = torch.randn(70, 4, 64, generator=generator)
    outputs = []
    for name in ("cpu", "portable", "torch"):
        cache = KvCache(KvCacheSpec(1, 2, 64, 16, torch.float32), 64, CPU)
        backend = make_backend(name, cache, 4, [AttentionRule(soft_cap=20.0)])
        builder = PlanBuilder(64)
        builder.add("s", [0] * 70)
        backend.prepare(builder.plan({"s": 70}))
        outputs.append(backend.forward(0, query, key_value))
        assert cache.slab.count_nonzero() == key_value.numel()
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0], atol=2e-6, rtol=2e-6)


def test_gaps_between_tokens_are_stepped_over() -> None:
    joined = torch.randn(9, 8, 16, generator=torch.Generator().manual_seed(1))
    outputs = []
    for query, key_value in (
        (joined[:, :4], joined[:, 4:]),
        (joined[:, :4].contiguous(), joined[:, 4:].contiguous()),
        # Heads that are no run of numbers are copied together first.
        (joined[:, :4].transpose(1, 2).contiguous().transpose(1, 2), joined[:, 4:]),
    ):
        cache = KvCache(KvCacheSpec(1, 2, 16, 16, torch.float32), 64, CPU)
        backend = make_backend("cpu", cache, 4, [])
        builder = PlanBuilder(64)
        builder.add("s", [0] * 9)
        backend.prepare(builder.plan({"s": 9}))
        outputs.append(backend.forward(0, query, key_value))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])


def test_kernels_are_chosen_where_they_can_compute() -> None:
    def chosen(name: str, head_dim: int, block_size: int = 16) -> AttentionBackend:
        cache = KvCache(KvCacheSpec(1, 2, head_dim, block_size, torch.float32), 4, CPU)
        return make_attention(name, cache, 4, CPU, [AttentionRule()])

    assert isinstance(chosen("auto", 8), CpuPagedAttention)
    assert isinstance(chosen("torch", 8), TorchPagedAttention)
    assert isinstance(chosen("auto", 12), TorchPagedAttention)
    assert isinstance(chosen("auto", 8, block_size=4), TorchPagedAttention)
    with pytest.raises(ConfigError, match="multiples of 8") as raised:
        chosen("cpu", 12)
    assert raised.value.key == "attention"
    with pytest.raises(ConfigError, match=r"flashinfer (is not installed|needs an NVIDIA GPU)"):
        chosen("flashinfer", 64)
