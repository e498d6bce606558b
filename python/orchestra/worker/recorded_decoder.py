"""A decoder on a CPU whose small steps are run from a recording of their kernels."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from orchestra.errors import InvalidRequestError
from orchestra.worker.attention import AttentionBackend
from orchestra.worker.attention_cpu import CpuPagedAttention
from orchestra.worker.drawn import LatestTokens
from orchestra.worker.logits import Logits
from orchestra.worker.models import Model
from orchestra.worker.models.decoder import Decoder, Rotations
from orchestra.worker.plan import Int32Array, StepPlan
from orchestra.worker.recording import Buffers, NotRecordableError, Part, Recorder

# Most tokens of a step that is run from the recording. In longer ones the kernels take many times what Python does.
RECORDED_ROWS = 64

_Enter = Callable[..., tuple[Tensor, Rotations]]
"""Makes of a step's inputs what goes into the layers."""

logger = logging.getLogger("orchestra.worker")


@dataclass(frozen=True)
class _Choice:
    """How the likeliest tokens of a recorded step are found."""

    parts: list[Part]
    """The calls, behind those of the step."""
    tokens: NDArray[np.int64] | None
    """`[RECORDED_ROWS]`, what they find; None on the ranks that only help."""


@dataclass(frozen=True)
class _Recording:
    """A decoder's step: tensors that never move, and the calls on their first rows."""

    inputs: list[Tensor]
    """What goes in: token ids and positions, `int64[RECORDED_ROWS]`; or what `Decoder.enter` gives."""
    numbers: list[NDArray[np.int64]]
    """Of those, the ones that are token ids and positions, as numpy has them."""
    attended: tuple[Tensor, Tensor]
    """What `Decoder.attend` gives."""
    finished: Tensor
    """What `Decoder.finish` gives."""
    attend: list[Part]
    """Up to `attended`."""
    finish: list[Part]
    """From there on."""
    choice: _Choice | None
    """None where there are no logits, or more than kernels is needed."""
    buffers: Buffers
    """Where the calls' other tensors lie."""


