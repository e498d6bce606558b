"""Draws the tokens of a step in one batch, with each sequence's parameters kept in its sampler slot.

A GPU is waited for once a step, when what was drawn comes to the host in one piece. So nothing on the way there may
depend on numbers that it computes: how much is ranked is decided by the parameters, which the host has. Rows of which
that turns out to be too little are drawn again.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestra.worker import sampling
from orchestra.worker.drawn import UNDECIDED, Drawn, LatestTokens, Packed
from orchestra.worker.plan import (
    GREEDY_BELOW,
    Float32Array,
    Int32Array,
    SequenceStart,
    StepOutput,
)
from orchestra.worker.staging import send
from orchestra.worker.token_history import TokenHistory


class _Draws(NamedTuple):
    """Tokens `int64[N]`, and whether none of them can be `UNDECIDED`."""

    tokens: Tensor
    is_final: bool


class Sampler:
    """The sampling rank's state: parameters by slot, and token histories of the slots that need them.

    Args:
        vocab_size: columns of the logits.
        max_num_seqs: number of slots.
        device: of the logits.
        latest: where what is drawn is noted for steps that are planned before it is known; None: there are none.
    """

    def __init__(
        self,
        vocab_size: int,
        max_num_seqs: int,
        device: torch.device,
        latest: LatestTokens | None = None,
    ) -> None:
        self._latest = latest
        self._unsettled: Drawn | None = None
        self._vocab_size = vocab_size
        self._device = device
        # Parameters stay on the host: they decide which kernels run at all.
        self._temperature = np.ones(max_num_seqs, np.float32)
        self._top_p = np.ones(max_num_seqs, np.float32)
        self._min_p = np.zeros(max_num_seqs, np.float32)
        self._top_k = np.full(max_num_seqs, vocab_size, np.int64)
        self._seed = np.zeros(max_num_seqs, np.uint64)
        self._has_bias = np.zeros(max_num_seqs, np.bool_)
        self._bias: dict[int, tuple[NDArray[np.int64], Float32Array]] = {}
        self._history = TokenHistory(vocab_size, max_num_seqs, device)

    def start(self, starts: Sequence[SequenceStart]) -> None:
        """A step begins, and sequences take their slots; whatever the slots held is forgotten.

        What the step before drew is final from here on: where rows of it may be undecided, the host waits for it.
        """
        if self._unsettled is not None:
            self._unsettled.fetch()
            self._unsettled = None
        for start in starts:
            slot = start.slot
            self._temperature[slot] = start.temperature
            self._top_p[slot] = start.top_p
            self._min_p[slot] = start.min_p
            self._top_k[slot] = min(start.top_k or self._vocab_size, self._vocab_size)
            self._seed[slot] = start.seed
            self._history.start(start)
            self._has_bias[slot] = len(start.logit_bias_ids) > 0
            self._bias.pop(slot, None)
            if self._has_bias[slot]:
                ids = start.logit_bias_ids.astype(np.int64)
                self._bias[slot] = (ids, start.logit_bias_values)

    def forget(self) -> None:
        """Lets go of a draw that has not been waited for."""
        self._unsettled = None

    def draw(
        self,
        logits: Tensor,
        slots: Int32Array,
        positions: Int32Array,
        num_top_logprobs: int,
    ) -> Drawn:
        """Draws one token per row; whoever wants to know them waits for them.

        Args:
            logits: `[N, V]`, of any float dtype.
            slots: `[N]`, all different.
            positions: `[N]`, that the tokens will have.
            num_top_logprobs: alternatives to report; -1: no log-probabilities at all.
        """
        edited = self._add_bias(logits, slots)
        edited = self._history.penalise(edited, slots)
        tokens, is_final = self._draw(edited, slots, positions)
        packed = Packed.of(logits, tokens, num_top_logprobs)
        if is_final:
            self._keep(slots, tokens)
            return Drawn(packed)

        @torch.inference_mode()
        def settle(undecided: Int32Array) -> Packed | None:
            if undecided.size:
                rows, chosen = self._tensor(undecided), (slots[undecided], positions[undecided])
                tokens[rows] = self._draw_random(edited[rows], *chosen, ranks_all=True).tokens
            self._keep(slots, tokens)
            return Packed.of(logits, tokens, num_top_logprobs) if undecided.size else None

        self._unsettled = Drawn(packed, settle)
        return self._unsettled

    def take(self, tokens: Tensor | Int32Array, slots: Int32Array) -> Drawn:
        """Draws what others have found to be the likeliest tokens of slots that take no others.

        Args:
            tokens: `[N]`, of any integer dtype where they are a tensor.
            slots: `[N]`, all different.
        """
        if isinstance(tokens, Tensor):
            self._note(slots, tokens)
            return Drawn(Packed.of_tokens(tokens))
        if self._latest is not None:
            self._latest.note(slots, torch.from_numpy(tokens))
        return Drawn(StepOutput.of_tokens(tokens))

    def _keep(self, slots: Int32Array, tokens: Tensor) -> None:
        """What later steps need to know of the draws."""
        self._history.append(slots, tokens)
        self._note(slots, tokens)

    def _note(self, slots: Int32Array, tokens: Tensor) -> None:
        if self._latest is not None:
            self._latest.note(slots, tokens)

    def _draw(self, logits: Tensor, slots: Int32Array, positions: Int32Array) -> _Draws:
        is_greedy = self._temperature[slots] < GREEDY_BELOW
        if is_greedy.all():
            return _Draws(sampling.argmax(logits), is_final=True)
        if not is_greedy.any():
            return self._draw_random(logits, slots, positions)
        random = np.flatnonzero(~is_greedy)
        rows = self._tensor(random)
        tokens = sampling.argmax(logits)
        drawn = self._draw_random(logits[rows], slots[random], positions[random])
        tokens[rows] = drawn.tokens
        return _Draws(tokens, drawn.is_final)

    def _draw_random(
        self, logits: Tensor, slots: Int32Array, positions: Int32Array, *, ranks_all: bool = False
    ) -> _Draws:
        """As `_draw`; with `ranks_all` nothing stays undecided, and a GPU is waited for."""
        probabilities = sampling.softmax(logits, self._tensor(self._temperature[slots]))
        is_undecided = self._drop_unlikely(probabilities, slots, ranks_all=ranks_all)
        numbers = sampling.uniforms(self._seed[slots], positions.astype(np.int64))
        tokens = sampling.draw(probabilities, self._tensor(numbers))
        if is_undecided is None:
            return _Draws(tokens, is_final=True)
        return _Draws(tokens.masked_fill_(is_undecided, UNDECIDED), is_final=False)

    def _drop_unlikely(
        self, probabilities: Tensor, slots: Int32Array, *, ranks_all: bool
    ) -> Tensor | None:
        """Sets to 0 what top-k, top-p and min-p drop, in the rows that ask for one of them.

        Returns:
            Of which rows (`bool[N]`) more would have had to be ranked; None where there can be none.
        """
        top_k, top_p, min_p = self._top_k[slots], self._top_p[slots], self._min_p[slots]
        is_ranked = (top_k < self._vocab_size) | (top_p < 1)
        if not (is_ranked | (min_p > 0)).any():
            return None
        is_undecided = None
        threshold = probabilities.amax(1, keepdim=True) * self._tensor(min_p).unsqueeze(1)
        if is_ranked.any():
            rows = self._tensor(np.flatnonzero(is_ranked))
            k, p = self._tensor(top_k[is_ranked]), self._tensor(top_p[is_ranked])
            if ranks_all:
                ranked = sampling.rank_threshold(probabilities[rows], k, p)
            else:
                count = self._num_candidates(top_k[is_ranked])
                ranked, is_found = sampling.threshold_among(probabilities[rows], k, p, count)
                if top_k.max() > count:
                    is_undecided = torch.zeros(len(slots), dtype=torch.bool, device=self._device)
                    is_undecided[rows] = ~is_found
            threshold[rows] = torch.maximum(threshold[rows], ranked)
        probabilities.mul_(probabilities >= threshold)
        return is_undecided

    def _num_candidates(self, top_k: NDArray[np.int64]) -> int:
        """How many tokens of each row to rank: all that any top-k asks for, for top-p alone what mostly is enough."""
        is_bounded = top_k < self._vocab_size
        count = int(top_k[is_bounded].max(initial=0))
        usual = min(sampling.CANDIDATES, self._vocab_size)
        return count if is_bounded.all() else max(count, usual)

    def _add_bias(self, logits: Tensor, slots: Int32Array) -> Tensor:
        """The logits with the biases of the slots that have some."""
        rows = np.flatnonzero(self._has_bias[slots])
        if not rows.size:
            return logits
        biases = [self._bias[int(slots[row])] for row in rows]
        row_index = self._tensor(np.repeat(rows, [len(ids) for ids, _ in biases]))
        token_index = self._tensor(np.concatenate([ids for ids, _ in biases]))
        values = self._tensor(np.concatenate([values for _, values in biases]))
        return logits.float().index_put((row_index, token_index), values, accumulate=True)

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return send(array, self._device)
