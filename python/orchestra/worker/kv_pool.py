"""Whether a worker's KV can move to other workers, and the memory for it if so."""

import logging
from typing import TYPE_CHECKING

import torch

from orchestra.errors import ConfigError, UnsupportedError
from orchestra.worker.config import WorkerConfig
from orchestra.worker.kv_cache import KvCacheSpec

if TYPE_CHECKING:
    from orchestra._core import KvPool

logger = logging.getLogger("orchestra.worker")


def make_kv_pool(
    config: WorkerConfig, spec: KvCacheSpec, num_blocks: int, device: torch.device
) -> "KvPool | None":
    """Memory for a KV cache of this shape that other workers can reach; None where KV is not to move, or cannot.

    Raises:
        ConfigError: it was asked for by name, and the cache is too large for it.
        UnsupportedError: it was asked for by name, and this worker cannot have it.
    """
    if config.kv_transfer == "off":
        if config.write_through:
            raise UnsupportedError("--write-through: KV does not move with --kv-transfer off")
        return None
    try:
        return _make(config, spec, num_blocks, device)
    except (ConfigError, UnsupportedError) as error:
        if config.kv_transfer != "auto" or config.write_through:
            raise
        logger.info("KV does not move to or from this worker: %s", error)
        return None


def _make(
    config: WorkerConfig, spec: KvCacheSpec, num_blocks: int, device: torch.device
) -> "KvPool":
    obstacles = {
        "the KV cache is in an accelerator's memory": device.type != "cpu",
        "the worker has several ranks": config.num_ranks > 1,
        "there is no prefix cache": not config.enable_prefix_cache,
    }
    for obstacle, is_there in obstacles.items():
        if is_there:
            raise UnsupportedError(f"--kv-transfer {config.kv_transfer}: {obstacle}")
    from orchestra import _core

    shape = (
        f"{spec.num_layers}x{spec.num_kv_heads}x{spec.head_dim}x{spec.block_size}/{spec.key_order}"
    )
    weights = f"{config.model_name}/{config.weights_epoch}"
    return _core.KvPool(
        {
            "num_layers": spec.num_layers,
            "num_blocks": num_blocks,
            "num_host_blocks": config.num_host_blocks,
            "layer_block_bytes": spec.layer_block_bytes,
            "layout": f"{weights}/{spec.dtype}/{shape}",
            "failure_domain": config.failure_domain,
            "write_through": config.write_through,
            "transports": config.kv_transfer,
            "address": config.kv_address,
        }
    )
