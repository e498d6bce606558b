"""The trunk of every family: embedding, layers, norm, head. A family's own file says what one layer is."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from orchestra.worker import summing
from orchestra.worker.attention import AttentionBackend
from orchestra.worker.expert_exchange import ExpertGroup
from orchestra.worker.layers import (
    LoadContext,
    Op,
    RMSNorm,
    VocabEmbedding,
    VocabHead,
    load_vocab_rows,
)
from orchestra.worker.loader import Progress
from orchestra.worker.logits import Logits
from orchestra.worker.model_config import ModelConfig
from orchestra.worker.parallel import Communicator
from orchestra.worker.rope_config import RopeConfig
from orchestra.worker.rotary import RotaryTable
from orchestra.worker.sharding import Span, Stage
from orchestra.worker.summing import Summing

if TYPE_CHECKING:
    from orchestra.worker.stage_link import StageLink

_EMBEDDING, _NORM, _HEAD = "model.embed_tokens.weight", "model.norm", "lm_head.weight"


class Numbered(Protocol):
    """What has a place in the KV cache."""

    index: int
    """Which layer of this rank's cache."""


class Layer(Protocol):
    """This rank's part of one layer, cut in two where tokens stop needing each other."""

    @property
    def attention(self) -> Numbered:
        """What reads and writes the cache."""
        ...

    def attend(self, hidden: Tensor, rotations: Tensor, backend: AttentionBackend) -> Tensor:
        """The first half up to the output projection: `[T, H]` to `[T, heads * head_dim]`."""
        ...

    def finish(self, hidden: Tensor, attended: Tensor) -> Summing[Tensor]:
        """The rest of the layer; works on any subset of the tokens."""
        ...


Rotations = dict[RotaryTable, Tensor]
"""How the tokens of a step are turned, by each of a model's tables."""

LoadLayer = Callable[[LoadContext, int, ModelConfig], Layer]
"""Loads `model.layers.<index>`."""


class RotaryTables:
    """The rotations of a model's layers; layers that turn alike share one.

    Args:
        config: the model's shape.
        max_positions: longest sequence that will run.
        device: where they are used.
    """

    def __init__(self, config: ModelConfig, max_positions: int, device: torch.device) -> None:
        self.config = config
        self._max_positions = max_positions
        self._device = device
        self._tables: dict[RopeConfig, RotaryTable] = {}

    def of(self, layers: Span) -> list[RotaryTable]:
        """Those of some layers, in order."""
        return [
            self._table(self.config.rope_of(index)) for index in range(layers.start, layers.stop)
        ]

    def _table(self, rope: RopeConfig) -> RotaryTable:
        if rope not in self._tables:
            table = RotaryTable(
                rope, self.config.rotary_head_dim, self._max_positions, self._device
            )
            self._tables[rope] = table
        return self._tables[rope]


