"""Rotary position embedding as `config.json` describes it, in the spellings of several years."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestra.errors import ConfigError, UnsupportedError
from orchestra.worker.config_json import number, numbers, optional_number

KINDS = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class RopeConfig:
    """The base frequency and how it is stretched to longer contexts. Names follow `config.json`."""

    theta: float = 10_000.0
    kind: str = "default"
    """One of `KINDS`."""
    partial_rotary_factor: float = 1.0
    """Share of each head that is rotated: its first elements."""
    factor: float = 1.0
    original_max_position_embeddings: int = 8192
    attention_factor: float = 1.0
    """Multiplies every rotated query and key (`yarn` and `longrope`)."""
    score_factor: float = 1.0
    """Multiplies the scores of latent attention (`yarn` with `mscale_all_dim`)."""
    low_freq_factor: float = 1.0
    """Of `llama3`: rotations with at most so many turns in the original context are slowed down wholly."""
    high_freq_factor: float = 4.0
    """Of `llama3`: those with at least so many stay."""
    beta_fast: float = 32.0
    """Of `yarn`: rotations with at least so many turns in the original context stay."""
    beta_slow: float = 1.0
    """Of `yarn`: those with at most so many are slowed down wholly."""
    truncate: bool = True
    """Of `yarn`: whether the two bounds are rounded to whole pairs."""
    short_factor: tuple[float, ...] = ()
    """Of `longrope`: divides the frequency of each pair in contexts up to the original length."""
    long_factor: tuple[float, ...] = ()
    """Of `longrope`: the same in longer contexts."""

    def rotary_dim(self, head_dim: int) -> int:
        """How many elements of each head are rotated."""
        return int(head_dim * self.partial_rotary_factor)


def parse_ropes(config: Mapping[str, Any], head_dim: int) -> tuple[RopeConfig, RopeConfig]:
    """Reads the rotation of layers that see everything and of those that see a window (often the same).

    Raises:
        ConfigError: a value has the wrong type or range.
        UnsupportedError: the rotation is of a kind that the worker does not have.
    """
    # transformers 5 writes `rope_parameters`, one for each kind of layer where they differ. Before, `rope_theta` stood
    # beside an optional `rope_scaling`, which windows did not share where they had a frequency of their own.
    key = "rope_parameters" if config.get("rope_parameters") is not None else "rope_scaling"
    given = config.get(key) or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"{key}: must be an object")
    local_theta = config.get("rope_local_base_freq")
    local = {"rope_theta": local_theta} if local_theta is not None else None
    if "full_attention" in given:
        local = given.get("sliding_attention") or local
        given = given["full_attention"]
        key += ".full_attention"
        if not isinstance(given, Mapping) or not isinstance(local, Mapping | None):
            raise ConfigError(f"{key}: must be an object, and so must that of sliding_attention")
    rope = _rope(config, given, key, head_dim)
    return rope, rope if local is None else _rope(config, local, "sliding_attention", head_dim)


def _rope(
    config: Mapping[str, Any], given: Mapping[str, Any], key: str, head_dim: int
) -> RopeConfig:
    share = number(given, "partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)
    theta = number(given, "rope_theta", config.get("rope_theta", RopeConfig.theta), key)
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "su" or (kind == "yarn" and "short_factor" in given):
        kind = "longrope"  # as the first checkpoints of Phi-3 call it
    if kind not in KINDS:
        raise UnsupportedError(f"{key}.rope_type: {kind!r}, supported are {', '.join(KINDS)}")
    plain = RopeConfig(theta, kind, share)
    rotary_dim = plain.rotary_dim(head_dim)
    if share > 1 or rotary_dim % 2 or not rotary_dim:
        raise UnsupportedError(
            f"partial_rotary_factor: {share} of a head of {head_dim} is not a number of pairs"
        )
    if kind == "default":
        return plain
    if kind in ("linear", "dynamic"):
        return RopeConfig(theta, kind, share, number(given, "factor", None, key))
    return _stretched(config, given, key, plain, rotary_dim // 2)


def _stretched(
    config: Mapping[str, Any], given: Mapping[str, Any], key: str, plain: RopeConfig, pairs: int
) -> RopeConfig:
    """The kinds that know the length of the original context."""
    # What stands beside the object counts first: so Phi-3 has it.
    outer = config.get("original_max_position_embeddings")
    inner = given.get("original_max_position_embeddings")
    longest = config.get("max_position_embeddings")
    found = {"original_max_position_embeddings": inner if outer is None else outer}
    original = int(number(found, "original_max_position_embeddings", longest, key))
    kind = plain.kind
    base = (plain.theta, kind, plain.partial_rotary_factor)
    if kind == "llama3":
        low = number(given, "low_freq_factor", None, key)
        high = number(given, "high_freq_factor", None, key)
        factor = number(given, "factor", None, key)
        return RopeConfig(*base, factor, original, low_freq_factor=low, high_freq_factor=high)
    factor = number(given, "factor", number(config, "max_position_embeddings", None) / original)
    attention = optional_number(given, "attention_factor", key)
    if kind == "longrope":
        if attention is None:
            attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        short = numbers(given, "short_factor", pairs, key)
        long = numbers(given, "long_factor", pairs, key)
        return RopeConfig(*base, factor, original, attention, short_factor=short, long_factor=long)
    return RopeConfig(
        *base,
        factor,
        original,
        _yarn_attention_factor(given, factor, key) if attention is None else attention,
        beta_fast=number(given, "beta_fast", RopeConfig.beta_fast, key),
        beta_slow=number(given, "beta_slow", RopeConfig.beta_slow, key),
        truncate=bool(given.get("truncate", True)),
        score_factor=_growth(given, factor, "mscale_all_dim", key) ** 2,
    )


def _yarn_attention_factor(given: Mapping[str, Any], factor: float, key: str) -> float:
    """0.1 · ln(factor) + 1, as the paper recommends (Peng et al., 2023, equation 22), or DeepSeek's variant."""
    if given.get("mscale") and given.get("mscale_all_dim"):
        growth = _growth(given, factor, "mscale", key)
        return growth / _growth(given, factor, "mscale_all_dim", key)
    return 0.1 * math.log(max(factor, 1.0)) + 1


def _growth(given: Mapping[str, Any], factor: float, name: str, key: str) -> float:
    """0.1 · m · ln(factor) + 1; 1 where `m` is 0 or missing."""
    scale = number(given, name, None, key) if given.get(name) else 0.0
    return 0.1 * scale * math.log(max(factor, 1.0)) + 1
