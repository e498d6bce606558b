"""Whether a worker's KV can move to other workers, and the memory for it if so."""

import logging
from typing import TYPE_CHECKING

import numpy as np
import torch

from orchestra.errors import ConfigError, UnsupportedError
from orchestra.worker.config import WorkerConfig
from orchestra.worker.group import Group
from orchestra.worker.kv_cache import KvCacheSpec
from orchestra.worker.kv_memory import KvMemory, map_memory, num_scratch_blocks
from orchestra.worker.plan_channel import Follower
from orchestra.worker.plan_socket import RankLostError

if TYPE_CHECKING:
    from orchestra._core import KvPool

# Before the address where ranks are told it: a message of theirs is never empty.
_ADDRESS = b"kv:"

logger = logging.getLogger("orchestra.worker")


def make_kv_memory(
    config: WorkerConfig, spec: KvCacheSpec, num_blocks: int, device: torch.device, group: Group
) -> KvMemory | None:
    """Memory for a KV cache that other workers can reach; None where KV is not to move, or cannot.

    Rank 0 makes it, and the others map it. All ranks of a group call this together, but for one that replaces another,
    which was told where the memory is.

    Args:
        config: says what was asked for.
        spec: the shape of this rank's cache.
        num_blocks: of each rank.
        device: where this rank computes.
        group: its ends to the others.

    Raises:
        ConfigError: it was asked for by name, and the cache is too large for it.
        UnsupportedError: it was asked for by name, and this worker cannot have it.
        InternalError: this rank does not see rank 0's memory.
        RankLostError: rank 0 is gone.
    """
    if group.follower is not None:
        address = _address(group.follower)
        return map_memory(address, config.shard) if address else None
    pool = make_kv_pool(config, spec, num_blocks, device, group)
    if group.leader is not None:
        group.leader.broadcast(_ADDRESS + ("" if pool is None else pool.address).encode())
    return None if pool is None else KvMemory(np.asarray(pool), config.shard, pool)


def _address(follower: Follower) -> str:
    if follower.terms.num_blocks > 0:
        return follower.terms.memory
    message = follower.receive()
    if message is None:
        raise RankLostError("rank 0 has ended")
    return message.removeprefix(_ADDRESS).decode()


def make_kv_pool(
    config: WorkerConfig, spec: KvCacheSpec, num_blocks: int, device: torch.device, group: Group
) -> "KvPool | None":
    """Rank 0's part of `make_kv_memory`.

    Raises:
        ConfigError: it was asked for by name, and the cache is too large for it.
        UnsupportedError: it was asked for by name, and this worker cannot have it.
    """
    if config.kv_transfer == "off":
        if config.write_through:
            raise UnsupportedError("--write-through: KV does not move with --kv-transfer off")
        return None
    try:
        return _make(config, spec, num_blocks, device, group)
    except (ConfigError, UnsupportedError) as error:
        if config.kv_transfer != "auto" or config.write_through:
            raise
        logger.info("KV does not move to or from this worker: %s", error)
        return None


def _make(
    config: WorkerConfig, spec: KvCacheSpec, num_blocks: int, device: torch.device, group: Group
) -> "KvPool":
    leader, ranks = group.leader, config.shard.size
    obstacles = {
        "the KV cache is in an accelerator's memory": device.type != "cpu",
        "there is no prefix cache": not config.enable_prefix_cache,
        "the ranks are of several stages, or divide prompts": config.num_ranks > ranks,
        "the ranks do not share memory": ranks > 1 and not group.shares_memory,
        # One that hung, was replaced and wakes up would write to what is another's by then.
        "the ranks do not meet over a Unix socket": leader is not None
        and not leader.has_one_process_each,
    }
    for obstacle, is_there in obstacles.items():
        if is_there:
            raise UnsupportedError(f"--kv-transfer {config.kv_transfer}: {obstacle}")
    from orchestra import _core

    shape = (
        f"{spec.num_layers}x{spec.num_kv_heads}x{spec.head_dim}x{spec.block_size}/{spec.key_order}"
    )
    if ranks > 1:
        shape += f"/{ranks} ranks"
    weights = f"{config.model_name}/{config.weights_epoch}"
    return _core.KvPool(
        {
            # What each rank has of a layer is one to the pool.
            "num_layers": spec.num_layers * ranks,
            "num_blocks": num_blocks,
            "num_scratch_blocks": num_scratch_blocks(config.shard),
            "num_host_blocks": config.num_host_blocks,
            "layer_block_bytes": spec.layer_block_bytes,
            "layout": f"{weights}/{spec.dtype}/{shape}",
            "failure_domain": config.failure_domain,
            "write_through": config.write_through,
            "transports": config.kv_transfer,
            "address": config.kv_address,
        }
    )
