"""Streams of a worker whose steps are planned ahead, beside those of one whose steps are not."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.stack import start_serve

DEMO = Path(__file__).parents[2] / "examples" / "models" / "demo"
# Few blocks, so that some are preempted; few seats, so that slots change hands behind sequences that have ended.
FLAGS = ["--dtype", "float32", "--max-num-seqs", "6", "--num-blocks", "48", "--kv-transfer", "off"]
PROMPTS = ["Once", "The king", "In the morning", "She said", "A house by the river"]


def _request(number: int) -> dict[str, Any]:
    """Requests that end by themselves, by a word or by their limit, drawn in every way."""
    ways: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 0.8, "extra_body": {"top_k": 20}},
        {"temperature": 1.1, "frequency_penalty": 0.4, "logprobs": 2},
    ]
    return {
        "prompt": PROMPTS[number % len(PROMPTS)] + " and" * (number % 7),
        "max_tokens": 1 + 5 * (number % 9),
        "seed": number,
        "stop": ["."] if number % 2 else None,
        **ways[number % len(ways)],
    }


async def _answers(url: str, model: str) -> list[tuple[str, str, list[float] | None]]:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-") as client:
        calls = [client.completions.create(model=model, **_request(n)) for n in range(40)]
        answers = await asyncio.gather(*calls)
    choices = [answer.choices[0] for answer in answers]
    return [
        (choice.text, choice.finish_reason, choice.logprobs and choice.logprobs.token_logprobs)
        for choice in choices
    ]


@pytest.mark.parametrize("ranks", ["1", "2"])
def test_planning_ahead_changes_no_stream(ranks: str) -> None:
    answers = []
    for mode in ("off", "on"):
        with start_serve(DEMO, *FLAGS, "--tp", ranks, "--async-scheduling", mode) as serve:
            answers.append(asyncio.run(_answers(serve.url, serve.model)))
    assert answers[0] == answers[1]
    assert {reason for _, reason, _ in answers[0]} == {"stop", "length"}
