"""Which ranks of a group share a node, and the one order in which their numbers are added, whatever carries them."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from orchestra.worker.sharding import Shard


def own_node() -> str:
    """The name of what this process can share memory with: this boot of the machine, seen from this PID namespace."""
    boot = namespace = ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with contextlib.suppress(OSError):
        namespace = str(Path("/proc/self/ns/pid").readlink())
    return f"{boot}/{namespace}"


@dataclass(frozen=True)
class Topology:
    """The nodes of a group."""

    nodes: tuple[tuple[int, ...], ...]
    """The ranks of each node in ascending order; the nodes in the order of their first ranks."""

    @classmethod
    def of(cls, names: Sequence[str]) -> "Topology":
        """Sorts the ranks by the names of their nodes; `names` is in the order of the ranks."""
        members: dict[str, list[int]] = {}
        for rank, name in enumerate(names):
            members.setdefault(name, []).append(rank)
        return cls(tuple(map(tuple, members.values())))

    @classmethod
    def agree(cls, store: Store, shard: Shard, name: str, timeout: timedelta) -> "Topology":
        """Tells the other ranks of a group the name of this one's node, and waits for theirs.

        Raises:
            RuntimeError: not every rank came in time.
        """
        store.set(f"node-of/{shard.rank}", name)
        keys = [f"node-of/{rank}" for rank in range(shard.size)]
        store.wait(keys, timeout)
        return cls.of([store.get(key).decode() for key in keys])

    def place(self, rank: int) -> tuple[int, int]:
        """A rank's node, and its place among the ranks of that node."""
        found = ((node, ranks) for node, ranks in enumerate(self.nodes) if rank in ranks)
        node, ranks = next(found)
        return node, ranks.index(rank)

    @property
    def is_even(self) -> bool:
        """Whether every node has as many ranks as the others, so that each rank has a peer on every other node."""
        return len(set(map(len, self.nodes))) == 1

    def total(self, parts: Tensor) -> Tensor:
        """The sum over all ranks, `[size, n]` to `[n]`: each node's own, then those of the nodes.

        Every algorithm that adds up numbers between nodes gives these bits, so which one is taken may depend on the
        size of a message, and so on the batch, without a request's numbers depending on it.
        """
        return add_up([add_up([parts[rank] for rank in ranks]) for ranks in self.nodes])


def add_up(parts: Sequence[Tensor]) -> Tensor:
    """The sum in fp32, in order, rounded once at the end: as the shared-memory group adds."""
    if len(parts) == 1:
        return parts[0]
    total = parts[0].to(torch.float32)
    for part in parts[1:]:
        total = total + part
    return total.to(parts[0].dtype)
