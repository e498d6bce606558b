"""`python -m benches.gpu`: steps of random Llamas on one GPU, as shares of what that card can do.

The card's memory bandwidth (a copy inside it) and its rate of matrix products (a large one, in the same numbers) are
measured first, in the same run. A decode step can be no faster than its weights and its KV can be read, nor than its
products can be computed; a prefill no faster than its products. What a step took, its draw and everything on the host
included, is compared with the larger of these. Weights are made on the device: nothing is loaded.

`--device cpu` runs a tiny model over the same code, to see that it runs.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from benches.kernels import make_plan
from benches.machine import commit, processor
from orchestra.worker import device as devices
from orchestra.worker.attention_choice import choose_attention, make_attention
from orchestra.worker.decode_graphs import CudaRecorder, DecodeGraphs
from orchestra.worker.decode_inputs import DecodeInputs
from orchestra.worker.kv_cache import GIB, KvCache, KvCacheSpec
from orchestra.worker.layers import LoadContext
from orchestra.worker.loader import WeightReader
from orchestra.worker.model_config import ModelConfig
from orchestra.worker.models import LOADERS
from orchestra.worker.parallel import SingleRank
from orchestra.worker.plan import SequenceStart, StepPlan
from orchestra.worker.runner import ModelRunner
from orchestra.worker.sampler import Sampler
from orchestra.worker.sampler_slots import SamplerSlots

if TYPE_CHECKING:
    from orchestra.worker.drawn import Drawn
    from orchestra.worker.sharding import Span

BLOCK_SIZE = 16
# Of the memory that is free beside the weights.
KV_SHARE = 0.8
SECONDS_PER_CELL = 1.0
STEPS_MIN, STEPS_MAX = 5, 50


@dataclass(frozen=True)
class Shape:
    """A Llama, and which steps of it are measured."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    batches: tuple[int, ...] = (1, 8, 32, 128)
    contexts: tuple[int, ...] = (512, 4096)
    prompt: int = 2048

    @property
    def layer_weights(self) -> int:
        """Numbers in the matrices of all layers."""
        heads = (2 * self.heads + 2 * self.kv_heads) * self.head_dim
        return self.layers * self.hidden * (heads + 3 * self.intermediate)

    @property
    def kv_numbers(self) -> int:
        """Numbers that the cache keeps of a token."""
        return self.layers * 2 * self.kv_heads * self.head_dim

    def attention_flops(self, pairs: int) -> int:
        """Operations to attend from queries to keys, of so many pairs of tokens."""
        return 4 * self.layers * self.heads * self.head_dim * pairs


# As Llama 3.2 1B and Llama 3.1 8B, the head apart from the embedding in both.
SHAPES = {
    "1b": Shape(2048, 8192, 16, 32, 8, 64, 128_256),
    "8b": Shape(4096, 14_336, 32, 32, 8, 128, 128_256),
    "tiny": Shape(64, 176, 2, 4, 2, 16, 512, batches=(1, 2), contexts=(48,), prompt=32),
}


@dataclass(frozen=True)
class Card:
    """What the device can do, as measured."""

    bytes_per_s: float
    flops_per_s: float

    def limit(self, num_bytes: int, flops: int) -> tuple[float, str]:
        """The least seconds for so much to read and to compute, and what sets them."""
        reading, computing = num_bytes / self.bytes_per_s, flops / self.flops_per_s
        return (reading, "memory") if reading >= computing else (computing, "products")


class RandomWeights(WeightReader):
    """Stands for a checkpoint: every weight is random, and made where it is wanted."""

    def __init__(self) -> None:
        self.bytes_read = 0

    def copy_rows(
        self, _name: str, shape: Sequence[int], _rows: Iterable[Span], target: Tensor
    ) -> None:
        """Fills a weight; norms with ones."""
        if len(shape) == 1:
            target.fill_(1.0)
        else:
            target.normal_(0.0, 0.02)

    def copy_columns(
        self, _name: str, _shape: Sequence[int], _columns: Span, target: Tensor
    ) -> None:
        """Fills a weight."""
        target.normal_(0.0, 0.02)

    def finish(self, _ignored: Callable[[str], bool]) -> None:
        """Nothing is left: nothing was there."""


