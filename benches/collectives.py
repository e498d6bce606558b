"""`python -m benches.collectives`: all-reduce between CPU ranks of this machine, over gloo and over shared memory.

Both groups stay up for the whole run, in the same processes, and take turns size by size, so that what else happens on
the machine falls on both. Prints a table of medians and 99th percentiles, in microseconds.
"""

import argparse
import multiprocessing
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from orchestra.worker.parallel import Communicator, ProcessGroup, rendezvous
from orchestra.worker.sharding import Shard
from orchestra.worker.shared_group import SharedMemoryGroup

# Rows and hidden size of what a layer adds up: decoding alone, in batches, and prefill.
SHAPES = [(1, 512), (1, 1024), (32, 1024), (1, 4096), (32, 4096), (128, 4096)]
ROUNDS = 5
SYSTEMS = ("gloo", "shared memory")


def rank_main(rank: int, size: int, folder: str, repeats: int, results: Connection) -> None:
    """Measures on every rank; rank 0 sends `{(shape, system): seconds}`."""
    torch.set_num_threads(1)
    shard = Shard(rank, size)
    store = rendezvous((Path(folder) / "store").as_uri(), shard)
    groups: list[Communicator] = [
        ProcessGroup(shard, store, torch.device("cpu")),
        SharedMemoryGroup(shard, store),
    ]
    taken: dict[tuple[tuple[int, int], str], list[float]] = {}
    for _ in range(ROUNDS):
        for shape in SHAPES:
            tensor = torch.zeros(shape, dtype=torch.bfloat16)
            for system, group in zip(SYSTEMS, groups, strict=True):
                group.all_reduce(tensor)
                for _ in range(repeats):
                    start = time.perf_counter()
                    group.all_reduce(tensor)
                    taken.setdefault((shape, system), []).append(time.perf_counter() - start)
    results.send(taken)
    for group in groups:
        group.close()


def main() -> None:
    """Runs the ranks and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benches.collectives", description=__doc__)
    parser.add_argument("--ranks", type=int, default=2, help="(default: 2)")
    parser.add_argument("--repeats", type=int, default=200, help="of each round (default: 200)")
    given = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (given.ranks, folder, given.repeats, sending)
        ranks = [
            context.Process(target=rank_main, args=(rank, *arguments), daemon=True)
            for rank in range(given.ranks)
        ]
        for rank in ranks:
            rank.start()
        tables = [receiving.recv() for _ in ranks]
        for rank in ranks:
            rank.join()
    print(f"all-reduce of bf16, {given.ranks} ranks, µs, median / p99\n")
    print("| rows x columns | gloo | shared memory | ratio of medians |\n|---|---|---|---|")
    for shape in SHAPES:
        cells, medians = [], []
        for system in SYSTEMS:
            micros = sorted(1e6 * each for table in tables for each in table[shape, system])
            medians.append(statistics.median(micros))
            cells.append(f"{medians[-1]:.0f} / {micros[int(len(micros) * 0.99)]:.0f}")
        ratio = medians[0] / medians[1]
        print(f"| {shape[0]} x {shape[1]} | {cells[0]} | {cells[1]} | {ratio:.1f} |")


if __name__ == "__main__":
    main()
