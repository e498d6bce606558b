"""One step as the agent encodes it: flat arrays, one behind the other; `rust/agent/src/plan_codec.rs` has the layout.

`T` tokens of `S` sequences run; `N` of the sequences draw a token. Sequences that decode (one token each) come first.
"""

import struct
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray

from orchestra.errors import InternalError

Int32Array = NDArray[np.int32]
Float32Array = NDArray[np.float32]

# Stands for a token that a step in flight draws: the one that was last drawn for its slot.
PENDING_TOKEN = -1
# Temperatures below this are greedy: dividing by them would overflow.
GREEDY_BELOW = 1e-5
# Bounds what damaged sampling parameters can make us allocate.
ARRAY_BYTES_MAX = 64 << 20

_NUM_ARRAYS = 16
# What it is, width of the block tables, step, alternatives, flags, bytes of the starts, lengths.
_HEAD = struct.Struct(f"<4sIQiII{_NUM_ARRAYS}I")
_MAGIC = b"plan"
_FILLS_BLOCKS, _HAS_PENDING = 1, 2


@dataclass(frozen=True)
class SequenceStart:
    """A sequence's sampling parameters enter a sampler slot: when it starts, and again after each preemption."""

    slot: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    logit_bias_ids: Int32Array
    logit_bias_values: Float32Array
    prompt_token_ids: Int32Array
    """Empty where no penalty needs it."""
    output_token_ids: Int32Array
    """Empty where no penalty needs it."""

    @property
    def has_penalties(self) -> bool:
        """Whether drawing needs to know which tokens came before."""
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )

    @property
    def is_likeliest_only(self) -> bool:
        """Whether its tokens are the likeliest ones by the logits as they are."""
        is_edited = self.has_penalties or len(self.logit_bias_ids) > 0
        return self.temperature < GREEDY_BELOW and not is_edited


@dataclass(frozen=True)
class BlockCopies:
    """KV to copy between blocks of the device and blocks of host memory."""

    blocks: Int32Array
    """`[C]`"""
    host_blocks: Int32Array
    """`[C]`"""


_NO_INTS = np.empty(0, np.int32)
_NO_FLOATS = np.empty(0, np.float32)
NO_COPIES = BlockCopies(_NO_INTS, _NO_INTS)


@dataclass(frozen=True)
class PendingTokens:
    """Tokens of a step that was planned before they were drawn."""

    rows: Int32Array
    """`[P]` places in `StepPlan.token_ids`."""
    slots: Int32Array
    """`[P]` the sampler slot that draws each."""


NONE_PENDING = PendingTokens(_NO_INTS, _NO_INTS)


@dataclass(frozen=True)
class StepPlan:
    """One step's work. Arrays are read-only views of the message, but for the block tables."""

    step_id: int
    token_ids: Int32Array
    """`[T]`, sequence after sequence; `PENDING_TOKEN` where `pending` says whose."""
    positions: Int32Array
    """`[T]` position of each token in its sequence."""
    slot_mapping: Int32Array
    """`[T]` where each token's KV goes: `block_id * block_size + offset`."""
    query_start: Int32Array
    """`[S + 1]` first token of each sequence; the last entry is `T`."""
    context_lens: Int32Array
    """`[S]` tokens of KV that each sequence has after this step."""
    block_tables: Int32Array
    """`[S, W]` block ids. What lies behind a sequence's own blocks names some blocks of others, or block 0."""
    swap_out: BlockCopies
    """To host memory, before everything else."""
    swap_in: BlockCopies
    """From host memory, after those and before anything is computed."""
    sample_sequences: Int32Array
    """`[N]` who draws a token: rows of the plan."""
    sample_slots: Int32Array
    """`[N]` the sampler slot of each."""
    sample_positions: Int32Array
    """`[N]` position that each drawn token will have in its sequence."""
    num_top_logprobs: int
    """-1: no sample wants log-probabilities; else the most alternatives that one wants."""
    starts: tuple[SequenceStart, ...]
    fills_blocks: bool = False
    """Whether another worker waits for KV of this step, so that the agent is to hear of each layer."""
    pending: PendingTokens = NONE_PENDING
    """Tokens that are not in the plan."""

    @property
    def draws_from_all(self) -> bool:
        """Whether a token is drawn from each of the step's, in their order: every sequence has one."""
        count = len(self.token_ids)
        is_each = len(self.sample_sequences) == count
        # As lists, which for few numbers take less than numpy's first look at them.
        return is_each and self.sample_sequences.tolist() == list(range(count))


@dataclass(frozen=True)
class StepOutput:
    """What was drawn for the `N` samples of a plan, `K` alternatives each."""

    token_ids: Int32Array
    """`[N]`"""
    chosen_logprobs: Float32Array
    """`[N]`, or empty where no sample wanted log-probabilities."""
    top_ids: Int32Array
    """`[N, K]`, most likely first."""
    top_logprobs: Float32Array
    """`[N, K]`"""

    @classmethod
    def of_tokens(cls, token_ids: Int32Array) -> "StepOutput":
        """Tokens of which nobody wants the log-probabilities."""
        return cls(token_ids, _NO_FLOATS, _NO_INTS, _NO_FLOATS)


