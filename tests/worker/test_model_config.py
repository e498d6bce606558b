"""`config.json` in its spellings, and what is refused by name."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from orchestra.errors import ConfigError, UnsupportedError
from orchestra.worker.families import FAMILIES
from orchestra.worker.model_config import ModelConfig
from orchestra.worker.models import LOADERS
from orchestra.worker.rope_config import RopeConfig
from orchestra.worker.rotary import inverse_frequencies
from tests.checkpoints import KINDS
from tests.worker.conftest import Checkpoints

MINIMAL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 3}
LATENT = {"architectures": ["DeepseekV2ForCausalLM"], "num_experts_per_tok": 2}


def parse(generation: dict[str, Any] | None = None, **changes: Any) -> ModelConfig:
    return ModelConfig.from_mappings({**MINIMAL, **changes}, generation or {})


def test_defaults() -> None:
    config = parse()
    assert (config.num_kv_heads, config.head_dim) == (4, 16)
    assert config.rope == RopeConfig(theta=10_000.0)
    assert config.dtype == torch.float32
    assert config.eos_token_ids == ()
    assert not any([config.qkv_bias, config.o_bias, config.mlp_bias, config.qk_norm])


def test_architectures_differ_by_flags() -> None:
    assert parse(architectures=["Qwen2ForCausalLM"]).qkv_bias
    assert not parse(architectures=["Qwen2ForCausalLM"]).o_bias
    assert parse(architectures=["Qwen3ForCausalLM"]).qk_norm
    assert parse(attention_bias=True).o_bias


def test_both_spellings_of_dtype_and_rotation() -> None:
    old = parse(torch_dtype="bfloat16", rope_theta=5e5, rope_scaling=LLAMA3)
    new = parse(dtype="bfloat16", rope_parameters={**LLAMA3, "rope_theta": 5e5})
    assert old == new
    assert new.rope.kind == "llama3"
    assert new.rope.theta == 5e5
    older = parse(rope_scaling={"type": "linear", "factor": 2.0})
    assert older.rope == RopeConfig(kind="linear", factor=2.0)


STRETCHED: dict[str, dict[str, Any]] = {
    "linear": {"factor": 8.0},
    "dynamic": {"factor": 8.0},
    "llama3": LLAMA3,
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 512},
    "yarn with its own bounds": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 300,
        "beta_fast": 16,
        "beta_slow": 2,
        "truncate": False,
        "mscale": 0.7,
        "mscale_all_dim": 0.2,
    },
    "yarn by ratio": {
        "rope_type": "yarn",
        "factor": None,
        "original_max_position_embeddings": 256,
        "attention_factor": 1.3,
    },
    "longrope": {
        "short_factor": [1.0 + i / 10 for i in range(64)],
        "long_factor": [2.0 + i for i in range(64)],
        "original_max_position_embeddings": 512,
    },
}


@pytest.mark.parametrize("case", STRETCHED)
@pytest.mark.parametrize("max_positions", [512, 2048])
def test_frequencies_agree_with_transformers(case: str, max_positions: int) -> None:
    scaling = {"rope_type": case, "rope_theta": 3e5, **STRETCHED[case]}
    shape: dict[str, Any] = {
        "hidden_size": 512,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
    }
    theirs, attention_factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](
        # It fills the dictionary in.
        LlamaConfig(**shape, rope_parameters=dict(scaling)),
        torch.device("cpu"),
        # Only this kind asks whether a sequence is long; the other that could does not differ up to the model's length.
        seq_len=max_positions if case == "longrope" else None,
    )
    rope = parse(**shape, rope_parameters=scaling).rope
    ours = inverse_frequencies(rope, 128, max_positions)
    assert rope.attention_factor == pytest.approx(attention_factor)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_first_spellings_of_longrope() -> None:
    factors = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    outer: dict[str, Any] = {"original_max_position_embeddings": 128}
    for name in ("su", "yarn", "longrope"):
        rope = parse(rope_scaling={"type": name, **factors}, **outer).rope
        assert (rope.kind, rope.factor) == ("longrope", 4.0)


def test_windows_by_layer() -> None:
    def windows(architecture: str, **changes: Any) -> list[int | None]:
        config = parse(architectures=[architecture], **changes)
        return [rule.window for rule in config.attention]

    assert windows("LlamaForCausalLM") == [None, None]
    assert windows("MistralForCausalLM") == [4096, 4096]
    assert windows("MistralForCausalLM", sliding_window=None) == [None, None]
    assert windows("Qwen2ForCausalLM", sliding_window=64) == [None, None]
    used = {"use_sliding_window": True, "sliding_window": 64}
    assert windows("Qwen2ForCausalLM", **used, max_window_layers=1) == [None, 64]
    assert windows("Qwen2ForCausalLM", **used, max_window_layers=0) == [64, 64]
    kinds = ["sliding_attention", "full_attention"]
    assert windows("Qwen3ForCausalLM", **used, layer_types=kinds) == [64, None]
    four = {"num_hidden_layers": 4, "sliding_window": 64}
    assert windows("Gemma2ForCausalLM", **four) == [64, None, 64, None]
    assert windows("Gemma3ForCausalLM", **four, sliding_window_pattern=3) == [64, 64, None, 64]


def test_gemma_in_both_spellings() -> None:
    architectures = ["Gemma3ForCausalLM"]
    linear = {"rope_type": "linear", "factor": 8.0}
    old = parse(architectures=architectures, rope_scaling=linear, rope_theta=1e6)
    new = parse(
        architectures=architectures,
        rope_parameters={
            "full_attention": {**linear, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )
    assert old == new
    assert old.rope == RopeConfig(1e6, "linear", factor=8.0)
    assert old.window_rope == RopeConfig(1e4)
    assert [old.rope_of(layer).theta for layer in range(2)] == [1e4, 1e4]
    assert old.attention[0].scale == 1 / 16
    assert old.embedding_scale == 8.0
    caps = parse(architectures=["Gemma2ForCausalLM"], final_logit_softcapping=None)
    assert (caps.attention[1].soft_cap, caps.logit_soft_cap) == (50.0, None)


def test_experts() -> None:
    assert parse().experts is None
    mixtral = parse(architectures=["MixtralForCausalLM"])
    assert mixtral.experts is not None
    assert (mixtral.experts.count, mixtral.experts.intermediate_size) == (8, 128)
    assert mixtral.mlp_width == 2 * (128 + 64)
    qwen = parse(
        architectures=["Qwen3MoeForCausalLM"],
        num_experts=16,
        moe_intermediate_size=32,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
    ).experts
    assert qwen is not None
    assert (qwen.count, qwen.per_token, qwen.is_normalised) == (16, 8, False)
    assert [qwen.is_in(layer) for layer in range(6)] == [False, True, False, False, False, True]


def test_latent_attention_has_one_head_in_the_cache() -> None:
    changes: dict[str, Any] = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "original_max_position_embeddings": 4096,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    }
    config = parse(**changes)
    assert (config.num_heads, config.num_kv_heads, config.head_dim) == (4, 1, 576)
    assert config.rotary_head_dim == 64
    assert config.rope.attention_factor == 1.0
    assert config.attention[0].scale == pytest.approx((0.1 * math.log(40) + 1) ** 2 / 192**0.5)
    assert config.experts is not None
    assert config.experts.is_in(3)
    assert not config.experts.is_in(2)
    assert config.num_draft_layers == 1


def test_every_family_has_its_layers_and_a_checkpoint(checkpoint: Checkpoints) -> None:
    assert FAMILIES.keys() == LOADERS.keys()
    made = {ModelConfig.from_directory(checkpoint(kind)).architecture for kind in KINDS}
    assert made == FAMILIES.keys()


def test_end_tokens_come_from_the_generation_config_first() -> None:
    assert parse(eos_token_id=2).eos_token_ids == (2,)
    assert parse({"eos_token_id": [3, 4]}, eos_token_id=2).eos_token_ids == (3, 4)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["MambaForCausalLM"]},
        {"architectures": None},
        {"hidden_act": "gelu"},
        {"hidden_activation": "gelu"},
        {"topk_method": "random", **EXPERTS},
        {"scoring_func": "tanh", **EXPERTS},
        {"moe_layer_freq": 2, **EXPERTS},
        {"attention_bias": True, **LATENT},
        {"rope_interleave": False, **LATENT},
        {"use_bidirectional_attention": True},
        {"quantization_config": {"quant_method": "gptq"}},
        {"sliding_window": 4096},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"rope_scaling": {"rope_type": "axial", "factor": 4.0}},
        {"partial_rotary_factor": 0.45},
        {"partial_rotary_factor": 1.5},
        {"layer_types": ["full_attention", "chunked_attention"]},
        {"dtype": "float8_e4m3fn"},
        {"head_dim": 15},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_unsupported_models_are_refused_by_key(changes: dict[str, Any]) -> None:
    key = next(iter(changes))
    with pytest.raises(UnsupportedError, match=f"^{key}"):
        parse(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"vocab_size": None},
        {"vocab_size": "100"},
        {"hidden_size": 0},
        {"num_hidden_layers": True},
        {"num_key_value_heads": 3},
        {"rms_norm_eps": -1},
        {"rope_theta": "big"},
        {"rope_scaling": {"type": "linear"}},
        {"rope_parameters": [1]},
        {"rope_parameters": {"full_attention": {}, "sliding_attention": 3}},
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}},
        {"rope_scaling": {"type": "longrope", "short_factor": ["1"] * 8, "long_factor": [1.0]}},
        {"layer_types": ["full_attention"]},
        {"layer_types": "full_attention"},
        {"num_experts_per_tok": 3, "num_experts": 2},
        {"mlp_only_layers": 3, **EXPERTS},
        {"n_group": 3, "topk_method": "noaux_tc", **EXPERTS},
        {"n_group": 4, "topk_method": "noaux_tc", "num_experts": 4, "num_experts_per_tok": 1},
        {"topk_group": 3, "n_group": 2, "topk_method": "noaux_tc", **EXPERTS},
        {"topk_group": 1, "n_group": 2, "topk_method": "noaux_tc", **EXPERTS},
        {"kv_lora_rank": 0, **LATENT},
        {"eos_token_id": "</s>"},
    ],
    ids=str,
)
def test_wrong_values_are_refused_by_key(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes)).removeprefix("rope_")):
        parse(**changes)


@pytest.mark.parametrize("content", [None, "{", "[]"], ids=["missing", "no JSON", "no object"])
def test_unreadable_file_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"^config\.json"):
        ModelConfig.from_directory(tmp_path)


def test_reads_what_transformers_writes(checkpoint: Checkpoints) -> None:
    directory = checkpoint("qwen3")
    config = ModelConfig.from_directory(directory)
    assert config.architecture == "Qwen3ForCausalLM"
    assert config.eos_token_ids == (1,)
    assert config.head_dim == json.loads((directory / "config.json").read_text())["head_dim"]
