"""Chooses what carries the collectives of a group, by where its ranks are."""

import logging
from datetime import timedelta

import torch
from torch.distributed.distributed_c10d import PrefixStore, Store

from orchestra.errors import ConfigError
from orchestra.worker.config import WorkerConfig
from orchestra.worker.node_group import NodeGroup
from orchestra.worker.parallel import GROUP_TIMEOUT, REGROUP_TIMEOUT, ProcessGroup
from orchestra.worker.renewable_group import AbortableCommunicator
from orchestra.worker.sharding import Shard
from orchestra.worker.shared_group import SharedMemoryGroup
from orchestra.worker.topology import Topology, own_node
from orchestra.worker.torch_group import TorchGroup

# More ranks than that, and torch's rings add up in an order that depends on where in a message a number stands.
_RING_RANKS_MAX = 2

logger = logging.getLogger("orchestra.worker")


def join_group(
    config: WorkerConfig, store: Store, device: torch.device, generation: int
) -> AbortableCommunicator:
    """Joins a group of this rank's, over what fits the place of its ranks.

    Args:
        config: says what was asked for, and the name of this rank's node.
        store: through which the ranks find each other.
        device: where the tensors live.
        generation: 0 for the first group of these ranks, one more for each that follows.

    Raises:
        ConfigError: something was asked for where it cannot be.
        RankLostError: not every rank came.
    """
    shard = config.shard
    timeout = REGROUP_TIMEOUT if generation else GROUP_TIMEOUT
    topology = _topology(config, shard, PrefixStore(f"topology-{generation}", store), timeout)
    is_cpu, is_one_node = device.type == "cpu", len(topology.nodes) == 1
    _check_place(config.collectives, is_cpu=is_cpu, is_one_node=is_one_node)
    use_shared_memory = is_cpu and config.collectives != "gloo"
    if is_one_node and use_shared_memory:
        return SharedMemoryGroup(shard, store, generation)
    if is_one_node and not is_cpu and _adds_up_in_memory(config, store, device, generation):
        from orchestra.worker.symmetric_group import SymmetricGroup

        return SymmetricGroup(shard, store, device, generation)
    if is_one_node and (shard.size <= _RING_RANKS_MAX or not is_cpu):
        return ProcessGroup(shard, store, device, generation)
    return NodeGroup(
        *(shard, topology, store, device),
        generation=generation,
        timeout=timeout,
        use_shared_memory=use_shared_memory,
    )


def join_context_group(
    config: WorkerConfig, store: Store, device: torch.device
) -> SharedMemoryGroup | TorchGroup:
    """Joins the ranks that divide prompts with this one: those with the same shard of the same stage.

    Args:
        config: says what was asked for, and the name of this rank's node.
        store: through which these ranks, and no others, find each other.
        device: where the tensors live.

    Raises:
        RankLostError: not every rank came.
    """
    shard = Shard(config.context.rank, config.context.size)
    topology = _topology(config, shard, PrefixStore("topology", store), GROUP_TIMEOUT)
    if len(topology.nodes) == 1 and device.type == "cpu" and config.collectives != "gloo":
        return SharedMemoryGroup(shard, store)
    return TorchGroup(shard, store, device, GROUP_TIMEOUT)


def _check_place(asked: str, *, is_cpu: bool, is_one_node: bool) -> None:
    """Refuses what was asked for where it cannot be."""
    if asked == "shm" and not (is_cpu and is_one_node):
        message = "--collectives: shm is for CPU ranks of one node"
        raise ConfigError(message, key="collectives")
    if asked in ("nccl", "nvlink") and is_cpu:
        raise ConfigError(f"--collectives: {asked} is for GPUs", key="collectives")
    if asked == "nvlink" and not is_one_node:
        raise ConfigError("--collectives: nvlink is for GPUs of one node", key="collectives")


def _adds_up_in_memory(
    config: WorkerConfig, store: Store, device: torch.device, generation: int
) -> bool:
    """Whether the GPUs of one node add up in each other's memory; the same on every rank."""
    if config.collectives == "nccl":
        return False
    from orchestra.worker.nvlink import reason_against

    reason = reason_against(
        *(config.shard, PrefixStore(f"gpus-{generation}", store), device),
        REGROUP_TIMEOUT if generation else GROUP_TIMEOUT,
        regroups=config.regroup_timeout_s > 0,
    )
    if reason and config.collectives == "nvlink":
        raise ConfigError(f"--collectives: {reason}", key="collectives")
    if reason:
        logger.info("NCCL adds up: %s", reason)
    return not reason


def _topology(config: WorkerConfig, shard: Shard, store: Store, timeout: timedelta) -> Topology:
    """Where the ranks of a group are, which the store is of."""
    return Topology.agree(store, shard, config.node or own_node(), timeout)
