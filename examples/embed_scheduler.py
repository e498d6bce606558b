"""Orchestra's scheduler inside your own program: no server, no torch. Run it: `python examples/embed_scheduler.py`.

Four engines, each with room for eight sequences, serve sixty-four conversations that share system prompts. The
scheduler sends each request where the least prefill is left to do, waits where nobody has room, and never promises
KV memory twice. Replace `Engine` with a client of yours.
"""

import asyncio
from collections import Counter

from orchestra import AsyncScheduler

MODEL = "my-model"
BLOCK_SIZE = 16
SYSTEM_PROMPT_TOKENS = 480


class Engine:
    """Stands in for an inference engine: computes what is not cached, and keeps prompts cached."""

    def __init__(self, name: str, scheduler: AsyncScheduler) -> None:
        self.name = name
        self.scheduler = scheduler
        scheduler.add_worker(
            name,
            model=MODEL,
            num_blocks=2_000,
            block_size=BLOCK_SIZE,
            max_num_seqs=8,
            max_model_len=4_096,
        )

    async def prefill(self, prompt: list[int], num_cached_tokens: int) -> None:
        """Computes the prompt's KV, then tells which blocks the prefix cache holds now."""
        await asyncio.sleep((len(prompt) - num_cached_tokens) * 2e-6)
        self.scheduler.kv_stored(self.name, self.scheduler.block_hashes(self.name, prompt))

    async def decode(self, max_tokens: int) -> list[int]:
        """Draws the output tokens."""
        await asyncio.sleep(max_tokens * 1e-4)
        return [0] * max_tokens


async def complete(
    scheduler: AsyncScheduler, engines: dict[str, Engine], prompt: list[int], max_tokens: int
) -> tuple[str, int]:
    """One request, from waiting for room to giving it back; the engine's name and the tokens found in its cache."""
    # Leaving the block gives the room back, also when the request fails or its client goes away.
    with await scheduler.acquire(
        prompt, model=MODEL, max_tokens=max_tokens, timeout=30
    ) as reservation:
        engine = engines[reservation.worker]
        await engine.prefill(prompt, reservation.num_cached_tokens)
        reservation.prefill_done()
        await engine.decode(max_tokens)
        return reservation.worker, reservation.num_cached_tokens


def conversation(number: int) -> list[int]:
    """A prompt of 640 tokens, which begins with one of four system prompts."""
    system = [number % 4] * SYSTEM_PROMPT_TOKENS
    return system + [1_000 + number] * 160


async def main() -> None:
    """Serves all conversations at once and prints where they went."""
    scheduler = AsyncScheduler()
    engines = {name: Engine(name, scheduler) for name in ("gpu-0", "gpu-1", "gpu-2", "gpu-3")}

    prompts = [conversation(number) for number in range(64)]
    requests = (complete(scheduler, engines, prompt, max_tokens=32) for prompt in prompts)
    results = await asyncio.gather(*requests)

    served = Counter(worker for worker, _ in results)
    hits = sum(cached for _, cached in results)
    print("requests per engine:", dict(sorted(served.items())))
    print(f"prompt tokens found in a cache: {hits} of {sum(map(len, prompts))}")
    print("still held:", scheduler.stats().num_reservations)

    # Why would the next request go where it would go?
    explanation = scheduler.explain(conversation(1), model=MODEL, max_tokens=32, k=2)
    for candidate in explanation.candidates:
        print(f"{candidate.worker}: cost {candidate.cost}, cached {candidate.num_cached_tokens}")


if __name__ == "__main__":
    asyncio.run(main())
