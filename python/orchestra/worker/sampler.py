"""Draws the tokens of a step in one batch, with each sequence's parameters kept in its sampler slot.

A GPU is waited for once a step, when what was drawn comes to the host in one piece. So nothing on the way there may
depend on numbers that it computes: how much is ranked is decided by the parameters, which the host has. Rows of which
that turns out to be too little are drawn again.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestra.worker import sampling
from orchestra.worker.plan import Float32Array, Int32Array, SequenceStart, StepOutput
from orchestra.worker.staging import send
from orchestra.worker.token_history import TokenHistory

# Stands for the token of a row whose likeliest candidates do not reach its top-p.
UNDECIDED = -1

_NO_INTS = np.empty(0, np.int32)
_NO_FLOATS = np.empty(0, np.float32)


class Sampler:
    """The sampling rank's state: parameters by slot, and token histories of the slots that need them.

    Args:
        vocab_size: columns of the logits.
        max_num_seqs: number of slots.
        device: of the logits.
    """

    def __init__(self, vocab_size: int, max_num_seqs: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        # Parameters stay on the host: they decide which kernels run at all.
        self._temperature = np.ones(max_num_seqs, np.float32)
        self._top_p = np.ones(max_num_seqs, np.float32)
        self._min_p = np.zeros(max_num_seqs, np.float32)
        self._top_k = np.full(max_num_seqs, vocab_size, np.int64)
        self._seed = np.zeros(max_num_seqs, np.uint64)
        self._has_bias = np.zeros(max_num_seqs, np.bool_)
        # Slots that do more than take the likeliest token.
        self._special: set[int] = set()
        self._bias: dict[int, tuple[NDArray[np.int64], Float32Array]] = {}
        self._history = TokenHistory(vocab_size, max_num_seqs, device)

    def start(self, starts: Sequence[SequenceStart]) -> None:
        """Sequences take their slots; whatever the slots held is forgotten."""
        for start in starts:
            slot = start.slot
            self._temperature[slot] = start.temperature
            self._top_p[slot] = start.top_p
            self._min_p[slot] = start.min_p
            self._top_k[slot] = min(start.top_k or self._vocab_size, self._vocab_size)
            self._seed[slot] = start.seed
            self._history.start(start)
            self._has_bias[slot] = len(start.logit_bias_ids) > 0
            is_greedy = start.temperature < sampling.GREEDY_BELOW
            self._special.discard(slot)
            if self._has_bias[slot] or start.has_penalties or not is_greedy:
                self._special.add(slot)
            self._bias.pop(slot, None)
            if self._has_bias[slot]:
                ids = start.logit_bias_ids.astype(np.int64)
                self._bias[slot] = (ids, start.logit_bias_values)

    def sample(
        self,
        logits: Tensor,
        slots: Int32Array,
        positions: Int32Array,
        num_top_logprobs: int,
    ) -> StepOutput:
        """Draws one token per row.

        Args:
            logits: `[N, V]`, of any float dtype.
            slots: `[N]`, all different.
            positions: `[N]`, that the tokens will have.
            num_top_logprobs: alternatives to report; -1: no log-probabilities at all.
        """
        if num_top_logprobs < 0 and self._special.isdisjoint(slots.tolist()):
            # What follows would take Python longer than the numbers.
            token_ids = sampling.argmax(logits).int().cpu().numpy()
            return StepOutput(token_ids, _NO_FLOATS, _NO_INTS, _NO_FLOATS)
        edited = self._add_bias(logits, slots)
        edited = self._history.penalise(edited, slots)
        tokens = self._draw(edited, slots, positions)
        output = _fetch(_pack(logits, tokens, num_top_logprobs), num_top_logprobs)
        undecided = np.flatnonzero(output.token_ids == UNDECIDED)
        if undecided.size:
            rows = self._tensor(undecided)
            tokens[rows] = self._draw_random(
                edited[rows], slots[undecided], positions[undecided], ranks_all=True
            )
            output = _fetch(_pack(logits, tokens, num_top_logprobs), num_top_logprobs)
        self._history.append(slots, tokens)
        return output

    def _draw(self, logits: Tensor, slots: Int32Array, positions: Int32Array) -> Tensor:
        """One token per row, or `UNDECIDED`; `int64[N]`."""
        is_greedy = self._temperature[slots] < sampling.GREEDY_BELOW
        if is_greedy.all():
            return sampling.argmax(logits)
        if not is_greedy.any():
            return self._draw_random(logits, slots, positions)
        random = np.flatnonzero(~is_greedy)
        rows = self._tensor(random)
        tokens = sampling.argmax(logits)
        tokens[rows] = self._draw_random(logits[rows], slots[random], positions[random])
        return tokens

    def _draw_random(
        self, logits: Tensor, slots: Int32Array, positions: Int32Array, *, ranks_all: bool = False
    ) -> Tensor:
        """As `_draw`; with `ranks_all` nothing stays undecided, and a GPU is waited for."""
        probabilities = sampling.softmax(logits, self._tensor(self._temperature[slots]))
        is_undecided = self._drop_unlikely(probabilities, slots, ranks_all=ranks_all)
        numbers = sampling.uniforms(self._seed[slots], positions.astype(np.int64))
        tokens = sampling.draw(probabilities, self._tensor(numbers))
        return tokens if is_undecided is None else tokens.masked_fill_(is_undecided, UNDECIDED)

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


def _pack(logits: Tensor, tokens: Tensor, num_alternatives: int) -> Tensor:
    """What `_fetch` takes apart: tokens, and log-probabilities where they were asked for; `int32[N, ...]`.

    These are of the model alone: before bias, penalties and temperature.
    """
    columns = [tokens.int().unsqueeze(1)]
    if num_alternatives >= 0:
        logprobs = torch.log_softmax(logits, 1, dtype=torch.float32)
        top = logprobs.topk(num_alternatives, 1)
        chosen = logprobs.gather(1, tokens.clamp(min=0).unsqueeze(1))
        columns += [chosen.view(torch.int32), top.values.view(torch.int32), top.indices.int()]
    return torch.cat(columns, 1)


def _fetch(packed: Tensor, num_alternatives: int) -> StepOutput:
    """Brings a step's results to the host: here a GPU is waited for."""
    columns = packed.cpu().numpy()
    token_ids = np.ascontiguousarray(columns[:, 0])
    if num_alternatives < 0:
        return StepOutput(token_ids, _NO_FLOATS, _NO_INTS, _NO_FLOATS)
    end = 2 + num_alternatives
    floats = np.ascontiguousarray(columns[:, 1:end]).view(np.float32)
    return StepOutput(
        token_ids,
        np.ascontiguousarray(floats[:, 0]),
        np.ascontiguousarray(columns[:, end:]),
        np.ascontiguousarray(floats[:, 1:]),
    )
