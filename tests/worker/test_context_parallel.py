"""Ranks that divide prompts compute what transformers computes, and to the bit what a single rank does."""

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from orchestra.errors import ConfigError
from orchestra.worker import assembly
from orchestra.worker import device as devices
from orchestra.worker.assembly import Place, Rank
from orchestra.worker.config import WorkerConfig
from orchestra.worker.context_parallel import (
    ROWS_MIN,
    RUN_TOKENS_PER_RANK_MIN,
    divide,
    part_of,
    rows_of,
)
from orchestra.worker.model_config import ModelConfig
from orchestra.worker.plan import StepPlan
from orchestra.worker.sharding import Shard
from tests.checkpoints import FAMILIES
from tests.worker.conftest import Checkpoints, MakeRank, Reference
from tests.worker.plans import PlanBuilder
from tests.worker.test_logits import prompt
from tests.worker.test_tensor_parallel import compare, thread_ranks

MIN_TOKENS = 16


@pytest.mark.parametrize("kind", [*FAMILIES, "deepseek3", "qwen3-window"])
def test_divided_prompts_add_up(kind: str, checkpoint: Checkpoints, reference: Reference) -> None:
    ranks = thread_ranks(checkpoint(kind), 1, contexts=2, context_min_tokens=MIN_TOKENS)
    compare(kind, ranks, reference)


@pytest.mark.parametrize(
    ("size", "contexts", "stages"),
    [
        pytest.param(2, 2, 1, id="of two shards each"),
        pytest.param(1, 2, 2, id="of two stages"),
        pytest.param(1, 3, 1, id="three"),
        pytest.param(2, 2, 2, id="and everything"),
    ],
)
def test_any_product(
    size: int, contexts: int, stages: int, checkpoint: Checkpoints, reference: Reference
) -> None:
    # A window in two of three layers: a layer that is not the stage's first has a rule of its own.
    kind = "qwen3-window"
    ranks = thread_ranks(
        *(checkpoint(kind), size, stages), contexts=contexts, context_min_tokens=MIN_TOKENS
    )
    compare(kind, ranks, reference)


@pytest.mark.parametrize(("size", "stages"), [(2, 1), (1, 2), (2, 2)])
def test_experts_are_divided_among_all_ranks_of_a_stage(
    size: int, stages: int, checkpoint: Checkpoints, reference: Reference
) -> None:
    ranks = thread_ranks(
        *(checkpoint("qwen3-moe"), size, stages),
        contexts=2,
        context_min_tokens=MIN_TOKENS,
        expert_parallel=True,
    )
    compare("qwen3-moe", ranks, reference)


def test_a_rank_needs_no_memory_for_the_experts_of_others(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_dir = checkpoint("mixtral")
    model_config = ModelConfig.from_directory(model_dir)
    place = Place(torch.device("cpu"), torch.float32, local_size=2)
    weights = load_file(model_dir / "model.safetensors")
    experts = sum(weight.nbytes for name, weight in weights.items() if ".experts." in name)
    config = WorkerConfig(model_dir, "", "", "", Shard(), context=Shard(1, 2))

    def needed(config: WorkerConfig) -> float:
        """Fewest bytes with which the weights are loaded."""
        few, enough = 0, 1 << 30
        while enough - few > 1:
            free = (few + enough) // 2
            monkeypatch.setattr(devices, "free_bytes", lambda *_, free=free: free)
            try:
                assembly._check_weights_fit(config, model_config, place)
                enough = free
            except ConfigError:
                few = free
        return enough

    assert needed(config) - needed(replace(config, expert_parallel=True)) == experts / 2


# === bit for bit ===


class Together:
    """Runs plans on all ranks of a worker at once."""

    def __init__(self, ranks: list[Rank]) -> None:
        self._ranks = ranks

    def forward(self, plan: StepPlan) -> Tensor | None:
        """The logits of the rank that samples."""
        with ThreadPoolExecutor(len(self._ranks)) as pool:
            every = list(pool.map(lambda rank: rank.runner.forward(plan), self._ranks))
        logits: Tensor | None = every[self._ranks[0].sampling_rank]
        return logits


def logits_of_a_life(runner: Together) -> Tensor:
    """Prompts that are chunked and mixed with decoding, a shared prefix, a sequence that is preempted and is back."""
    builder = PlanBuilder(256)
    builder.add("a", prompt(150))
    builder.add("b", prompt(70, seed=3))
    rows = []

    def step(**scheduled: int) -> None:
        plan = builder.plan(scheduled)
        logits = runner.forward(plan)
        names = {member.slot: name for name, member in builder.sequences.items()}
        if logits is None:
            return
        for slot, row in zip(plan.sample_slots, logits, strict=True):
            builder.append(names[int(slot)], int(row.argmax()))
            # What is recorded is overwritten by the next step.
            rows.append(row.clone())

    step(a=100)
    step(a=50, b=30)
    step(a=1, b=40)
    # `c` finds in the cache what a divided step wrote, and what a decoding one did.
    builder.add("c", builder.sequences["a"].tokens[:144] + prompt(60, 7), "a", shared_blocks=9)
    step(a=1, b=1, c=60)
    step(a=1, b=1, c=1)
    builder.forget("b")
    step(a=1, c=1)
    step(a=1, b=len(builder.sequences["b"].tokens), c=1)
    step(a=1, b=1, c=1)
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("kind", "dtype", "contexts", "experts"),
    [
        *itertools.product(["llama", "gemma3", "deepseek3"], ["float32"], [2, 3], ["whole"]),
        *itertools.product(["llama", "qwen3-moe"], ["bfloat16"], [2, 3], ["whole"]),
        ("mixtral", "float32", 2, "divided"),
        pytest.param("mixtral", "float32", 8, "divided", id="some ranks have none"),
        ("qwen3-moe", "bfloat16", 3, "divided"),
        ("deepseek3", "bfloat16", 2, "divided"),
    ],
)
def test_bits_do_not_depend_on_the_division(
    kind: str, dtype: str, contexts: int, experts: str, checkpoint: Checkpoints, make_rank: MakeRank
) -> None:
    alone = logits_of_a_life(Together([make_rank(kind, dtype=dtype)]))
    divided = thread_ranks(
        *(checkpoint(kind), 1),
        contexts=contexts,
        context_min_tokens=MIN_TOKENS,
        num_blocks=256,
        dtype=dtype,
        expert_parallel=experts == "divided",
    )
    assert torch.equal(logits_of_a_life(Together(divided)), alone)


