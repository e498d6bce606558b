"""`config.json` in its spellings, and what is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from orchestra.errors import ConfigError, UnsupportedError
from orchestra.worker.model_config import ModelConfig, RopeConfig
from orchestra.worker.rotary import inverse_frequencies
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


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_frequencies_agree_with_transformers(kind: str) -> None:
    scaling = {**LLAMA3, "rope_type": kind, "rope_theta": 3e5}
    theirs, factor = ROPE_INIT_FUNCTIONS[kind](
        LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=scaling),
        torch.device("cpu"),
    )
    rope = parse(rope_parameters=scaling).rope
    assert factor == 1.0
    torch.testing.assert_close(inverse_frequencies(rope, 128), theirs, rtol=1e-6, atol=0)


def test_end_tokens_come_from_the_generation_config_first() -> None:
    assert parse(eos_token_id=2).eos_token_ids == (2,)
    assert parse({"eos_token_id": [3, 4]}, eos_token_id=2).eos_token_ids == (3, 4)


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["MambaForCausalLM"]},
        {"architectures": None},
        {"hidden_act": "gelu"},
        {"quantization_config": {"quant_method": "gptq"}},
        {"sliding_window": 4096},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"partial_rotary_factor": 0.5},
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
