"""What a step draws, between the device that draws it and the host that hands it on."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from orchestra.worker.parallel import Communicator
from orchestra.worker.plan import Float32Array, Int32Array, PendingTokens, StepOutput
from orchestra.worker.staging import send

# Stands for the token of a row whose likeliest candidates do not reach its top-p.
UNDECIDED = -1

NOTHING_DRAWN = StepOutput.of_tokens(np.empty(0, np.int32))


class Packed(NamedTuple):
    """Tokens and, where asked for, log-probabilities of `N` samples with `K` alternatives each, in one tensor."""

    numbers: Tensor
    """`int32[N, 1 or 2 + 2 K]`: the token, its log-probability, those of the alternatives, and these."""
    num_alternatives: int
    """`K`; -1: there are no log-probabilities."""

    @classmethod
    def of(cls, logits: Tensor, tokens: Tensor, num_alternatives: int) -> "Packed":
        """Log-probabilities are of the model alone: before bias, penalties and temperature.

        Args:
            logits: `[N, V]`, of any float dtype.
            tokens: `[N]`, of any integer dtype.
            num_alternatives: the most that a sample wants; -1: no log-probabilities at all.
        """
        if num_alternatives < 0:
            return cls.of_tokens(tokens)
        column = tokens.int().unsqueeze(1)
        logprobs = torch.log_softmax(logits, 1, dtype=torch.float32)
        top = logprobs.topk(num_alternatives, 1)
        chosen = logprobs.gather(1, tokens.clamp(min=0).unsqueeze(1))
        floats = chosen.view(torch.int32), top.values.view(torch.int32)
        return cls(torch.cat([column, *floats, top.indices.int()], 1), num_alternatives)

    @classmethod
    def of_tokens(cls, tokens: Tensor) -> "Packed":
        """Tokens (`[N]`, of any integer dtype) without log-probabilities."""
        return cls(tokens.int().unsqueeze(1), -1)

    def read(self) -> StepOutput:
        """Takes them apart again; `numbers` is on the host."""
        columns = self.numbers.numpy()
        token_ids = np.ascontiguousarray(columns[:, 0])
        if self.num_alternatives < 0:
            return StepOutput.of_tokens(token_ids)
        end = 2 + self.num_alternatives
        floats: Float32Array = np.ascontiguousarray(columns[:, 1:end]).view(np.float32)
        return StepOutput(
            token_ids,
            np.ascontiguousarray(floats[:, 0]),
            np.ascontiguousarray(columns[:, end:]),
            np.ascontiguousarray(floats[:, 1:]),
        )


Settle = Callable[[Int32Array], Packed | None]
"""Is told which rows are undecided, draws them again and gives all rows anew; None where there were none."""


class Drawn:
    """The draws of one step on their way to the host.

    Args:
        drawn: what was drawn. On a GPU its copy to the host starts here, behind what the device does already, so that
            waiting for it is not waiting for the step behind. A `StepOutput` is on the host, and final.
        settle: to be called before the tokens are used, as rows may be `UNDECIDED`; None: none can be.
    """

    def __init__(self, drawn: Packed | StepOutput, settle: Settle | None = None) -> None:
        self._drawn = drawn
        self._settle = settle
        self._copied: torch.cuda.Event | None = None
        if isinstance(drawn, Packed) and drawn.numbers.is_cuda:
            numbers = torch.empty_like(drawn.numbers, device="cpu", pin_memory=True)
            numbers.copy_(drawn.numbers, non_blocking=True)
            self._drawn = drawn._replace(numbers=numbers)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record()

    def fetch(self) -> StepOutput:
        """Waits for the draws, and for those alone; again gives the same."""
        if isinstance(self._drawn, Packed):
            if self._copied is not None:
                self._copied.synchronize()
            output = self._drawn.read()
            if self._settle is not None:
                undecided = np.flatnonzero(output.token_ids == UNDECIDED)
                packed = self._settle(undecided.astype(np.int32))
                if packed is not None:
                    output = packed._replace(numbers=packed.numbers.cpu()).read()
            self._drawn, self._settle = output, None
        return self._drawn


class LatestTokens:
    """The token that was last drawn for each sampler slot, where it was drawn: for steps that were planned before it.

    The ranks that share each layer each have one. To what one of them notes, which draws, the others have zeros; so
    what a step goes on with is the sum of theirs.

    Args:
        max_num_seqs: number of slots.
        device: of the logits.
        communicator: joins those ranks.
    """

    def __init__(self, max_num_seqs: int, device: torch.device, communicator: Communicator) -> None:
        self._device = device
        self._communicator = communicator
        self._tokens = torch.zeros(max_num_seqs, dtype=torch.int32, device=device)

    def note(self, slots: Int32Array, tokens: Tensor) -> None:
        """The slots (`[N]`) drew these tokens (`int[N]`)."""
        self._tokens.index_copy_(0, self._index(slots), tokens.int())

    def fill(self, token_ids: Tensor, pending: PendingTokens) -> None:
        """Writes them to a step's token ids (`int[T]`) where these are pending; every rank does, in every step."""
        if len(pending.rows) == 0:
            return
        tokens = self._tokens.index_select(0, self._index(pending.slots))
        if self._communicator.shard.size > 1:
            # As numbers that every group can add up, and in which tokens are exact.
            numbers = tokens.float()
            self._communicator.all_reduce(numbers)
            tokens = numbers.int()
        token_ids.index_copy_(0, self._index(pending.rows), tokens.to(token_ids.dtype))

    def _index(self, places: Int32Array) -> Tensor:
        return send(places.astype(np.int64), self._device)
