"""`python -m benches.kernels`: attention over the paged cache, linear layers, draws, by the CPU kernels and torch.

Both compute the same in one process and take turns, so that what else happens on the machine falls on both. Prints
tables of medians in milliseconds.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch

from orchestra.worker import sampling
from orchestra.worker.attention import AttentionBackend, TorchPagedAttention
from orchestra.worker.attention_cpu import CpuPagedAttention
from orchestra.worker.kv_cache import KvCache, KvCacheSpec
from orchestra.worker.linear import CpuLinear, DenseLinear
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
# Outputs and inputs: a joined gate and up projection, a down projection, a head.
LINEARS = [(3072, 512), (512, 1536), (32000, 512), (5632, 1024)]
ROWS = (1, 8, 32, 128, 512)
# More weights than a cache holds, as a model has.
WEIGHT_BYTES = 96 << 20
VOCABULARY = 32000
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
    return take_turns(
        [partial(backend.forward, 0, query, key_value) for backend in backends],
        repeats,
    )


def measure_linear(
    shape: tuple[int, int], rows: int, dtype: torch.dtype, repeats: int
) -> list[float]:
    """Median milliseconds of a layer: torch, then the kernels; of as many layers in a row as outgrow the cache."""
    count = max(1, WEIGHT_BYTES // (shape[0] * shape[1] * dtype.itemsize))
    weights = [torch.randn(shape).to(dtype) for _ in range(count)]
    x = torch.randn(rows, shape[1]).to(dtype)
    kinds = [[kind(weight, None) for weight in weights] for kind in (DenseLinear, CpuLinear)]
    tolerance = 1e-3 if dtype == torch.float32 else 1.0
    torch.testing.assert_close(*(layers[0](x) for layers in kinds), atol=tolerance, rtol=2e-2)

    def run(layers: Sequence[Callable[[torch.Tensor], torch.Tensor]]) -> None:
        for layer in layers:
            layer(x)

    together = take_turns([partial(run, layers) for layers in kinds], repeats)
    return [spent / count for spent in together]


def take_turns(work: Sequence[Callable[[], object]], repeats: int) -> list[float]:
    """Runs each in turn; returns their median milliseconds."""
    taken: list[list[float]] = [[] for _ in work]
    for _ in range(repeats):
        for each, times in zip(work, taken, strict=True):
            start = time.perf_counter()
            each()
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
    with torch.inference_mode():
        print_attention(given.dtypes, given.repeats)
        print_linear(given.dtypes, max(3, given.repeats // 6))
        print_draws(given.repeats)


def print_attention(dtypes: Sequence[str], repeats: int) -> None:
    """A row for each shape of heads and of steps."""
    print(f"attention of one layer, {torch.get_num_threads()} threads, ms, medians\n")
    print("| dtype | heads | sequences x new, context | torch | kernels | ratio |")
    print("|---|---|---|---|---|---|")
    for name in dtypes:
        for shape in SHAPES:
            for cell in CELLS:
                torch_ms, own_ms = measure(shape, cell, DTYPES[name], repeats)
                heads = f"{shape[0]}/{shape[1]} x {shape[2]}"
                what = f"{cell[0]} x {cell[1]}, {cell[2]}"
                ratio = torch_ms / own_ms
                print(
                    f"| {name} | {heads} | {what} | {torch_ms:.2f} | {own_ms:.2f} | {ratio:.1f} |",
                    flush=True,
                )


def print_linear(dtypes: Sequence[str], repeats: int) -> None:
    """A row for each shape of weights and count of rows."""
    print(f"\na linear layer, {torch.get_num_threads()} threads, ms, medians\n")
    print("| dtype | weights | rows | torch | kernels | ratio | GFLOP/s | GB/s of weights |")
    print("|---|---|---|---|---|---|---|---|")
    for name in dtypes:
        for outputs, inputs in LINEARS:
            for rows in ROWS:
                torch_ms, own_ms = measure_linear((outputs, inputs), rows, DTYPES[name], repeats)
                size = outputs * inputs
                speeds = 2 * rows * size / own_ms / 1e6, size * DTYPES[name].itemsize / own_ms / 1e6
                print(
                    f"| {name} | {outputs} x {inputs} | {rows} | {torch_ms:.2f} | {own_ms:.2f} |"
                    f" {torch_ms / own_ms:.1f} | {speeds[0]:.0f} | {speeds[1]:.1f} |",
                    flush=True,
                )


def draw(logits: torch.Tensor, temperatures: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """A token of each row, by the kernels."""
    return sampling.draw(sampling.softmax(logits, temperatures), numbers)


def draw_by_torch(
    logits: torch.Tensor, temperatures: torch.Tensor, numbers: torch.Tensor
) -> torch.Tensor:
    """The same by torch."""
    probabilities = torch.softmax(logits / temperatures.unsqueeze(1), 1)
    sums = probabilities.cumsum(1, dtype=torch.float64)
    return torch.searchsorted(sums, numbers.unsqueeze(1) * sums[:, -1:], right=True).squeeze(1)


def print_draws(repeats: int) -> None:
    """A row for each count of rows."""
    print(f"\ndraws among {VOCABULARY} tokens, {torch.get_num_threads()} threads, ms, medians\n")
    print("| rows | torch | kernels | ratio |\n|---|---|---|---|")
    for rows in (1, 8, 32):
        numbers = torch.rand(rows, dtype=torch.float64)
        inputs = (torch.randn(rows, VOCABULARY) * 3, torch.ones(rows), numbers)
        assert torch.equal(draw(*inputs), draw_by_torch(*inputs))
        work = [partial(function, *inputs) for function in (draw_by_torch, draw)]
        torch_ms, own_ms = take_turns(work, repeats)
        print(f"| {rows} | {torch_ms:.2f} | {own_ms:.2f} | {torch_ms / own_ms:.1f} |", flush=True)


if __name__ == "__main__":
    main()
