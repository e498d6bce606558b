"""Builds step plans as the agent would, from what a test says should run."""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import msgpack
import numpy as np

from orchestra.worker.plan import (
    PENDING_TOKEN,
    BlockCopies,
    PendingTokens,
    SequenceStart,
    StepPlan,
)

BLOCK_SIZE = 16


def sampling_start(slot: int, **overrides: Any) -> SequenceStart:
    """Sampling parameters that change nothing: greedy, no filters, no penalties."""
    values: dict[str, Any] = {
        "slot": slot,
        "temperature": 0.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": 0,
        "logit_bias_ids": [],
        "logit_bias_values": [],
        "prompt_token_ids": [],
        "output_token_ids": [],
    }
    values.update(overrides)
    for name in ("logit_bias_ids", "prompt_token_ids", "output_token_ids"):
        values[name] = np.array(values[name], np.int32)
    values["logit_bias_values"] = np.array(values["logit_bias_values"], np.float32)
    return SequenceStart(**values)


PLAN_ARRAYS = (
    *("token_ids", "positions", "slot_mapping", "query_start", "context_lens", "slots"),
    *("update_slots", "update_columns", "update_blocks"),
    *("swap_out_blocks", "swap_out_host_blocks", "swap_in_blocks", "swap_in_host_blocks"),
    *("sample_sequences", "sample_slots", "sample_positions"),
)
"""In the order of a message."""


def plan_fields(plan: StepPlan) -> dict[str, Any]:
    """What a plan's message says: the whole of each block table, and slots in the order of the rows.

    Pending tokens are not told: they go by slots, which are others.
    """
    assert len(plan.pending.rows) == 0
    height, width = plan.block_tables.shape
    slots, columns = np.arange(height), np.arange(width)
    return {
        **vars(plan),
        "swap_out_blocks": plan.swap_out.blocks,
        "swap_out_host_blocks": plan.swap_out.host_blocks,
        "swap_in_blocks": plan.swap_in.blocks,
        "swap_in_host_blocks": plan.swap_in.host_blocks,
        "slots": slots,
        "block_table_width": width,
        "update_slots": slots.repeat(width),
        "update_columns": np.tile(columns, height),
        "update_blocks": plan.block_tables.reshape(-1),
    }


def pack_plan(fields: Mapping[str, Any]) -> bytes:
    """The message that says so."""
    arrays = [_int32(fields[name]) for name in PLAN_ARRAYS]
    starts = [{key: _packed(it) for key, it in asdict(one).items()} for one in fields["starts"]]
    tail = bytes(msgpack.packb(starts)) if starts else b""
    head = [fields[name] for name in ("block_table_width", "step_id", "num_top_logprobs")]
    flags = int(fields["fills_blocks"]) | 2 * int(PENDING_TOKEN in arrays[0])
    lengths = [len(array) for array in arrays]
    packed = struct.pack(f"<4sIQiII{len(arrays)}I", b"plan", *head, flags, len(tail), *lengths)
    return packed + b"".join(array.tobytes() for array in arrays) + tail


def encode_plan(plan: StepPlan) -> bytes:
    """The message that `PlanReader` reads; see `plan_fields`."""
    return pack_plan(plan_fields(plan))


def _packed(value: Any) -> Any:
    return value.tobytes() if isinstance(value, np.ndarray) else value


@dataclass
class Running:
    """A sequence that a test runs."""

    tokens: list[int]
    blocks: list[int]
    num_computed: int
    slot: int