class Decoder:
    """This rank's part of the model: its slices of its stage's layers.

    Args:
        entry: token ids to `[T, H]`: the embedding, or what the stage before sends.
        span: which layers of the model these are.
        layers: in order.
        rotaries: of all layers.
        after: what follows the layers.
        communicator: joins the ranks of the stage.
        expert_group: the ranks that have the stage's experts between them; None: this one has what it needs.
    """

    def __init__(
        self,
        entry: Op,
        span: Span,
        layers: Sequence[Layer],
        rotaries: RotaryTables,
        after: "Head | StageLink",
        communicator: Communicator,
        expert_group: ExpertGroup | None,
    ) -> None:
        self.span = span
        self._entry = entry
        self._layers = layers
        self._tables = rotaries
        self._rotaries = rotaries.of(span)
        self._after = after
        self._communicator = communicator
        self._expert_group = expert_group

    @classmethod
    def load(
        cls,
        load_layer: LoadLayer,
        context: LoadContext,
        config: ModelConfig,
        max_positions: int,
        progress: Progress,
    ) -> "Decoder":
        """Loads this rank's slices.

        Args:
            load_layer: the family's.
            context: where from and where to.
            config: the model's shape.
            max_positions: longest sequence that will run.
            progress: told after each layer.
        """
        stage = context.stage
        span = stage.layers(config.num_layers)
        parts = len(span) + 2
        embedding = None
        if stage.is_first:
            embedding = VocabEmbedding.load(context, _EMBEDDING, config)
        entry = embedding or FormerStage(context, config)
        progress(1, parts)
        layers = []
        for done, index in enumerate(range(span.start, span.stop), start=2):
            layers.append(load_layer(context, index, config))
            progress(done, parts)
        after = Head.load(context, config, embedding) if stage.is_last else context.link
        context.reader.finish(_of_others(config, stage))
        progress(parts, parts)
        rotaries = RotaryTables(config, max_positions, context.device)
        ends = (rotaries, after, context.communicator, context.expert_group)
        return cls(entry, span, layers, *ends)

    @property
    def config(self) -> ModelConfig:
        """The shape of the whole model."""
        return self._tables.config

    def with_layers(self, span: Span, further: Mapping[int, Layer]) -> "Decoder":
        """The same stage with other layers; neither runs before `take_places` says whose the shared ones are.

        Args:
            span: which layers of the model.
            further: those that this decoder does not have, by their number in the model.
        """
        own = {self.span.start + place: layer for place, layer in enumerate(self._layers)}
        layers = [further[it] if it in further else own[it] for it in range(span.start, span.stop)]
        return Decoder(
            *(self._entry, span, layers, self._tables, self._after),
            *(self._communicator, self._expert_group),
        )

    def take_places(self) -> None:
        """Lets every layer find its KV in a cache of this decoder's layers."""
        for place, layer in enumerate(self._layers):
            layer.attention.index = place

    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: AttentionBackend, rows: Tensor | None
    ) -> Logits | None:
        """Runs one step; see `models.Model`."""
        return self.run(*self.enter(token_ids, positions), attention, rows)

    def forget(self) -> None:
        """Does nothing: no step is recorded here."""

    def run(
        self, hidden: Tensor, rotations: Rotations, attention: AttentionBackend, rows: Tensor | None
    ) -> Logits | None:
        """The rest of a step behind `enter`."""
        hidden, attended = self.attend(hidden, rotations, attention)
        if rows is not None and self.is_last:
            if rows.shape[0] == 0 and self._expert_group is None:
                return None
            hidden, attended = hidden.index_select(0, rows), attended.index_select(0, rows)
        if self.is_last and self._expert_group is not None:
            # One rank has what is sampled, and the others its experts.
            self._expert_group.is_divided = True
        finished = self.finish(hidden, attended)
        return None if self.is_last and finished.shape[0] == 0 else self.leave(finished)

    # The four parts of a step. All but the last may be kernels and sums over the ranks alone.

    def enter(self, token_ids: Tensor, positions: Tensor) -> tuple[Tensor, Rotations]:
        """What goes into the layers: `[T, H]`, and how their heads are turned."""
        hidden = self._entry(token_ids)
        return hidden, {table: table(positions) for table in dict.fromkeys(self._rotaries)}

    def attend(
        self, hidden: Tensor, rotations: Rotations, attention: AttentionBackend
    ) -> tuple[Tensor, Tensor]:
        """All layers up to the last one's attention: its input `[T, H]`, and `[T, heads * head_dim]`.

        Every token leaves its KV in the last layer too, but only those that are sampled need go further.
        """
        return summing.run(self.attending(hidden, rotations, attention), self._communicator)

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The rest, for any of the tokens: `[N, H]`, or of the last stage this rank's columns of the logits."""
        return summing.run(self.finishing(hidden, attended), self._communicator)

    def leave(self, finished: Tensor) -> Logits | None:
        """Hands that on: to the next stage, or as logits."""
        if isinstance(self._after, Head):
            return self._after.logits(finished)
        self._after.send(finished)
        return None

    # The two that meet sums, for who runs them otherwise than one sum after the other.

    def attending(
        self, hidden: Tensor, rotations: Rotations, attention: AttentionBackend
    ) -> Summing[tuple[Tensor, Tensor]]:
        """See `attend`."""
        for layer, table in zip(self._layers[:-1], self._rotaries[:-1], strict=True):
            attended = layer.attend(hidden, rotations[table], attention)
            hidden = yield from layer.finish(hidden, attended)
        attended = self._layers[-1].attend(hidden, rotations[self._rotaries[-1]], attention)
        return hidden, attended

    def finishing(self, hidden: Tensor, attended: Tensor) -> Summing[Tensor]:
        """See `finish`."""
        finished = yield from self._layers[-1].finish(hidden, attended)
        return self._after.project(finished) if isinstance(self._after, Head) else finished

    @property
    def is_first(self) -> bool:
        """Whether token ids go in, and not what another stage sends."""
        return not isinstance(self._entry, FormerStage)

    @property
    def is_last(self) -> bool:
        """Whether logits come out."""
        return isinstance(self._after, Head)


