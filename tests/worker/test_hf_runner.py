"""transformers' own modules over the paged cache, against transformers alone and against the native runner."""

import logging
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from orchestra.errors import ConfigError, UnsupportedError
from orchestra.worker.assembly import Rank
from orchestra.worker.config import WorkerConfig
from orchestra.worker.hf_check import check_against_own_attention
from orchestra.worker.hf_config import HfConfig
from orchestra.worker.hf_model import HfModel
from orchestra.worker.runner_choice import read_model_config
from orchestra.worker.sharding import Shard, Stage
from tests.checkpoints import FAMILIES, OTHER_KINDS
from tests.worker.conftest import Checkpoints, MakeRank, Reference
from tests.worker.plans import PlanBuilder
from tests.worker.test_logits import (
    Run,
    assert_bfloat16_is_close,
    assert_close,
    prompt,
    swap_and_come_back,
)

CPU = torch.device("cpu")


# === against transformers ===


@pytest.mark.parametrize("kind", [*OTHER_KINDS, *FAMILIES])
def test_logits_whole_chunked_shared_and_preempted(
    kind: str, make_rank: MakeRank, reference: Reference
) -> None:
    run = Run(make_rank(kind, runner="hf"), kind, reference)
    shared = prompt(48)
    run.builder.add("whole", shared + prompt(27, seed=1))
    run.builder.add("chunked", prompt(40, seed=2))
    run.builder.add("single", prompt(1))
    run.step(whole=75, chunked=16, single=1)
    run.step(whole=1, chunked=1)
    run.builder.add("sharing", shared + prompt(9, seed=3), shares="whole", shared_blocks=3)
    run.step(whole=1, chunked=23, single=1, sharing=9)
    run.builder.forget("chunked")
    run.step(sharing=1, single=1)
    run.step(chunked=41, whole=1, sharing=1)
    run.step(chunked=1, whole=1, sharing=1, single=1)
    assert run.num_compared == 2 + 1 + 4 + 2 + 3 + 4


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_greedy_tokens_are_the_same(kind: str, make_rank: MakeRank, reference: Reference) -> None:
    rank = make_rank(kind)
    builder = PlanBuilder(rank.num_blocks)
    builder.add("a", prompt(30))
    for step in range(64):
        logits = rank.runner.forward(builder.plan({"a": 1 if step else 30}))
        assert logits is not None
        builder.append("a", int(logits[0].argmax()))
    drawn = builder.sequences["a"].tokens
    assert drawn[30:] == reference(kind, drawn)[29:-1].argmax(-1).tolist()


def test_swapped_sequences_come_back(make_rank: MakeRank, reference: Reference) -> None:
    swap_and_come_back(make_rank("granite", num_host_blocks=6), "granite", reference)


def test_a_step_without_samples_leaves_its_kv(make_rank: MakeRank, reference: Reference) -> None:
    rank = make_rank("olmo2")
    builder = PlanBuilder(rank.num_blocks)
    tokens = prompt(30)
    builder.add("a", tokens)
    assert rank.runner.forward(builder.plan({"a": 20})) is None
    logits = rank.runner.forward(builder.plan({"a": 10}))
    assert logits is not None
    assert_close(logits[0], reference("olmo2", tokens)[-1])


@pytest.mark.parametrize("kind", ["granite", "cohere2"])
def test_bfloat16_stays_close(kind: str, make_rank: MakeRank, reference: Reference) -> None:
    assert_bfloat16_is_close(kind, make_rank, reference)


# === against the native runner ===

# What a step asks of each of four sequences: tokens to compute, 0 for none; below 0 it is preempted first.
_STEPS = st.lists(
    st.tuples(*[st.sampled_from([-1, 0, 0, 1, 1, 2, 5, 16, 17, 33])] * 4), min_size=3, max_size=8
)


@cache
def both_runners(make_rank: MakeRank, kind: str) -> tuple[Rank, Rank]:
    """The same checkpoint under both."""
    return make_rank(kind, runner="native"), make_rank(kind, runner="hf")


@pytest.mark.parametrize("kind", ["qwen3-window", "gemma2"])
def test_both_runners_agree_on_any_plan(kind: str, make_rank: MakeRank) -> None:
    native, hf = both_runners(make_rank, kind)

    @settings(max_examples=15, deadline=None)
    @given(steps=_STEPS, lengths=st.tuples(*[st.integers(1, 60)] * 4), seed=st.integers(0, 9))
    def agree(steps: list[tuple[int, ...]], lengths: tuple[int, ...], seed: int) -> None:
        builder = PlanBuilder(native.num_blocks, seed)
        for index, length in enumerate(lengths):
            builder.add(str(index), prompt(length, seed=index))
        # At the end everything that is left, so that each example compares every sequence.
        for step in [*steps, (100, 100, 100, 100)]:
            scheduled = schedule(builder, step)
            if scheduled:
                compare_step(builder, scheduled, native, hf)

    agree()


def schedule(builder: PlanBuilder, step: tuple[int, ...]) -> dict[str, int]:
    """What of a step's wishes can be done: nobody runs further than its last token."""
    scheduled = {}
    for name, asked in zip(builder.sequences, step, strict=True):
        if asked < 0:
            builder.forget(name)
        sequence = builder.sequences[name]
        count = min(abs(asked), len(sequence.tokens) - sequence.num_computed)
        if count:
            scheduled[name] = count
    return scheduled


def compare_step(builder: PlanBuilder, scheduled: dict[str, int], native: Rank, hf: Rank) -> None:
    """Runs one step on both, compares the logits, appends the greedy tokens."""
    plan = builder.plan(scheduled)
    expected, actual = native.runner.forward(plan), hf.runner.forward(plan)
    if expected is None or actual is None:
        assert expected is actual
        return
    assert_close(actual, expected)
    names = {sequence.slot: name for name, sequence in builder.sequences.items()}
    for slot, row in zip(plan.sample_slots, expected, strict=True):
        builder.append(names[int(slot)], int(row.argmax()))


