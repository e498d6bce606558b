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


def select_dtype(name: str, checkpoint: torch.dtype, device: torch.device) -> torch.dtype:
    """The numbers to compute in; `auto` takes the checkpoint's where the device is fast in them."""
    if name != "auto":
        return _DTYPES[name]
    if device.type == "cuda":
        return checkpoint
    return torch.bfloat16 if checkpoint != torch.float32 and has_native_bf16() else torch.float32


def has_native_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware; others compute it slower than fp32."""
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
