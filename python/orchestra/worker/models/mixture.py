"""Mixtral and Qwen 3 MoE: Llama's layer around a mixture of experts."""

from orchestra.worker.experts import ExpertNames, SparseMLP
from orchestra.worker.layers import LoadContext
from orchestra.worker.model_config import ModelConfig
from orchestra.worker.models.llama import LlamaLayer

_MIXTRAL = ExpertNames(gate="w1", up="w3", down="w2")
_QWEN3 = ExpertNames(gate="gate_proj", up="up_proj", down="down_proj")


def load_mixtral_layer(context: LoadContext, index: int, config: ModelConfig) -> LlamaLayer:
    """Loads `model.layers.<index>`."""
    name = f"model.layers.{index}.block_sparse_moe"
    mlp = SparseMLP.load(context, name, config, _MIXTRAL)
    return LlamaLayer.around(mlp, context, index, config)


def load_qwen3_layer(context: LoadContext, index: int, config: ModelConfig) -> LlamaLayer:
    """Loads `model.layers.<index>`: experts, or one MLP where the model has none in this layer."""
    if config.experts is None or not config.experts.is_in(index):
        return LlamaLayer.load(context, index, config)
    mlp = SparseMLP.load(context, f"model.layers.{index}.mlp", config, _QWEN3)
    return LlamaLayer.around(mlp, context, index, config)
