"""Plans as they travel."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from orchestra.errors import InternalError
from orchestra.worker.plan import PlanReader, StepPlan
from tests.worker.plans import (
    PlanBuilder,
    encode_plan,
    pack_plan,
    plan_fields,
    sampling_start,
)


def read(message: bytes) -> StepPlan:
    """The plan of a first message."""
    return PlanReader(max_num_seqs=4, max_blocks=8).read(message)


def message_with(plan: StepPlan, **changes: Any) -> bytes:
    """A plan's message with some fields replaced."""
    return pack_plan({**plan_fields(plan), **changes})


@pytest.fixture
def plan() -> StepPlan:
    builder = PlanBuilder(32)
    builder.add("a", list(range(40)))
    builder.add("b", [1, 2, 3])
    starts = [
        sampling_start(0),
        sampling_start(
            1,
            temperature=0.5,
            top_k=7,
            seed=2**64 - 1,
            logit_bias_ids=[5, 6],
            logit_bias_values=[1.5, -2.0],
            repetition_penalty=1.5,
            prompt_token_ids=[1, 2, 3],
            output_token_ids=[4],
        ),
    ]
    return builder.plan({"a": 33, "b": 3}, starts, num_top_logprobs=2)


def test_pending_tokens_are_those_of_their_slots(plan: StepPlan) -> None:
    tokens = [-1, *range(34), -1]
    pending = read(
        message_with(plan, token_ids=tokens, query_start=[0, 35, 36], slots=[3, 1])
    ).pending
    assert pending.rows.tolist() == [0, 35]
    assert pending.slots.tolist() == [3, 1]
    assert len(read(encode_plan(plan)).pending.rows) == 0


def test_round_trip(plan: StepPlan) -> None:
    decoded = read(encode_plan(plan))
    assert decoded.step_id == plan.step_id
    assert decoded.num_top_logprobs == 2
    arrays = [name for name, value in vars(plan).items() if isinstance(value, np.ndarray)]
    assert len(arrays) == 9
    for name in arrays:
        np.testing.assert_array_equal(getattr(decoded, name), getattr(plan, name))
    assert decoded.block_tables.shape == (2, 3)
    plain, full = decoded.starts
    assert not plain.has_penalties
    assert full.has_penalties
    assert (full.slot, full.temperature, full.top_k, full.seed) == (1, 0.5, 7, 2**64 - 1)
    assert full.logit_bias_ids.tolist() == [5, 6]
    assert full.logit_bias_values.tolist() == [1.5, -2.0]
    assert full.prompt_token_ids.tolist() == [1, 2, 3]
    assert full.output_token_ids.tolist() == [4]


def test_arrays_are_views_of_the_message(plan: StepPlan) -> None:
    decoded = read(encode_plan(plan))
    assert not decoded.token_ids.flags.owndata
    assert not decoded.token_ids.flags.writeable


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: b"",
        lambda message: message[:50],
        lambda message: message[:-1],
        lambda message: message + b"\0",
        lambda message: b"move" + message[4:],
        # More sampling parameters, a longer first array; and a list that is none.
        lambda message: message[:24] + b"\xff\xff\xff\xff" + message[28:],
        lambda message: message[:28] + b"\xff\xff\xff\xff" + message[32:],
        lambda message: message.replace(b"\x92\x8d", b"\xc1\x8d"),
        lambda message: message.replace(b"top_k", b"top_x"),
    ],
    ids=[
        *("empty", "no head", "cut off", "too long", "no plan"),
        *("starts", "lengths", "no msgpack", "no such field"),
    ],
)
def test_damaged_message_is_refused(plan: StepPlan, damage: Callable[[bytes], bytes]) -> None:
    with pytest.raises(InternalError, match="cannot be read"):
        read(damage(encode_plan(plan)))


@pytest.mark.parametrize(
    "name", ["positions", "slot_mapping", "context_lens", "sample_slots", "sample_positions"]
)
def test_arrays_of_different_lengths_are_refused(plan: StepPlan, name: str) -> None:
    damaged = replace(plan, **{name: getattr(plan, name)[:-1]})
    with pytest.raises(InternalError, match="do not fit"):
        read(encode_plan(damaged))


def test_query_start_must_end_at_the_last_token(plan: StepPlan) -> None:
    damaged = replace(plan, query_start=plan.query_start - 1)
    with pytest.raises(InternalError, match="do not fit"):
        read(encode_plan(damaged))


def test_a_message_brings_what_changes_of_the_tables(plan: StepPlan) -> None:
    reader = PlanReader(max_num_seqs=4, max_blocks=8)
    names = ("update_slots", "update_columns", "update_blocks")

    def tables(slots: list[int], width: int, *updates: list[int]) -> list[list[int]]:
        changes = dict(zip(names, updates, strict=True))
        message = message_with(plan, slots=slots, block_table_width=width, **changes)
        rows: list[list[int]] = reader.read(message).block_tables.tolist()
        return rows

    assert tables([3, 1], 2, [3, 3, 1], [0, 1, 0], [7, 8, 9]) == [[7, 8], [9, 0]]
    assert tables([3, 1], 2, [], [], []) == [[7, 8], [9, 0]]
    assert tables([1, 3], 3, [1, 3], [1, 2], [5, 6]) == [[9, 5, 0], [7, 8, 6]]
    # A new owner of slot 1: its first block replaces the old one.
    assert tables([1, 3], 1, [1], [0], [4]) == [[4], [7]]


@pytest.mark.parametrize(
    "changes",
    [
        {"update_slots": [4]},
        {"update_columns": [8]},
        {"update_blocks": [1, 2]},
        {"slots": [0, 4]},
        {"block_table_width": 9},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_tables_that_do_not_exist_are_refused(plan: StepPlan, changes: dict[str, Any]) -> None:
    update = {"update_slots": [0], "update_columns": [0], "update_blocks": [1]}
    with pytest.raises(InternalError, match="cannot be read"):
        read(message_with(plan, **{**update, **changes}))
