"""The forward pass against transformers in fp32, however the scheduler cuts and mixes the work."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from orchestra.worker import attention_layout
from orchestra.worker.assembly import Rank
from tests.checkpoints import FAMILIES, KINDS, MAX_POSITIONS, make_checkpoint
from tests.worker.conftest import MakeRank, Reference
from tests.worker.plans import PlanBuilder

# Relative to the spread of the logits, which is about 1.
TOLERANCE = 1e-4


def prompt(length: int, seed: int = 0) -> list[int]:
    """Random tokens that every vocabulary has."""
    draw = random.Random(f"{length} {seed}")
    return [draw.randrange(8, 500) for _ in range(length)]


class Run:
    """A rank under a plan builder, each step compared with the reference."""

    def __init__(self, rank: Rank, kind: str, reference: Reference) -> None:
        self.builder = PlanBuilder(rank.num_blocks)
        self._rank = rank
        self._kind = kind
        self._reference = reference
        self.num_compared = 0

    def step(self, **scheduled: int) -> dict[str, int]:
        """Runs one step, compares its logits, appends the greedy tokens; returns them."""
        plan = self.builder.plan(scheduled)
        logits = self._rank.runner.forward(plan)
        names = {m.slot: name for name, m in self.builder.sequences.items()}
        drawn: dict[str, int] = {}
        if logits is None:
            return drawn
        for slot, row in zip(plan.sample_slots, logits, strict=True):
            name = names[int(slot)]
            expected = self._reference(self._kind, self.builder.sequences[name].tokens)[-1]
            assert_close(row, expected)
            drawn[name] = int(row.argmax())
            assert drawn[name] == int(expected.argmax())
            self.builder.append(name, drawn[name])
            self.num_compared += 1
        return drawn


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Compares logits, relative to their spread."""
    difference = (actual.cpu() - expected).abs().max()
    assert difference <= TOLERANCE * max(1.0, float(expected.std()))


@pytest.mark.parametrize("kind", KINDS)
def test_whole_chunked_and_decoded(kind: str, make_rank: MakeRank, reference: Reference) -> None:
    run = Run(make_rank(kind), kind, reference)
    run.builder.add("whole", prompt(75))
    run.builder.add("chunked", prompt(40, seed=1))
    run.builder.add("single", prompt(1))
    run.step(whole=75, chunked=16, single=1)
    run.step(whole=1, chunked=1)
    run.step(whole=1, chunked=20, single=1)
    run.step(chunked=3)
    for _ in range(2):
        run.step(whole=1, chunked=1, single=1)
    assert run.num_compared == 12


@pytest.mark.parametrize("kind", ["gemma2", "deepseek3"])
def test_torchs_attention_computes_the_same(
    kind: str, make_rank: MakeRank, reference: Reference
) -> None:
    run = Run(make_rank(kind, attention="torch"), kind, reference)
    run.builder.add("a", prompt(40))
    run.builder.add("b", prompt(7, seed=1))
    run.step(a=25, b=7)
    run.step(b=1, a=15)
    run.step(a=1, b=1)
    assert run.num_compared == 5


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_are_the_same(kind: str, make_rank: MakeRank, reference: Reference) -> None:
    rank = make_rank(kind)
    builder = PlanBuilder(rank.num_blocks)
    tokens = prompt(30)
    builder.add("a", tokens)
    for step in range(64):
        logits = rank.runner.forward(builder.plan({"a": 1 if step else 30}))
        assert logits is not None
        builder.append("a", int(logits[0].argmax()))
    drawn = builder.sequences["a"].tokens
    # One pass over what was drawn says what transformers would have drawn after each token.
    expected = reference(kind, drawn)[29:-1].argmax(-1)
    assert drawn[30:] == expected.tolist()


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_way_to_cut_a_prompt(kind: str, make_rank: MakeRank, reference: Reference) -> None:
    rank = make_rank(kind)
    for chunk in (1, 2, 7, 15, 16, 17, 32):
        run = Run(rank, kind, reference)
        run.builder.add("a", prompt(50))
        for start in range(0, 50, chunk):
            run.step(a=min(chunk, 50 - start))
        assert run.num_compared == 1


