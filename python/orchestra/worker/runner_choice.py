"""Which code computes a model: our own, or transformers' modules over our cache."""

import importlib.util
import logging
import os
from typing import TYPE_CHECKING, Protocol

from orchestra.errors import ConfigError, UnsupportedError
from orchestra.worker.config import WorkerConfig
from orchestra.worker.loader import Progress
from orchestra.worker.model_config import AttentionRule, ModelConfig
from orchestra.worker.models import Model

if TYPE_CHECKING:
    import torch

    from orchestra.worker.hf_config import HfConfig

logger = logging.getLogger("orchestra.worker")


class ModelShape(Protocol):
    """What a rank has to know of any model to serve it. Names follow `ModelConfig`."""

    @property
    def vocab_size(self) -> int: ...  # noqa: D102
    @property
    def hidden_size(self) -> int: ...  # noqa: D102
    @property
    def mlp_width(self) -> int: ...  # noqa: D102
    @property
    def num_layers(self) -> int: ...  # noqa: D102
    @property
    def num_heads(self) -> int: ...  # noqa: D102
    @property
    def num_kv_heads(self) -> int: ...  # noqa: D102
    @property
    def head_dim(self) -> int: ...  # noqa: D102
    @property
    def key_order(self) -> str: ...  # noqa: D102
    @property
    def attention(self) -> tuple[AttentionRule, ...]: ...  # noqa: D102
    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...  # noqa: D102


def read_model_config(config: WorkerConfig) -> "ModelConfig | HfConfig":
    """Reads the model's own files, and decides by them who computes it.

    Returns:
        Our own description of the model for the native runner, transformers' for the other.

    Raises:
        ConfigError: a setting, or a file of the checkpoint, is wrong.
        UnsupportedError: no runner that may be taken has the model.
    """
    if config.runner == "hf":
        return _read_hf(config)
    try:
        return _read_native(config)
    except UnsupportedError as error:
        if config.runner == "native":
            raise
        model_config = _read_hf_instead(config, error)
        logger.info(
            "transformers' own modules compute this model, the native runner does not: %s", error
        )
        return model_config


def load_hf(
    config: WorkerConfig,
    model_config: "HfConfig",
    dtype: "torch.dtype",
    device: "torch.device",
    longest: int,
    progress: Progress,
) -> tuple[Model, ModelShape]:
    """Loads a model of transformers, and tries it out.

    Args:
        config: what was asked for.
        model_config: by `read_model_config`.
        dtype: to compute in.
        device: to compute on.
        longest: sequence that will ever run, tokens.
        progress: told when the weights are loaded, and when they were tried out.

    Raises:
        ConfigError: the weights are missing, damaged, or do not fit the configuration.
        UnsupportedError: the model needs more than causal attention over its own keys and values.
    """
    from orchestra.worker.hf_check import check_against_own_attention
    from orchestra.worker.hf_model import HfModel

    model, shape = HfModel.load(config.model_dir, model_config, dtype, device, longest)
    progress(1, 2)
    check_against_own_attention(model, shape, dtype, device, longest)
    progress(2, 2)
    return model, shape


def _read_native(config: WorkerConfig) -> ModelConfig:
    model_config = ModelConfig.from_directory(config.model_dir)
    config.shard.heads(model_config.num_heads, model_config.num_kv_heads)
    config.stage.layers(model_config.num_layers)
    if config.expert_parallel and model_config.experts is None:
        message = f"--expert-parallel: {model_config.architecture} has no experts"
        raise ConfigError(message, key="expert_parallel")
    return model_config


def _read_hf(config: WorkerConfig) -> "HfConfig":
    if importlib.util.find_spec("transformers") is None:
        raise ConfigError(
            "--runner: transformers is not installed; it comes with the extra orchestra[hf]",
            key="runner",
        )
    if config.shard.size > 1:
        raise ConfigError("--tp: transformers' own modules run on one rank", key="tp")
    if config.stage.count > 1:
        message = "--pipeline-parallel: transformers' own modules run on one rank"
        raise ConfigError(message, key="pipeline_parallel")
    if config.context.size > 1:
        message = "--context-parallel: transformers' own modules run on one rank"
        raise ConfigError(message, key="context_parallel")
    if config.expert_parallel:
        message = "--expert-parallel: transformers' own modules run on one rank"
        raise ConfigError(message, key="expert_parallel")
    # Read by transformers when it is imported: nothing is ever asked of a server.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from orchestra.worker.hf_config import HfConfig

    return HfConfig.from_directory(config.model_dir)


def _read_hf_instead(config: WorkerConfig, error: UnsupportedError) -> "HfConfig":
    """After the native runner refused; an error names both reasons."""
    try:
        return _read_hf(config)
    except (ConfigError, UnsupportedError) as other:
        raise UnsupportedError(f"{error}; transformers' own modules: {other}") from other
