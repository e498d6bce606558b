"""`python -m benches.collectives_nodes`: two ranks on each of two nodes add up tensors, flat and by node.

The nodes are network namespaces of this machine, with a link between them whose rate the kernel's token bucket filter
limits; the ranks of a node share memory, or speak over its loopback. Every way of adding up has its groups from the
start, in the same processes, and they take turns, so that what else happens on the machine falls on all of them. A
sum takes as long as its slowest rank. Prints a table of medians in milliseconds. Needs root, `ip` and `tc`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore

from benches.collectives_nodes.network import MissingError, run_ranks, two_nodes
from benches.machine import commit, processor
from orchestra.worker.node_group import NodeGroup
from orchestra.worker.sharding import Shard
from orchestra.worker.topology import Topology

RANKS_PER_NODE = 2
KIB = 1 << 10
SIZES = [16 * KIB, 64 * KIB, 256 * KIB, 1024 * KIB, 4096 * KIB, 16384 * KIB, 32768 * KIB]
# A size is repeated as often as it takes to move so many bytes, within bounds.
BYTES_PER_ROUND = 8 << 20
REPEATS_MAX = 10
TIMEOUT = timedelta(minutes=5)
RING = "gloo's ring"

AllReduce = Callable[[Tensor], None]


def rank_main(rank: int, folder: Path, rounds: int) -> None:
    """Measures on one rank; leaves `{size: {system: seconds}}` and the table that was chosen in a file."""
    torch.set_num_threads(1)
    size = 2 * RANKS_PER_NODE
    shard = Shard(rank, size)
    store = dist.FileStore(str(folder / "store"), size)
    ring = dist.ProcessGroupGloo(PrefixStore("ring", store), rank, size, TIMEOUT)
    topology = Topology.of([str(other // RANKS_PER_NODE) for other in range(size)])

    def join(name: str, *, use_shared_memory: bool) -> NodeGroup:
        return NodeGroup(
            *(shard, topology, PrefixStore(name, store), torch.device("cpu")),
            generation=0,
            timeout=TIMEOUT,
            use_shared_memory=use_shared_memory,
        )

    shared, sockets = join("shm", use_shared_memory=True), join("gloo", use_shared_memory=False)
    systems = _systems(ring, shared, sockets)
    taken: dict[int, dict[str, list[float]]] = {
        num_bytes: {name: [] for name in systems} for num_bytes in SIZES
    }
    for _ in range(rounds):
        for num_bytes in SIZES:
            numbers = torch.zeros(num_bytes // 2, dtype=torch.bfloat16)
            for _ in range(max(1, min(REPEATS_MAX, BYTES_PER_ROUND // num_bytes))):
                for name, all_reduce in systems.items():
                    shared.all_gather(torch.zeros(1))
                    start = time.perf_counter()
                    all_reduce(numbers)
                    taken[num_bytes][name].append(time.perf_counter() - start)
    result = {"taken": taken, "table": shared.table.encode()}
    (folder / f"result-{rank}").write_text(json.dumps(result))
    shared.close()
    sockets.close()


def _systems(
    ring: dist.ProcessGroupGloo, shared: NodeGroup, sockets: NodeGroup
) -> dict[str, AllReduce]:
    def by(group: NodeGroup, name: str) -> AllReduce:
        algorithm = next(each for each in group.algorithms if each.value == name)
        return lambda numbers: group.all_reduce_by(algorithm, numbers)

    return {
        RING: lambda numbers: ring.allreduce([numbers]).wait(),
        "gather": by(shared, "gather"),
        "exchange": by(shared, "exchange"),
        "by node, gloo inside": by(sockets, "by-node"),
        "by node, shared memory inside": by(shared, "by-node"),
        "as measured at start": shared.all_reduce,
    }


def print_table(results: list[dict[str, dict[str, object]]], rate: str) -> None:
    """Medians, and how much faster than the best flat one adding up by node is."""
    tables = [result["taken"] for result in results]
    names = list(tables[0][str(SIZES[0])])
    print(f"all-reduce of bf16, 2 nodes of {RANKS_PER_NODE} ranks, {rate} between them, ms, median")
    print(f"{processor()}, commit {commit()}; chosen: {results[0]['table']}\n")
    print(f"| KiB | {' | '.join(names)} | ring / by node |")
    print("|---" * (len(names) + 2) + "|")
    for size in SIZES:
        medians = {}
        for name in names:
            ranks = zip(*(table[str(size)][name] for table in tables), strict=True)
            medians[name] = 1e3 * statistics.median(map(max, ranks))
        cells = " | ".join(f"{medians[name]:.2f}" for name in names)
        ratio = medians[RING] / medians["by node, shared memory inside"]
        print(f"| {size // KIB} | {cells} | {ratio:.2f} |")


def main() -> None:
    """Makes the nodes, runs the ranks and prints the table; or is one of the ranks."""
    parser = argparse.ArgumentParser(prog="python -m benches.collectives_nodes")
    parser.add_argument("--rate", default="1gbit", help="of the link, each way (default: 1gbit)")
    parser.add_argument("--rounds", type=int, default=3, help="over all sizes (default: 3)")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank is not None:
        rank_main(given.rank, given.folder, given.rounds)
        return
    own = [sys.executable, "-m", "benches.collectives_nodes", "--rounds", str(given.rounds)]
    try:
        with two_nodes(given.rate) as nodes, tempfile.TemporaryDirectory() as folder:
            results = run_ranks(nodes, own, Path(folder), 2 * RANKS_PER_NODE)
    except MissingError as error:
        raise SystemExit(f"no nodes can be made here: {error}") from error
    print_table(results, given.rate)


if __name__ == "__main__":
    main()