def test_long_context_reaches_stretched_rotations(
    make_rank: MakeRank, reference: Reference
) -> None:
    run = Run(make_rank("llama3-rope"), "llama3-rope", reference)
    run.builder.add("a", prompt(600))
    run.step(a=512)
    run.step(a=88)
    run.step(a=1)
    assert run.num_compared == 2


def test_longest_sequence_chooses_between_rotations(tmp_path: Path, make_rank: MakeRank) -> None:
    # Made for 64 positions, stretched to 2,048: transformers chooses by each sequence, we once for all of them.
    changes = {"original_max_position_embeddings": 64, "max_position_embeddings": MAX_POSITIONS}
    model_dir = make_checkpoint("phi3-longrope", tmp_path / "phi3", seed=1, **changes)
    model = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="eager")
    for length, settings in ((100, {}), (60, {"max_model_len": 64})):
        rank = make_rank("phi3-longrope", model_dir=model_dir, **settings)
        builder = PlanBuilder(rank.num_blocks)
        tokens = prompt(length)
        builder.add("a", tokens)
        rank.runner.forward(builder.plan({"a": 48}))
        logits = rank.runner.forward(builder.plan({"a": length - 48}))
        assert logits is not None
        with torch.inference_mode():
            assert_close(logits[0], model(torch.tensor([tokens])).logits[0, -1])


@pytest.mark.parametrize("kind", FAMILIES)
def test_sequences_share_a_prefix(kind: str, make_rank: MakeRank, reference: Reference) -> None:
    run = Run(make_rank(kind), kind, reference)
    shared = prompt(48)
    run.builder.add("first", shared + prompt(5, seed=1))
    run.step(first=53)
    run.builder.add("second", shared + prompt(9, seed=2), shares="first", shared_blocks=3)
    run.builder.add("third", shared + prompt(1, seed=3), shares="first", shared_blocks=3)
    run.step(first=1, second=9, third=1)
    run.step(first=1, second=1, third=1)
    assert run.num_compared == 7


@pytest.mark.parametrize("kind", FAMILIES)
def test_preempted_sequence_comes_back(
    kind: str, make_rank: MakeRank, reference: Reference
) -> None:
    run = Run(make_rank(kind), kind, reference)
    run.builder.add("a", prompt(20))
    run.builder.add("b", prompt(33))
    run.step(a=20, b=33)
    run.step(a=1, b=1)
    run.builder.forget("a")
    run.step(b=1)
    run.step(b=1, a=22)
    run.step(a=1, b=1)
    assert run.num_compared == 9


def swap_and_come_back(rank: Rank, kind: str, reference: Reference) -> None:
    """One sequence goes to host memory while the other takes its blocks; then they change places."""
    run = Run(rank, kind, reference)
    run.builder.add("a", prompt(20))
    run.builder.add("b", prompt(33))
    run.step(a=20, b=33)
    run.step(a=1, b=1)
    run.builder.swap_out("a", [5, 2])
    run.builder.add("c", prompt(40, seed=2))
    # The blocks that `a` gives up are written in the very step that saves them.
    run.step(b=1, c=40)
    run.builder.swap_out("b", [1, 0, 3])
    run.builder.swap_in("a")
    run.step(a=1, c=1)
    run.builder.swap_in("b")
    run.step(a=1, b=1, c=1)
    assert run.num_compared == 2 + 2 + 2 + 2 + 3


def test_swapped_sequences_come_back(make_rank: MakeRank, reference: Reference) -> None:
    swap_and_come_back(make_rank("qwen2", num_host_blocks=6), "qwen2", reference)


@pytest.mark.parametrize("kind", FAMILIES)
def test_mixed_lengths_are_bucketed(
    kind: str, make_rank: MakeRank, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_layout, "PADDED_TOKENS_FREE", 0)
    run = Run(make_rank(kind), kind, reference)
    lengths = {"a": 3, "b": 250, "c": 17, "d": 5, "e": 33, "f": 12, "g": 8}
    for name, length in lengths.items():
        run.builder.add(name, prompt(length))
        run.step(**{name: length})
    run.step(**dict.fromkeys(lengths, 1))
    # One more that prefills behind the buckets.
    run.builder.add("late", prompt(30, seed=5))
    run.step(late=20, **dict.fromkeys(lengths, 1))
    run.step(late=10, **dict.fromkeys(lengths, 1))
    assert run.num_compared == 7 + 3 * 7 + 1


