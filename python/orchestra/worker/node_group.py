"""The collectives of ranks on several nodes, which are far apart where the ranks of a node are near each other.

An all-reduce by node moves most of its bytes inside the nodes: the ranks of a node add up a share each, ranks of the
same place on every node add up their shares, and the ranks of a node join them again, as the hierarchical algorithms of
MPI and NCCL do. With two nodes of two ranks, of `n` bytes so many cross the link, each way: `n` by node, `1.5 n` in a
ring over all four ranks, `1.75 n` to exchange, `4 n` to gather. Small messages cost turns instead: one to gather, four
to exchange, one between the nodes and two inside them by node.
"""

from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.nn import functional as F  # noqa: N812 (torch's own customary name)

from orchestra.worker.algorithm_table import Algorithm, AlgorithmTable, measure
from orchestra.worker.aside import make_aside
from orchestra.worker.sharding import Shard
from orchestra.worker.shared_group import SharedMemoryGroup
from orchestra.worker.topology import Topology, add_up
from orchestra.worker.torch_group import TorchGroup

# Pieces that go one after the other by node: large enough for the link, small enough to overlap.
CHUNK_BYTES = 2 << 20
_TABLE_KEY = "algorithm-table"


class Insiders(Protocol):
    """The collectives between the ranks of one node."""

    def reduce_scatter(self, numbers: Tensor) -> Tensor:
        """This rank's share of the sum, added in the order of the ranks."""
        ...

    def all_gather(self, part: Tensor) -> Tensor:
        """Every rank's part."""
        ...

    def abort(self) -> None:
        """Ends the collectives."""
        ...

    def close(self) -> None:
        """Leaves the group."""
        ...


