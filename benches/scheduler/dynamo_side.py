"""Dynamo's `SelectionService` and `RadixTree` (PyPI `ai-dynamo-runtime`) through the same work."""

import os
import time

from benches.scheduler.workload import BLOCK_SIZE, MODEL, Cell, Times

# Approximate mode: workers need no event sockets, and the index is written by the decisions themselves.
os.environ.setdefault("DYN_ROUTER_USE_KV_EVENTS", "false")
os.environ.setdefault("DYN_LOG", "error")


class DynamoSide:
    """A selection service in this process; `register` before anything else."""

    def __init__(self) -> None:
        from dynamo._core import SelectionService

        self.service = SelectionService()
        self.select = Times()
        self.count = 0
        self.registered_per_s = 0.0

    async def register(self, cell: Cell, prompts: list[list[int]]) -> None:
        """Registers the workers and sends every prompt once."""
        self.prompts = prompts
        started = time.perf_counter()
        for index in range(cell.num_workers):
            await self.service.upsert_worker(
                {
                    "worker_id": index,
                    "model_name": MODEL,
                    "endpoint": f"http://127.0.0.1:{10000 + index}",
                    "block_size": BLOCK_SIZE,
                    "total_kv_blocks": 1 << 20,
                    "max_num_batched_tokens": 8192,
                }
            )
        self.registered_per_s = cell.num_workers / (time.perf_counter() - started)
        for prompt in prompts:
            await self._cycle(prompt)

    async def _cycle(self, prompt: list[int]) -> float:
        self.count += 1
        selection_id = str(self.count)
        request = {"model_name": MODEL, "token_ids": prompt, "selection_id": selection_id}
        started = time.perf_counter()
        await self.service.select_and_reserve(request)
        await self.service.free_reservation(selection_id)
        return (time.perf_counter() - started) * 1e6

    async def turn(self, picks: list[int]) -> None:
        """Times one cycle for each pick."""
        for pick in picks:
            self.select.samples.append(await self._cycle(self.prompts[pick]))
