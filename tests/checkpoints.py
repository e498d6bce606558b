"""Small random-weight checkpoints in the Hugging Face layout, and the tokeniser that goes with them."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    DeepseekV2Config,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OlmoeConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
    StableLmConfig,
)

END_OF_TEXT = "<|end|>"
SPECIAL_TOKENS = ["<|begin|>", END_OF_TEXT, "<|user|>", "<|assistant|>", "<|system|>"]
VOCAB_SIZE = 512
MAX_POSITIONS = 2048
# Wide enough that the two best logits of a random model are rarely close.
INITIALIZER_RANGE = 0.08

CHAT_TEMPLATE = (
    "{{ '<|begin|>' }}{% for message in messages %}{{ '<|' + message['role'] + '|>' }}"
    "{{ message['content'] }}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

# What the tokeniser learns its pairs from.
_TEXT = """\
The quick brown fox jumps over the lazy dog. A model reads tokens and writes tokens, one after the other.
Every request gets exactly one ending; every queue has a bound and a named answer when it is full.
In the beginning there was a prompt, and the prompt was without form; and the worker said, let there be tokens.
She sells sea shells by the sea shore. Peter Piper picked a peck of pickled peppers. Größe, naïve, café, 東京, 🙂.
def schedule(self, now): return [request for request in self.waiting if request.fits(now)]
{"name": "orchestra", "numbers": [0, 1, 2, 3, 5, 8, 13, 21], "nested": {"true": true, "null": null}}
"""

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": MAX_POSITIONS,
    "initializer_range": INITIALIZER_RANGE,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
_YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 256,
}
_DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
_LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}

_WINDOW = {"use_sliding_window": True, "sliding_window": 21}
_MIXED_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
_LATENT = {
    "num_key_value_heads": 8,
    "head_dim": 10,
    "q_lora_rank": 44,
    "kv_lora_rank": 38,
    "qk_rope_head_dim": 10,
    "qk_nope_head_dim": 12,
    "v_head_dim": 14,
    "num_experts_per_tok": 3,
    "n_shared_experts": 2,
    "moe_intermediate_size": 28,
}

# Each kind: the configuration class and what differs from the shape above.
_KINDS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "llama-tied": (LlamaConfig, {"tie_word_embeddings": True}),
    "llama-biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama3-rope": (LlamaConfig, {"rope_parameters": _LLAMA3_ROPE}),
    "linear-rope": (LlamaConfig, {"rope_parameters": _LINEAR_ROPE}),
    "yarn-rope": (LlamaConfig, {"rope_parameters": _YARN_ROPE}),
    "dynamic-rope": (LlamaConfig, {"rope_parameters": _DYNAMIC_ROPE}),
    # Nothing divides evenly but the heads: a vocabulary of a prime size, an odd intermediate size, 4 KV heads.
    "llama-odd": (
        LlamaConfig,
        {
            "vocab_size": 509,
            "hidden_size": 96,
            "intermediate_size": 171,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
        },
    ),
    "mistral": (MistralConfig, {"sliding_window": None}),
    # Windows that are no multiple of a block and shorter than the prompts of the tests.
    "mistral-window": (MistralConfig, {"sliding_window": 21}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": True}),
    "qwen2-window": (Qwen2Config, {**_WINDOW, "max_window_layers": 1}),
    "qwen3": (Qwen3Config, {}),
    "phi3": (Phi3Config, {"sliding_window": 21}),
    "phi3-longrope": (
        Phi3Config,
        {
            "num_attention_heads": 4,
            "original_max_position_embeddings": MAX_POSITIONS,
            "rope_parameters": {
                "rope_type": "longrope",
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0, 1.1, 1.2, 1.4, 1.9, 3.0],
                "long_factor": [1.0, 2.1, 4.2, 8.4, 16.9, 31.0],
            },
        },
    ),
    # The caps are low enough to bend what random weights give.
    "gemma2": (
        Gemma2Config,
        {
            "sliding_window": 21,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": (Gemma3TextConfig, {"sliding_window": 21, "layer_types": _MIXED_LAYERS}),
    "mixtral": (MixtralConfig, {"num_local_experts": 6, "num_experts_per_tok": 2}),
    # The first layer has no experts; the weights of a token's experts do not add up to 1.
    "qwen3-moe": (
        Qwen3MoeConfig,
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 52,
            "mlp_only_layers": [0],
        },
    ),
    "qwen3-moe-normalised": (
        Qwen3MoeConfig,
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 52,
            "norm_topk_prob": True,
            "decoder_sparse_step": 2,
            **_WINDOW,
        },
    ),
    "deepseek2": (
        DeepseekV2Config,
        {**_LATENT, "q_lora_rank": None, "n_routed_experts": 6, "first_k_dense_replace": 1},
    ),
    "deepseek2-grouped": (
        DeepseekV2Config,
        {
            **_LATENT,
            "n_routed_experts": 12,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.7,
        },
    ),
    "deepseek3": (
        DeepseekV3Config,
        {
            **_LATENT,
            "n_routed_experts": 12,
            "n_group": 4,
            "topk_group": 2,
            "first_k_dense_replace": 1,
            "rope_parameters": {**_YARN_ROPE, "mscale": 1.0, "mscale_all_dim": 0.7},
        },
    ),
    "qwen3-window": (Qwen3Config, {**_WINDOW, "layer_types": _MIXED_LAYERS}),
}
KINDS = tuple(_KINDS)
# Kinds that only transformers' own modules compute.
_OTHER_KINDS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    # Three layers with a window of 21 and a rotation, then one with neither.
    "cohere2": (Cohere2Config, {"num_hidden_layers": 4, "sliding_window": 21}),
    "gpt-neox": (GPTNeoXConfig, {"rotary_pct": 0.5}),
    # Every factor that a Granite has is far from 1.
    "granite": (
        GraniteConfig,
        {
            "embedding_multiplier": 3.0,
            "attention_multiplier": 0.4,
            "residual_multiplier": 0.6,
            "logits_scaling": 0.7,
        },
    ),
    "olmo2": (Olmo2Config, {}),
    "olmoe": (
        OlmoeConfig,
        {"head_dim": 8, "num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 48},
    ),
    # No rotation: positions are embedded, counted from 2.
    "opt": (OPTConfig, {"ffn_dim": 176, "word_embed_proj_dim": 64, "dropout": 0.0}),
    # The second layer of three does not rotate.
    "smollm3": (SmolLM3Config, {"no_rope_layers": [1, 0, 1]}),
    "stablelm": (
        StableLmConfig,
        {"head_dim": 8, "use_parallel_residual": True, "qk_layernorm": True},
    ),
}
OTHER_KINDS = tuple(_OTHER_KINDS)
# One kind of each way to build a layer.
FAMILIES = (
    "llama",
    "mistral-window",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma2",
    "gemma3",
    "mixtral",
    "qwen3-moe",
)


def make_checkpoint(kind: str, directory: Path, seed: int, **overrides: Any) -> Path:
    """Writes a checkpoint of random weights.

    Args:
        kind: one of `KINDS` or `OTHER_KINDS`.
        directory: to create.
        seed: the same seed gives the same weights.
        overrides: further values for the configuration.

    Returns:
        `directory`.
    """
    config_class, differences = {**_KINDS, **_OTHER_KINDS}[kind]
    return write_checkpoint(config_class(**{**_SHAPE, **differences, **overrides}), directory, seed)


def write_checkpoint(config: PreTrainedConfig, directory: Path, seed: int) -> Path:
    """Writes a checkpoint of random weights for a configuration; see `make_checkpoint`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _randomise_vectors(model)
    model.generation_config.eos_token_id = 1
    model.generation_config.pad_token_id = None
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def write_tokenizer(directory: Path) -> None:
    """Writes a byte-level BPE of at most `VOCAB_SIZE` tokens, trained on a fixed text, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 3,  # fits the odd vocabulary too
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT.splitlines(), trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[0],
        "eos_token": END_OF_TEXT,
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def _randomise_vectors(model: PreTrainedModel) -> None:
    """Norm weights and biases too: at 1 and 0 a mistake with them would not show."""
    with torch.no_grad():
        for weight in model.state_dict().values():
            if weight.dim() == 1:
                weight.add_(torch.randn_like(weight), alpha=0.2)
