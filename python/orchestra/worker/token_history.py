"""Which tokens the sequences with penalties have seen. Sequences without penalties take no memory here."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestra.worker import sampling
from orchestra.worker.plan import Int32Array, SequenceStart
from orchestra.worker.staging import send

_NO_ROW = -1


class TokenHistory:
    """Token counts of the sampler slots that need them, in rows that grow to at most one per slot.

    Args:
        vocab_size: of the model.
        max_num_seqs: number of slots.
        device: of the logits.
    """

    def __init__(self, vocab_size: int, max_num_seqs: int, device: torch.device) -> None:
        self._device = device
        self._row = np.full(max_num_seqs, _NO_ROW, np.int64)
        self._free: list[int] = []
        # [slots, 3]: repetition, frequency, presence.
        self._penalties = np.zeros((max_num_seqs, 3), np.float32)
        self._prompt = torch.zeros((0, vocab_size), dtype=torch.bool, device=device)
        self._counts = torch.zeros((0, vocab_size), dtype=torch.int32, device=device)

    def start(self, start: SequenceStart) -> None:
        """A sequence takes a slot, with the tokens that it has already."""
        row = int(self._row[start.slot])
        if not start.has_penalties:
            if row != _NO_ROW:
                self._row[start.slot] = _NO_ROW
                self._free.append(row)
            return
        if row == _NO_ROW:
            row = self._take_row()
            self._row[start.slot] = row
        self._penalties[start.slot] = (
            start.repetition_penalty,
            start.frequency_penalty,
            start.presence_penalty,
        )
        prompt, output = self._ids(start.prompt_token_ids), self._ids(start.output_token_ids)
        self._prompt[row].zero_().index_fill_(0, prompt, value=True)
        ones = torch.ones_like(output, dtype=torch.int32)
        self._counts[row].zero_().index_add_(0, output, ones)

    def penalise(self, logits: Tensor, slots: Int32Array) -> Tensor:
        """The logits (`[N, V]`) with the penalties of the slots (`[N]`) that have some."""
        rows = self._row[slots]
        has_row = rows != _NO_ROW
        if not has_row.any():
            return logits
        logits = logits.float()
        index = self._tensor(rows[has_row])
        penalties = self._tensor(self._penalties[slots[has_row]])
        samples = self._tensor(np.flatnonzero(has_row))
        penalised = sampling.apply_penalties(
            logits[samples], self._prompt[index], self._counts[index], penalties
        )
        return logits.index_copy(0, samples, penalised)

    def append(self, slots: Int32Array, tokens: Tensor) -> None:
        """Counts the tokens (`int64[N]`) that the slots (`[N]`) drew."""
        rows = self._row[slots]
        has_row = rows != _NO_ROW
        if not has_row.any():
            return
        index = self._tensor(rows[has_row])
        drawn = tokens[self._tensor(np.flatnonzero(has_row))]
        self._counts[index, drawn] += 1

    def _take_row(self) -> int:
        if not self._free:
            size = self._counts.shape[0]
            grown = min(max(1, 2 * size), len(self._row))
            self._prompt = _grow(self._prompt, grown)
            self._counts = _grow(self._counts, grown)
            self._free.extend(range(size, grown))
        return self._free.pop()

    def _ids(self, token_ids: Int32Array) -> Tensor:
        return self._tensor(token_ids.astype(np.int64))

    def _tensor(self, array: NDArray[np.generic]) -> Tensor:
        return send(array, self._device)


def _grow(table: Tensor, rows: int) -> Tensor:
    grown = table.new_zeros((rows, table.shape[1]))
    grown[: table.shape[0]] = table
    return grown
