"""A decoder on a CPU whose small steps are run from a recording of their kernels."""

import logging
from dataclasses import dataclass

from torch import Tensor

from orchestra.errors import InvalidRequestError
from orchestra.worker.attention import AttentionBackend
from orchestra.worker.attention_cpu import CpuPagedAttention
from orchestra.worker.models import Model
from orchestra.worker.models.decoder import Decoder, Rotations
from orchestra.worker.recording import Buffers, NotRecordableError, Part, Recorder

# Most tokens of a step that is run from the recording. In longer ones the kernels take many times what Python does.
RECORDED_ROWS = 64

logger = logging.getLogger("orchestra.worker")


@dataclass(frozen=True)
class _Recording:
    """A decoder's step: tensors that never move, and the calls on their first rows."""

    hidden: Tensor
    """Goes in: `[RECORDED_ROWS, H]`."""
    rotations: Rotations
    """Go in."""
    attended: tuple[Tensor, Tensor]
    """What `Decoder.attend` gives."""
    finished: Tensor
    """What `Decoder.finish` gives."""
    attend: list[Part]
    finish: list[Part]
    buffers: Buffers
    """Where the calls' other tensors lie."""


class RecordedDecoder:
    """A `Model`: steps of up to `RECORDED_ROWS` tokens are run from a recording, all others as usual.

    Both compute the same, to the bit. What is recorded is everything between the embedding and the logits; it is made
    by the first step. A decoder in which torch computes something itself, such as which experts a token goes to, is
    not recorded, and every step is computed as usual.

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
        """Lets go of the recording, as must be done when the group of ranks has changed: it holds its sums."""
        self._recording = None

    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: AttentionBackend, rows: Tensor | None
    ) -> Tensor | None:
        """Runs one step; see `models.Model`. The logits are valid until the next one."""
        is_small = len(token_ids) <= RECORDED_ROWS and attention is self._attention
        if not is_small or self._attention.is_watched or self.obstacle is not None:
            return self._decoder.forward(token_ids, positions, attention, rows)
        hidden, rotations = self._decoder.enter(token_ids, positions)
        recording = self._recording or self._record(hidden, rotations)
        if recording is None:
            return self._decoder.run(hidden, rotations, attention, rows)
        return self._run(recording, hidden, rotations, rows)

    def _run(
        self, recording: _Recording, hidden: Tensor, rotations: Rotations, rows: Tensor | None
    ) -> Tensor | None:
        decoder, count = self._decoder, len(hidden)
        recording.hidden[:count] = hidden
        for table, rotation in rotations.items():
            recording.rotations[table][:count] = rotation
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

    def _record(self, hidden: Tensor, rotations: Rotations) -> _Recording | None:
        """Records a step with the inputs of another, however many tokens those are."""
        decoder, buffers = self._decoder, Buffers()
        hidden = hidden.new_zeros(RECORDED_ROWS, *hidden.shape[1:])
        rotations = {
            table: rotation.new_zeros(RECORDED_ROWS, *rotation.shape[1:])
            for table, rotation in rotations.items()
        }
        attending = Recorder(RECORDED_ROWS, buffers)
        finishing = Recorder(RECORDED_ROWS, buffers)
        try:
            with attending:
                attended = decoder.attend(hidden, rotations, self._attention)
            with finishing:
                finished = decoder.finish(*attended)
        except (NotRecordableError, InvalidRequestError) as obstacle:
            self.obstacle = str(obstacle)
            logger.debug("steps are not recorded: %s", obstacle)
            return None
        parts = attending.parts, finishing.parts
        self._recording = _Recording(hidden, rotations, attended, finished, *parts, buffers)
        return self._recording


def recorded(model: Model, attention: AttentionBackend) -> Model:
    """The model, its small steps recorded where that can be."""
    if isinstance(model, Decoder) and isinstance(attention, CpuPagedAttention):
        return RecordedDecoder(model, attention)
    return model
