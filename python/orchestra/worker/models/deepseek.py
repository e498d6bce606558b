"""DeepSeek-V2 and V3: latent attention, and experts of which some are for every token."""

from dataclasses import dataclass

from torch import Tensor

from orchestra.worker.attention import AttentionBackend
from orchestra.worker.experts import ExpertNames, SparseMLP
from orchestra.worker.latent_attention import LatentAttention
from orchestra.worker.layers import GatedMLP, LoadContext, Op, RMSNorm, load_row_parallel
from orchestra.worker.model_config import ModelConfig
from orchestra.worker.row_kernels import add_
from orchestra.worker.summing import Summing

_EXPERTS = ExpertNames(gate="gate_proj", up="up_proj", down="down_proj")


@dataclass
class DeepseekLayer:
    """Attention, then the MLP or the experts, each over a normalised copy and added to the residual stream."""

    input_norm: RMSNorm
    attention: LatentAttention
    output: Op
    mlp_norm: RMSNorm
    mlp: Op

    @classmethod
    def load(cls, context: LoadContext, index: int, config: ModelConfig) -> "DeepseekLayer":
        """Loads `model.layers.<index>`."""
        assert config.latent is not None
        name, hidden = f"model.layers.{index}", config.hidden_size
        heads = context.communicator.shard.heads(config.num_heads, 1)
        width = config.latent.v_dim
        is_sparse = config.experts is not None and config.experts.is_in(index)
        return cls(
            input_norm=RMSNorm.load(context, f"{name}.input_layernorm", hidden, config),
            attention=LatentAttention.load(context, f"{name}.self_attn", index, config),
            output=load_row_parallel(
                context,
                f"{name}.self_attn.o_proj",
                [hidden, config.num_heads * width],
                heads.query_rows(width),
                bias=False,
            ),
            mlp_norm=RMSNorm.load(context, f"{name}.post_attention_layernorm", hidden, config),
            mlp=SparseMLP.load(context, f"{name}.mlp", config, _EXPERTS)
            if is_sparse
            else GatedMLP.load(context, f"{name}.mlp", config),
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
