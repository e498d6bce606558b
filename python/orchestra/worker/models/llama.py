"""Llama and its close relatives: Mistral without windows, Qwen 2 (biases), Qwen 3 (head norms)."""

from dataclasses import dataclass

from torch import Tensor

from orchestra.worker.attention import AttentionBackend
from orchestra.worker.layers import (
    GatedMLP,
    LoadContext,
    RMSNorm,
    RowParallel,
    VocabEmbedding,
    VocabHead,
    load_vocab_rows,
)
from orchestra.worker.loader import Progress
from orchestra.worker.model_config import ModelConfig
from orchestra.worker.rotary import RotaryTable
from orchestra.worker.self_attention import SelfAttention


@dataclass
class DecoderLayer:
    """One layer: attention, then the MLP, each over a normalised copy and added to the residual stream."""

    input_norm: RMSNorm
    attention: SelfAttention
    output: RowParallel
    mlp_norm: RMSNorm
    mlp: GatedMLP

    @classmethod
    def load(cls, context: LoadContext, index: int, config: ModelConfig) -> "DecoderLayer":
        """Loads `model.layers.<index>`."""
        name = f"model.layers.{index}"
        hidden, eps = config.hidden_size, config.rms_norm_eps
        heads = context.communicator.shard.heads(config.num_heads, config.num_kv_heads)
        columns = heads.query_rows(config.head_dim)
        output_shape = [hidden, config.num_heads * config.head_dim]
        return cls(
            input_norm=RMSNorm.load(context, f"{name}.input_layernorm", hidden, eps),
            attention=SelfAttention.load(context, f"{name}.self_attn", index, config),
            output=RowParallel.load(
                context, f"{name}.self_attn.o_proj", output_shape, columns, bias=config.o_bias
            ),
            mlp_norm=RMSNorm.load(context, f"{name}.post_attention_layernorm", hidden, eps),
            mlp=GatedMLP.load(
                context, f"{name}.mlp", hidden, config.intermediate_size, bias=config.mlp_bias
            ),
        )

    def attend(self, hidden: Tensor, rotations: Tensor, backend: AttentionBackend) -> Tensor:
        """The first half up to the output projection: `[T, H]` to `[T, heads * head_dim]`."""
        return self.attention(self.input_norm(hidden), rotations, backend)

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The rest of the layer; works on any subset of the tokens."""
        hidden = self.output(attended).add_(hidden)
        return self.mlp(self.mlp_norm(hidden)).add_(hidden)


class Llama:
    """This rank's part of the model.

    Args:
        embedding: token ids to `[T, H]`.
        layers: in order.
        norm: before the head.
        head: `[N, H]` to logits.
        rotary: rotations by position.
    """

    def __init__(
        self,
        embedding: VocabEmbedding,
        layers: list[DecoderLayer],
        norm: RMSNorm,
        head: VocabHead,
        rotary: RotaryTable,
    ) -> None:
        self._embedding = embedding
        self._layers = layers
        self._norm = norm
        self._head = head
        self._rotary = rotary

    @classmethod
    def load(
        cls, context: LoadContext, config: ModelConfig, max_positions: int, progress: Progress
    ) -> "Llama":
        """Loads this rank's slices.

        Args:
            context: where from and where to.
            config: the model's shape.
            max_positions: longest sequence that will run.
            progress: told after each layer.
        """
        vocab, hidden = config.vocab_size, config.hidden_size
        parts = config.num_layers + 2
        embedding = VocabEmbedding.load(context, "model.embed_tokens.weight", vocab, hidden)
        progress(1, parts)
        layers = []
        for index in range(config.num_layers):
            layers.append(DecoderLayer.load(context, index, config))
            progress(index + 2, parts)
        norm = RMSNorm.load(context, "model.norm", hidden, config.rms_norm_eps)
        weight = embedding.weight
        if not config.tie_word_embeddings:
            weight = load_vocab_rows(context, "lm_head.weight", vocab, hidden)
        head = VocabHead(weight, vocab, context.communicator)
        context.reader.finish(_is_ignored)
        progress(parts, parts)
        rotary = RotaryTable(config.rope, config.head_dim, max_positions, context.device)
        return cls(embedding, layers, norm, head, rotary)

    def forward(
        self, token_ids: Tensor, positions: Tensor, attention: AttentionBackend, rows: Tensor | None
    ) -> Tensor | None:
        """Runs one step; see `models.Model`."""
        hidden = self._embedding(token_ids)
        rotations = self._rotary(positions)
        *first, last = self._layers
        for layer in first:
            hidden = layer.finish(hidden, layer.attend(hidden, rotations, attention))
        # Every token leaves its KV in the last layer too, but only those that are sampled go further.
        attended = last.attend(hidden, rotations, attention)
        if rows is not None:
            if rows.shape[0] == 0:
                return None
            hidden, attended = hidden.index_select(0, rows), attended.index_select(0, rows)
        return self._head(self._norm(last.finish(hidden, attended)))


def _is_ignored(name: str) -> bool:
    """Weights that some checkpoints carry and no model needs: computed tables, and a tied head's second copy."""
    return name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"
