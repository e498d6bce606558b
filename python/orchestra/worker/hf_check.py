"""Holds a model over the paged cache against its own attention, before it serves anybody.

What a module does with its tokens beside attention cannot be read off its calls: it may mix neighbours (a convolution,
a recurrence), or take positions from somewhere else. Cut and mixed as a scheduler does it, such a model gives other
logits than alone and whole.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from orchestra.errors import UnsupportedError
from orchestra.worker.attention import TorchPagedAttention
from orchestra.worker.attention_layout import Int64Array
from orchestra.worker.hf_attention import IMPLEMENTATION
from orchestra.worker.hf_config import HfShape
from orchestra.worker.hf_model import HfModel
from orchestra.worker.kv_cache import KvCache, KvCacheSpec
from orchestra.worker.plan import NO_COPIES, StepPlan

_BLOCK_SIZE = 16
# Of the two sequences; more than two blocks, and more than one.
_LENGTHS = (40, 25)
# Which blocks each has, in no order, so that a wrong one shows.
_TABLES = np.array([[4, 1, 3], [2, 5, 0]], np.int32)
_NUM_BLOCKS = 6
# Of the rms error of a token's logits to their spread. What has nothing to do with each other is off by 1.4; rounding
# gives 1e-6 in fp32, and in bf16 a hundredth in a small model and a tenth in a deep one.
_TOLERANCE = {torch.float32: 1e-3}
_TOLERANCE_HALF = 0.4
# In so many of a sequence's tokens; not in all, because rounding may choose a token other experts.
_SHARE = 0.75


@dataclass(frozen=True)
class _Piece:
    """Tokens `start..stop` of a sequence."""

    sequence: int
    start: int
    stop: int


@torch.inference_mode()
def check_against_own_attention(
    model: HfModel, shape: HfShape, dtype: torch.dtype, device: torch.device, longest: int
) -> None:
    """Runs two sequences in pieces and mixed, then each whole with the model's own attention, and compares.

    Args:
        model: as it will serve.
        shape: of its cache, and its attention's rules.
        dtype: that it computes in.
        device: where it computes.
        longest: sequence that will ever run, tokens.

    Raises:
        UnsupportedError: the logits differ.
    """
    draw = np.random.default_rng(1)
    sequences = [draw.integers(shape.vocab_size, size=min(n, longest)) for n in _LENGTHS]
    first, second = (len(tokens) for tokens in sequences)
    cut = max(1, first * 2 // 5)
    steps = [
        [_Piece(0, 0, cut), _Piece(1, 0, second - 1)],
        [_Piece(1, second - 1, second), _Piece(0, cut, first)],
    ]
    spec = KvCacheSpec(shape.num_layers, shape.num_kv_heads, shape.head_dim, _BLOCK_SIZE, dtype)
    cache = KvCache(spec, _NUM_BLOCKS, device)
    attention = TorchPagedAttention(cache, shape.num_heads, device, shape.attention)
    pieces: list[list[Tensor]] = [[], []]
    for step in steps:
        plan = _plan(step, sequences)
        attention.prepare(plan)
        tokens, positions = (
            torch.from_numpy(array.astype(np.int64)).to(device)
            for array in (plan.token_ids, plan.positions)
        )
        logits = model.forward(tokens, positions, attention, None)
        assert logits is not None
        lengths = np.diff(plan.query_start).tolist()
        for piece, rows in zip(step, torch.split(logits.whole(), lengths), strict=True):
            pieces[piece.sequence].append(rows)
    tolerance = _TOLERANCE.get(dtype, _TOLERANCE_HALF)
    for tokens_of_one, parts in zip(sequences, pieces, strict=True):
        expected = _own_logits(model, torch.from_numpy(tokens_of_one).to(device))
        error = _typical_error(torch.cat(parts), expected)
        if not error <= tolerance:
            raise UnsupportedError(
                f"architectures: {shape.architecture} gives other logits in pieces and in company than whole and alone"
                f" (by {error:.2g} of their spread): it needs more of earlier tokens than their keys and values"
            )


def _own_logits(model: HfModel, tokens: Tensor) -> Tensor:
    """Logits of a whole sequence by the model's own attention, `[T, vocab_size]`."""
    module = model.module
    module.set_attn_implementation("eager")
    try:
        logits: Tensor = module(input_ids=tokens.unsqueeze(0), use_cache=False).logits[0]
    finally:
        module.set_attn_implementation(IMPLEMENTATION)
    return logits


def _typical_error(actual: Tensor, expected: Tensor) -> float:
    """Root of the mean square of a token's error, over the spread of its logits; exceeded by few tokens."""
    actual, expected = actual.float(), expected.float()
    error = (actual - expected).square().mean(-1).sqrt()
    spread = (expected - expected.mean(-1, keepdim=True)).square().mean(-1).sqrt()
    relative = error / spread.clamp_min(torch.finfo(torch.float32).tiny)
    return float(relative.quantile(_SHARE))


def _plan(pieces: Sequence[_Piece], sequences: Sequence[Int64Array]) -> StepPlan:
    """One step of these pieces; single tokens have to come first."""
    members = [piece.sequence for piece in pieces]
    positions = [np.arange(piece.start, piece.stop) for piece in pieces]
    slots = [
        _TABLES[member][where // _BLOCK_SIZE] * _BLOCK_SIZE + where % _BLOCK_SIZE
        for member, where in zip(members, positions, strict=True)
    ]
    tokens = [sequences[member][where] for member, where in zip(members, positions, strict=True)]
    none = np.empty(0, np.int32)
    return StepPlan(
        step_id=0,
        token_ids=np.concatenate(tokens).astype(np.int32),
        positions=np.concatenate(positions).astype(np.int32),
        slot_mapping=np.concatenate(slots).astype(np.int32),
        query_start=np.cumsum([0, *map(len, positions)], dtype=np.int32),
        context_lens=np.array([piece.stop for piece in pieces], np.int32),
        block_tables=_TABLES[members],
        swap_out=NO_COPIES,
        swap_in=NO_COPIES,
        sample_sequences=none,
        sample_slots=none,
        sample_positions=none,
        num_top_logprobs=-1,
        starts=(),
    )
