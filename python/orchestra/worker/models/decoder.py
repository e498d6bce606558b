"""The trunk of every family: embedding, layers, norm, head. A family's own file says what one layer is."""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from orchestra.worker.attention import AttentionBackend
from orchestra.worker.layers import (
    LoadContext,
    RMSNorm,
    VocabEmbedding,
    VocabHead,
    load_vocab_rows,
)
from orchestra.worker.loader import Progress
from orchestra.worker.model_config import ModelConfig
from orchestra.worker.rotary import RotaryTable


class Layer(Protocol):
    """This rank's part of one layer, cut in two where tokens stop needing each other."""

    def attend(self, hidden: Tensor, rotations: Tensor, backend: AttentionBackend) -> Tensor:
        """The first half up to the output projection: `[T, H]` to `[T, heads * head_dim]`."""
        ...

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The rest of the layer; works on any subset of the tokens."""
        ...


LoadLayer = Callable[[LoadContext, int, ModelConfig], Layer]
"""Loads `model.layers.<index>`."""


class Decoder:
    """This rank's part of the model.

    Args:
        embedding: token ids to `[T, H]`.
        layers: in order.
        norm: before the head.
        head: `[N, H]` to logits.
        rotaries: of each layer; layers that turn alike share one table.
    """

    def __init__(
        self,
        embedding: VocabEmbedding,
        layers: Sequence[Layer],
        norm: RMSNorm,
        head: VocabHead,
        rotaries: Sequence[RotaryTable],
    ) -> None:
        self._embedding = embedding
        self._layers = layers
        self._norm = norm
        self._head = head
        self._rotaries = rotaries

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
        vocab, hidden = config.vocab_size, config.hidden_size
        parts = config.num_layers + 2
        embedding = VocabEmbedding.load(context, "model.embed_tokens.weight", config)
        progress(1, parts)
        layers = []
        for index in range(config.num_layers):
            layers.append(load_layer(context, index, config))
            progress(index + 2, parts)
        norm = RMSNorm.load(context, "model.norm", hidden, config)
        weight = embedding.weight
        if not config.tie_word_embeddings:
            weight = load_vocab_rows(context, "lm_head.weight", vocab, hidden)
        head = VocabHead(weight, vocab, context.communicator, config.logit_soft_cap)
        drafts = range(config.num_layers, config.num_layers + config.num_draft_layers)
        unread = tuple(f"model.layers.{index}." for index in drafts)
        context.reader.finish(lambda name: name.startswith(unread) or _is_ignored(name))
        progress(parts, parts)
        ropes = [config.rope_of(index) for index in range(config.num_layers)]
        tables = {
            rope: RotaryTable(rope, config.rotary_head_dim, max_positions, context.device)
            for rope in set(ropes)
        }
        return cls(embedding, layers, norm, head, [tables[rope] for rope in ropes])

    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: AttentionBackend, rows: Tensor | None
    ) -> Tensor | None:
        """Runs one step; see `models.Model`."""
        hidden = self._embedding(token_ids)
        rotations = {table: table(positions) for table in set(self._rotaries)}
        for layer, table in zip(self._layers[:-1], self._rotaries[:-1], strict=True):
            hidden = layer.finish(hidden, layer.attend(hidden, rotations[table], attention))
        # Every token leaves its KV in the last layer too, but only those that are sampled go further.
        last = self._layers[-1]
        attended = last.attend(hidden, rotations[self._rotaries[-1]], attention)
        if rows is not None:
            if rows.shape[0] == 0:
                return None
            hidden, attended = hidden.index_select(0, rows), attended.index_select(0, rows)
        return self._head(self._norm(last.finish(hidden, attended)))


def _is_ignored(name: str) -> bool:
    """Weights that some checkpoints carry and no model needs: computed tables, and a tied head's second copy."""
    return name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"
