"""Whether the GPUs of a group can add up by themselves, in each other's memory."""

from collections.abc import Sequence
from datetime import timedelta
from importlib.util import find_spec
from itertools import permutations

import torch
from torch._C._autograd import DeviceType
from torch._C._distributed_c10d import _detect_dma_connectivity  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from orchestra.worker.sharding import Shard

# What the kernel is built for.
CAPABILITY_MIN = (8, 0)
# Torch's rendezvous before this counted those of a process, not those of a group: a new rank never met old ones.
REGROUPING_TORCH = (2, 15)


def reason_against(
    shard: Shard, store: Store, device: torch.device, timeout: timedelta, *, regroups: bool
) -> str:
    """Why the GPUs of one node cannot add up by themselves, found alike on every rank; empty where they can.

    Args:
        shard: this rank's place.
        store: through which the ranks tell each other which GPUs they have.
        device: this rank's.
        timeout: how long to wait for the others.
        regroups: whether the ranks go on with another group after one of them was lost.

    Raises:
        RuntimeError: not every rank came in time.
    """
    store.set(f"gpu-of/{shard.rank}", str(device.index))
    keys = [f"gpu-of/{rank}" for rank in range(shard.size)]
    store.wait(keys, timeout)
    gpus = [int(store.get(key)) for key in keys]
    return obstacle(gpus, regroups=regroups)


def obstacle(gpus: Sequence[int], *, regroups: bool) -> str:
    """Why GPUs, by their numbers, cannot add up by themselves; empty where they can."""
    if find_spec("triton") is None:
        return "triton is not installed"
    release = tuple(map(int, torch.__version__.split(".")[:2]))
    if regroups and release < REGROUPING_TORCH:
        return "a replaced rank can join the others only with torch 2.15 or newer"
    if len(set(gpus)) < len(gpus):
        return "ranks share a GPU, or see different ones under the same number"
    if max(gpus) >= torch.cuda.device_count():
        return "a rank has a GPU that another does not see"
    if min(map(torch.cuda.get_device_capability, gpus)) < CAPABILITY_MIN:
        return "the GPUs are too old for the kernel"
    # Signals are added to from afar, which over PCIe not every machine can do.
    links = _detect_dma_connectivity(DeviceType.CUDA, "nvlink").matrix
    for own, other in permutations(gpus, 2):
        if links[own][other] == 0 or not torch.cuda.can_device_access_peer(own, other):
            return f"GPUs {own} and {other} are not joined by NVLink"
    return ""
