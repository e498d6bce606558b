"""Which attention backend a rank has."""

import importlib.util
from collections.abc import Sequence

import torch

from orchestra.errors import ConfigError
from orchestra.worker import attention_cpu, attention_flashinfer
from orchestra.worker.attention import AttentionBackend, TorchPagedAttention
from orchestra.worker.attention_cpu import CpuPagedAttention
from orchestra.worker.attention_flashinfer import FlashInferPagedAttention
from orchestra.worker.kv_cache import KvCacheSpec, PagedCache
from orchestra.worker.model_config import AttentionRule


def choose_attention(name: str, spec: KvCacheSpec, device: torch.device) -> str:
    """The backend that `--attention` means here: `torch`, `cpu`, `triton` or `flashinfer`.

    Args:
        name: one of them, or `auto`: our kernels for the device where they can compute, else torch.
        spec: of this rank's cache.
        device: of the tensors.

    Raises:
        ConfigError: kernels were asked for that cannot compute.
    """
    if name == "torch":
        return name
    kernels = name
    if name == "auto":
        kernels = "cpu" if device.type == "cpu" else "triton"
    obstacle = _OBSTACLES[kernels](spec, device)
    if obstacle is None:
        return kernels
    if name != "auto":
        raise ConfigError(f"--attention: {name} {obstacle}", key="attention")
    return "torch"


def make_attention(
    name: str,
    cache: PagedCache,
    num_heads: int,
    device: torch.device,
    rules: Sequence[AttentionRule],
) -> AttentionBackend:
    """The attention of a rank.

    Args:
        name: as `choose_attention` takes it.
        cache: this rank's.
        num_heads: query heads of this rank.
        device: of the tensors.
        rules: of each layer.

    Raises:
        ConfigError: kernels were asked for that cannot compute.
    """
    chosen = choose_attention(name, cache.spec, device)
    if chosen == "cpu":
        return CpuPagedAttention(cache, num_heads, rules)
    if chosen == "triton":
        # Imported here: Triton comes with torch's builds for GPUs only.
        from orchestra.worker.attention_triton import TritonPagedAttention

        return TritonPagedAttention(cache, num_heads, device, rules)
    if chosen == "flashinfer":
        return FlashInferPagedAttention(cache, num_heads, device, rules)
    return TorchPagedAttention(cache, num_heads, device, rules)


def _cpu_obstacle(spec: KvCacheSpec, device: torch.device) -> str | None:
    if attention_cpu.supports(spec, device):
        return None
    return "needs fp32 or bf16 on a CPU, and heads and blocks of multiples of 8"


def _triton_obstacle(spec: KvCacheSpec, device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "is not installed; it comes with torch's builds for NVIDIA GPUs"
    from orchestra.worker import attention_triton

    reason = attention_triton.obstacle(spec, device)
    return None if reason is None else f"cannot compute here: {reason}"


_OBSTACLES = {
    "cpu": _cpu_obstacle,
    "triton": _triton_obstacle,
    "flashinfer": attention_flashinfer.obstacle,
}