def test_every_rank_keeps_every_token(checkpoint: Checkpoints) -> None:
    ranks = thread_ranks(checkpoint("llama"), 1, contexts=3, context_min_tokens=MIN_TOKENS)
    builder = PlanBuilder(64)
    builder.add("a", prompt(112))
    together = Together(ranks)
    assert together.forward(builder.plan({"a": 60})) is None
    assert together.forward(builder.plan({"a": 52})) is not None
    blocks = builder.sequences["a"].blocks
    for layer in range(ranks[0].runner._cache.spec.num_layers):
        first, *others = (rank.runner._cache.layer(layer)[blocks] for rank in ranks)
        assert first.all()
        assert all(torch.equal(other, first) for other in others)


# === the division ===


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=8),
    size=st.integers(2, 5),
    min_tokens=st.integers(1, 200),
)
def test_every_token_is_computed_once(lengths: list[int], size: int, min_tokens: int) -> None:
    query_start = np.cumsum([0, *lengths], dtype=np.int32)
    parts = divide(query_start, size, min_tokens)
    long = [length for length in lengths if length >= size * RUN_TOKENS_PER_RANK_MIN]
    if parts is None:
        return
    assert sum(long) >= min_tokens
    rows = [rows_of(part) for part in parts]
    assert sorted(np.concatenate(rows)) == list(range(sum(lengths)))
    assert min(map(len, rows)) >= ROWS_MIN
    # In the order of the step, and the last token of every sequence is rank 0's.
    assert all((np.diff(own) > 0).all() for own in rows)
    assert set(query_start[1:] - 1) <= set(rows[0])
    for part in parts:
        for segment in part:
            assert query_start[segment.sequence] <= segment.tokens.start
            assert segment.tokens.stop <= query_start[segment.sequence + 1]
    # Nobody has more than a fair share, but for the tokens that are not divided and what rounding adds per run.
    fair = max(sum(lengths) / size, sum(lengths) - sum(long))
    assert max(map(len, rows)) <= fair + 2 * len(long) + 1


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("num_decodes", [0, 60])
def test_the_work_is_balanced(size: int, num_decodes: int) -> None:
    lengths = [1] * num_decodes + [1600, 400]
    parts = divide(np.cumsum([0, *lengths], dtype=np.int32), size, 256)
    assert parts is not None
    tokens, scores = [], []
    for part in parts:
        spans = [segment for segment in part if lengths[segment.sequence] > 1]
        tokens.append(sum(len(segment.tokens) for segment in part))
        starts = np.cumsum([0, *lengths])
        scores.append(
            sum(
                int(row - starts[segment.sequence]) + 1
                for segment in spans
                for row in range(segment.tokens.start, segment.tokens.stop)
            )
        )
    assert max(tokens) - min(tokens) <= 8
    if num_decodes == 0:
        assert max(scores) < 1.02 * min(scores)


def test_small_steps_are_not_divided() -> None:
    query_start = np.array([0, 1, 2, 40], np.int32)
    assert divide(query_start, 2, min_tokens=39) is None
    assert divide(query_start, 2, min_tokens=38) is not None
    assert divide(query_start, 1, min_tokens=1) is None
    # Many short runs are as much work, but nothing that could be cut.
    short = np.arange(0, 700, 7, dtype=np.int32)
    assert divide(short, 2, min_tokens=1) is None


def test_samples_stay_with_their_tokens() -> None:
    builder = PlanBuilder(64)
    builder.add("a", prompt(50))
    builder.add("b", prompt(30, seed=1))
    builder.add("c", prompt(3, seed=2))
    builder.plan({"c": 2})
    plan = builder.plan({"a": 50, "b": 20, "c": 1})
    # In another order, and without `b`, which is not through with its prompt.
    plan = replace(plan, sample_sequences=plan.sample_sequences[::-1].copy())
    parts = divide(plan.query_start, 2, MIN_TOKENS)
    assert parts is not None
    own = part_of(plan, parts[0], is_first=True)
    expected = plan.query_start[plan.sample_sequences + 1] - 1
    ends = own.query_start[own.sample_sequences + 1] - 1
    assert own.token_ids[ends].tolist() == plan.token_ids[expected].tolist()
    assert own.positions[ends].tolist() == plan.positions[expected].tolist() == [49, 2]
    other = part_of(plan, parts[1], is_first=False)
    assert len(other.sample_sequences) == len(other.sample_slots) == 0
    assert len(own.token_ids) + len(other.token_ids) == len(plan.token_ids)
