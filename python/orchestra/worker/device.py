"""Where a rank computes, in which numbers, with how many threads and how much memory."""

import os
from pathlib import Path

import torch

from orchestra.errors import ConfigError
from orchestra.worker import host_memory

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_NATIVE_BF16 = {"avx512_bf16", "amx_bf16"}


def select_device(name: str, local_rank: int) -> torch.device:
    """The device of a rank.

    Args:
        name: `auto`, `cpu` or `cuda`.
        local_rank: among the ranks of this machine; each has a GPU of its own.

    Raises:
        ConfigError: CUDA was asked for and is not there, or there are fewer GPUs than ranks.
    """
    has_cuda = torch.cuda.is_available()
    if name == "cpu" or (name == "auto" and not has_cuda):
        return torch.device("cpu")
    if not has_cuda:
        raise ConfigError("--device: cuda was asked for, but torch sees no GPU", key="device")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(f"--tp: rank {local_rank} has no GPU, torch sees {count}", key="tp")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def select_dtype(
    name: str, checkpoint: torch.dtype, device: torch.device, *, by_torch: bool
) -> torch.dtype:
    """The numbers to compute in.

    `auto` takes the checkpoint's. The CPU kernels know fp32 and bf16: bf16 takes the place of fp16. It halves what is
    read, and where the processor has no units for it the kernels compute in fp32 what they have read, in the same time.
    Torch's own layers do not.

    Args:
        name: `auto`, `float32` or `bfloat16`.
        checkpoint: what its weights are stored as.
        device: where they are computed.
        by_torch: whether torch's own layers compute them there, not ours.
    """
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cuda":
        return checkpoint
    is_slow = by_torch and not has_native_bf16()
    return torch.float32 if checkpoint == torch.float32 or is_slow else torch.bfloat16


def has_native_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware; on others torch's layers compute it slower than fp32."""
    try:
        flags = _read_field(Path("/proc/cpuinfo"), "flags").split()
    except (OSError, KeyError):
        return False
    return not _NATIVE_BF16.isdisjoint(flags)


def set_threads(local_size: int) -> None:
    """Divides the cores among the ranks of this machine, unless `OMP_NUM_THREADS` has decided."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))


def free_bytes(device: torch.device, local_size: int) -> int:
    """Memory that this rank may count as free: of its GPU, or its share of the machine's."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return host_memory.free_bytes(local_size)


def _read_field(path: Path, name: str) -> str:
    for line in path.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip().removesuffix(" kB")
    raise KeyError(name)
