"""A worker that the kernel allows only so much memory: it has to refuse, or to get through its heaviest steps.

`python -m tests.worker.limited_process MODEL_DIR RUNNER MEGABYTES…` brings a rank up once for each figure, with so much
more data than the process has already as its limit (RLIMIT_DATA), and with all of it that is left for the cache; prints
a JSON object for each: `refused` with the message, or `blocks`, after the steps below. Then once more under the last
limit, with blocks of host memory besides.
"""

import importlib
import json
import resource
import sys
from dataclasses import replace
from pathlib import Path

import torch

from orchestra.errors import ConfigError
from orchestra.worker import assembly, attention_layout
from orchestra.worker.assembly import Rank, assemble
from orchestra.worker.config import WorkerConfig
from tests.worker.plans import PlanBuilder, sampling_start

SEQUENCES, TOKENS, LONGEST = 96, 512, 2048
# Of the cache's 16 tokens each: what the heaviest of the steps needs.
BLOCKS_NEEDED = LONGEST // 16 + SEQUENCES
EVERYTHING = {
    "temperature": 1.0,
    "top_p": 0.99,
    "top_k": 4000,
    "min_p": 0.0001,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.4,
    "prompt_token_ids": [1, 2, 3],
    "logit_bias_ids": [3],
    "logit_bias_values": [2.0],
}


def heaviest_steps(rank: Rank) -> None:
    """A long prompt, as many samples as a step may have, and decoding far behind a shared prefix."""
    builder = PlanBuilder(rank.num_blocks)
    builder.add("0", [5] * (LONGEST - 32))
    for _ in range(0, LONGEST - 32, TOKENS):
        left = LONGEST - 32 - builder.sequences["0"].num_computed
        rank.runner.execute(builder.plan({"0": min(TOKENS, left)}, [sampling_start(0)]))
    builder.append("0", 5)
    shared = (LONGEST - 32) // 16
    for index in range(1, SEQUENCES):
        tokens = [5] * (shared * 16 + 1)
        builder.add(str(index), tokens, shares="0", shared_blocks=shared)
    names = [str(index) for index in range(SEQUENCES)]
    starts = [sampling_start(i, seed=i, **(EVERYTHING if i else {})) for i in range(SEQUENCES)]
    rank.runner.execute(builder.plan(dict.fromkeys(names, 1), starts, num_top_logprobs=20))
    builder = PlanBuilder(rank.num_blocks)
    count = TOKENS // SEQUENCES
    for name in names:
        builder.add(name, [5] * count)
    rank.runner.execute(builder.plan(dict.fromkeys(names, count), starts, num_top_logprobs=20))


def try_with(config: WorkerConfig, megabytes: int) -> dict[str, object]:
    """Brings the rank up and runs it under one limit."""
    status = Path("/proc/self/status").read_text().splitlines()
    (data,) = (line.split()[1] for line in status if line.startswith("VmData:"))
    limit = int(data) * 1024 + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))
    try:
        rank = assemble(config, lambda _done, _total: None)
        if rank.num_blocks >= BLOCKS_NEEDED:
            heaviest_steps(rank)
    except ConfigError as error:
        return {"refused": str(error)}
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return {"blocks": rank.num_blocks}


def main(arguments: list[str]) -> None:
    """Runs the rank under one limit after the other."""
    model_dir, runner, *limits = arguments
    if runner == "hf":
        # What importing takes is not what is tested.
        importlib.import_module("orchestra.worker.hf_model")
    torch.set_num_threads(1)
    assembly.CPU_SHARE = 1.0
    # As large beside this model as they are beside one of some gigabytes.
    attention_layout.GATHER_BYTES_MAX = 2 << 20
    attention_layout.MASK_NUMBERS_MAX = 1 << 18
    attention_layout.MASK_NUMBERS_KEPT = 1 << 19
    config = WorkerConfig(
        model_dir=Path(model_dir),
        router="",
        worker_id="",
        model_name="",
        runner=runner,
        device="cpu",
        dtype="float32",
        # The one that gathers keys and values; kernels read them where they lie.
        attention="torch",
        max_num_seqs=SEQUENCES,
        max_num_batched_tokens=TOKENS,
        max_model_len=LONGEST,
        kv_transfer="off",
    )
    for megabytes in map(int, limits):
        print(json.dumps(try_with(config, megabytes)), flush=True)
    swapping = replace(config, num_host_blocks=64)
    print(json.dumps(try_with(swapping, int(limits[-1]))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
