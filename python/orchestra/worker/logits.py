"""Logits of a step on their way from the ranks that have a part of the vocabulary each to the one that draws."""

from typing import Protocol

from torch import Tensor

from orchestra.worker import recording, sampling
from orchestra.worker.parallel import Communicator
from orchestra.worker.plan import Int32Array


class Logits(Protocol):
    """What a step's tokens are drawn by: `N` rows. Every rank of the stage has to ask for the same of it, once."""

    def whole(self) -> Tensor | None:
        """`[N, vocab_size]` on the stage's first rank; None on the others."""
        ...

    def likeliest(self) -> Tensor | Int32Array | None:
        """The likeliest token of each row, the first of equals: `[N]` on the stage's first rank, else None."""
        ...


class WholeLogits:
    """Logits that are all on this rank.

    Args:
        logits: `[N, vocab_size]`
    """

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits

    def whole(self) -> Tensor:
        """See `Logits`."""
        return self._logits

    def likeliest(self) -> Tensor:
        """See `Logits`."""
        return sampling.argmax(self._logits)


class SharedLogits:
    """Logits of which each rank has the columns of its part of the vocabulary.

    Where only the likeliest tokens are wanted, each rank looks for them in its own part, and one number of a row
    crosses over to the first rank instead of the row.

    Args:
        part: `[N, rows]`, this rank's columns, and padding behind the last of the vocabulary.
        vocab: size of the vocabulary.
        communicator: joins the ranks.
    """

    def __init__(self, part: Tensor, vocab: int, communicator: Communicator) -> None:
        self._part = part
        self._vocab = vocab
        self._communicator = communicator

    def whole(self) -> Tensor | None:
        """See `Logits`."""
        logits = self._communicator.gather_columns(self._part)
        return None if logits is None else logits[:, : self._vocab]

    def likeliest(self) -> Tensor | None:
        """See `Logits`."""
        span = self._communicator.shard.padded_span(self._vocab)
        own = sampling.candidates(self._part[:, : len(span)], span.start)
        everyone = recording.gather_columns(self._communicator, own)
        return None if everyone is None else sampling.likeliest_of(everyone)
