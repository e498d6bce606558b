"""A process that waits to become a rank: everything is imported, and the checkpoint is on its way into memory."""

import json
import os
import sys
from importlib import import_module

from orchestra.worker.config import WorkerConfig

# Arguments and environment of one rank.
ORDER_BYTES_MAX = 1 << 20


def await_assignment(config: WorkerConfig) -> list[str] | None:
    """Prepares for being any rank of a worker, and waits until told which.

    Args:
        config: what all ranks have in common.

    Returns:
        The arguments to run with; None where standard input ended, and nobody needs a spare any more.
    """
    from orchestra import _core

    if config.parent_pid is not None:
        _core.die_with_parent(config.parent_pid)
    _prepare(config)
    print(json.dumps({"status": "spare"}), flush=True)
    line = sys.stdin.readline(ORDER_BYTES_MAX)
    if not line:
        return None
    order = json.loads(line)
    # Before CUDA is asked for anything: it counts its devices once.
    os.environ.update(order["environment"])
    arguments: list[str] = order["arguments"]
    return arguments


def _prepare(config: WorkerConfig) -> None:
    import torch

    import_module("orchestra.worker.runtime")
    # Loads the kernels' libraries.
    torch.nn.functional.linear(torch.ones(2, 64), torch.ones(64, 64))
    for path in config.model_dir.glob("*.safetensors"):
        with path.open("rb") as weights:
            os.posix_fadvise(weights.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
