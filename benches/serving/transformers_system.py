"""transformers' continuous batching in a process of its own, driven over its pipes.

It is called in-process through the manager's public API (no HTTP on its side), with streaming results. Settings are
the ones it needs on a CPU: cache and batch sizes given, no CUDA graphs; otherwise its defaults.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benches.serving.workload import Cell, Sample


class Transformers:
    """The parent's handle."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        """Takes a started child."""
        self.process = process

    def run(self, cell: Cell, prompts: list[list[int]]) -> Sample:
        """Runs one cell in the child and returns what it took."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        order = {
            "prompts": prompts,
            "concurrency": cell.concurrency,
            "output_tokens": cell.output_tokens,
        }
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError("the transformers process ended")
        return Sample(**json.loads(answer))


@contextlib.contextmanager
def batching(checkpoint: Path, dtype: str, threads: int) -> Iterator[Transformers]:
    """Starts the child, yields its handle, and ends it."""
    command = [sys.executable, "-m", "benches.serving.transformers_system"]
    process = subprocess.Popen(
        [*command, str(checkpoint), dtype, str(threads)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # As our workers set it for themselves: spinning OpenMP threads would slow both systems.
        env={"OMP_WAIT_POLICY": "passive", **os.environ},
    )
    try:
        yield Transformers(process)
    finally:
        if process.stdin is not None:
            process.stdin.close()
        process.wait(timeout=60)


async def _closed_loop(manager: Any, order: dict[str, Any]) -> Sample:
    waiting = iter(order["prompts"])
    sample = Sample(elapsed_s=0.0, output_tokens=0)
    numbers = iter(range(1 << 30))
    started = time.perf_counter()

    async def client() -> None:
        for prompt in waiting:
            request_id = f"{started}-{next(numbers)}"
            results: asyncio.Queue[Any] = asyncio.Queue()
            manager.register_result_handler(request_id, results.put_nowait)
            begun = time.perf_counter()
            manager.add_request(
                prompt,
                request_id=request_id,
                max_new_tokens=order["output_tokens"],
                streaming=True,
                eos_token_id=-1,
            )
            output = await results.get()
            sample.ttft_s.append(time.perf_counter() - begun)
            while not output.is_finished():
                output = await results.get()
            if output.error or len(output.generated_tokens) != order["output_tokens"]:
                raise RuntimeError(f"transformers answered {output.error!r}")
            sample.output_tokens += len(output.generated_tokens)

    await asyncio.gather(*(client() for _ in range(order["concurrency"])))
    sample.elapsed_s = time.perf_counter() - started
    return sample


def main(checkpoint: str, dtype: str, threads: str) -> None:
    """Serves orders from standard input until it closes."""
    import torch
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    torch.set_num_threads(int(threads))
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    # Room for 64 requests of 1,024 tokens: never the reason for waiting in any cell.
    config = ContinuousBatchingConfig(
        page_size=32, num_blocks=2048, max_batch_tokens=2048, use_cuda_graph=False
    )
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=64)
    with model.continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=config
    ) as manager:
        for line in sys.stdin:
            sample = asyncio.run(_closed_loop(manager, json.loads(line)))
            sys.stdout.write(json.dumps(asdict(sample)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