class Head:
    """What the last stage has behind its layers: hidden states to logits."""

    def __init__(self, norm: RMSNorm, head: VocabHead) -> None:
        self._norm = norm
        self._head = head

    @classmethod
    def load(
        cls, context: LoadContext, config: ModelConfig, embedding: VocabEmbedding | None
    ) -> "Head":
        """Loads this rank's slices; with tied weights they are those of `embedding`, where this stage has it."""
        vocab, hidden = config.vocab_size, config.hidden_size
        norm = RMSNorm.load(context, _NORM, hidden, config)
        if config.tie_word_embeddings and embedding is not None:
            weight = embedding.weight
        else:
            name = _EMBEDDING if config.tie_word_embeddings else _HEAD
            weight = load_vocab_rows(context, name, vocab, hidden)
        return cls(norm, VocabHead(weight, vocab, context.communicator, config.logit_soft_cap))

    def project(self, hidden: Tensor) -> Tensor:
        """Maps `[N, H]` to this rank's columns of the logits."""
        return self._head.project(self._norm(hidden))

    def logits(self, part: Tensor) -> Logits:
        """The logits that these columns are this rank's part of."""
        return self._head.logits(part)


class FormerStage:
    """Stands where the first stage has the embedding."""

    def __init__(self, context: LoadContext, config: ModelConfig) -> None:
        self._link = context.link
        self._width = config.hidden_size
        self._dtype = context.dtype
        self._device = context.device

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Waits for the hidden states `[T, H]` of these tokens."""
        shape = (token_ids.shape[0], self._width)
        hidden = torch.empty(shape, dtype=self._dtype, device=self._device)
        self._link.receive(hidden)
        return hidden


def prefix_of(layer: int) -> str:
    """How the names of a layer's weights begin."""
    return f"model.layers.{layer}."


def _of_others(config: ModelConfig, stage: Stage) -> Callable[[str], bool]:
    """Tells the weights that other stages read, and those that none does, from what should not be there."""
    span = stage.layers(config.num_layers)
    # Layers behind the last one are for drafting.
    layers = range(config.num_layers + config.num_draft_layers)
    others = [index for index in layers if not span.start <= index < span.stop]
    prefixes = tuple(map(prefix_of, others))
    names = set() if stage.is_first else {_EMBEDDING}
    if not stage.is_last:
        names |= {f"{_NORM}.weight", _HEAD}
    return lambda name: name in names or name.startswith(prefixes) or _is_ignored(name)


def _is_ignored(name: str) -> bool:
    """Weights that some checkpoints carry and no model needs: computed tables, and a tied head's second copy."""
    return name.endswith("rotary_emb.inv_freq") or name == _HEAD
