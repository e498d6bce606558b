"""The gRPC door: with nothing but reflection, and with `orchestra.Client`."""

import asyncio
from contextlib import aclosing
from typing import Any

import grpc
import httpx
import pytest
import uvloop
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from orchestra import errors
from orchestra.client import Client
from tests.e2e.stack import Serve, eventually

GENERATE = "/orchestra.v1.Inference/Generate"


class Reflected:
    """A caller that knows only what the server says about itself. Its messages have no static type."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._channel: Any = channel
        self._database = ProtoReflectionDescriptorDatabase(channel)
        self._pool: Any = DescriptorPool(self._database)

    @property
    def services(self) -> set[str]:
        return set(self._database.get_services())

    def message(self, name: str) -> Any:
        return GetMessageClass(self._pool.FindMessageTypeByName(name))

    def generate(self, **fields: object) -> list[Any]:
        request = self.message("orchestra.v1.GenerateRequest")(**fields)
        call = self._channel.unary_stream(
            GENERATE,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=self.message("orchestra.v1.GenerateResponse").FromString,
        )
        return list(call(request, timeout=30))

    def health(self, service: str) -> str:
        request = self.message("grpc.health.v1.HealthCheckRequest")(service=service)
        call = self._channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=self.message("grpc.health.v1.HealthCheckResponse").FromString,
        )
        answer = call(request, timeout=30)
        values = answer.DESCRIPTOR.fields_by_name["status"].enum_type.values_by_number
        return str(values[answer.status].name)


def test_reflection_is_enough(serve: Serve) -> None:
    with grpc.insecure_channel(serve.grpc) as channel:
        caller = Reflected(channel)
        assert {"orchestra.v1.Inference", "grpc.health.v1.Health"} <= caller.services
        assert caller.health("") == "SERVING"
        assert caller.health("orchestra.v1.Inference") == "SERVING"
        responses = caller.generate(
            model=serve.model,
            text="Once upon a time",
            sampling={"max_tokens": 8, "temperature": 0.0, "ignore_eos": True},
        )
    tokens = [token for response in responses for token in response.token_ids]
    assert len(tokens) == 8
    finish = responses[-1].finish
    assert finish.usage.completion_tokens == 8
    assert "".join(response.text for response in responses)


def test_workers_door_is_not_offered_to_clients(serve: Serve) -> None:
    with grpc.insecure_channel(serve.grpc) as channel:
        assert "orchestra.v1.WorkerGateway" not in Reflected(channel).services


async def test_models(serve: Serve) -> None:
    async with Client(serve.grpc) as client:
        (model,) = await client.models()
    assert model.id == serve.model
    assert model.workers == 1
    assert model.max_model_len > 0


async def test_text_token_ids_and_messages(serve: Serve) -> None:
    async with Client(serve.grpc) as client:
        chunks = [
            chunk
            async for chunk in client.generate(
                "Once upon", model=serve.model, max_tokens=12, temperature=0, ignore_eos=True
            )
        ]
        whole = await client.complete(
            "Once upon", model=serve.model, max_tokens=12, temperature=0, ignore_eos=True
        )
        assert whole.text == "".join(chunk.text for chunk in chunks)
        assert len(chunks) > 3
        finish = whole.choices[0].finish
        assert (finish.reason, finish.usage.completion_tokens) == ("length", 12)
        assert len(whole.choices[0].token_ids) == 12
        # What was generated is a prompt as good as text: the model continues where it was.
        first = await client.complete(
            [7, 8, 9], model=serve.model, max_tokens=6, temperature=0, ignore_eos=True
        )
        tokens = first.choices[0].token_ids
        rest = await client.complete(
            [7, 8, 9, *tokens[:3]], model=serve.model, max_tokens=3, temperature=0, ignore_eos=True
        )
        assert rest.choices[0].token_ids == tokens[3:]
        chat = await client.complete(
            [{"role": "user", "content": "Hello"}], model=serve.model, max_tokens=4, ignore_eos=True
        )
        assert chat.choices[0].finish.usage.completion_tokens == 4


def test_client_under_uvloop(serve: Serve) -> None:
    async def run() -> str:
        async with Client(serve.grpc) as client:
            one = client.complete("Once", model=serve.model, max_tokens=4, temperature=0)
            other = client.complete("Once", model=serve.model, max_tokens=4, temperature=0)
            texts = {answer.text for answer in await asyncio.gather(one, other)}
            return texts.pop() if len(texts) == 1 else ""

    assert uvloop.run(run())


async def test_choices_and_logprobs(serve: Serve) -> None:
    async with Client(serve.grpc) as client:
        answer = await client.complete(
            "Once", model=serve.model, n=3, seed=11, max_tokens=8, logprobs=2, ignore_eos=True
        )
    assert len({choice.token_ids for choice in answer.choices}) > 1
    for choice in answer.choices:
        assert [entry.chosen.token_id for entry in choice.logprobs] == list(choice.token_ids)
        assert all(len(entry.top) == 2 for entry in choice.logprobs)


async def test_stop_string(serve: Serve) -> None:
    async with Client(serve.grpc) as client:
        whole = await client.complete(
            "Once", model=serve.model, max_tokens=30, temperature=0, ignore_eos=True
        )
        stop = whole.text[10:14]
        stopped = await client.complete(
            "Once", model=serve.model, max_tokens=30, temperature=0, ignore_eos=True, stop=[stop]
        )
    finish = stopped.choices[0].finish
    assert (finish.reason, finish.stop_string) == ("stop", stop)
    assert stopped.text == whole.text[: whole.text.index(stop)]


async def test_grpc_and_http_give_the_same_tokens(serve: Serve) -> None:
    body = {
        "model": serve.model,
        "prompt": "Once",
        "max_tokens": 10,
        "temperature": 0,
        "ignore_eos": True,
    }
    async with httpx.AsyncClient(timeout=30) as http, Client(serve.grpc) as client:
        answer = await http.post(f"{serve.url}/v1/completions", json=body)
        same = await client.complete(
            "Once", model=serve.model, max_tokens=10, temperature=0, ignore_eos=True
        )
    assert answer.json()["choices"][0]["text"] == same.text


async def test_errors_are_our_exceptions(serve: Serve) -> None:
    async with Client(serve.grpc) as client:
        with pytest.raises(errors.ModelNotFoundError):
            await client.complete("x", model="no-such-model")
        with pytest.raises(errors.InvalidRequestError) as wrong:
            await client.complete("x", model=serve.model, temperature=9)
        assert wrong.value.key == "temperature"
        with pytest.raises(errors.ContextTooLongError):
            await client.complete([3] * 100_000, model=serve.model)
        with pytest.raises(errors.InvalidRequestError):
            await client.complete([], model=serve.model)
        with pytest.raises(errors.DeadlineExceededError):
            await client.complete(
                "x", model=serve.model, max_tokens=400, ignore_eos=True, timeout_s=0.02
            )


async def test_leaving_a_stream_aborts_it(serve: Serve) -> None:
    async with Client(serve.grpc) as client:
        stream = client.generate("Once", model=serve.model, max_tokens=400, ignore_eos=True)
        async with aclosing(stream):
            await anext(stream)
        await asyncio.to_thread(
            eventually, lambda: serve.metrics()["orchestra_requests_running"] == 0, 5.0
        )