class PlanBuilder:
    """Continuous batching without a policy: the test says how many tokens of whom run in each step.

    Args:
        num_blocks: of the pool; they are handed out in a random order, so that a wrong block shows.
        seed: of that order.
    """

    def __init__(self, num_blocks: int, seed: int = 0) -> None:
        self._free = [int(block) for block in np.random.default_rng(seed).permutation(num_blocks)]
        self._step_id = 0
        self._kept: dict[str, list[int]] = {}
        self._swap_out: list[tuple[int, int]] = []
        self._swap_in: list[tuple[int, int]] = []
        self.sequences: dict[str, Running] = {}

    def add(
        self, name: str, tokens: Sequence[int], shares: str = "", shared_blocks: int = 0
    ) -> None:
        """Adds a sequence; its first `shared_blocks` blocks are those of the sequence `shares`, already computed."""
        blocks = self.sequences[shares].blocks[:shared_blocks] if shares else []
        computed = shared_blocks * BLOCK_SIZE
        slot = len(self.sequences)
        self.sequences[name] = Running(list(tokens), list(blocks), computed, slot)

    def append(self, name: str, token: int) -> None:
        """A drawn token joins its sequence; or `PENDING_TOKEN` does in its place."""
        self.sequences[name].tokens.append(token)

    def forget(self, name: str) -> None:
        """Preempts a sequence: its blocks go back to the pool, everything is to be computed again."""
        sequence = self.sequences[name]
        self._free.extend(sequence.blocks)
        sequence.blocks = []
        sequence.num_computed = 0

    def swap_out(self, name: str, host_blocks: Sequence[int]) -> None:
        """Preempts a sequence: with the next step its blocks go to host memory and back to the pool."""
        sequence = self.sequences[name]
        self._swap_out.extend(zip(sequence.blocks, host_blocks, strict=True))
        self._kept[name] = list(host_blocks)
        self._free.extend(sequence.blocks)
        sequence.blocks = []

    def swap_in(self, name: str) -> None:
        """Gives a preempted sequence other blocks, into which the next step copies what host memory kept."""
        host_blocks = self._kept.pop(name)
        blocks = [self._free.pop() for _ in host_blocks]
        self._swap_in.extend(zip(blocks, host_blocks, strict=True))
        self.sequences[name].blocks = blocks

    def plan(
        self,
        scheduled: Mapping[str, int],
        starts: Sequence[SequenceStart] = (),
        num_top_logprobs: int = -1,
    ) -> StepPlan:
        """One step of the scheduled sequences, with decodes first; who reaches its last token draws."""
        self._step_id += 1
        names = sorted(scheduled, key=lambda name: scheduled[name] > 1)
        rows = [self._advance(name, scheduled[name]) for name in names]
        members = [self.sequences[name] for name in names]
        draws = [i for i, m in enumerate(members) if m.num_computed == len(m.tokens)]
        width = max(len(member.blocks) for member in members)
        tables = [m.blocks + [0] * (width - len(m.blocks)) for m in members]
        positions = np.concatenate([np.arange(start, stop) for start, stop in rows])
        slots = [
            m.blocks[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
            for m, (start, stop) in zip(members, rows, strict=True)
            for position in range(start, stop)
        ]
        swap_out, swap_in = _copies(self._swap_out), _copies(self._swap_in)
        self._swap_out, self._swap_in = [], []
        parts = [m.tokens[start:stop] for m, (start, stop) in zip(members, rows, strict=True)]
        tokens = np.concatenate(parts)
        query_start = np.cumsum([0, *(stop - start for start, stop in rows)])
        pending = np.flatnonzero(tokens == PENDING_TOKEN)
        # Only sequences of one token have such, and these come first.
        pending_slots = [members[row].slot for row in pending]
        return StepPlan(
            step_id=self._step_id,
            token_ids=_int32(tokens),
            positions=_int32(positions),
            slot_mapping=_int32(slots),
            query_start=_int32(query_start),
            context_lens=_int32([stop for _, stop in rows]),
            block_tables=_int32(tables),
            swap_out=swap_out,
            swap_in=swap_in,
            sample_sequences=_int32(draws),
            sample_slots=_int32([members[i].slot for i in draws]),
            sample_positions=_int32([len(members[i].tokens) for i in draws]),
            num_top_logprobs=num_top_logprobs,
            starts=tuple(starts),
            pending=PendingTokens(_int32(pending), _int32(pending_slots)),
        )

    def _advance(self, name: str, count: int) -> tuple[int, int]:
        """Takes the blocks that the next `count` tokens need; returns their positions."""
        sequence = self.sequences[name]
        start, stop = sequence.num_computed, sequence.num_computed + count
        assert stop <= len(sequence.tokens)
        while len(sequence.blocks) * BLOCK_SIZE < stop:
            sequence.blocks.append(self._free.pop())
        sequence.num_computed = stop
        return start, stop


def _copies(pairs: list[tuple[int, int]]) -> BlockCopies:
    blocks, host_blocks = zip(*pairs, strict=True) if pairs else ((), ())
    return BlockCopies(_int32(blocks), _int32(host_blocks))


def _int32(values: Any) -> Any:
    return np.array(values, dtype=np.int32)