class PlanReader:
    """Reads the agent's messages and keeps the block tables, of which each message brings only what changes.

    So every message has to be read, in order.

    Args:
        max_num_seqs: slots, each with its table.
        max_blocks: of the longest sequence.
    """

    def __init__(self, max_num_seqs: int, max_blocks: int) -> None:
        self._tables = np.zeros((max_num_seqs, max_blocks), np.int32)

    def read(self, message: bytes) -> StepPlan:
        """Reads the next message.

        Raises:
            InternalError: the message is damaged or not a plan: its arrays do not fit each other.
        """
        try:
            plan = self._read(message)
        except (
            ValueError,
            KeyError,
            TypeError,
            IndexError,
            struct.error,
            msgpack.UnpackException,
        ) as error:
            raise InternalError(f"the step plan cannot be read: {error!r}") from error
        _check(plan)
        return plan

    def _read(self, message: bytes) -> StepPlan:
        magic, width, step_id, num_top, flags, start_bytes, *lengths = _HEAD.unpack_from(message)
        num_words = sum(lengths)
        end = _HEAD.size + 4 * num_words
        if magic != _MAGIC or end + start_bytes != len(message):
            raise ValueError(f"a message of {len(message)} bytes that begins with {magic!r}")
        words = np.frombuffer(message, "<i4", num_words, _HEAD.size)
        arrays, start = [], 0
        for length in lengths:
            arrays.append(words[start : start + length])
            start += length
        tokens, positions, slot_mapping, query_start, context_lens, slots, *rest = arrays
        update, swap_out, swap_in, samples = rest[:3], rest[3:5], rest[5:7], rest[7:]
        return StepPlan(
            step_id=step_id,
            token_ids=tokens,
            positions=positions,
            slot_mapping=slot_mapping,
            query_start=query_start,
            context_lens=context_lens,
            block_tables=self._block_tables(update, slots, width),
            swap_out=_copies(*swap_out),
            swap_in=_copies(*swap_in),
            sample_sequences=samples[0],
            sample_slots=samples[1],
            sample_positions=samples[2],
            num_top_logprobs=num_top,
            starts=_starts(message[end:]) if start_bytes else (),
            fills_blocks=bool(flags & _FILLS_BLOCKS),
            pending=_pending(tokens, query_start, slots) if flags & _HAS_PENDING else NONE_PENDING,
        )

    def _block_tables(self, update: list[Int32Array], rows: Int32Array, width: int) -> Int32Array:
        """Writes what changes, then gathers the step's rows."""
        slots, columns, blocks = update
        if not len(slots) == len(columns) == len(blocks):
            raise ValueError("updates of the block tables")
        if len(slots):
            self._tables[slots, columns] = blocks
        if width > self._tables.shape[1]:
            raise ValueError(f"block tables of {width} blocks")
        return self._tables[rows, :width]


def _check(plan: StepPlan) -> None:
    """Compares the lengths; the values are the scheduler's business."""
    tokens, sequences, samples = (
        len(plan.token_ids),
        len(plan.context_lens),
        len(plan.sample_sequences),
    )
    fits = (
        len(plan.positions) == tokens
        and len(plan.slot_mapping) == tokens
        and len(plan.query_start) == sequences + 1
        and plan.query_start[-1] == tokens
        and len(plan.block_tables) == sequences
        and len(plan.swap_out.blocks) == len(plan.swap_out.host_blocks)
        and len(plan.swap_in.blocks) == len(plan.swap_in.host_blocks)
        and len(plan.sample_slots) == samples
        and len(plan.sample_positions) == samples
    )
    if not fits:
        raise InternalError(f"the arrays of step {plan.step_id} do not fit each other")


def _pending(tokens: Int32Array, query_start: Int32Array, slots: Int32Array) -> PendingTokens:
    rows = np.flatnonzero(tokens == PENDING_TOKEN)
    sequences = np.searchsorted(query_start, rows, side="right") - 1
    return PendingTokens(rows.astype(np.int32), slots[sequences])


def _copies(blocks: Int32Array, host_blocks: Int32Array) -> BlockCopies:
    return BlockCopies(blocks, host_blocks) if len(blocks) or len(host_blocks) else NO_COPIES


def _starts(message: bytes) -> tuple[SequenceStart, ...]:
    return tuple(map(_start, msgpack.unpackb(message, max_bin_len=ARRAY_BYTES_MAX)))


def _start(fields: dict[str, Any]) -> SequenceStart:
    arrays = {
        "logit_bias_ids": _int32(fields["logit_bias_ids"]),
        "logit_bias_values": np.frombuffer(fields["logit_bias_values"], "<f4"),
        "prompt_token_ids": _int32(fields["prompt_token_ids"]),
        "output_token_ids": _int32(fields["output_token_ids"]),
    }
    return SequenceStart(**{**fields, **arrays})


def _int32(buffer: bytes) -> Int32Array:
    return np.frombuffer(buffer, "<i4")
