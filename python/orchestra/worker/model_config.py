"""The shape of a model, read from the Hugging Face `config.json` of its checkpoint."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from orchestra.errors import ConfigError, UnsupportedError
from orchestra.worker.config_json import natural, number, optional_number, positive, read_json
from orchestra.worker.expert_config import ExpertConfig, parse_experts
from orchestra.worker.families import FAMILIES, Family
from orchestra.worker.latent_config import LatentConfig, parse_latent
from orchestra.worker.rope_config import RopeConfig, parse_ropes

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Of the MLP's gates; `layers` computes them.
ACTIVATIONS = ("silu", "gelu_pytorch_tanh")
FULL, SLIDING = "full_attention", "sliding_attention"


@dataclass(frozen=True)
class AttentionRule:
    """What the tokens of a layer see, and how their scores are made."""

    window: int | None = None
    """How many tokens, the last ones and itself, a token sees; None: all before it."""
    scale: float | None = None
    """Multiplies the scores; None: 1 / √head_dim."""
    soft_cap: float | None = None
    """Bends every score `s` to `cap · tanh(s / cap)`; None: not bent."""


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
    window_rope: RopeConfig
    """Of layers with a window; the same in most models."""
    attention: tuple[AttentionRule, ...]
    """Of each layer."""
    activation: str
    """Of the MLP's gates; one of `ACTIVATIONS`."""
    norm_offset: float
    """Added to the weights of norms."""
    embedding_scale: float | None
    """Multiplies the embeddings; None: they are taken as they are."""
    logit_soft_cap: float | None
    """Bends every logit `x` to `cap · tanh(x / cap)`; None: not bent."""
    has_joined_projections: bool
    """Whether query, key and value are one weight in the checkpoint, and gate and up are one."""
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    """Whether each query and key head is normalised before the rotation."""
    experts: ExpertConfig | None
    """None: every layer has one MLP."""
    latent: LatentConfig | None
    """None: every KV head has keys and values of its own. Else all heads share one of `head_dim` elements."""
    num_draft_layers: int
    """Layers behind the last one that only help to draft tokens; the worker does not run them."""
    dtype: torch.dtype
    """Of the checkpoint's weights."""
    eos_token_ids: tuple[int, ...]

    @property
    def key_order(self) -> str:
        """How the elements of a cached key lie: as `rotary` wants them, the two of a rotated pair side by side."""
        return "pairs"

    @property
    def mlp_width(self) -> int:
        """Numbers that the widest MLP keeps of a token side by side, between its first weight and its last."""
        if self.experts is None:
            return self.intermediate_size
        # Every expert has its own copy of the token too.
        chosen = self.experts.per_token * (self.experts.intermediate_size + self.hidden_size)
        return max(self.intermediate_size, chosen + self.experts.shared_size)

    @property
    def rotary_head_dim(self) -> int:
        """Elements of a head that the rotation covers, those that it leaves alone included."""
        return self.head_dim if self.latent is None else self.latent.rope_dim

    def rope_of(self, layer: int) -> RopeConfig:
        """The rotation of a layer."""
        return self.rope if self.attention[layer].window is None else self.window_rope

    @classmethod
    def from_directory(cls, model_dir: Path) -> "ModelConfig":
        """Reads `config.json` and, where there is one, `generation_config.json`.

        Raises:
            ConfigError: a file is missing or not JSON, or a value has the wrong type or range.
            UnsupportedError: the model needs something that the worker does not have; the key is named.
        """
        config = read_json(model_dir / "config.json")
        generation = model_dir / "generation_config.json"
        generation_config = read_json(generation) if generation.exists() else {}
        return cls.from_mappings(config, generation_config)

    @classmethod
    def from_mappings(
        cls, config: Mapping[str, Any], generation_config: Mapping[str, Any]
    ) -> "ModelConfig":
        """Like `from_directory`, of the files' contents."""
        architecture = _architecture(config)
        family = FAMILIES[architecture]
        config = {**family.defaults, **config}
        _refuse_unsupported(config, family)
        attention_bias = bool(config.get("attention_bias"))
        num_heads = positive(config, "num_attention_heads")
        num_kv_heads = positive(config, "num_key_value_heads", num_heads)
        if num_heads % num_kv_heads:
            raise ConfigError(
                f"num_key_value_heads: {num_kv_heads} do not divide {num_heads} attention heads"
            )
        hidden_size = positive(config, "hidden_size")
        latent = parse_latent(config) if family.is_latent else None
        head_dim = positive(config, "head_dim", hidden_size // num_heads)
        rotary_head_dim = head_dim if latent is None else latent.rope_dim
        if rotary_head_dim % 2:
            raise UnsupportedError(f"head_dim: {rotary_head_dim} is odd, rotation needs pairs")
        num_layers = positive(config, "num_hidden_layers")
        rope, window_rope = parse_ropes(config, rotary_head_dim)
        return cls(
            architecture=architecture,
            vocab_size=positive(config, "vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=positive(config, "intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads if latent is None else 1,
            head_dim=head_dim if latent is None else latent.cached_dim,
            max_position_embeddings=positive(config, "max_position_embeddings"),
            rms_norm_eps=number(config, "rms_norm_eps", 1e-6),
            rope=rope,
            window_rope=window_rope,
            attention=_attention(config, family, _scale(config, latent, rope)),
            activation=_activation(config)[1],
            norm_offset=family.norm_offset,
            embedding_scale=math.sqrt(hidden_size) if family.has_scaled_embedding else None,
            logit_soft_cap=optional_number(config, "final_logit_softcapping"),
            has_joined_projections=family.has_joined_projections,
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=attention_bias or family.qkv_bias,
            o_bias=attention_bias,
            mlp_bias=bool(config.get("mlp_bias")),
            qk_norm=family.qk_norm,
            latent=latent,
            num_draft_layers=natural(config, "num_nextn_predict_layers", 0),
            experts=parse_experts(config),
            dtype=checkpoint_dtype(config),
            eos_token_ids=eos_token_ids(config, generation_config),
        )


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or []
    known = [name for name in names if name in FAMILIES]
    if not known:
        expected = ", ".join(FAMILIES)
        raise UnsupportedError(f"architectures: {names} has none of {expected}")
    return str(known[0])


def _refuse_unsupported(config: Mapping[str, Any], family: Family) -> None:
    """Names the first key that asks for something the worker would silently get wrong."""
    if config.get("quantization_config") is not None:
        raise UnsupportedError("quantization_config: quantised checkpoints are not supported")
    key, activation = _activation(config)
    if activation not in ACTIVATIONS:
        expected = ", ".join(ACTIVATIONS)
        raise UnsupportedError(f"{key}: {activation!r} is not supported, only {expected}")
    if config.get("use_bidirectional_attention"):
        raise UnsupportedError("use_bidirectional_attention: tokens see only those before them")
    window = config.get("sliding_window")
    if window is not None and not family.has_windows:
        raise UnsupportedError(f"sliding_window: {window} is set, this architecture has none")
    kinds = config.get("layer_types")
    supported = [FULL, SLIDING] if family.has_windows else [FULL]
    if kinds is not None:
        if not isinstance(kinds, list) or len(kinds) != config.get("num_hidden_layers"):
            raise ConfigError("layer_types: must be a list with a kind for every layer")
        unknown = [kind for kind in kinds if kind not in supported]
        if unknown:
            expected = ", ".join(supported)
            raise UnsupportedError(f"layer_types: {unknown[0]!r}, supported here are {expected}")


def _activation(config: Mapping[str, Any]) -> tuple[str, Any]:
    """The key that names the activation, and the name."""
    key = "hidden_act" if config.get("hidden_activation") is None else "hidden_activation"
    return key, config.get(key, "silu")


def _attention(
    config: Mapping[str, Any], family: Family, scale: float | None
) -> tuple[AttentionRule, ...]:
    soft_cap = optional_number(config, "attn_logit_softcapping")
    windows = _windows(config, positive(config, "num_hidden_layers"), family)
    return tuple(AttentionRule(window, scale, soft_cap) for window in windows)


def _scale(
    config: Mapping[str, Any], latent: LatentConfig | None, rope: RopeConfig
) -> float | None:
    """What multiplies the scores; None: 1 / √head_dim."""
    if latent is not None:
        return rope.score_factor / math.sqrt(latent.query_dim)
    divisor = optional_number(config, "query_pre_attn_scalar")
    return None if divisor is None else 1 / math.sqrt(divisor)


def _windows(config: Mapping[str, Any], num_layers: int, family: Family) -> tuple[int | None, ...]:
    """How many tokens the layers see, one by one."""
    is_used = family.has_windows and config.get("use_sliding_window", True)
    if not is_used or config.get("sliding_window") is None:
        return (None,) * num_layers
    window = positive(config, "sliding_window")
    kinds = config.get("layer_types")
    if kinds is not None:
        return tuple(window if kind == SLIDING else None for kind in kinds)
    # Without a list, the last of every `sliding_window_pattern` layers sees everything (Gemma), or the first
    # `max_window_layers` do (Qwen), or none does.
    layers = range(num_layers)
    if config.get("sliding_window_pattern") is not None:
        pattern = positive(config, "sliding_window_pattern")
        return tuple(window if (index + 1) % pattern else None for index in layers)
    first = natural(config, "max_window_layers", 0)
    return tuple(window if index >= first else None for index in layers)


def eos_token_ids(
    config: Mapping[str, Any], generation_config: Mapping[str, Any]
) -> tuple[int, ...]:
    """The tokens that end a text; what `generation_config.json` says counts first."""
    ids = generation_config.get("eos_token_id", config.get("eos_token_id"))
    if ids is None:
        return ()
    ids = ids if isinstance(ids, list) else [ids]
    if not all(isinstance(token_id, int) and token_id >= 0 for token_id in ids):
        raise ConfigError(f"eos_token_id: {ids} must be token ids")
    return tuple(ids)


def checkpoint_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The numbers of the checkpoint's weights."""
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    if name not in _DTYPES:
        raise UnsupportedError(f"dtype: {name!r}, supported are {', '.join(_DTYPES)}")
    return _DTYPES[name]
