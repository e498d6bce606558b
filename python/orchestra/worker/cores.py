"""Which cores of its machine a rank computes on.

Ranks that share each layer wait for each other many times a step, and who has waited for a while sleeps. The kernel
likes to run who is woken where it was woken from: so two ranks come to take turns on one core, with another one free,
until the next time that it balances the load, some milliseconds later.
"""

import logging
import os
from pathlib import Path

import torch

from orchestra import _core
from orchestra.errors import InternalError

_CORES = Path("/sys/devices/system/cpu")

logger = logging.getLogger("orchestra.worker")


def share_of(local_rank: int, local_size: int, root: Path = _CORES) -> tuple[int, ...]:
    """The cores of one of the ranks of this machine; none where it may go anywhere, as it is alone or they are too few.

    Args:
        local_rank: which of the ranks.
        local_size: how many they are.
        root: where the kernel describes the cores.
    """
    cores = sorted(os.sched_getaffinity(0), key=lambda core: (*_place(root / f"cpu{core}"), core))
    if local_size == 1 or len(cores) < local_size:
        return ()
    begin, end = (len(cores) * rank // local_size for rank in (local_rank, local_rank + 1))
    return tuple(cores[begin:end])


def bind(cores: tuple[int, ...]) -> None:
    """Keeps the threads that compute, this one among them, on some cores. Other threads of the process stay free.

    Where more threads compute than there are cores, or the system does not let them, nothing is done.
    """
    threads = torch.get_num_threads()
    if threads > len(cores):
        return
    try:
        _core.bind_threads(list(cores), threads)
    except InternalError as error:
        logger.debug("this rank computes on any core: %s", error)


def _place(core: Path) -> tuple[int, int]:
    """Of a hardware thread: its processor, and its core there, which it may share with others."""
    try:
        package, number = (
            int((core / "topology" / name).read_text())
            for name in ("physical_package_id", "core_id")
        )
    except (OSError, ValueError):
        return 0, 0
    return package, number
