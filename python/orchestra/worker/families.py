"""What an architecture means beyond the keys of its `config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """One architecture. The flags are what no key says."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What a key means that is missing; null is a value."""
    qkv_bias: bool = False
    """Whether the query, key and value projections have biases whatever `attention_bias` says."""
    qk_norm: bool = False
    """Whether each query and key head is normalised before the rotation."""
    has_windows: bool = False
    """Whether `sliding_window` means something."""
    has_joined_projections: bool = False
    """Whether query, key and value are one weight in the checkpoint, and gate and up are one."""
    has_scaled_embedding: bool = False
    """Whether embeddings are multiplied by √hidden_size."""
    norm_offset: float = 0.0
    """Added to the weights of norms."""


# Qwen's files name a window that only `use_sliding_window` brings into force.
_QWEN_WINDOW = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_GEMMA = {
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family({"sliding_window": 4096}, has_windows=True),
    "Qwen2ForCausalLM": Family(_QWEN_WINDOW, qkv_bias=True, has_windows=True),
    "Qwen3ForCausalLM": Family({**_QWEN_WINDOW, "head_dim": 128}, qk_norm=True, has_windows=True),
    "Phi3ForCausalLM": Family(
        {"rms_norm_eps": 1e-5}, has_windows=True, has_joined_projections=True
    ),
    "MixtralForCausalLM": Family(
        {
            "rms_norm_eps": 1e-5,
            "rope_theta": 1_000_000.0,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
        has_windows=True,
    ),
    "Qwen3MoeForCausalLM": Family(
        {
            "use_sliding_window": False,
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
        qk_norm=True,
        has_windows=True,
    ),
    "Gemma2ForCausalLM": Family(
        {
            **_GEMMA,
            "sliding_window_pattern": 2,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        has_windows=True,
        has_scaled_embedding=True,
        norm_offset=1.0,
    ),
    "Gemma3ForCausalLM": Family(
        {
            **_GEMMA,
            "sliding_window_pattern": 6,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
        },
        qk_norm=True,
        has_windows=True,
        has_scaled_embedding=True,
        norm_offset=1.0,
    ),
}
