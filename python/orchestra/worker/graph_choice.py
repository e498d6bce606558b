"""Whether a rank records its decode steps, and what that costs."""

from typing import TYPE_CHECKING, cast

import torch

from orchestra.errors import ConfigError
from orchestra.worker.attention import AttentionBackend
from orchestra.worker.attention_choice import choose_attention
from orchestra.worker.config import WorkerConfig
from orchestra.worker.decode_graphs import (
    CudaRecorder,
    DecodeGraphs,
    RecordableAttention,
    decode_sizes,
)
from orchestra.worker.decode_inputs import DecodeInputs
from orchestra.worker.kv_cache import KvCacheSpec
from orchestra.worker.model_config import ModelConfig
from orchestra.worker.models import Model
from orchestra.worker.runner_choice import ModelShape

if TYPE_CHECKING:
    from orchestra.worker.hf_config import HfConfig

# What the driver keeps of one graph of some thousand launches: an estimate, to be measured on a GPU.
GRAPH_BYTES = 8 << 20


def attention_name(
    config: WorkerConfig, model_config: "ModelConfig | HfConfig", device: torch.device
) -> str:
    """Which attention backend a model is to have on a device, as `choose_attention` takes it."""
    # Latent attention has one KV head of which all query heads are the group. The kernels for GPUs have no room for so
    # wide a head, and there it is a matrix product of torch's.
    is_latent = isinstance(model_config, ModelConfig) and model_config.latent is not None
    return "torch" if is_latent and device.type != "cpu" else config.attention


def uses_graphs(
    config: WorkerConfig,
    model_config: "ModelConfig | HfConfig",
    spec: KvCacheSpec,
    device: torch.device,
) -> bool:
    """Whether decode steps are recorded.

    Raises:
        ConfigError: it was asked for and cannot be; or attention kernels were, and cannot.
    """
    if config.cuda_graphs == "off":
        return False
    attention = choose_attention(attention_name(config, model_config, device), spec, device)
    reasons = {
        "there is no GPU": device.type != "cuda",
        f"the attention backend is {attention}": attention != "triton",
        "the layers are divided among stages": config.stage.count > 1,
        "the tokens of a step are divided among ranks": config.context.size > 1,
        "transformers' modules compute the model": not isinstance(model_config, ModelConfig),
    }
    found = [reason for reason, is_so in reasons.items() if is_so]
    if found and config.cuda_graphs == "on":
        raise ConfigError(f"--cuda-graphs: {found[0]}", key="cuda_graphs")
    return not found and (config.cuda_graphs == "on" or config.num_ranks == 1)


def graph_bytes(config: WorkerConfig, shape: ModelShape, max_blocks: int) -> int:
    """Upper estimate of what recorded steps keep for good, beside what `assembly.step_bytes` counts.

    Args:
        config: of the worker.
        shape: of the model.
        max_blocks: of the longest sequence.
    """
    sizes = decode_sizes(config.max_num_seqs)
    # The graphs share one pool. What a step has live at once is counted as `step_bytes` does; its logits twice, once
    # where they are computed and once where they stay; the sums of splits apart.
    heads = 3 * shape.num_heads * shape.head_dim
    per_row = 4 * shape.hidden_size + 3 * shape.mlp_width + heads + 2 * shape.vocab_size
    tables = config.max_num_seqs * max_blocks
    numbers = config.max_num_seqs * per_row + tables
    from orchestra.worker.attention_triton import SPLIT_SUM_BYTES_MAX

    return numbers * torch.float32.itemsize + SPLIT_SUM_BYTES_MAX + len(sizes) * GRAPH_BYTES


def make_graphs(
    config: WorkerConfig,
    model: Model,
    attention: AttentionBackend,
    longest: int,
    device: torch.device,
) -> DecodeGraphs:
    """The decode steps of a rank, yet to be recorded.

    Args:
        config: of the worker.
        model: this rank's part.
        attention: over this rank's cache; a backend that can be recorded, as `uses_graphs` has found.
        longest: sequence that will ever run, tokens.
        device: where the model computes.
    """
    max_blocks = -(-longest // config.block_size)
    inputs = DecodeInputs(config.max_num_seqs, max_blocks, device)
    sizes = decode_sizes(config.max_num_seqs)
    recordable = cast("RecordableAttention", attention)
    return DecodeGraphs(model, recordable, inputs, sizes, longest, CudaRecorder())
