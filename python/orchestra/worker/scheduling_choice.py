"""Whether a worker's steps are planned ahead: the next one while its device runs the one before."""

import torch

from orchestra.errors import ConfigError
from orchestra.worker.config import WorkerConfig

# One that runs and one that waits for it.
STEPS_AHEAD = 2


def plans_ahead(config: WorkerConfig, device: torch.device, *, moves_kv: bool) -> bool:
    """Whether the next step is planned and started before the tokens of the one before are on the host.

    Args:
        config: of the worker.
        device: where the model computes.
        moves_kv: whether KV comes from other workers, which it does only while no step runs.

    Raises:
        ConfigError: it was asked for and cannot be.
    """
    if config.async_scheduling == "off":
        return False
    reasons = {
        "ranks of other stages or contexts do not learn what was drawn": (
            config.num_ranks > config.shard.size
        ),
        "KV moves to this worker, unless --kv-transfer is off": moves_kv,
    }
    found = [reason for reason, is_so in reasons.items() if is_so]
    if found and config.async_scheduling == "on":
        raise ConfigError(f"--async-scheduling: {found[0]}", key="async_scheduling")
    # A CPU that plans has no time to compute. Several ranks do it where they are asked to: on GPUs it was never timed.
    is_worth_it = device.type == "cuda" and config.num_ranks == 1
    return not found and (config.async_scheduling == "on" or is_worth_it)