# === which runner is taken ===


def config_of(model_dir: Path, **changes: Any) -> WorkerConfig:
    return WorkerConfig(model_dir, "", "w", "m", **changes)


def test_auto_takes_the_native_runner_where_it_can(checkpoint: Checkpoints) -> None:
    assert not isinstance(read_model_config(config_of(checkpoint("llama"))), HfConfig)
    assert isinstance(read_model_config(config_of(checkpoint("llama"), runner="hf")), HfConfig)


def test_auto_says_when_it_takes_the_other(
    checkpoint: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "orchestra.worker"):
        assert isinstance(read_model_config(config_of(checkpoint("granite"))), HfConfig)
    (record,) = caplog.records
    assert "transformers' own modules compute this model" in record.getMessage()
    assert "GraniteForCausalLM" in record.getMessage()


def test_native_is_taken_at_its_word(checkpoint: Checkpoints) -> None:
    with pytest.raises(
        UnsupportedError, match=r"^architectures: \['GraniteForCausalLM'\] has none"
    ):
        read_model_config(config_of(checkpoint("granite"), runner="native"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard": Shard(0, 2)}, "--tp: "),
        ({"stage": Stage(0, 2)}, "--pipeline-parallel: "),
        ({"context": Shard(0, 2)}, "--context-parallel: "),
        ({"expert_parallel": True}, "--expert-parallel: "),
    ],
)
def test_one_rank_only(checkpoint: Checkpoints, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        read_model_config(config_of(checkpoint("llama"), runner="hf", **changes))
    # Where nobody asked for it by name, what the native runner lacks comes first.
    with pytest.raises(UnsupportedError, match=f"^architectures: .*modules: {message}"):
        read_model_config(config_of(checkpoint("granite"), **changes))


def test_missing_extra_is_named(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch) -> None:
    # transformers is installed here: that it cannot be found is played.
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ConfigError, match=r"^--runner: .*orchestra\[hf\]"):
        read_model_config(config_of(checkpoint("llama"), runner="hf"))
    with pytest.raises(UnsupportedError, match=r"GraniteForCausalLM.*orchestra\[hf\]"):
        read_model_config(config_of(checkpoint("granite")))


def test_both_runners_count_alike(make_rank: MakeRank) -> None:
    native, hf = both_runners(make_rank, "gemma2")
    assert hf.num_blocks == native.num_blocks
    assert hf.max_model_len == native.max_model_len
    for name in ("num_layers", "num_heads", "num_kv_heads", "head_dim", "eos_token_ids", "dtype"):
        assert getattr(hf.model_config, name) == getattr(native.model_config, name), name
    rules = zip(hf.model_config.attention, native.model_config.attention, strict=True)
    for rule, expected in rules:
        assert (rule.window, rule.soft_cap) == (expected.window, expected.soft_cap)
        assert rule.scale == pytest.approx(expected.scale)


def test_kv_of_the_two_is_told_apart(make_rank: MakeRank) -> None:
    native, hf = both_runners(make_rank, "gemma2")
    assert native.model_config.key_order != hf.model_config.key_order


# === the check at start ===


class ShiftedMlp(nn.Module):
    """Stands for what no attention call shows: an MLP that also looks at the token to the left in the batch."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        output: Tensor = self.inner(hidden + 0.3 * hidden.roll(1, dims=1))
        return output


def test_a_model_that_mixes_neighbours_is_refused(checkpoint: Checkpoints) -> None:
    model_dir = checkpoint("llama")
    config = HfConfig.from_directory(model_dir)
    model, shape = HfModel.load(model_dir, config, torch.float32, CPU, 256)
    check_against_own_attention(model, shape, torch.float32, CPU, 256)
    layer = model.module.model.layers[1]
    layer.mlp = ShiftedMlp(layer.mlp)
    with pytest.raises(UnsupportedError, match="other logits in pieces and in company"):
        check_against_own_attention(model, shape, torch.float32, CPU, 256)


def test_a_wrong_rule_is_refused(checkpoint: Checkpoints) -> None:
    model_dir = checkpoint("mistral-window")
    config = HfConfig.from_directory(model_dir)
    model, shape = HfModel.load(model_dir, config, torch.float32, CPU, 256)
    wide = HfModel.load(checkpoint("mistral"), config, torch.float32, CPU, 256)[1]
    with pytest.raises(UnsupportedError, match="other logits"):
        check_against_own_attention(model, wide, torch.float32, CPU, 256)
    # Where no sequence is longer than the window, there is none.
    assert HfModel.load(model_dir, config, torch.float32, CPU, 21)[1].attention == wide.attention
    assert shape.attention != wide.attention


def test_shortest_limit_is_enough_for_the_check(make_rank: MakeRank, reference: Reference) -> None:
    rank = make_rank("granite", max_model_len=2, num_blocks=1)
    builder = PlanBuilder(rank.num_blocks)
    builder.add("a", [9, 8])
    logits = rank.runner.forward(builder.plan({"a": 2}))
    assert logits is not None
    assert_close(logits[0], reference("granite", [9, 8])[-1])


def test_own_attention_is_put_back(checkpoint: Checkpoints) -> None:
    # Another model of the same class, as a test's reference is, keeps the attention that it asked for.
    other = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=1, hidden_size=32))
    before = other.config._attn_implementation
    HfModel.load(
        checkpoint("llama"), HfConfig.from_directory(checkpoint("llama")), torch.float32, CPU, 64
    )
    assert other.config._attn_implementation == before == "sdpa"
