"""What transformers' modules cannot serve is refused at start, by the key that says so where there is one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    DiffLlamaConfig,
    FalconConfig,
    GptOssConfig,
    PreTrainedConfig,
    XGLMConfig,
)

from orchestra.errors import ConfigError, UnsupportedError
from orchestra.worker.hf_config import HfConfig
from orchestra.worker.hf_model import HfModel
from tests.checkpoints import make_checkpoint, write_checkpoint
from tests.worker.conftest import Checkpoints

CPU = torch.device("cpu")
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "num_attention_heads": 4,
}


def read(folder: Path, changes: dict[str, Any]) -> HfConfig:
    """A configuration with some values changed."""
    (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    return HfConfig.from_directory(folder)


def load(model_dir: Path, longest: int = 64) -> HfModel:
    config = HfConfig.from_directory(model_dir)
    return HfModel.load(model_dir, config, torch.float32, CPU, longest)[0]


# === by the configuration ===


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": None}, "model_type: None is none"),
        ({"model_type": "unheard-of"}, "model_type: 'unheard-of' is none"),
        # Code beside the weights is not run, whatever the file asks for.
        ({"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}, "model_type: 'own' is none"),
        ({"architectures": ["LlamaModel"]}, r"architectures: \['LlamaModel'\] is not LlamaFor"),
        ({"architectures": None}, r"architectures: \[\] is not LlamaForCausalLM"),
        ({"model_type": "t5"}, r"architectures: .* does not write text"),
        ({"model_type": "gemma3"}, "text_config: gemma3 is not a model of text alone"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config: "),
        ({"is_encoder_decoder": True}, "is_encoder_decoder: "),
        ({"add_cross_attention": True}, "add_cross_attention: "),
        ({"dtype": "float64"}, "dtype: 'float64'"),
        (
            {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]},
            "kv_lora_rank: ",
        ),
        (
            {"model_type": "jamba", "architectures": ["JambaForCausalLM"]},
            "layer_types: 'linear_attention'",
        ),
        (
            {"model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"]},
            "layer_types: 'chunked_attention'",
        ),
    ],
)
def test_refused_before_weights_are_read(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=f"^{message}"):
        read(tmp_path, changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "wide"}, r"config\.json: .*hidden_size"),
        ({"hidden_size": 33}, r"config\.json: .*hidden size \(33\)"),
        ({"eos_token_id": [-1]}, "eos_token_id: "),
        ({"max_position_embeddings": 0}, "max_position_embeddings: must be a positive"),
    ],
)
def test_wrong_values_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        read(tmp_path, changes)


def test_rotations_of_a_whole_batch_are_refused(tmp_path: Path) -> None:
    changes = {"original_max_position_embeddings": 64, "max_position_embeddings": 256}
    folder = make_checkpoint("phi3-longrope", tmp_path / "phi3", seed=1, **changes)
    load(folder, longest=64)
    with pytest.raises(UnsupportedError, match=r"^rope_parameters: .*--max-model-len 64"):
        load(folder, longest=65)


# === by how the model runs ===

_SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": None,
}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GptOssConfig(**_SIZES, head_dim=8, num_local_experts=4), "s_aux: "),
        (BertConfig(**_SIZES), "is_causal: tokens see those that come after"),
        (DiffLlamaConfig(**_SIZES), "num_hidden_layers: a layer attends more than once"),
        (
            XGLMConfig(vocab_size=64, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4),
            "num_hidden_layers: 0 of 2 layers attend through",
        ),
        (
            FalconConfig(**_SIZES, bos_token_id=0, eos_token_id=1),
            r"architectures: FalconForCausalLM fails .*\(KeyError",
        ),
    ],
    ids=lambda value: value.model_type if isinstance(value, PreTrainedConfig) else "",
)
def test_refused_when_watched(tmp_path: Path, config: PreTrainedConfig, message: str) -> None:
    write_checkpoint(config, tmp_path, seed=1)
    with pytest.raises(UnsupportedError, match=f"^{message}"):
        load(tmp_path)


# === by the weights ===


def test_weights_have_to_fit(checkpoint: Checkpoints, tmp_path: Path) -> None:
    weights = load_file(checkpoint("granite") / "model.safetensors")
    folder = make_checkpoint("granite", tmp_path / "granite", seed=1)
    norm = "model.norm.weight"

    def refuses(changed: dict[str, torch.Tensor], message: str) -> None:
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ConfigError, match=message):
            load(folder)

    without = {name: weight for name, weight in weights.items() if name != norm}
    refuses(without, f"^the checkpoint has no weight {norm}$")
    refuses({**weights, "left": torch.zeros(2)}, r"that the model does not: left$")
    refuses({**weights, norm: torch.zeros(3)}, "transformers cannot load|another shape")
    # What old checkpoints carry along is no fault.
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}
    save_file({**weights, **extra}, folder / "model.safetensors", {"format": "pt"})
    load(folder)


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    folder = make_checkpoint("granite", tmp_path / "granite", seed=1)
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ConfigError, match=r"^transformers cannot load the checkpoint"):
        load(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"^transformers cannot load the checkpoint"):
        load(folder)
