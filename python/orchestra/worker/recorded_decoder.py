"""A decoder on a CPU whose small steps are run from a recording of their kernels."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from orchestra.errors import InvalidRequestError
from orchestra.worker.attention import AttentionBackend
from orchestra.worker.attention_cpu import CpuPagedAttention
from orchestra.worker.logits import Logits
from orchestra.worker.models import Model
from orchestra.worker.models.decoder import Decoder, Rotations
from orchestra.worker.recording import Buffers, NotRecordableError, Part, Recorder

# Most tokens of a step that is run from the recording. In longer ones the kernels take many times what Python does.
RECORDED_ROWS = 64

_Enter = Callable[..., tuple[Tensor, Rotations]]
"""Makes of a step's inputs what goes into the layers."""

logger = logging.getLogger("orchestra.worker")


@dataclass(frozen=True)
class _Recording:
    """A decoder's step: tensors that never move, and the calls on their first rows."""

    inputs: list[Tensor]
    """What goes in: token ids and positions, `int64[RECORDED_ROWS]`; or what `Decoder.enter` gives."""
    attended: tuple[Tensor, Tensor]
    """What `Decoder.attend` gives."""
    finished: Tensor
    """What `Decoder.finish` gives."""
    attend: list[Part]
    """Up to `attended`."""
    finish: list[Part]
    """From there on."""
    buffers: Buffers
    """Where the calls' other tensors lie."""


class RecordedDecoder:
    """A `Model`: steps of up to `RECORDED_ROWS` tokens are run from a recording, all others as usual.

    Both compute the same, to the bit. Everything from the embedding to the logits is recorded, by the first step. A
    decoder in which torch computes something itself, such as which experts a token goes to, is not recorded, and every
    step is computed as usual.

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
        for part in recording.attend:
            part(count)
        if rows is not None and decoder.is_last:
            if len(rows) == 0:
                return None
            attended = [part.index_select(0, rows) for part in recording.attended]
            return decoder.leave(decoder.finish(*attended))
        for part in recording.finish:
            part(count)
        finished = recording.finished[:count]
        # Who sends may do so while the next step runs.
        return decoder.leave(finished if decoder.is_last else finished.clone())

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
        self._recording = _Recording(inputs, attended, finished, *parts, buffers)
        return self._recording


def recorded(model: Model, attention: AttentionBackend) -> Model:
    """The model, its small steps recorded where that can be."""
    if isinstance(model, Decoder) and isinstance(attention, CpuPagedAttention):
        return RecordedDecoder(model, attention)
    return model
