"""The experts of a mixture, as `config.json` describes them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from orchestra.errors import ConfigError, UnsupportedError
from orchestra.worker.config_json import natural, number, positive

# As the families name the number of experts.
_COUNT_KEYS = ("n_routed_experts", "num_experts", "num_local_experts")
_METHODS = ("greedy", "group_limited_greedy", "noaux_tc")


@dataclass(frozen=True)
class ExpertConfig:
    """The experts that take the place of the MLP in some layers or all."""

    count: int
    per_token: int
    """Experts that each token goes to."""
    intermediate_size: int
    """Of one expert."""
    shared_size: int = 0
    """Intermediate size of the experts that every token goes to, together; 0: there are none."""
    is_normalised: bool = False
    """Whether the weights of a token's experts are made to add up to 1."""
    scale: float = 1.0
    """Multiplies the weights after that."""
    is_sigmoid: bool = False
    """Whether an expert's score is a sigmoid of its own; else all of them are one softmax."""
    has_choice_bias: bool = False
    """Whether something is added to the scores where experts are chosen, but not where they are weighted."""
    num_groups: int = 1
    """Groups of equally many experts, of which each token uses some only."""
    groups_per_token: int = 1
    sparse_step: int = 1
    """Every so many layers there are experts."""
    dense_layers: frozenset[int] = frozenset()
    """Where there are none all the same."""

    def is_in(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return (layer + 1) % self.sparse_step == 0 and layer not in self.dense_layers


def parse_experts(config: Mapping[str, Any]) -> ExpertConfig | None:
    """Reads the experts; None where the model has none.

    Raises:
        ConfigError: a value has the wrong type or range.
        UnsupportedError: tokens are sent to experts in a way that the worker does not have.
    """
    key = next((key for key in _COUNT_KEYS if config.get(key) is not None), None)
    if key is None:
        return None
    count, per_token = positive(config, key), positive(config, "num_experts_per_tok")
    if per_token > count:
        raise ConfigError(f"num_experts_per_tok: {per_token} of {count} experts")
    method = config.get("topk_method") or "greedy"
    if method not in _METHODS:
        raise UnsupportedError(f"topk_method: {method!r}, supported are {', '.join(_METHODS)}")
    scoring = config.get("scoring_func") or "softmax"
    if scoring not in ("softmax", "sigmoid"):
        raise UnsupportedError(f"scoring_func: {scoring!r}, supported are softmax and sigmoid")
    if config.get("moe_layer_freq", 1) != 1:
        raise UnsupportedError(f"moe_layer_freq: {config['moe_layer_freq']}, supported is 1")
    groups, chosen_groups = _groups(config, count, per_token) if method != "greedy" else (1, 1)
    size = positive(config, "moe_intermediate_size", positive(config, "intermediate_size"))
    return ExpertConfig(
        count=count,
        per_token=per_token,
        intermediate_size=size,
        shared_size=size * natural(config, "n_shared_experts", 0),
        is_normalised=bool(config.get("norm_topk_prob")),
        scale=number(config, "routed_scaling_factor", 1.0),
        is_sigmoid=scoring == "sigmoid",
        has_choice_bias=method == "noaux_tc",
        num_groups=groups,
        groups_per_token=chosen_groups,
        sparse_step=positive(config, "decoder_sparse_step", 1),
        dense_layers=_dense_layers(config),
    )


def _groups(config: Mapping[str, Any], count: int, per_token: int) -> tuple[int, int]:
    groups, chosen = positive(config, "n_group", 1), positive(config, "topk_group", 1)
    if count % groups or count // groups < 2:
        raise ConfigError(f"n_group: {groups} do not divide {count} experts into groups of several")
    if chosen > groups or chosen * (count // groups) < per_token:
        raise ConfigError(f"topk_group: {chosen} of {groups} groups have no {per_token} experts")
    return groups, chosen


def _dense_layers(config: Mapping[str, Any]) -> frozenset[int]:
    listed = config.get("mlp_only_layers") or []
    if not isinstance(listed, list) or not all(isinstance(index, int) for index in listed):
        raise ConfigError("mlp_only_layers: must be a list of layers")
    return frozenset([*listed, *range(natural(config, "first_k_dense_replace", 0))])
