"""The Triton kernels: compiled where there is a GPU (`make gpu`), else in Triton's interpreter."""

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from orchestra.errors import ConfigError
from orchestra.worker import attention_triton_kernels as kernels
from orchestra.worker.attention import TorchPagedAttention
from orchestra.worker.attention_choice import choose_attention, make_attention
from orchestra.worker.attention_triton import TritonPagedAttention, Tuning
from orchestra.worker.decode_inputs import DecodeInputs
from orchestra.worker.kv_cache import KvCache, KvCacheSpec
from orchestra.worker.model_config import AttentionRule
from tests.worker.plans import BLOCK_SIZE, PlanBuilder
from tests.worker.test_attention import rules, textbook

pytestmark = pytest.mark.usefixtures("fast_interpreter")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_BLOCKS = 128
# Small, so that a short sequence has many of them, and they grow within a thousand tokens.
SPLIT = KEYS = 32
# A sequence: tokens in the cache before the step, and new ones.
sequences = st.lists(
    st.tuples(st.integers(0, 90), st.one_of(st.just(1), st.integers(1, 25))), min_size=1, max_size=4
)
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


class Setup:
    """A cache of random numbers, where blocks that nobody wrote are not numbers, and a backend over it."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        rule: AttentionRule,
        sharing: int,
        seed: int = 0,
        rows: int = 64,
    ) -> None:
        heads, kv_heads, head_dim = shape
        self.spec = KvCacheSpec(2, kv_heads, head_dim, BLOCK_SIZE, dtype)
        self.cache = KvCache(self.spec, NUM_BLOCKS, DEVICE)
        self.cache.slab.fill_(math.nan)
        tuning = replace(
            Tuning.of(self.spec, DEVICE), rows=rows, keys=KEYS, split=SPLIT, programs=sharing
        )
        # The layer under test is the second; the first has another rule, which must not leak into it.
        self.backend = TritonPagedAttention(
            self.cache, heads, DEVICE, [AttentionRule(window=3), rule], tuning
        )
        self._generator = torch.Generator().manual_seed(seed)

    def random(self, *shape: int) -> Tensor:
        """Numbers that the next call does not repeat."""
        numbers = torch.randn(*shape, generator=self._generator)
        return numbers.to(self.spec.dtype).to(DEVICE)

    def fill(self, builder: PlanBuilder, name: str, key_value: Tensor) -> None:
        """Has the cache hold a sequence, as if its tokens (`[tokens, 2 * kv_heads, d]`) were computed."""
        plan = builder.plan({name: len(key_value)})
        blocks, offsets = np.divmod(plan.slot_mapping.astype(np.int64), BLOCK_SIZE)
        layer = self.cache.layer(1).flatten(1, 2)
        layer[torch.from_numpy(blocks).to(DEVICE), :, torch.from_numpy(offsets).to(DEVICE)] = (
            key_value
        )

    def run(self, plan: Any, query: Tensor, key_value: Tensor) -> Tensor:
        """One layer of one step, `[T, heads, d]`."""
        self.backend.prepare(plan)
        return self.backend.forward(1, query, key_value).view(query.shape)


@given(
    batch=sequences,
    shape=st.sampled_from([(1, 1, 16), (6, 2, 16), (3, 3, 48), (20, 1, 16)]),
    dtype=st.sampled_from(list(TOLERANCES)),
    rule=rules,
    sharing=st.sampled_from([1, 5, 1000]),
    rows=st.sampled_from([16, 64]),
    seed=st.integers(0, 1000),
)
# No shrinking: in the interpreter it takes minutes.
@settings(max_examples=10, deadline=None, phases=(Phase.explicit, Phase.generate))
def test_agrees_with_the_textbook(
    batch: list[tuple[int, int]],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    rule: AttentionRule,
    sharing: int,
    rows: int,
    seed: int,
) -> None:
    heads, kv_heads, head_dim = shape
    setup = Setup(shape, dtype, rule, sharing, seed, rows)
    builder = PlanBuilder(NUM_BLOCKS, seed)
    contexts: dict[str, Tensor] = {}
    news = {f"s{index}": new for index, (_, new) in enumerate(batch)}
    for name, (cached, new) in zip(news, batch, strict=True):
        builder.add(name, [0] * (cached + new))
        contexts[name] = setup.random(cached, 2 * kv_heads, head_dim)
        if cached:
            setup.fill(builder, name, contexts[name])
    plan = builder.plan(news)
    tokens = len(plan.token_ids)
    # Views of one tensor, as the projections give them.
    joined = setup.random(tokens, heads + 2 * kv_heads, head_dim)
    query, key_value = joined[:, :heads], joined[:, heads:]
    actual = setup.run(plan, query, key_value)
    for row, name in enumerate(sorted(news, key=lambda name: news[name] > 1)):
        own = slice(int(plan.query_start[row]), int(plan.query_start[row + 1]))
        context = torch.cat([contexts[name], key_value[own]]).float()
        key, value = context[:, :kv_heads].cpu(), context[:, kv_heads:].cpu()
        expected = textbook(query[own].float().cpu(), key, value, len(contexts[name]), rule)
        tolerance = TOLERANCES[dtype]
        torch.testing.assert_close(
            actual[own].float().cpu(), expected, atol=tolerance, rtol=tolerance
        )


def test_long_contexts_have_longer_splits() -> None:
    tokens, shape = 1300, (2, 1, 16)
    outputs = []
    for sharing in (1, 7, 1000):
        setup = Setup(shape, torch.float32, AttentionRule(), sharing)
        builder = PlanBuilder(NUM_BLOCKS)
        builder.add("s", [0] * tokens)
        past = setup.random(tokens - 1, 2, 16)
        setup.fill(builder, "s", past)
        query, key_value = setup.random(1, 2, 16), setup.random(1, 2, 16)
        outputs.append(setup.run(builder.plan({"s": 1}), query, key_value))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    context = torch.cat([past, key_value]).cpu()
    expected = textbook(query.cpu(), context[:, :1], context[:, 1:], tokens - 1, AttentionRule())
    torch.testing.assert_close(outputs[0].cpu(), expected, atol=2e-5, rtol=2e-5)


def test_splits_cover_every_position_once() -> None:
    splits = [kernels.split_of(position, SPLIT) for position in range(40_000)]
    assert splits[0] == 0
    assert all(later - earlier in (0, 1) for earlier, later in pairwise(splits))
    lengths = np.bincount(splits)[:-1]
    assert set(lengths[:32]) == {SPLIT}
    # 16 to each doubling.
    assert lengths[32:].tolist() == [
        SPLIT << (1 + index // 16) for index in range(len(lengths) - 32)
    ]


@pytest.mark.parametrize(
    ("dtype", "shape", "rule"),
    [
        (torch.float32, (6, 1, 16), AttentionRule()),
        (torch.bfloat16, (2, 1, 48), AttentionRule(window=40, soft_cap=3.0)),
    ],
)
def test_no_bit_depends_on_batch_or_cut(
    dtype: torch.dtype, shape: tuple[int, int, int], rule: AttentionRule
) -> None:
    heads, kv_heads, head_dim = shape
    tokens = 70
    numbers = Setup(shape, dtype, rule, 1)
    query = numbers.random(tokens, heads, head_dim)
    key_value = numbers.random(tokens, 2 * kv_heads, head_dim)

    def run(cuts: list[int], mates: int, sharing: int) -> Tensor:
        """The sequence in steps that end at `cuts`, beside others of one new token each."""
        setup = Setup(shape, dtype, rule, sharing, seed=1)
        builder = PlanBuilder(NUM_BLOCKS, seed=mates)
        for mate in range(mates):
            builder.add(f"m{mate}", [0] * 200)
        builder.add("s", [0] * tokens)
        parts = []
        for begin, end in zip([0, *cuts], [*cuts, tokens], strict=False):
            plan = builder.plan({f"m{mate}": 1 for mate in range(mates)} | {"s": end - begin})
            queries = torch.cat([setup.random(mates, heads, head_dim), query[begin:end]])
            other = setup.random(mates, 2 * kv_heads, head_dim)
            keys_values = torch.cat([other, key_value[begin:end]])
            parts.append(setup.run(plan, queries, keys_values)[mates:])
        return torch.cat(parts)

    whole = run([], 0, sharing=1)
    assert not whole.isnan().any()
    for cuts, mates, sharing in (
        ([1, 33, 69], 0, 1000),
        ([17, 64], 2, 4),
        ([68, 69], 1, 1),
    ):
        torch.testing.assert_close(run(cuts, mates, sharing), whole, rtol=0, atol=0)


def test_rows_that_pad_touch_nothing() -> None:
    outputs, slabs = [], []
    for size in (2, 5):
        setup = Setup((6, 2, 16), torch.float32, AttentionRule(window=50), sharing=30)
        builder = PlanBuilder(NUM_BLOCKS)
        for name, length in (("a", 90), ("b", 3)):
            builder.add(name, [0] * length)
            setup.fill(builder, name, setup.random(length - 1, 4, 16))
        plan = builder.plan({"a": 1, "b": 1})
        inputs = DecodeInputs(max_size=5, max_blocks=20, device=DEVICE)
        setup.backend.prepare_padded(inputs, size, longest=320)()
        inputs.fill(plan)
        joined = setup.random(5, 10, 16)[:size]
        output = setup.backend.forward(1, joined[:, :6], joined[:, 6:])
        assert output[2:].count_nonzero() == 0
        outputs.append(output[:2])
        slabs.append(setup.cache.slab.clone())
        # And they are the bits that a step gives which is not padded.
        again = setup.run(plan, joined[:2, :6], joined[:2, 6:])
        assert torch.equal(again.view(2, -1), output[:2])
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(slabs[0].nan_to_num(7.0), slabs[1].nan_to_num(7.0))


def test_building_the_kernels_changes_nothing() -> None:
    setup = Setup((6, 2, 16), torch.float32, AttentionRule(), sharing=30)
    setup.backend.build()
    assert setup.cache.slab.isnan().all()


def test_sums_of_splits_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []
    empty = torch.empty

    def counting(*shape: Any, **options: Any) -> Tensor:
        made.append(empty(*shape, **options))
        return made[-1]

    def run(limit: int) -> Tensor:
        monkeypatch.setattr("orchestra.worker.attention_triton.SPLIT_SUM_BYTES_MAX", limit)
        setup = Setup((2, 1, 16), torch.float32, AttentionRule(), sharing=1000)
        builder = PlanBuilder(NUM_BLOCKS)
        builder.add("s", [0] * 100)
        setup.fill(builder, "s", setup.random(99, 2, 16))
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", counting)
            return setup.run(builder.plan({"s": 1}), setup.random(1, 2, 16), setup.random(1, 2, 16))

    def kept() -> int:
        return sum(tensor.nbytes for tensor in made if tensor.dtype == torch.float32)

    # 4 splits of 2 heads, each with 16 sums and 2 statistics.
    size = 4 * 2 * 18 * 4
    shared = run(size)
    assert kept() == size
    made.clear()
    assert torch.equal(run(size - 1), shared)
    assert kept() == 0


def test_triton_is_chosen_where_it_can_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(name: str, head_dim: int = 16, device: str = "cpu") -> str:
        spec = KvCacheSpec(1, 2, head_dim, 16, torch.float32)
        return choose_attention(name, spec, torch.device(device))

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (8, 9))
    assert chosen("auto", device="cuda") == "triton"
    assert chosen("auto", head_dim=40, device="cuda") == "torch"
    assert chosen("torch", device="cuda") == "torch"
    assert chosen("auto") == "cpu"
    with pytest.raises(ConfigError, match="triton cannot compute here: heads of 40") as raised:
        chosen("triton", head_dim=40)
    assert raised.value.key == "attention"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (7, 5))
    assert chosen("auto", device="cuda") == "torch"
    with pytest.raises(ConfigError, match=r"compute capability is \(7, 5\)"):
        chosen("triton", device="cuda")


@pytest.mark.skipif(DEVICE.type == "cuda", reason="says what happens without a GPU")
def test_without_a_gpu_only_the_interpreter_runs_the_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = KvCache(KvCacheSpec(1, 2, 16, 16, torch.float32), 4, DEVICE)
    assert isinstance(make_attention("triton", cache, 4, DEVICE, []), TritonPagedAttention)
    assert not isinstance(make_attention("auto", cache, 4, DEVICE, []), TritonPagedAttention)
    assert isinstance(make_attention("torch", cache, 4, DEVICE, []), TorchPagedAttention)
    monkeypatch.setattr("orchestra.worker.attention_triton.is_interpreted", lambda: False)
    with pytest.raises(ConfigError, match="there is no GPU"):
        make_attention("triton", cache, 4, DEVICE, [])
