"""Random-weight checkpoints of a stated size, for speed and not for sense."""

from __future__ import annotations

import shutil
from pathlib import Path

# More than any bench asks for.
MAX_POSITIONS = 8192
SHAPES = {
    # The 60 M model: 83 MB of bf16 weights are read per decode step.
    "60m": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 32000,
    },
    "300m": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 20,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 32000,
    },
    # 190 M parameters, of which a token uses 42 M: 4 of 32 experts in each layer.
    "moe": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "moe_intermediate_size": 384,
        "num_experts": 32,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "vocab_size": 32000,
    },
}


def random_model(shape: str, folder: Path, tokenizer_from: Path) -> Path:
    """Writes a random bf16 Llama of `SHAPES[shape]`, or a Qwen 3 MoE where it has experts, once; returns its folder.

    The tokenizer files are the demo model's: prompts are token ids and outputs are counted, so the text that the ids
    beyond its vocabulary would have does not matter.
    """
    has_experts = "num_experts" in SHAPES[shape]
    target = folder / f"{'qwen3' if has_experts else 'llama'}-{shape}"
    if (target / "model.safetensors").exists():
        return target
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

    torch.manual_seed(0)
    kind = Qwen3MoeConfig if has_experts else LlamaConfig
    config = kind(
        **SHAPES[shape],
        max_position_embeddings=MAX_POSITIONS,
        initializer_range=0.05,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = AutoModelForCausalLM.from_config(config)
    model.to(torch.bfloat16).save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer_from / name, target / name)
    return target
