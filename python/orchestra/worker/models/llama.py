"""Llama and its close relatives: Mistral, Qwen 2 (biases), Qwen 3 (head norms), Phi-3 (joined projections)."""

from dataclasses import dataclass

from torch import Tensor

from orchestra.worker.attention import AttentionBackend
from orchestra.worker.layers import GatedMLP, LoadContext, Op, RMSNorm
from orchestra.worker.model_config import ModelConfig
from orchestra.worker.row_kernels import add_
from orchestra.worker.self_attention import SelfAttention, load_output
from orchestra.worker.summing import Summing


@dataclass
class LlamaLayer:
    """Attention, then the MLP, each over a normalised copy and added to the residual stream."""

    input_norm: RMSNorm
    attention: SelfAttention
    output: Op
    mlp_norm: RMSNorm
    mlp: Op

    @classmethod
    def load(cls, context: LoadContext, index: int, config: ModelConfig) -> "LlamaLayer":
        """Loads `model.layers.<index>`."""
        name = f"model.layers.{index}.mlp"
        return cls.around(GatedMLP.load(context, name, config), context, index, config)

    @classmethod
    def around(cls, mlp: Op, context: LoadContext, index: int, config: ModelConfig) -> "LlamaLayer":
        """Loads what stands around the MLP."""
        name, hidden = f"model.layers.{index}", config.hidden_size
        return cls(
            input_norm=RMSNorm.load(context, f"{name}.input_layernorm", hidden, config),
            attention=SelfAttention.load(context, f"{name}.self_attn", index, config),
            output=load_output(context, f"{name}.self_attn.o_proj", config),
            mlp_norm=RMSNorm.load(context, f"{name}.post_attention_layernorm", hidden, config),
            mlp=mlp,
        )

    def attend(self, hidden: Tensor, rotations: Tensor, backend: AttentionBackend) -> Tensor:
        """See `decoder.Layer`."""
        return self.attention(self.input_norm(hidden), rotations, backend)

    def finish(self, hidden: Tensor, attended: Tensor) -> Summing[Tensor]:
        """See `decoder.Layer`."""
        total = self.output(attended)
        yield total
        output = self.mlp(self.mlp_norm.after_sum(total, hidden))
        yield output
        return add_(output, total)
