"""`python -m benches.collectives`: all-reduce between ranks of this machine, by two transports in turns.

Between CPU ranks over gloo and over shared memory; with `--device cuda` between GPUs that NVLink joins, over NCCL and
in each other's memory, as decode steps do it: recorded in a CUDA graph, which is replayed.

Both transports stay up for the whole run, in the same processes, and take turns size by size, so that what else happens
on the machine falls on both. Prints a table of medians and 99th percentiles, in microseconds.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from orchestra.worker.decode_graphs import CudaRecorder
from orchestra.worker.nvlink import obstacle
from orchestra.worker.parallel import Communicator, ProcessGroup, rendezvous
from orchestra.worker.sharding import Shard
from orchestra.worker.shared_group import SharedMemoryGroup

# Rows and hidden size of what a layer adds up: decoding alone, in batches, and prefill.
SHAPES = {
    "cpu": [(1, 512), (1, 1024), (32, 1024), (1, 4096), (32, 4096), (128, 4096)],
    "cuda": [(1, 4096), (32, 4096), (128, 4096), (1, 8192), (128, 8192), (2048, 8192)],
}
ROUNDS = 5
SYSTEMS = {"cpu": ("gloo", "shared memory"), "cuda": ("NCCL", "each other's memory")}
# All-reduces of a recording.
RECORDED = 20

Sum = Callable[[Tensor], None]
Timed = Callable[[], float]
"""Adds up; returns the seconds of one all-reduce."""


def join(shard: Shard, store: Store, device: torch.device) -> tuple[list[Communicator], list[Sum]]:
    """The groups, and what the systems add up by."""
    if device.type == "cpu":
        groups: list[Communicator] = [
            ProcessGroup(shard, store, device),
            SharedMemoryGroup(shard, store),
        ]
        return groups, [group.all_reduce for group in groups]
    from orchestra.worker.symmetric_group import SymmetricGroup

    group = SymmetricGroup(shard, store, device)
    # Torch's own group is NCCL's, which that one has for what it does not add up.
    return [group], [add_up_by_nccl, group.all_reduce]


def add_up_by_nccl(tensor: Tensor) -> None:
    """By torch's own group."""
    dist.all_reduce(tensor)


def timed(add_up: Sum, tensor: Tensor) -> Timed:
    """What adds `tensor` up by one system, after a first time."""
    add_up(tensor)
    if tensor.device.type == "cpu":

        def call() -> float:
            start = time.perf_counter()
            add_up(tensor)
            return time.perf_counter() - start

        return call

    def compute() -> Tensor:
        for _ in range(RECORDED):
            add_up(tensor)
        return tensor

    replay = CudaRecorder()(compute)

    def run() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        replay()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / RECORDED

    return run


def rank_main(
    rank: int, size: int, device_type: str, folder: str, repeats: int, results: Connection
) -> None:
    """Measures on every rank, each of which sends `{(shape, system): seconds}`."""
    torch.set_num_threads(1)
    device = torch.device("cpu") if device_type == "cpu" else torch.device("cuda", rank)
    if device_type == "cuda":
        torch.cuda.set_device(device)
    shard = Shard(rank, size)
    groups, sums = join(shard, rendezvous((Path(folder) / "store").as_uri(), shard), device)
    cells: dict[tuple[tuple[int, int], str], Timed] = {}
    for shape in SHAPES[device_type]:
        for system, add_up in zip(SYSTEMS[device_type], sums, strict=True):
            zeros = torch.zeros(shape, dtype=torch.bfloat16, device=device)
            cells[shape, system] = timed(add_up, zeros)
    taken: dict[tuple[tuple[int, int], str], list[float]] = {cell: [] for cell in cells}
    for _ in range(ROUNDS):
        for cell, run in cells.items():
            run()
            taken[cell] += [run() for _ in range(repeats)]
    results.send(taken)
    cells.clear()
    for group in groups:
        group.close()


def main() -> None:
    """Runs the ranks and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benches.collectives", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="(default: cpu)")
    parser.add_argument("--ranks", type=int, default=2, help="(default: 2)")
    parser.add_argument("--repeats", type=int, default=200, help="of each round (default: 200)")
    given = parser.parse_args()
    if given.device == "cuda" and (reason := obstacle(range(given.ranks), regroups=False)):
        print(f"nothing to compare between {given.ranks} GPUs: {reason}")
        return
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (given.ranks, given.device, folder, given.repeats, sending)
        ranks = [
            context.Process(target=rank_main, args=(rank, *arguments), daemon=True)
            for rank in range(given.ranks)
        ]
        for rank in ranks:
            rank.start()
        tables = [receiving.recv() for _ in ranks]
        for rank in ranks:
            rank.join()
    systems = SYSTEMS[given.device]
    print(f"all-reduce of bf16, {given.ranks} ranks, µs, median / p99\n")
    print(f"| rows x columns | {' | '.join(systems)} | ratio of medians |\n|---|---|---|---|")
    for shape in SHAPES[given.device]:
        columns, medians = [], []
        for system in systems:
            micros = sorted(1e6 * each for table in tables for each in table[shape, system])
            medians.append(statistics.median(micros))
            columns.append(f"{medians[-1]:.0f} / {micros[int(len(micros) * 0.99)]:.0f}")
        ratio = medians[0] / medians[1]
        print(f"| {shape[0]} x {shape[1]} | {columns[0]} | {columns[1]} | {ratio:.1f} |")


if __name__ == "__main__":
    main()
