"""The official `openai` client against the real stack: what it understands is what clients rely on."""

import math
from collections.abc import AsyncIterator

import openai
import pytest
from openai.types.chat import ChatCompletionUserMessageParam

from tests.e2e.stack import Serve

MESSAGES: list[ChatCompletionUserMessageParam] = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture
async def client(serve: Serve) -> AsyncIterator[openai.AsyncOpenAI]:
    """A client that does not retry, so that each test sees what the router said."""
    made = openai.AsyncOpenAI(base_url=f"{serve.url}/v1", api_key="unused", max_retries=0)
    async with made as open_client:
        yield open_client


async def test_models(client: openai.AsyncOpenAI, serve: Serve) -> None:
    models = [model async for model in client.models.list()]
    assert [model.id for model in models] == [serve.model]
    assert (await client.models.retrieve(serve.model)).object == "model"


async def test_chat(client: openai.AsyncOpenAI, serve: Serve) -> None:
    answer = await client.chat.completions.create(
        model=serve.model, messages=MESSAGES, max_tokens=12, temperature=0
    )
    choice = answer.choices[0]
    assert answer.object == "chat.completion"
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage is not None
    assert 0 < answer.usage.completion_tokens <= 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


async def test_chat_stream_equals_the_whole(client: openai.AsyncOpenAI, serve: Serve) -> None:
    whole = await client.chat.completions.create(
        model=serve.model, messages=MESSAGES, max_tokens=24, temperature=0
    )
    stream = await client.chat.completions.create(
        model=serve.model,
        messages=MESSAGES,
        max_completion_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    pieces = [choice for chunk in chunks for choice in chunk.choices]
    assert (
        "".join(piece.delta.content or "" for piece in pieces) == whole.choices[0].message.content
    )
    assert pieces[0].delta.role == "assistant"
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == [
        whole.choices[0].finish_reason
    ]
    # The usage comes alone, in the last chunk.
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1
    # It streamed: no chunk waited for the end.
    assert len(pieces) > 4


async def test_chat_logprobs(client: openai.AsyncOpenAI, serve: Serve) -> None:
    answer = await client.chat.completions.create(
        model=serve.model,
        messages=MESSAGES,
        max_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=3,
    )
    assert answer.choices[0].logprobs is not None
    entries = answer.choices[0].logprobs.content
    assert entries is not None
    assert answer.usage is not None
    assert len(entries) == answer.usage.completion_tokens
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        # Greedy: the chosen token is the likeliest.
        assert entry.token == entry.top_logprobs[0].token
        assert math.isclose(entry.logprob, entry.top_logprobs[0].logprob, abs_tol=1e-6)
        values = [one.logprob for one in entry.top_logprobs]
        assert values == sorted(values, reverse=True)
        assert sum(math.exp(value) for value in values) <= 1.0 + 1e-6
        assert entry.bytes is not None


async def test_chat_n_choices(client: openai.AsyncOpenAI, serve: Serve) -> None:
    answer = await client.chat.completions.create(
        model=serve.model, messages=MESSAGES, max_tokens=16, temperature=1.0, n=3, seed=5
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in answer.choices]
    assert len(set(texts)) > 1
    again = await client.chat.completions.create(
        model=serve.model, messages=MESSAGES, max_tokens=16, temperature=1.0, n=3, seed=5
    )
    assert [choice.message.content for choice in again.choices] == texts


async def test_completion_of_text_list_and_token_ids(
    client: openai.AsyncOpenAI, serve: Serve
) -> None:
    prompts = ["To be, or", "What is"]
    both = await client.completions.create(
        model=serve.model, prompt=prompts, max_tokens=8, temperature=0
    )
    assert [choice.index for choice in both.choices] == [0, 1]
    for prompt, choice in zip(prompts, both.choices, strict=True):
        alone = await client.completions.create(
            model=serve.model,
            prompt=prompt,
            max_tokens=8,
            temperature=0,
            extra_body={"return_token_ids": True},
        )
        assert alone.choices[0].text == choice.text
        extra = alone.choices[0].model_extra
        assert extra is not None
        by_ids = await client.completions.create(
            model=serve.model, prompt=extra["prompt_token_ids"], max_tokens=8, temperature=0
        )
        assert by_ids.choices[0].text == choice.text


async def test_completion_stream(client: openai.AsyncOpenAI, serve: Serve) -> None:
    stream = await client.completions.create(
        model=serve.model,
        prompt="Once",
        max_tokens=10,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    pieces = [chunk.choices[0] async for chunk in stream]
    assert pieces[-1].finish_reason == "length"
    assert all(piece.finish_reason is None for piece in pieces[:-1])


async def test_stop_string_ends_before_itself(client: openai.AsyncOpenAI, serve: Serve) -> None:
    whole = await client.completions.create(
        model=serve.model,
        prompt="Once upon",
        max_tokens=40,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    text = whole.choices[0].text
    # From the middle of one token into the next, wherever the tokens end.
    stop = text[len(text) // 2 : len(text) // 2 + 5]
    for stream in (False, True):
        stopped = await client.completions.create(
            model=serve.model,
            prompt="Once upon",
            max_tokens=40,
            temperature=0,
            stop=[stop],
            stream=stream,
            extra_body={"ignore_eos": True},
        )
        choices = (
            [chunk.choices[0] async for chunk in stopped]
            if isinstance(stopped, openai.AsyncStream)
            else stopped.choices
        )
        assert "".join(choice.text for choice in choices) == text[: text.index(stop)]
        assert choices[-1].finish_reason == "stop"


async def test_errors_become_the_clients_exceptions(
    client: openai.AsyncOpenAI, serve: Serve
) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="no-such-model", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        await client.chat.completions.create(model=serve.model, messages=MESSAGES, temperature=3)
    assert (wrong.value.code, wrong.value.param) == ("invalid_request", "temperature")
    with pytest.raises(openai.BadRequestError) as long:
        await client.completions.create(model=serve.model, prompt=[5] * 100_000, max_tokens=1)
    assert long.value.code == "context_too_long"


async def test_leaving_a_stream_frees_the_worker(client: openai.AsyncOpenAI, serve: Serve) -> None:
    stream = await client.completions.create(
        model=serve.model,
        prompt="Once",
        max_tokens=400,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    await anext(aiter(stream))
    await stream.close()
    # The next request on an otherwise idle worker is served at once, and nothing is counted as running.
    answer = await client.completions.create(model=serve.model, prompt="Once", max_tokens=1)
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert serve.metrics()["orchestra_requests_running"] == 0
