"""Attention over compressed keys and values, as `config.json` describes it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestra.errors import UnsupportedError
from orchestra.worker.config_json import positive


@dataclass(frozen=True)
class LatentConfig:
    """Keys and values of all heads as one vector per token, from which each head makes its own."""

    q_rank: int | None
    """Size of what the queries are made from; None: of the hidden state itself."""
    kv_rank: int
    """Size of what keys and values are made from."""
    rope_dim: int
    """Elements of a query, and of the one key that all heads share, that carry the position."""
    nope_dim: int
    """Elements of a head's query and key that do not."""
    v_dim: int
    """Elements of a head's value."""

    @property
    def query_dim(self) -> int:
        """Elements of a head's query as the checkpoint has them."""
        return self.nope_dim + self.rope_dim

    @property
    def cached_dim(self) -> int:
        """Elements that the cache keeps of a token as its key, and again as its value."""
        return self.rope_dim + self.kv_rank


def parse_latent(config: Mapping[str, Any]) -> LatentConfig:
    """Reads the shape.

    Raises:
        ConfigError: a value has the wrong type or range.
        UnsupportedError: the projections have something that the worker does not load.
    """
    if config.get("attention_bias"):
        raise UnsupportedError("attention_bias: compressed projections have no biases here")
    if not config.get("rope_interleave", True):
        raise UnsupportedError("rope_interleave: only rotations of neighbouring elements are there")
    latent = LatentConfig(
        q_rank=None if config.get("q_lora_rank") is None else positive(config, "q_lora_rank"),
        kv_rank=positive(config, "kv_lora_rank"),
        rope_dim=positive(config, "qk_rope_head_dim"),
        nope_dim=positive(config, "qk_nope_head_dim"),
        v_dim=positive(config, "v_head_dim"),
    )
    if latent.cached_dim % 2:
        raise UnsupportedError(f"kv_lora_rank: {latent.kv_rank} is odd")
    return latent
