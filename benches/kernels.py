"""`python -m benches.kernels`: attention over the paged cache, by the CPU kernels and by torch.

Both attend over caches of the same shape in one process and take turns, so that what else happens on the machine falls
on both. Prints a table of medians in milliseconds.
"""

import argparse
import statistics
import time

import numpy as np
import torch

from orchestra.worker.attention import AttentionBackend, TorchPagedAttention
from orchestra.worker.attention_cpu import CpuPagedAttention
from orchestra.worker.kv_cache import KvCache, KvCacheSpec
from orchestra.worker.plan import NO_COPIES, StepPlan

# Query heads, KV heads, size of a head.
SHAPES = [(8, 4, 64), (16, 8, 64), (32, 8, 128)]
CONTEXT = 512
# Sequences, new tokens of each, tokens of context.
CELLS = [
    *((batch, 1, CONTEXT) for batch in (1, 8, 32)),
    (1, 128, 128),
    (1, 512, 512),
    (1, 128, 512),
]
BLOCK_SIZE = 16
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def make_plan(batch: int, new: int, context: int) -> StepPlan:
    """A step of equally long sequences, whose blocks lie anywhere."""
    width = context // BLOCK_SIZE
    tables = np.random.default_rng(0).permutation(batch * width).astype(np.int32)
    tables = tables.reshape(batch, width)
    positions = np.tile(np.arange(context - new, context, dtype=np.int32), (batch, 1))
    blocks = np.take_along_axis(tables, positions // BLOCK_SIZE, axis=1)
    nothing = np.empty(0, np.int32)
    return StepPlan(
        step_id=1,
        token_ids=np.zeros(batch * new, np.int32),
        positions=positions.reshape(-1),
        slot_mapping=(blocks * BLOCK_SIZE + positions % BLOCK_SIZE).reshape(-1),
        query_start=np.arange(0, batch * new + 1, new, dtype=np.int32),
        context_lens=np.full(batch, context, np.int32),
        block_tables=tables,
        swap_out=NO_COPIES,
        swap_in=NO_COPIES,
        sample_sequences=nothing,
        sample_slots=nothing,
        sample_positions=nothing,
        num_top_logprobs=-1,
        starts=(),
    )


def measure(
    shape: tuple[int, int, int], cell: tuple[int, int, int], dtype: torch.dtype, repeats: int
) -> list[float]:
    """Median milliseconds of a layer: torch, then the kernels."""
    (heads, kv_heads, size), (batch, new, context) = shape, cell
    device = torch.device("cpu")
    spec = KvCacheSpec(1, kv_heads, size, BLOCK_SIZE, dtype)
    num_blocks = batch * context // BLOCK_SIZE
    caches = [KvCache(spec, num_blocks, device) for _ in range(2)]
    filled = torch.randn(caches[0].slab.shape).to(dtype)
    for cache in caches:
        cache.slab.copy_(filled)
    backends: list[AttentionBackend] = [
        TorchPagedAttention(caches[0], heads, device),
        CpuPagedAttention(caches[1], heads),
    ]
    plan = make_plan(batch, new, context)
    query = torch.randn(batch * new, heads, size).to(dtype)
    key_value = torch.randn(batch * new, 2 * kv_heads, size).to(dtype)
    outputs = []
    for backend in backends:
        backend.prepare(plan)
        outputs.append(backend.forward(0, query, key_value).float())
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(*outputs, atol=tolerance, rtol=tolerance)
    taken: list[list[float]] = [[], []]
    for _ in range(repeats):
        for backend, times in zip(backends, taken, strict=True):
            start = time.perf_counter()
            backend.forward(0, query, key_value)
            times.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(times) for times in taken]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benches.kernels", description=__doc__)
    parser.add_argument("--threads", type=int, help="(default: torch's own choice)")
    parser.add_argument("--repeats", type=int, default=30, help="(default: 30)")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    given = parser.parse_args()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    print(f"attention of one layer, {torch.get_num_threads()} threads, ms, medians\n")
    print("| dtype | heads | sequences x new, context | torch | kernels | ratio |")
    print("|---|---|---|---|---|---|")
    with torch.inference_mode():
        for name in given.dtypes:
            for shape in SHAPES:
                for cell in CELLS:
                    torch_ms, own_ms = measure(shape, cell, DTYPES[name], given.repeats)
                    heads = f"{shape[0]}/{shape[1]} x {shape[2]}"
                    what = f"{cell[0]} x {cell[1]}, {cell[2]}"
                    ratio = torch_ms / own_ms
                    print(
                        f"| {name} | {heads} | {what} | {torch_ms:.2f} | {own_ms:.2f} | {ratio:.1f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
