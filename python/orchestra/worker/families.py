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
    is_latent: bool = False
    """Whether keys and values are compressed into one vector per token."""
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
_DEEPSEEK = {
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
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
    "DeepseekV2ForCausalLM": Family(
        {**_DEEPSEEK, "n_routed_experts": 64, "n_shared_experts": 2, "moe_intermediate_size": 1407},
        is_latent=True,
    ),
    "DeepseekV3ForCausalLM": Family(
        {
            **_DEEPSEEK,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "moe_intermediate_size": 2048,
            "num_experts_per_tok": 8,
            "n_group": 8,
            "topk_group": 4,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "first_k_dense_replace": 3,
            "num_nextn_predict_layers": 1,
        },
        is_latent=True,
    ),
}