class Engine:
    """One rank over random weights.

    Args:
        shape: of the model.
        device: where it computes.
        dtype: of weights and KV.
    """

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        self.shape = shape
        config = model_config(shape, dtype)
        longest = config.max_position_embeddings
        context = LoadContext(RandomWeights(), SingleRank(), dtype, device)
        model = LOADERS[config.architecture](context, config, longest, lambda _done, _all: None)
        spec = KvCacheSpec(
            shape.layers, shape.kv_heads, shape.head_dim, BLOCK_SIZE, dtype, config.key_order
        )
        wanted = max(shape.batches) * (max(shape.contexts) // BLOCK_SIZE)
        fitting = int(devices.free_bytes(device, 1) * KV_SHARE) // spec.bytes_per_block
        self.num_blocks = min(wanted, fitting)
        cache = KvCache(spec, self.num_blocks, device)
        self.attention = choose_attention("auto", spec, device)
        attention: Any = make_attention("auto", cache, shape.heads, device, config.attention)
        largest = max(shape.batches)
        sampler = Sampler(shape.vocab, largest, device)
        sampler.start([greedy(slot) for slot in range(largest)])
        self.runner = ModelRunner(model, cache, attention, SamplerSlots(sampler), device)
        self.graphs: DecodeGraphs | None = None
        if self.attention == "triton":
            inputs = DecodeInputs(largest, -(-longest // BLOCK_SIZE), device)
            sizes, record = list(shape.batches), CudaRecorder()
            self.graphs = DecodeGraphs(model, attention, inputs, sizes, longest, record)
            self.graphs.record()

    def plan(self, batch: int, new: int, context: int) -> StepPlan:
        """A step of equally long sequences that all draw. Where the cache is too small, sequences share blocks."""
        plan = make_plan(batch, new, context)
        np.mod(plan.block_tables, self.num_blocks, out=plan.block_tables)
        np.mod(plan.slot_mapping, self.num_blocks * BLOCK_SIZE, out=plan.slot_mapping)
        every = np.arange(batch, dtype=np.int32)
        values = {**vars(plan), "sample_sequences": every, "sample_slots": every}
        return StepPlan(**{**values, "sample_positions": np.full(batch, context, np.int32)})

    def step_seconds(self, plan: StepPlan, *, with_graphs: bool, is_ahead: bool = False) -> float:
        """The median time of a step, until its tokens are on the host; or those of the one before, with `is_ahead`."""
        self.runner.recorded = self.graphs if with_graphs else None
        in_flight: deque[Drawn | None] = deque([None] if is_ahead else [])

        def step() -> None:
            in_flight.append(self.runner.start(plan))
            if (drawn := in_flight.popleft()) is not None:
                drawn.fetch()

        times: list[float] = []
        began = time.perf_counter()
        for _ in range(2):  # kernels are built, memory is taken
            step()
        while len(times) < STEPS_MIN or (
            len(times) < STEPS_MAX and time.perf_counter() - began < SECONDS_PER_CELL
        ):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        return median(times)


def model_config(shape: Shape, dtype: torch.dtype) -> ModelConfig:
    """What `config.json` of such a model would say."""
    keys = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": max(*shape.contexts, shape.prompt),
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
        "dtype": str(dtype).removeprefix("torch."),
    }
    return ModelConfig.from_mappings(keys, {})


def greedy(slot: int) -> SequenceStart:
    """A sequence that takes the most likely token."""
    nothing = np.empty(0, np.int32)
    numbers = (0.0, 1.0, 0, 0.0, 1.0, 0.0, 0.0, 0)
    return SequenceStart(slot, *numbers, nothing, np.empty(0, np.float32), nothing, nothing)


def measure_card(device: torch.device, dtype: torch.dtype) -> Card:
    """Copies and multiplies; the best of some runs, which is the card's limit and not its mood."""
    size, side = (GIB, 8192) if device.type == "cuda" else (GIB >> 5, 512)
    source = torch.empty(size, dtype=torch.uint8, device=device).zero_()
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    copying = best_seconds(lambda: target.copy_(source), device)
    computing = best_seconds(lambda: torch.mm(a, b, out=product), device)
    return Card(2 * size / copying, 2 * side**3 / computing)


def best_seconds(call: Callable[[], Any], device: torch.device, calls: int = 10) -> float:
    """Seconds of a call, the least of a few runs of `calls` each."""

    def run() -> float:
        wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait(device)
        return (time.perf_counter() - start) / calls

    run()
    return min(run() for _ in range(5))


def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(name: str, device: torch.device, dtype: torch.dtype, card: Card) -> str:
    """Prints the rows of one model; returns what is to be said of it below the table."""
    shape = SHAPES[name]
    engine = Engine(shape, device, dtype)
    weights = shape.layer_weights + shape.vocab * shape.hidden

    def row(what: str, tokens: int, seconds: float, limit: tuple[float, str]) -> None:
        least, set_by = limit
        figures = f"{1e3 * seconds:.2f} | {tokens / seconds:.0f} | {1e3 * least:.2f}"
        print(f"| {name} | {what} | {figures} | {set_by} | {least / seconds:.2f} |", flush=True)

    for context in shape.contexts:
        for batch in shape.batches:
            plan = engine.plan(batch, 1, context)
            num_bytes = (weights + batch * context * shape.kv_numbers) * dtype.itemsize
            flops = 2 * weights * batch + shape.attention_flops(batch * context)
            limit = card.limit(num_bytes, flops)
            what = f"decode, batch {batch}, context {context}"
            row(what, batch, engine.step_seconds(plan, with_graphs=True), limit)
            ahead = engine.step_seconds(plan, with_graphs=True, is_ahead=True)
            row(f"{what}, planned ahead", batch, ahead, limit)
            if engine.graphs is not None and batch == 1:
                row(f"{what}, no graphs", 1, engine.step_seconds(plan, with_graphs=False), limit)
    prompt = shape.prompt
    pairs = prompt * (prompt + 1) // 2
    flops = 2 * (shape.layer_weights * prompt + shape.vocab * shape.hidden)
    limit = card.limit(weights * dtype.itemsize, flops + shape.attention_flops(pairs))
    seconds = engine.step_seconds(engine.plan(1, prompt, prompt), with_graphs=False)
    row(f"prefill of {prompt} tokens", prompt, seconds, limit)
    held = engine.num_blocks * BLOCK_SIZE
    note = f"attention by {engine.attention}; the cache holds {held} tokens"
    return f"{name}: {note}, beyond which sequences share blocks."


def describe(device: torch.device) -> str:
    """What computes, and under what."""
    if device.type != "cuda":
        return f"{processor()}, torch {torch.__version__}"
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
        driver = answer.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    import triton

    name = torch.cuda.get_device_name(device)
    return f"{name}, driver {driver}, torch {torch.__version__}, triton {triton.__version__}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m benches.gpu", description=__doc__)
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    parser.add_argument(
        "--models", nargs="+", choices=list(SHAPES), help="(default: 1b 8b; tiny without a GPU)"
    )
    given = parser.parse_args(arguments)
    device = devices.select_device(given.device, 0)
    is_cuda = device.type == "cuda"
    dtype = torch.bfloat16 if is_cuda else torch.float32
    models = given.models or (["1b", "8b"] if is_cuda else ["tiny"])
    card = measure_card(device, dtype)
    command = f"python -m benches.gpu --device {device.type} --models {' '.join(models)}"
    print(f"`{command}` at {commit()}: {describe(device)}, {str(dtype).removeprefix('torch.')}.\n")
    rates = f"{card.bytes_per_s / 1e9:.0f} GB/s copied (read and written), "
    print(rates + f"{card.flops_per_s / 1e12:.2f} TFLOP/s in a matrix product.\n")
    print("| model | step | ms | tokens/s | limit ms | set by | share of the limit |")
    print("|---|---|---|---|---|---|---|")
    notes = []
    for name in models:
        notes.append(measure(name, device, dtype, card))
        gc.collect()  # the last model makes room for the next
        torch.cuda.empty_cache()
    print("\n" + "\n".join(notes))


if __name__ == "__main__":
    main()
