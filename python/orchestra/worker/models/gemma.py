"""Gemma 2 and 3: norms on both sides of attention and MLP, and layers that see a window between those that see all.

The rest of what is special stands in `ModelConfig`: caps on scores and logits, the scaled embedding, norms whose weight
counts from 1, a rotation of their own for the layers with a window, and (Gemma 3) normalised heads.
"""

from dataclasses import dataclass

from torch import Tensor

from orchestra.worker.attention import AttentionBackend
from orchestra.worker.layers import GatedMLP, LoadContext, Op, RMSNorm
from orchestra.worker.model_config import ModelConfig
from orchestra.worker.row_kernels import add_
from orchestra.worker.self_attention import SelfAttention, load_output
from orchestra.worker.summing import Summing


@dataclass
class GemmaLayer:
    """Attention, then the MLP, each normalised before and after, and added to the residual stream."""

    input_norm: RMSNorm
    attention: SelfAttention
    output: Op
    output_norm: RMSNorm
    mlp_norm: RMSNorm
    mlp: GatedMLP
    mlp_output_norm: RMSNorm

    @classmethod
    def load(cls, context: LoadContext, index: int, config: ModelConfig) -> "GemmaLayer":
        """Loads `model.layers.<index>`."""
        name = f"model.layers.{index}"

        def norm(part: str) -> RMSNorm:
            return RMSNorm.load(context, f"{name}.{part}_layernorm", config.hidden_size, config)

        return cls(
            input_norm=norm("input"),
            attention=SelfAttention.load(context, f"{name}.self_attn", index, config),
            output=load_output(context, f"{name}.self_attn.o_proj", config),
            output_norm=norm("post_attention"),
            mlp_norm=norm("pre_feedforward"),
            mlp=GatedMLP.load(context, f"{name}.mlp", config),
            mlp_output_norm=norm("post_feedforward"),
        )

    def attend(self, hidden: Tensor, rotations: Tensor, backend: AttentionBackend) -> Tensor:
        """See `decoder.Layer`."""
        return self.attention(self.input_norm(hidden), rotations, backend)

    def finish(self, hidden: Tensor, attended: Tensor) -> Summing[Tensor]:
        """See `decoder.Layer`."""
        projected = self.output(attended)
        yield projected
        total = self.output_norm(projected)
        output = self.mlp(self.mlp_norm.after_sum(total, hidden))
        yield output
        return add_(self.mlp_output_norm(output), total)
