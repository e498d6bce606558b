"""What the machine can do at most, measured in the run whose figures are held against it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from orchestra.worker.device import has_native_bf16
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
        reading = model.bytes_read(batch) / self.bytes_per_s
        step = max(reading, 2 * model.weights * batch / self.flop_per_s)
        return batch * output / (batch * prefill + output * step)


@dataclass(frozen=True)
class ModelSize:
    """What a step computes with."""

    layer_weights: int
    """That a token is multiplied with in all layers, without embedding and head: of experts those that it goes to."""
    weights: int
    """With the head."""
    itemsize: int
    """Bytes of a weight."""
    expert_weights: int = 0
    """Of all experts that a token goes to, in all layers; part of `layer_weights`."""
    experts: int = 1
    """Of a layer."""
    picks: int = 1
    """Experts of a token."""

    def bytes_read(self, batch: int) -> float:
        """Of the weights that a decode step needs.

        Each token goes to `picks` of the experts; of random ones it is expected that a share of
        `1 - (1 - picks / experts) ** batch` is somebody's.
        """
        wanted = 1 - (1 - self.picks / self.experts) ** batch
        of_experts = self.expert_weights * (self.experts / self.picks) * wanted
        return (self.weights - self.expert_weights + of_experts) * self.itemsize

    @classmethod
    def of(cls, checkpoint: Path, dtype: str) -> ModelSize:
        """Of the `config.json` of a Llama, or of a Qwen 3 MoE."""
        config = json.loads((checkpoint / "config.json").read_text())
        hidden, head = config["hidden_size"], config["head_dim"]
        layers, experts = config["num_hidden_layers"], config.get("num_local_experts", 1)
        picks = config.get("num_experts_per_tok", 1)
        width = config["moe_intermediate_size"] if experts > 1 else config["intermediate_size"]
        heads = 2 * config["num_attention_heads"] + 2 * config["num_key_value_heads"]
        of_experts = layers * picks * 3 * hidden * width
        layer_weights = layers * hidden * head * heads + of_experts
        weights = layer_weights + hidden * config["vocab_size"]
        itemsize = getattr(torch, dtype).itemsize
        return cls(layer_weights, weights, itemsize, of_experts, experts, picks)


def measure(dtype: str) -> Limits:
    """Reads and multiplies for some seconds; best of the repeats, for a limit is what is possible."""
    a, b = (torch.randn(GEMM_SIZE, GEMM_SIZE) for _ in range(2))
    kind = getattr(torch, dtype)
    ours, rows = CpuLinear(b.to(kind), None), a.to(kind)
    multiplying = _seconds(lambda: ours(rows))
    # Without units for bf16 torch multiplies that a hundred times slower than fp32: what is possible is the latter.
    if has_native_bf16():
        a, b = a.to(kind), b.to(kind)
    multiplying = min(multiplying, _seconds(lambda: a @ b))
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