@pytest.mark.parametrize("kind", FAMILIES)
def test_long_chunks_are_cut_into_bounded_masks(
    kind: str, make_rank: MakeRank, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_layout, "MASK_NUMBERS_MAX", 2000)
    run = Run(make_rank(kind), kind, reference)
    run.builder.add("a", prompt(90))
    run.step(a=30)
    run.step(a=60)
    assert run.num_compared == 1


def test_step_without_samples_gives_no_logits(make_rank: MakeRank) -> None:
    rank = make_rank("llama")
    builder = PlanBuilder(rank.num_blocks)
    builder.add("a", prompt(40))
    assert rank.runner.forward(builder.plan({"a": 16})) is None


def test_samples_may_come_in_any_order(make_rank: MakeRank, reference: Reference) -> None:
    rank = make_rank("llama")
    builder = PlanBuilder(rank.num_blocks)
    tokens = {name: prompt(5, seed=ord(name)) for name in "abc"}
    for name in "abc":
        builder.add(name, tokens[name])
        rank.runner.forward(builder.plan({name: 4}))
    plan = builder.plan(dict.fromkeys("abc", 1))
    shuffled = replace(plan, sample_sequences=np.array([2, 0, 1], np.int32))
    logits = rank.runner.forward(shuffled)
    assert logits is not None
    for row, name in zip(logits, "cab", strict=True):
        assert_close(row, reference("llama", tokens[name])[-1])


def assert_bfloat16_is_close(
    kind: str, make_rank: MakeRank, reference: Reference, device: str = "cpu"
) -> None:
    rank = make_rank(kind, dtype="bfloat16", device=device)
    builder = PlanBuilder(rank.num_blocks)
    tokens = prompt(60)
    builder.add("a", tokens)
    assert rank.runner.forward(builder.plan({"a": 40})) is None
    logits = rank.runner.forward(builder.plan({"a": 20}))
    expected = reference(kind, tokens)[-1:]
    assert logits is not None
    error = (logits.float().cpu() - expected).square().mean().sqrt()
    assert logits.dtype == torch.bfloat16
    # bf16 keeps 8 bits; a wrong position or head would be off by the spread itself.
    assert error < 0.05 * expected.std()


@pytest.mark.parametrize("kind", FAMILIES)
def test_bfloat16_stays_close(kind: str, make_rank: MakeRank, reference: Reference) -> None:
    assert_bfloat16_is_close(kind, make_rank, reference)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_bits_do_not_depend_on_company_or_cuts(kind: str, dtype: str, make_rank: MakeRank) -> None:
    rank = make_rank(kind, dtype=dtype)

    def logits(*chunks: int, with_others: bool) -> Tensor:
        builder = PlanBuilder(rank.num_blocks)
        builder.add("a", prompt(90))
        builder.add("b", prompt(70, seed=3))
        builder.add("c", prompt(200, seed=4))
        rows = []
        for chunk in chunks:
            others = {"b": 1, "c": 7} if with_others else {}
            plan = builder.plan({"a": chunk, **others})
            computed = rank.runner.forward(plan)
            if builder.sequences["a"].num_computed == len(builder.sequences["a"].tokens):
                assert computed is not None
                row = plan.sample_slots.tolist().index(builder.sequences["a"].slot)
                rows.append(computed[row].clone())
                builder.append("a", 7)
        return torch.stack(rows)

    whole = logits(90, 1, 1, 1, with_others=False)
    assert torch.equal(logits(90, 1, 1, 1, with_others=True), whole)
    assert torch.equal(logits(*[16] * 5, 10, 1, 1, 1, with_others=False), whole)
    assert torch.equal(logits(*[7] * 12, 6, 1, 1, 1, with_others=True), whole)