class NodeGroup:
    """A `Communicator` over several nodes.

    Whichever algorithm adds up, and however long the message is, every rank gets the bits of `Topology.total`. Which is
    the fastest for which size is measured when the first group of these ranks forms, and written down in the store for
    those that follow.

    Args:
        shard: this rank's place.
        topology: of the group.
        store: through which the ranks find each other.
        device: where the tensors live.
        generation: 0 for the first group of these ranks, one more for each that follows.
        timeout: how long a collective waits for a rank.
        use_shared_memory: whether the CPU ranks of a node add up through it.
    """

    def __init__(
        self,
        shard: Shard,
        topology: Topology,
        store: Store,
        device: torch.device,
        *,
        generation: int,
        timeout: timedelta,
        use_shared_memory: bool,
    ) -> None:
        self.shard = shard
        self._topology = topology
        self._device = device
        self._aside = make_aside(device)
        own = PrefixStore(f"nodes-{generation}", store)
        self._flat = TorchGroup(shard, PrefixStore("flat", own), device, timeout)
        self._inside: Insiders | None = None
        self._between: TorchGroup | None = None
        self._algorithms = {Algorithm.GATHER: self._gather, Algorithm.EXCHANGE: self._exchange}
        node, place = topology.place(shard.rank)
        count, width = len(topology.nodes), len(topology.nodes[node])
        if topology.is_even and count > 1 and width > 1:
            insiders = PrefixStore(f"inside-{node}", own)
            if use_shared_memory:
                self._inside = SharedMemoryGroup(Shard(place, width), insiders)
            else:
                self._inside = TorchGroup(Shard(place, width), insiders, device, timeout)
            peers = PrefixStore(f"between-{place}", own)
            self._between = TorchGroup(Shard(node, count), peers, device, timeout)
            self._algorithms[Algorithm.BY_NODE] = self._by_node
        self.table = self._agree_on_table(store)
        """Which algorithm is taken for which size."""

    @property
    def algorithms(self) -> list[Algorithm]:
        """Those that this topology allows."""
        return list(self._algorithms)

    def all_reduce(self, tensor: Tensor) -> None:
        """Replaces `tensor` by its sum over all ranks.

        Raises:
            RankLostError, RuntimeError: a rank is lost, and was noticed through shared memory, or by torch's groups.
        """
        self.all_reduce_by(self.table.pick(tensor.nbytes), tensor)

    def start_all_reduce(self, tensor: Tensor) -> Callable[[], None]:
        """See `parallel.Overlapping`."""
        return self._aside.start(lambda: self.all_reduce(tensor))

    def all_reduce_by(self, algorithm: Algorithm, tensor: Tensor) -> None:
        """Adds up by one of `algorithms`, the same on every rank; else as `all_reduce`."""
        if tensor.numel() > 0:
            total = self._algorithms[algorithm](tensor.reshape(-1))
            tensor.copy_(total[: tensor.numel()].view(tensor.shape))

    def all_gather(self, part: Tensor) -> Tensor:
        """Every rank's `[n, ...]`, `[size, n, ...]`."""
        return self._flat.all_gather(part)

    def gather_columns(self, tensor: Tensor) -> Tensor | None:
        """Joins the ranks' `[n, columns]` side by side on rank 0; None on the others."""
        return self._flat.gather_columns(tensor)

    def abort(self) -> None:
        """Ends the collectives of this rank, where the transports can; any thread may call it."""
        for group in (self._inside, self._between, self._flat):
            if group is not None:
                group.abort()

    def close(self) -> None:
        """Leaves the groups."""
        for group in (self._inside, self._between, self._flat):
            if group is not None:
                group.close()

    # === the algorithms: [n] to at least [n], what is behind being padding ===

    def _gather(self, numbers: Tensor) -> Tensor:
        # Not `all_gather`, which is a ring in gloo: this one is a single turn.
        everyone = self._flat.exchange(numbers.expand(self.shard.size, -1))
        return self._topology.total(everyone)

    def _exchange(self, numbers: Tensor) -> Tensor:
        shares = _padded(numbers, self.shard.size).view(self.shard.size, -1)
        total = self._topology.total(self._flat.exchange(shares))
        return self._flat.all_gather(total).view(-1)

    def _by_node(self, numbers: Tensor) -> Tensor:
        inside, between = self._inside, self._between
        assert inside is not None
        assert between is not None
        unit = len(self._topology.nodes) * len(self._topology.nodes[0])
        numbers = _padded(numbers, unit)
        total = torch.empty_like(numbers)
        length = max(unit, CHUNK_BYTES // numbers.itemsize // unit * unit)
        under_way: deque[tuple[Tensor, Callable[[], Tensor]]] = deque()

        def join_next() -> None:
            target, finish = under_way.popleft()
            target.copy_(inside.all_gather(finish()).view(-1))

        # While one piece is between the nodes, the next is added up inside.
        for piece, target in zip(
            torch.split(numbers, length), torch.split(total, length), strict=True
        ):
            share = inside.reduce_scatter(piece)
            under_way.append((target, _start_between(between, share)))
            if len(under_way) > 1:
                join_next()
        join_next()
        return total

    # === the table ===

    def _agree_on_table(self, store: Store) -> AlgorithmTable:
        """The table that rank 0 measures, or has measured before over the same topology."""
        key = f"{_TABLE_KEY}/{self._topology.nodes}"
        # Rank 0 writes it when every rank has taken part in the measurement, and so has looked.
        if not store.check([key]):
            table = measure(self.all_reduce_by, self.algorithms, self._hear_first, self._device)
            if self.shard.rank == 0:
                store.set(key, table.encode())
        return AlgorithmTable.decode(store.get(key).decode())

    def _hear_first(self, said: bool) -> bool:  # noqa: FBT001 (passed on by position)
        """What rank 0 says."""
        everyone = self._flat.all_gather(torch.tensor([int(said)], device=self._device))
        return bool(everyone[0].item())


def _start_between(between: TorchGroup, share: Tensor) -> Callable[[], Tensor]:
    """Begins to add up a share over the nodes; what it returns waits for the sum."""
    # With two nodes both ways cost as many bytes.
    if between.shard.size == 2:
        gathered = between.start_all_gather(share)
        return lambda: add_up(list(gathered()))
    joined = between.start_all_gather(between.reduce_scatter(share))
    return lambda: joined().view(-1)


def _padded(numbers: Tensor, count: int) -> Tensor:
    """`[n]` with zeros behind it, as few as `count` equal shares need."""
    missing = -numbers.numel() % count
    return F.pad(numbers, (0, missing)) if missing else numbers
