"""What transformers makes of a checkpoint's `config.json`, and what of it the worker cannot serve.

The refusals here are those that a key gives away before any weight is read. What no key says, `hf_attention` finds by
watching the model run.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from orchestra.errors import ConfigError, UnsupportedError
from orchestra.worker.config_json import read_json
from orchestra.worker.model_config import (
    FULL,
    SLIDING,
    AttentionRule,
    checkpoint_dtype,
    eos_token_ids,
)


@dataclass(frozen=True)
class HfConfig:
    """A model by its files, before its weights are read."""

    source: Any
    """transformers' own configuration object."""
    architecture: str
    """The class of transformers that computes it."""
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    dtype: torch.dtype
    """Of the checkpoint's weights."""
    eos_token_ids: tuple[int, ...]

    @classmethod
    def from_directory(cls, model_dir: Path) -> "HfConfig":
        """Reads `config.json` and, where there is one, `generation_config.json`.

        Raises:
            ConfigError: a file is missing or not JSON, or transformers finds a value wrong.
            UnsupportedError: transformers has no such model, or the worker cannot serve it; the key is named.
        """
        config = read_json(model_dir / "config.json")
        generation = model_dir / "generation_config.json"
        generation_config = read_json(generation) if generation.exists() else {}
        if config.get("quantization_config") is not None:
            raise UnsupportedError("quantization_config: quantised checkpoints are not supported")
        source = _read(model_dir, config)
        architecture = _architecture(source, config)
        _refuse_unsupported(source)
        return cls(
            source=source,
            architecture=architecture,
            vocab_size=_positive(source, "vocab_size"),
            hidden_size=_positive(source, "hidden_size"),
            max_position_embeddings=_positive(source, "max_position_embeddings"),
            dtype=checkpoint_dtype(config),
            eos_token_ids=eos_token_ids(config, generation_config),
        )


@dataclass(frozen=True)
class HfShape(HfConfig):
    """The same model once it was loaded and watched: what its cache and its attention must be like."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    """Numbers that the widest MLP keeps of a token side by side."""
    attention: tuple[AttentionRule, ...]
    """Of each layer, in the order in which they run."""

    @property
    def key_order(self) -> str:
        """How the elements of a cached key lie: as the model's own code has them."""
        return self.architecture


def check_rotations(source: Any, longest: int) -> None:
    """Refuses a rotation that transformers would choose by the longest sequence of a whole batch.

    Args:
        source: transformers' configuration.
        longest: sequence that may ever run, tokens.

    Raises:
        UnsupportedError: sequences can be so long that `longrope` changes its frequencies, also under cached keys.
    """
    for rope in _ropes(source):
        original: Any = rope.get("original_max_position_embeddings")
        is_switching = rope.get("rope_type") == "longrope" and original is not None
        if is_switching and longest > original:
            raise UnsupportedError(
                f"rope_parameters: longrope changes beyond {original} positions, and these modules then turn every"
                f" sequence of a batch otherwise; --max-model-len {original} leaves it alone"
            )


def _read(model_dir: Path, config: Mapping[str, Any]) -> Any:
    kind = config.get("model_type")
    try:
        return AutoConfig.from_pretrained(model_dir, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise UnsupportedError(
            f"model_type: {kind!r} is none that the installed transformers computes itself"
        ) from error
    except Exception as error:
        # Whatever class the model's own checks raise: with a checkpoint that it knows, they object to a value.
        raise ConfigError(f"config.json: {' '.join(str(error).split())}") from error


def _architecture(source: Any, config: Mapping[str, Any]) -> str:
    """The class that is to be loaded: the one that the checkpoint was written by."""
    if source.get_text_config() is not source:
        raise UnsupportedError(f"text_config: {source.model_type} is not a model of text alone")
    names = config.get("architectures") or []
    if type(source) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedError(f"architectures: {names} does not write text token after token")
    name = str(MODEL_FOR_CAUSAL_LM_MAPPING[type(source)].__name__)
    if name not in names:
        raise UnsupportedError(f"architectures: {names} is not {name}")
    return name


def _refuse_unsupported(source: Any) -> None:
    for key in ("is_encoder_decoder", "add_cross_attention"):
        if getattr(source, key, False):
            raise UnsupportedError(f"{key}: a model of two parts is not supported")
    if getattr(source, "kv_lora_rank", None) is not None:
        raise UnsupportedError("kv_lora_rank: latent attention needs the native runner")
    for kind in getattr(source, "layer_types", None) or ():
        if kind not in (FULL, SLIDING):
            raise UnsupportedError(
                f"layer_types: {kind!r}, supported here are {FULL} and {SLIDING}"
            )


def _positive(source: Any, key: str) -> int:
    """A size by the name that transformers gives it in every model."""
    value = getattr(source, key, None)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{key}: must be a positive integer, is {value!r}")
    return value


def _ropes(source: Any) -> Iterator[Mapping[str, Any]]:
    """The rotations of a configuration: of all layers, or of each kind of layer."""
    given = getattr(source, "rope_parameters", None)
    if isinstance(given, Mapping):
        yield given
        yield from (rope for rope in given.values() if isinstance(rope, Mapping))
