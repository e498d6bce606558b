"""Compiles the Triton kernels for GPUs that need not be there; prints what they take, as JSON.

A process of its own: where Triton's interpreter is in use, nothing can be compiled.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from orchestra.worker import attention_triton_kernels as kernels
from orchestra.worker import experts_triton_kernels as experts
from orchestra.worker import row_triton_kernels as rows
from orchestra.worker import symmetric_triton_kernels as symmetric
from orchestra.worker.attention_triton import Tuning
from orchestra.worker.experts_triton import Tiles
from orchestra.worker.kv_cache import KvCacheSpec

NUMBERS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
CPU = torch.device("cpu")
GROUP, KV_HEADS = 4, 8
POINTERS = {
    **dict.fromkeys(("output", "query", "layer", "key_value"), "numbers"),
    **dict.fromkeys(("x", "y", "addend", "out", "heads"), "numbers"),
    **dict.fromkeys(("sums", "stats", "weight", "rotations"), "fp32"),
    "numbers": "numbers",
    **dict.fromkeys(("bases", "order", "starts", "tile_ends", "chosen"), "i64"),
    **dict.fromkeys(("rows", "stack"), "numbers"),
    "weights": "fp32",
}
SCALARS = {"scale": "fp32", "soft_cap": "fp32", "epsilon": "fp32", "timeout_ns": "i64"}
INTEGERS = ("num_splits", "window", "count", "piece", "share", "first")


def build(
    kernel: Any, capability: int, numbers: str, constants: dict[str, Any], options: dict[str, int]
) -> dict[str, int]:
    """Compiles one kernel; returns bytes of shared memory, registers, and bytes that did not fit them."""
    signature, aligned = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in SCALARS:
            signature[name] = SCALARS[name]
        elif name in INTEGERS or name.endswith("stride"):
            signature[name] = "i32"
        else:
            kind = POINTERS.get(name, "i32")
            signature[name] = "*" + (numbers if kind == "numbers" else kind)
        if signature[name].startswith("*") or name.endswith("stride"):
            aligned[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        tools = Path(triton.__file__).parent / "backends/nvidia/bin"
        usage = subprocess.run(
            [tools / "cuobjdump", "--dump-resource-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    pairs = dict(
        word.split(":") for word in usage.split() if word.count(":") == 1 and word[-1] != ":"
    )
    return {
        "shared": built.metadata.shared,
        "registers": int(pairs["REG"]),
        "spilled": int(pairs["LOCAL"]) + int(pairs["STACK"]),
    }


def main() -> None:
    """Compiles for the capability and the size of heads that the command line names."""
    capability, head_dim, name = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    dtype = getattr(torch, name)
    tuning = Tuning.of(KvCacheSpec(1, KV_HEADS, head_dim, 16, dtype), CPU)
    head = {"HEAD_DIM": head_dim, "HEAD_DIM_PADDED": triton.next_power_of_2(head_dim)}
    shape = {"KV_HEADS": KV_HEADS, "GROUP": GROUP, "SPLIT": tuning.split, **head}
    tile = {"BLOCK_SIZE": 16, "ROWS": tuning.rows, "KEYS": tuning.keys, "IS_INTERPRETED": False}
    options = {"num_warps": tuning.num_warps, "num_stages": tuning.num_stages}
    heads = {"HEADS": 2 * KV_HEADS, "HEADS_PADDED": 2 * KV_HEADS, "BLOCK_SIZE": 16}
    row = {"GROUPS": 1, "SIZE": 4096, "SIZE_PADDED": 4096}
    rotated = {"COUNT": 40, "COUNT_PADDED": 64, "PAIRS": head_dim // 2, "PAIRS_PADDED": 64}
    ranks = {"RANK": 1, "LANES": 8, "PROGRAMS": 64, "SLOT_BYTES": 65536, "BLOCK": 1024}
    ranks |= {"SIGNAL_BYTES": 2048, "LOOKS": 1024, "IS_INTERPRETED": False}
    special = {"HAS_WINDOW": True, "HAS_CAP": True}
    plain = {"HAS_WINDOW": False, "HAS_CAP": False}
    jobs: dict[str, tuple[Any, dict[str, Any], dict[str, int]]] = {
        "attend": (kernels.attend, {**shape, **tile, **plain, "IS_SPLIT": False}, options),
        "attend_split": (kernels.attend, {**shape, **tile, **special, "IS_SPLIT": True}, options),
        "combine": (kernels.combine, {**shape, "GROUP_PADDED": GROUP}, {}),
        "write_kv": (kernels.write_kv, {**heads, **head}, {}),
        "rms_norm": (rows.rms_norm, {**row, "IS_ONE_WEIGHT": True, "HAS_ADDEND": True}, {}),
        "gate": (rows.gate, {"SIZE": 5632, "BLOCK": 1024, "IS_SILU": True}, {}),
        "rotate": (rows.rotate, rotated, {}),
        "add_up": (symmetric.all_reduce, {**ranks, "SIZE": 2, "IS_SHARED": False}, {}),
        "add_up_shares": (symmetric.all_reduce, {**ranks, "SIZE": 8, "IS_SHARED": True}, {}),
    }
    mixture = {"EXPERTS": 128, "EXPERTS_PADDED": 128, "INPUTS": 2048, "OUTPUTS": 1536}
    for job, pairs in (("project_few", 8), ("project_many", 16384)):
        cut = Tiles.of(pairs, 128, dtype)
        sizes = {"ROWS": cut.rows, "COLUMNS": cut.columns, "DEPTH": cut.depth}
        constants = {**mixture, **sizes, "DIVISOR": 8, "IS_SCATTERED": False}
        staged = {"num_warps": 4, "num_stages": cut.num_stages}
        jobs[job] = (experts.project, {**constants, "IS_INTERPRETED": False}, staged)
    jobs["mix"] = (experts.mix, {"PICKS": 8, "SIZE": 2048, "BLOCK": 1024}, {})
    numbers = NUMBERS[dtype]
    done = {
        job: build(kernel, capability, numbers, constants, chosen)
        for job, (kernel, constants, chosen) in jobs.items()
    }
    print(json.dumps(done))


if __name__ == "__main__":
    main()
