"""`orchestra.Scheduler` through the cycle that is timed."""

import time

from benches.scheduler.workload import BLOCK_SIZE, MAX_TOKENS, MODEL, Cell, Times, as_buffer
from orchestra import Scheduler


class OrchestraSide:
    """A scheduler whose workers hold whatever they were once sent.

    Dynamo's service runs in its approximate mode, in which a decision also writes the prompt into the index. So ours
    is timed twice: the decision alone, and with the prompt's blocks hashed and stored, as if the worker's KV event
    were handled in the caller's time too.
    """

    def __init__(self, cell: Cell, prompts: list[list[int]]) -> None:
        self.lists = prompts
        self.buffers = [as_buffer(prompt) for prompt in prompts]
        self.scheduler = Scheduler()
        started = time.perf_counter()
        for index in range(cell.num_workers):
            self.scheduler.add_worker(
                f"worker-{index}",
                model=MODEL,
                num_blocks=1 << 20,
                max_model_len=1 << 20,
                block_size=BLOCK_SIZE,
            )
        self.registered_per_s = cell.num_workers / (time.perf_counter() - started)
        self.decide, self.decide_list, self.decide_and_store = Times(), Times(), Times()
        for prompt in self.buffers:
            self._cycle(prompt, is_stored=True)

    def _cycle(self, prompt: object, *, is_stored: bool) -> float:
        scheduler = self.scheduler
        started = time.perf_counter()
        reservation = scheduler.route(prompt, model=MODEL, max_tokens=MAX_TOKENS)  # type: ignore[arg-type]
        if is_stored:
            worker = reservation.worker
            scheduler.kv_stored(worker, scheduler.block_hashes(worker, prompt))  # type: ignore[arg-type]
        reservation.release()
        return (time.perf_counter() - started) * 1e6

    def turn(self, picks: list[int]) -> None:
        """Times one cycle for each pick, in each of the three ways."""
        for pick in picks:
            self.decide.samples.append(self._cycle(self.buffers[pick], is_stored=False))
        for pick in picks:
            self.decide_list.samples.append(self._cycle(self.lists[pick], is_stored=False))
        for pick in picks:
            self.decide_and_store.samples.append(self._cycle(self.buffers[pick], is_stored=True))