class RecordedDecoder:
    """A `Model`: steps of up to `RECORDED_ROWS` tokens are run from a recording, all others as usual.

    Both compute the same, to the bit. Everything from the embedding to the logits is recorded, by the first step. A
    decoder in which torch computes something itself, such as which experts a token goes to, is not recorded, and every
    step is computed as usual.

    And `RecordedSteps`: those that draw from each of their tokens do without torch. A pass over the weights leaves
    nothing of it in the processor's caches, and to fetch what one of its calls reads takes longer than the call.

    Args:
        decoder: what is recorded.
        attention: over this rank's cache. A step that is attended by something else, or in which another worker waits
            for each layer, is computed as usual.
    """

    def __init__(self, decoder: Decoder, attention: CpuPagedAttention) -> None:
        self.obstacle: str | None = None
        """Why nothing is recorded, once that is known."""
        self._decoder = decoder
        self._attention = attention
        self._recording: _Recording | None = None

    @property
    def is_recorded(self) -> bool:
        """Whether there is a recording."""
        return self._recording is not None

    def forget(self) -> None:
        """See `models.Model`."""
        self._recording = None

    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: AttentionBackend, rows: Tensor | None
    ) -> Logits | None:
        """Runs one step; see `models.Model`. The logits are valid until the next one."""
        is_small = len(token_ids) <= RECORDED_ROWS and attention is self._attention
        if not is_small or self._attention.is_watched or self.obstacle is not None:
            return self._decoder.forward(token_ids, positions, attention, rows)
        inputs, enter = self._inputs(token_ids, positions)
        recording = self._recording or self._record(inputs, enter)
        if recording is None:
            return self._decoder.run(*enter(*inputs), attention, rows)
        return self._run(recording, inputs, rows)

    def takes(self, plan: StepPlan) -> bool:
        """See `RecordedSteps`."""
        decoder = self._decoder
        is_whole = self._recording is not None and decoder.is_first and decoder.is_last
        is_small = 0 < len(plan.token_ids) <= RECORDED_ROWS
        return is_whole and is_small and plan.draws_from_all and not plan.fills_blocks

    def run(self, plan: StepPlan, latest: LatestTokens | None = None) -> Logits | None:
        """See `RecordedSteps`."""
        recording, count = self._recording, len(plan.token_ids)
        assert recording is not None
        self._attention.prepare(plan)
        for kept, given in zip(recording.numbers, (plan.token_ids, plan.positions), strict=True):
            kept[:count] = given
        if latest is not None:
            latest.fill(recording.inputs[0], plan.pending)
        _call(recording.attend, count)
        return self._finish(recording, count)

    def _inputs(self, token_ids: Tensor, positions: Tensor) -> tuple[list[Tensor], _Enter]:
        """What a recording is given, and how the decoder is entered with it."""
        decoder = self._decoder
        if decoder.is_first:
            return [token_ids, positions], decoder.enter
        # What the stage before sends has to be waited for outside.
        hidden, rotations = decoder.enter(token_ids, positions)
        return [hidden, *rotations.values()], lambda hidden, *turned: (
            hidden,
            dict(zip(rotations, turned, strict=True)),
        )

    def _run(
        self, recording: _Recording, inputs: list[Tensor], rows: Tensor | None
    ) -> Logits | None:
        decoder, count = self._decoder, len(inputs[0])
        for kept, given in zip(recording.inputs, inputs, strict=True):
            kept[:count] = given
        _call(recording.attend, count)
        if rows is None or not decoder.is_last:
            return self._finish(recording, count)
        if len(rows) == 0:
            return None
        attended = [part.index_select(0, rows) for part in recording.attended]
        return decoder.leave(decoder.finish(*attended))

    def _finish(self, recording: _Recording, count: int) -> Logits | None:
        """The rest of a step of which every row goes on."""
        _call(recording.finish, count)
        if recording.choice is not None:
            return _RecordedLogits(self._decoder, recording.finished, recording.choice, count)
        finished = recording.finished[:count]
        # Who sends may do so while the next step runs.
        return self._decoder.leave(finished if self._decoder.is_last else finished.clone())

    def _record(self, like: list[Tensor], enter: _Enter) -> _Recording | None:
        """Records a step with inputs like others, however many tokens those are of."""
        decoder, buffers = self._decoder, Buffers()
        inputs = [tensor.new_zeros(RECORDED_ROWS, *tensor.shape[1:]) for tensor in like]
        attending = Recorder(RECORDED_ROWS, buffers)
        finishing = Recorder(RECORDED_ROWS, buffers)
        try:
            with attending:
                attended = decoder.attend(*enter(*inputs), self._attention)
            with finishing:
                finished = decoder.finish(*attended)
        except (NotRecordableError, InvalidRequestError) as obstacle:
            self.obstacle = str(obstacle)
            logger.debug("steps are not recorded: %s", obstacle)
            return None
        parts = attending.parts, finishing.parts
        choice = self._record_choice(finished, buffers) if decoder.is_last else None
        numbers = [tensor.numpy() for tensor in inputs] if decoder.is_first else []
        self._recording = _Recording(inputs, numbers, attended, finished, *parts, choice, buffers)
        return self._recording

    def _record_choice(self, logits: Tensor, buffers: Buffers) -> _Choice | None:
        choosing = Recorder(RECORDED_ROWS, buffers)
        try:
            with choosing:
                left = self._decoder.leave(logits)
                likeliest = None if left is None else left.likeliest()
        except NotRecordableError as obstacle:
            logger.debug("what is likeliest is not recorded: %s", obstacle)
            return None
        tokens = likeliest.numpy() if isinstance(likeliest, Tensor) else None
        return _Choice(choosing.parts, tokens)


class _RecordedLogits:
    """The `Logits` of a recorded step.

    Args:
        decoder: whose they are.
        finished: what `Decoder.finish` gives, of all rows.
        choice: how the likeliest are found.
        count: rows of the step.
    """

    def __init__(self, decoder: Decoder, finished: Tensor, choice: _Choice, count: int) -> None:
        self._decoder = decoder
        self._finished = finished
        self._choice = choice
        self._count = count

    def whole(self) -> Tensor | None:
        """See `Logits`."""
        logits = self._decoder.leave(self._finished[: self._count])
        return None if logits is None else logits.whole()

    def likeliest(self) -> Int32Array | None:
        """See `Logits`."""
        _call(self._choice.parts, self._count)
        tokens = self._choice.tokens
        return None if tokens is None else tokens[: self._count].astype(np.int32)


def _call(parts: list[Part], count: int) -> None:
    for part in parts:
        part(count)


def recorded(model: Model, attention: AttentionBackend) -> Model:
    """The model, its small steps recorded where that can be."""
    if isinstance(model, Decoder) and isinstance(attention, CpuPagedAttention):
        return RecordedDecoder(model, attention)
    return model
