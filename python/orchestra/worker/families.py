"""What an architecture means beyond the keys of its `config.json`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """One architecture. The flags are what no key says."""

    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What a key means that is missing; null is a value."""
    qkv_bias: bool = False
    """Whether the query, key and value projections have biases whatever `attention_bias` says."""
    qk_norm: bool = False
    """Whether each query and key head is normalised before the rotation."""
    has_windows: bool = False
    """Whether `sliding_window` means something."""


# Qwen's files name a window that only `use_sliding_window` brings into force.
_QWEN_WINDOW = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}

FAMILIES: dict[str, Family] = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family({"sliding_window": 4096}, has_windows=True),
    "Qwen2ForCausalLM": Family(_QWEN_WINDOW, qkv_bias=True, has_windows=True),
    "Qwen3ForCausalLM": Family({**_QWEN_WINDOW, "head_dim": 128}, qk_norm=True, has_windows=True),
}
