"""What the machine can do at most, measured in the run whose figures are held against it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from orchestra.worker.linear import CpuLinear

# Far more than any cache holds.
STREAM_BYTES = 512 << 20
GEMM_SIZE = 2048
REPEATS = 7


@dataclass(frozen=True)
class Limits:
    """Of this machine, now."""

    bytes_per_s: float
    """Reading memory."""
    flop_per_s: float
    """A large matrix product in the engine's dtype, by the faster of torch's and ours."""

    def __str__(self) -> str:
        """Both, for people."""
        return f"reads {self.bytes_per_s / 1e9:.1f} GB/s, multiplies {self.flop_per_s / 1e9:.0f} GFLOP/s"

    def at_least(self, other: Limits) -> Limits:
        """The higher of each: what was reached once is possible."""
        return Limits(
            max(self.bytes_per_s, other.bytes_per_s), max(self.flop_per_s, other.flop_per_s)
        )

    def tokens_per_s(self, model: ModelSize, batch: int, prompt: int, output: int) -> float:
        """Output tokens per second that no engine can pass, attention not counted (roofline of Williams et al., 2009).

        Each request costs its prompt's products, and `output` steps that read every weight once for the whole batch or
        are bound by their products, whichever takes longer.

        Args:
            model: whose weights are read.
            batch: requests at a time.
            prompt: tokens of each request that are computed.
            output: tokens that it gets.
        """
        prefill = 2 * model.layer_weights * prompt / self.flop_per_s
        reading = model.bytes / self.bytes_per_s
        step = max(reading, 2 * model.weights * batch / self.flop_per_s)
        return batch * output / (batch * prefill + output * step)


@dataclass(frozen=True)
class ModelSize:
    """What a step computes with."""

    layer_weights: int
    """Of all layers, without embedding and head."""
    weights: int
    """With the head."""
    bytes: int
    """Of `weights`."""

    @classmethod
    def of(cls, checkpoint: Path, dtype: str) -> ModelSize:
        """Of a Llama's `config.json`."""
        config = json.loads((checkpoint / "config.json").read_text())
        hidden, head = config["hidden_size"], config["head_dim"]
        heads = 2 * config["num_attention_heads"] + 2 * config["num_key_value_heads"]
        layer = hidden * head * heads + 3 * hidden * config["intermediate_size"]
        layers = layer * config["num_hidden_layers"]
        weights = layers + hidden * config["vocab_size"]
        return cls(layers, weights, weights * getattr(torch, dtype).itemsize)


def measure(dtype: str) -> Limits:
    """Reads and multiplies for some seconds; best of the repeats, for a limit is what is possible."""
    kind = getattr(torch, dtype)
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE).to(kind) for _ in range(2))
    multiplying = _seconds(lambda: a @ b)
    ours = CpuLinear(b, None)
    multiplying = min(multiplying, _seconds(lambda: ours(a)))
    return Limits(_bytes_per_s(), 2 * GEMM_SIZE**3 / multiplying)


def _bytes_per_s() -> float:
    """By the faster of a long sum and a row times a matrix, which is how an engine reads."""
    numbers, row = torch.ones(STREAM_BYTES // 4096 // 4, 4096), torch.ones(1, 4096)
    weights = CpuLinear(numbers, None)
    return STREAM_BYTES / min(_seconds(numbers.sum), _seconds(lambda: weights(row)))


def _seconds(work: Callable[[], object]) -> float:
    work()
    took = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return min(took)
