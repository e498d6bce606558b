"""One rank's part when layers move between the stages of a pipeline.

Rank 0 orders one phase after the other while no step is in flight, and every rank answers each of them. Until the last
phase the rank has its old layers untouched beside the new ones, so that whatever fails before is dropped and the worker
goes on as it was.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

import msgpack
import torch

from orchestra.errors import ConfigError, InternalError
from orchestra.worker import host_memory
from orchestra.worker.kv_cache import KvCache
from orchestra.worker.layer_courier import Courier
from orchestra.worker.layers import LoadContext
from orchestra.worker.loader import WeightReader
from orchestra.worker.model_config import ModelConfig
from orchestra.worker.models import LAYER_LOADERS
from orchestra.worker.models.decoder import Decoder, Layer, prefix_of
from orchestra.worker.plan import StepPlan
from orchestra.worker.runner import ModelRunner
from orchestra.worker.sharding import Span, Stage
from orchestra.worker.stage_cache import StageCache

# Before an order, where a plan has a map: no message of msgpack begins so.
_MARK = b"\xc1move"

# What goes wrong in a phase without the rank being at fault for good: files, memory, connections.
_FAILURES = (ConfigError, InternalError, OSError, MemoryError, RuntimeError)


class MoveError(InternalError):
    """Layers cannot move as they should."""


class Phase(StrEnum):
    """What a rank is to do now."""

    SURVEY = "survey"
    """Say how much memory is free."""
    LOAD = "load"
    """Read the weights of the layers that come, and take memory for their KV."""
    EXCHANGE = "exchange"
    """Hand over the KV of those that go, and take that of those that come."""
    SWITCH = "switch"
    """Compute the new layers from now on."""
    DROP = "drop"
    """Forget what was loaded."""


@dataclass(frozen=True)
class MoveOrder:
    """What rank 0 says to every rank."""

    phase: Phase
    number: int
    """Of the move, counted from 1."""
    split: tuple[int, ...]
    """Layers of each stage after it."""

    def encode(self) -> bytes:
        """The message that `decode` reads."""
        return _MARK + bytes(msgpack.packb([self.phase.value, self.number, list(self.split)]))

    @classmethod
    def decode(cls, message: bytes) -> "MoveOrder | None":
        """Reads a message; None: it is something else.

        Raises:
            InternalError: it is damaged.
        """
        if not message.startswith(_MARK):
            return None
        try:
            phase, number, split = msgpack.unpackb(message[len(_MARK) :])
            return cls(Phase(phase), int(number), tuple(map(int, split)))
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise InternalError(f"an order to move layers cannot be read: {error!r}") from error


@dataclass(frozen=True)
class MoveAnswer:
    """What a rank says after a phase."""

    free_bytes: int
    """Memory that it could take."""
    error: str = ""
    """Why the phase failed; empty: it did not."""

    def encode(self) -> bytes:
        """The message that `decode` reads."""
        return bytes(msgpack.packb([self.free_bytes, self.error]))

    @classmethod
    def decode(cls, message: bytes) -> "MoveAnswer":
        """Reads a message.

        Raises:
            InternalError: it is damaged.
        """
        try:
            free_bytes, error = msgpack.unpackb(message)
            return cls(int(free_bytes), str(error))
        except (ValueError, TypeError, msgpack.UnpackException) as error:
            raise InternalError(f"an answer to an order cannot be read: {error!r}") from error


@dataclass(frozen=True)
class StageParts:
    """What a rank computes a step with."""

    decoder: Decoder
    cache: StageCache
    runner: ModelRunner


@dataclass(frozen=True)
class Makers:
    """How parts are made for layers that were not there at start."""

    reader: Callable[[], WeightReader]
    """Opens the checkpoint."""
    context: Callable[[WeightReader, Stage], LoadContext]
    """For loading layers of a stage."""
    runner: Callable[[Decoder, StageCache], ModelRunner]
    """Around a decoder and a cache of the same layers."""


@dataclass
class _Pending:
    """A move that has begun."""

    stage: Stage
    span: Span
    layers: dict[int, Layer]
    """Those that come, by their number in the model."""
    caches: dict[int, KvCache]
    """And their KV."""
    parts: StageParts | None = None


class LayerMover:
    """This rank's layers, and how they change.

    Args:
        model_config: the model's shape.
        stage: this rank's, as the layers lie at start.
        parts: its own at start.
        makers: of further ones.
        courier: to the other stages.
        local_size: ranks that share this machine's memory.

    Raises:
        ConfigError: a file of the checkpoint is gone or damaged.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        stage: Stage,
        parts: StageParts,
        makers: Makers,
        courier: Courier,
        local_size: int,
    ) -> None:
        self.model_config = model_config
        self.stage = stage
        self._parts = parts
        self._makers = makers
        self._courier = courier
        self._local_size = local_size
        with makers.reader() as reader:
            self._fingerprint = reader.fingerprint
        self._pending: _Pending | None = None
        self._phases = {
            Phase.SURVEY: self._survey,
            Phase.LOAD: self._load,
            Phase.EXCHANGE: self._exchange,
            Phase.SWITCH: self._switch,
            Phase.DROP: self._drop,
        }

    @property
    def runner(self) -> ModelRunner:
        """What executes steps now."""
        return self._parts.runner

    @property
    def split(self) -> tuple[int, ...]:
        """Layers of each stage now."""
        owners = self._owners(self.stage)
        return tuple(owners.count(index) for index in range(self.stage.count))

    def layer_bytes(self, reader: WeightReader, layer: int) -> int:
        """About what a layer takes on this rank: weights and KV, host memory included."""
        context = self._makers.context(reader, self.stage)
        numbers = reader.count_numbers(prefix_of(layer))
        weights = -(-numbers * context.dtype.itemsize // context.communicator.shard.size)
        return weights + self._parts.cache.layer_bytes

    def open_checkpoint(self) -> WeightReader:
        """What layers are loaded from.

        Raises:
            ConfigError: a file is gone or damaged.
        """
        return self._makers.reader()

    def note(self, plan: StepPlan) -> None:
        """Takes in which blocks a step writes; called before it runs."""
        self._parts.cache.written.note(plan)

    def obey(self, order: MoveOrder) -> MoveAnswer:
        """Does what rank 0 asks for. Only the last phase changes what the next step runs on.

        Raises:
            Exception: switching failed, which leaves the ranks with different ideas of who has which layers.
        """
        error = ""
        try:
            self._phases[order.phase](order)
        except _FAILURES as failure:
            if order.phase is Phase.SWITCH:
                raise
            error = f"{type(failure).__name__}: {failure}"
        return MoveAnswer(self._free_bytes(), error)

    # === the phases ===

    def _survey(self, _order: MoveOrder) -> None:
        """The answer to any order says how much memory is free."""

    def _load(self, order: MoveOrder) -> None:
        stage = replace(self.stage, split=order.split)
        span, own = stage.layers(self.model_config.num_layers), self._parts.decoder.span
        coming = [it for it in range(span.start, span.stop) if not own.start <= it < own.stop]
        load_layer = LAYER_LOADERS[self.model_config.architecture]
        with self._makers.reader() as reader:
            if reader.fingerprint != self._fingerprint:
                raise MoveError("the checkpoint is not the one that was loaded at start any more")
            self._check_memory(sum(self.layer_bytes(reader, layer) for layer in coming))
            context = self._makers.context(reader, stage)
            layers = {layer: load_layer(context, layer, self.model_config) for layer in coming}
        caches = {layer: self._parts.cache.new_layer() for layer in coming}
        self._pending = _Pending(stage, span, layers, caches)

    def _check_memory(self, needed: int) -> None:
        free = self._free_bytes()
        if needed > free:
            raise MoveError(f"the layers that come take {needed} bytes, but {free} are free")

    def _exchange(self, order: MoveOrder) -> None:
        pending, index = self._begun(), self.stage.index
        self._courier.begin(order.number)
        try:
            # All ranks in the same order: whoever waits, waits for one that waits for nothing later.
            ways = zip(self._owners(self.stage), self._owners(pending.stage), strict=True)
            for layer, (giver, taker) in enumerate(ways):
                if giver != taker and giver == index:
                    self._give(layer, taker)
                elif giver != taker and taker == index:
                    self._take(pending.caches[layer], giver)
        finally:
            self._courier.end()
        pending.parts = self._with_pending(pending)

    def _give(self, layer: int, taker: int) -> None:
        cache = self._parts.cache
        own = cache.layers[layer - self._parts.decoder.span.start]
        for blocks, numbers in cache.written_pieces(own):
            self._courier.send(taker, blocks.index_select(0, numbers))

    def _take(self, target: KvCache, giver: int) -> None:
        for blocks, numbers in self._parts.cache.written_pieces(target):
            shape = (len(numbers), *blocks.shape[1:])
            piece = torch.empty(shape, dtype=blocks.dtype)
            self._courier.receive(giver, piece)
            blocks.index_copy_(0, numbers, piece)

    def _with_pending(self, pending: _Pending) -> StageParts:
        own, cache = self._parts.decoder.span, self._parts.cache
        layers = [
            pending.caches[it] if it in pending.caches else cache.layers[it - own.start]
            for it in range(pending.span.start, pending.span.stop)
        ]
        decoder = self._parts.decoder.with_layers(pending.span, pending.layers)
        moved = StageCache(layers, cache.written)
        return StageParts(decoder, moved, self._makers.runner(decoder, moved))

    def _switch(self, _order: MoveOrder) -> None:
        pending = self._begun()
        assert pending.parts is not None
        pending.parts.decoder.take_places()
        self._parts, self.stage = pending.parts, pending.stage
        self._pending = None

    def _drop(self, _order: MoveOrder) -> None:
        self._pending = None

    def _begun(self) -> _Pending:
        if self._pending is None:
            raise MoveError("no move has begun")
        return self._pending

    def _owners(self, stage: Stage) -> list[int]:
        """The stage of each layer."""
        spans = (
            replace(stage, index=index).layers(self.model_config.num_layers)
            for index in range(stage.count)
        )
        return [index for index, span in enumerate(spans) for _ in range(len(span))]

    def _free_bytes(self) -> int:
        return host_memory.free_bytes(self._local_size)
