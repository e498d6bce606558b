"""Which of a worker's ranks a process is."""

import argparse
import os
from urllib.parse import urlparse

from orchestra.errors import ConfigError
from orchestra.worker.argument_types import parse_layer_split
from orchestra.worker.sharding import Shard, Stage


def place_of(given: argparse.Namespace) -> tuple[Shard, Shard, Stage]:
    """Reads a rank's place from its flags, or with `env://` from what torchrun sets.

    Returns:
        Among the ranks that share each layer; among those that divide prompts; and its stage.

    Raises:
        ConfigError: there is no such place, or no way to meet the other ranks.
    """
    stages, contexts = given.pipeline_parallel, given.context_parallel
    size, rank = given.tp, given.rank
    if urlparse(given.rendezvous).scheme == "env":
        world = int(os.environ.get("WORLD_SIZE", "1"))
        size = max(1, world // (stages * contexts)) if size is None else size
        rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    size = 1 if size is None else size
    in_stage = contexts * size
    num_ranks = stages * in_stage
    flags = f"--tp {size}"
    flags += f" --cp {contexts}" if contexts > 1 else ""
    flags += f" --pp {stages}" if stages > 1 else ""
    rank = 0 if rank is None and num_ranks == 1 else rank
    if rank is None or rank >= num_ranks:
        raise ConfigError(f"--rank: must be 0 to {num_ranks - 1} with {flags}", key="rank")
    if num_ranks > 1 and not given.rendezvous:
        raise ConfigError(f"--rendezvous: needed with {flags}", key="rendezvous")
    split = parse_layer_split(given.layer_split) if given.layer_split else ()
    stage = Stage(rank // in_stage, stages, split)
    context = Shard(rank % in_stage // size, contexts)
    return Shard(rank % size, size), context, stage
