"""The shape of a model, read from the Hugging Face `config.json` of its checkpoint."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from orchestra.errors import ConfigError, UnsupportedError

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# What each architecture means where its config.json has no key for it.
_ARCHITECTURES: dict[str, dict[str, bool]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {},
    "Qwen2ForCausalLM": {"qkv_bias": True},
    "Qwen3ForCausalLM": {"qk_norm": True},
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: the base frequency and how it is stretched to longer contexts."""

    theta: float = 10_000.0
    kind: str = "default"
    """`default`, `linear` or `llama3`."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Everything about a model that the worker needs to build it. Names follow `config.json`."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    """Whether each query and key head is normalised before the rotation."""
    dtype: torch.dtype
    """Of the checkpoint's weights."""
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_directory(cls, model_dir: Path) -> "ModelConfig":
        """Reads `config.json` and, where there is one, `generation_config.json`.

        Raises:
            ConfigError: a file is missing or not JSON, or a value has the wrong type or range.
            UnsupportedError: the model needs something that the worker does not have; the key is named.
        """
        config = _read_json(model_dir / "config.json")
        generation = model_dir / "generation_config.json"
        generation_config = _read_json(generation) if generation.exists() else {}
        return cls.from_mappings(config, generation_config)

    @classmethod
    def from_mappings(
        cls, config: Mapping[str, Any], generation_config: Mapping[str, Any]
    ) -> "ModelConfig":
        """Like `from_directory`, of the files' contents."""
        architecture = _architecture(config)
        _refuse_unsupported(config)
        flags = _ARCHITECTURES[architecture]
        attention_bias = bool(config.get("attention_bias"))
        num_heads = _positive(config, "num_attention_heads")
        num_kv_heads = _positive(config, "num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise ConfigError(
                f"num_key_value_heads: {num_kv_heads} do not divide {num_heads} attention heads"
            )
        hidden_size = _positive(config, "hidden_size")
        head_dim = _positive(config, "head_dim", hidden_size // num_heads)
        if head_dim % 2:
            raise UnsupportedError(f"head_dim: {head_dim} is odd, rotation needs pairs")
        return cls(
            architecture=architecture,
            vocab_size=_positive(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=_positive(config, "intermediate_size"),
            num_layers=_positive(config, "num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            max_position_embeddings=_positive(config, "max_position_embeddings"),
            rms_norm_eps=_number(config, "rms_norm_eps", 1e-6),
            rope=_rope(config),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias or flags.get("qkv_bias", False),
            o_bias=attention_bias,
            mlp_bias=bool(config.get("mlp_bias")),
            qk_norm=flags.get("qk_norm", False),
            dtype=_dtype(config),
            eos_token_ids=_eos_token_ids(config, generation_config),
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path.name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path.name} must hold a JSON object")
    return content


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or []
    known = [name for name in names if name in _ARCHITECTURES]
    if not known:
        expected = ", ".join(_ARCHITECTURES)
        raise UnsupportedError(f"architectures: {names} has none of {expected}")
    return str(known[0])


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    """Names the first key that asks for something the worker would silently get wrong."""
    if config.get("quantization_config") is not None:
        raise UnsupportedError("quantization_config: quantised checkpoints are not supported")
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedError(f"hidden_act: {activation!r} is not supported, only 'silu'")
    has_window = config.get("sliding_window") is not None
    if has_window and config.get("use_sliding_window", True):
        raise UnsupportedError(
            f"sliding_window: {config['sliding_window']} is set, windows are not supported"
        )
    kinds = set(config.get("layer_types") or ["full_attention"])
    if kinds != {"full_attention"}:
        raise UnsupportedError(f"layer_types: {sorted(kinds)}, only 'full_attention' is supported")


def _rope(config: Mapping[str, Any]) -> RopeConfig:
    # transformers 5 writes `rope_parameters`; before, `rope_theta` stood beside an optional `rope_scaling`.
    key = "rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling"
    given = config.get(key) or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"{key}: must be an object")
    share = given.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if share not in (None, 1.0):
        raise UnsupportedError(f"partial_rotary_factor: {share} is not supported, only 1.0")
    theta = _number(given, "rope_theta", config.get("rope_theta", RopeConfig.theta), key)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, kind, _number(given, "factor", None, key))
    if kind == "llama3":
        return RopeConfig(
            theta,
            kind,
            _number(given, "factor", None, key),
            _number(given, "low_freq_factor", None, key),
            _number(given, "high_freq_factor", None, key),
            int(_number(given, "original_max_position_embeddings", None, key)),
        )
    raise UnsupportedError(f"{key}.rope_type: {kind!r}, supported are default, linear and llama3")


def _eos_token_ids(
    config: Mapping[str, Any], generation_config: Mapping[str, Any]
) -> tuple[int, ...]:
    ids = generation_config.get("eos_token_id", config.get("eos_token_id"))
    if ids is None:
        return ()
    ids = ids if isinstance(ids, list) else [ids]
    if not all(isinstance(token_id, int) and token_id >= 0 for token_id in ids):
        raise ConfigError(f"eos_token_id: {ids} must be token ids")
    return tuple(ids)


def _dtype(config: Mapping[str, Any]) -> torch.dtype:
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    if name not in _DTYPES:
        raise UnsupportedError(f"dtype: {name!r}, supported are {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _positive(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{key}: must be a positive integer, is {value!r}")
    return value


def _number(config: Mapping[str, Any], key: str, default: Any, within: str = "") -> float:
    value = config.get(key)
    value = default if value is None else value
    name = f"{within}.{key}" if within else key
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ConfigError(f"{name}: must be a positive number, is {value!r}")
    return float(value)
