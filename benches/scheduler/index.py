"""Loading a prefix index through Python: blocks per second and bytes per entry, each side in a process of its own."""

import json
import multiprocessing
import time
from collections.abc import Callable

import psutil

from benches.scheduler.workload import BLOCK_SIZE, MODEL

NUM_WORKERS = 1024
NUM_BLOCKS = 128
CHAINS_PER_WORKER = 32


def measure() -> list[dict[str, object]]:
    """One row for each side."""
    context = multiprocessing.get_context("spawn")
    rows = []
    for side in (load_orchestra, load_dynamo):
        with context.Pool(1) as pool:
            rows.append(pool.apply(timed, (side,)))
    return rows


def timed(side: Callable[[], tuple[str, Callable[[], None]]]) -> dict[str, object]:
    """Runs a side's load in this process, which has done nothing before."""
    name, load = side()
    process = psutil.Process()
    before, started = process.memory_info().rss, time.perf_counter()
    load()
    elapsed = time.perf_counter() - started
    entries = NUM_WORKERS * CHAINS_PER_WORKER * NUM_BLOCKS
    return {
        "side": name,
        "entries": entries,
        "blocks_per_s": entries / elapsed,
        "bytes_per_entry": (process.memory_info().rss - before) / entries,
    }


def chain(worker: int, number: int) -> list[int]:
    """Block hashes: the first half of chain `number` is the same on every worker."""
    half = NUM_BLOCKS // 2
    shared = [1 + number * NUM_BLOCKS + block for block in range(half)]
    first = (1 << 40) + (worker * CHAINS_PER_WORKER + number) * NUM_BLOCKS
    return shared + [first + block for block in range(half)]


def load_orchestra() -> tuple[str, Callable[[], None]]:
    """Ours: `kv_stored`, one call for each chain."""
    from orchestra import Scheduler

    scheduler = Scheduler()
    for worker in range(NUM_WORKERS):
        scheduler.add_worker(
            f"worker-{worker}",
            model=MODEL,
            num_blocks=1 << 20,
            max_model_len=1 << 20,
            block_size=BLOCK_SIZE,
        )

    def load() -> None:
        for number in range(CHAINS_PER_WORKER):
            for worker in range(NUM_WORKERS):
                scheduler.kv_stored(f"worker-{worker}", chain(worker, number))

    return "orchestra.Scheduler.kv_stored", load


def load_dynamo() -> tuple[str, Callable[[], None]]:
    """Dynamo's: `RadixTree.apply_event`, one event for each chain, in the JSON that it reads."""
    from dynamo._core import RadixTree

    tree = RadixTree()

    def load() -> None:
        event_id = 0
        for number in range(CHAINS_PER_WORKER):
            for worker in range(NUM_WORKERS):
                blocks = [
                    {"block_hash": block, "tokens_hash": block} for block in chain(worker, number)
                ]
                event = {
                    "event_id": event_id,
                    "data": {"stored": {"parent_hash": None, "blocks": blocks}},
                }
                event_id += 1
                tree.apply_event(worker, json.dumps(event).encode())
        # Events are applied by a thread of its own; an answer comes after all of them.
        tree.find_matches([1])

    return "dynamo RadixTree.apply_event", load
