"""A model that the native runner does not know, served by transformers' own modules to the official client."""

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.e2e.stack import Serve, start_serve

# All four requests together would need 23 blocks; no prompt's length is a multiple of the chunks.
FLAGS = ("--dtype", "float32", "--num-blocks", "18", "--max-prefill-chunk", "13")
LENGTHS = (1, 30, 77, 130)
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Granite."""
    return make_checkpoint("granite", tmp_path_factory.mktemp("models") / "granite", seed=7)


@pytest.fixture(scope="module")
def serve(model_dir: Path) -> Iterator[Serve]:
    """`orchestra serve` on it."""
    with start_serve(model_dir, *FLAGS) as running:
        yield running


def greedy(model_dir: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers writes after each prompt; nothing ends it early."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    outputs = []
    for prompt in prompts:
        drawn = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=0,
        )
        outputs.append(drawn[0, len(prompt) :].tolist())
    return outputs


async def test_greedy_tokens_equal_those_of_transformers(serve: Serve, model_dir: Path) -> None:
    draw = random.Random(3)
    prompts = [[draw.randrange(8, VOCAB_SIZE - 4) for _ in range(length)] for length in LENGTHS]
    async with openai.AsyncOpenAI(base_url=f"{serve.url}/v1", api_key="-", max_retries=0) as client:

        async def complete(prompt: list[int]) -> list[int]:
            answer = await client.completions.create(
                model=serve.model,
                prompt=prompt,
                max_tokens=MAX_TOKENS,
                temperature=0,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
            extra = answer.choices[0].model_extra
            assert extra is not None
            token_ids: list[int] = extra["token_ids"]
            return token_ids

        first = await asyncio.gather(*map(complete, prompts))
        # The second time, the prompts are in the prefix cache as far as it has room for them.
        second = await asyncio.gather(*map(complete, prompts))
    expected = greedy(model_dir, prompts)
    assert first == expected
    assert second == expected
    assert serve.metrics()["orchestra_prefix_cache_hit_tokens_total"] > 0
    assert "transformers' own modules compute this model" in serve.log.read_text()


async def test_chat_by_its_template(serve: Serve) -> None:
    async with openai.AsyncOpenAI(base_url=f"{serve.url}/v1", api_key="-", max_retries=0) as client:
        stream = await client.chat.completions.create(
            model=serve.model,
            messages=[{"role": "user", "content": "Who are you?"}],
            max_tokens=8,
            temperature=0.8,
            seed=5,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    assert chunks[-1].usage is not None
    assert 0 < chunks[-1].usage.completion_tokens <= 8
    finished = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert finished[-1] in ("stop", "length")
