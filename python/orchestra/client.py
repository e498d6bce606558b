"""`orchestra.Client`: generates over gRPC, for asyncio programs under any event loop."""

from __future__ import annotations

from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

import grpc
from grpc import aio

from orchestra import errors
from orchestra.v1 import inference_pb2, types_pb2
from orchestra.v1.inference_pb2_grpc import InferenceStub

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence
    from types import TracebackType

    from typing_extensions import Self, Unpack

    from orchestra.v1.inference_pb2_grpc import InferenceAsyncStub

__all__ = [
    "Choice",
    "Chunk",
    "Client",
    "Completion",
    "Finish",
    "Model",
    "Options",
    "Sampling",
    "TokenLogprob",
    "TokenLogprobs",
    "Usage",
]

# Metadata of the router's errors: what the gRPC status alone cannot say.
ERROR_CODE_KEY = "orchestra-error-code"
ERROR_PARAM_KEY = "orchestra-error-param"
RETRY_AFTER_MS_KEY = "retry-after-ms"

# For an error that did not come from a router, such as a refused connection.
_BY_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequestError,
    grpc.StatusCode.UNAUTHENTICATED: errors.AuthenticationError,
    grpc.StatusCode.NOT_FOUND: errors.ModelNotFoundError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.OverloadedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceededError,
    grpc.StatusCode.UNAVAILABLE: errors.WorkerUnavailableError,
    grpc.StatusCode.CANCELLED: errors.RequestCancelledError,
    grpc.StatusCode.UNIMPLEMENTED: errors.UnsupportedError,
}

Prompt: TypeAlias = "str | Sequence[int] | Sequence[Mapping[str, str]]"
"""Text; token ids; or messages, each `{"role": …, "content": …}`, for the model's chat template."""


class Sampling(TypedDict, total=False):
    """How tokens are drawn; what is left out is the model's default. Ranges: `proto/orchestra/v1/types.proto`."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    logprobs: int
    logit_bias: Mapping[int, float]


class Options(Sampling, total=False):
    """What a request can ask for besides its prompt and its model."""

    n: int
    """Choices to generate; 1 where left out."""
    stop: Sequence[str]
    """A choice ends before the first of these strings."""
    timeout_s: float | None
    """Give up after this many seconds; without it the router's own limit holds."""
    cache_salt: str
    """Requests share cached prefixes only with equal salts."""


@dataclass(frozen=True)
class TokenLogprob:
    """A token and the natural logarithm of the probability that the model gave it."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class TokenLogprobs:
    """The chosen token and the likeliest ones, most likely first."""

    chosen: TokenLogprob
    top: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Usage:
    """Tokens of one choice."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    """Prompt tokens whose KV came from the prefix cache."""


@dataclass(frozen=True)
class Finish:
    """How a choice ended."""

    reason: str
    """`stop`, `length`, `abort` or `error`."""
    stop_string: str | None
    """The stop string that ended it, where one did."""
    usage: Usage


@dataclass(frozen=True)
class Chunk:
    """A piece of one choice."""

    index: int
    """Which choice, `0..n`."""
    text: str
    """Never half a character."""
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    """One per token where `logprobs` was asked for, else empty."""
    finish: Finish | None
    """Set on the choice's last chunk."""


@dataclass(frozen=True)
class Choice:
    """One whole choice."""

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    finish: Finish


@dataclass(frozen=True)
class Model:
    """A model that a request can name."""

    id: str
    max_model_len: int
    """Longest prompt plus output, tokens."""
    workers: int


@dataclass(frozen=True)
class Completion:
    """Everything that a request produced."""

    choices: tuple[Choice, ...]

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text


class Client:
    """A connection to a router's gRPC door.

    ::

        async with Client("127.0.0.1:8001") as client:
            async for chunk in client.generate("To be", model="demo", max_tokens=32):
                print(chunk.text, end="")

    Args:
        address: `host:port`.
        api_key: sent as a bearer token, where the router asks for one.
        credentials: for TLS; without them the connection is in the clear.
    """

    def __init__(
        self,
        address: str,
        *,
        api_key: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        self._address = address
        self._metadata = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
        self._credentials = credentials
        self._channel: aio.Channel | None = None

    async def __aenter__(self) -> Self:
        if self._credentials is None:
            self._channel = aio.insecure_channel(self._address)
        else:
            self._channel = aio.secure_channel(self._address, self._credentials)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    async def models(self) -> list[Model]:
        """The models that a request could name now."""
        try:
            answer = await self._stub().ListModels(
                inference_pb2.ListModelsRequest(), metadata=self._metadata
            )
        except aio.AioRpcError as error:
            raise _exception(error) from error
        return [Model(model.id, model.max_model_len, model.workers) for model in answer.models]

    async def generate(
        self,
        prompt: Prompt,
        *,
        model: str,
        **options: Unpack[Options],
    ) -> AsyncGenerator[Chunk, None]:
        """Streams what the model produces. Leaving the loop early aborts the request on its worker.

        Args:
            prompt: text, token ids or messages.
            model: the name of a served model.
            options: see `Options` and `Sampling`.

        Raises:
            OrchestraError: the subclass that the error's code names.
        """
        timeout_s = options.get("timeout_s")
        request = _request(prompt, model, options)
        call = self._stub().Generate(request, timeout=timeout_s, metadata=self._metadata)
        try:
            async for response in call:
                yield _chunk(response)
        except aio.AioRpcError as error:
            raise _exception(error) from error
        finally:
            call.cancel()

    async def complete(
        self,
        prompt: Prompt,
        *,
        model: str,
        **options: Unpack[Options],
    ) -> Completion:
        """Like `generate`, and returns when everything is there."""
        chunks: list[list[Chunk]] = [[] for _ in range(options.get("n", 1))]
        stream = self.generate(prompt, model=model, **options)
        async with aclosing(stream):
            async for chunk in stream:
                chunks[chunk.index].append(chunk)
        return Completion(tuple(_choice(pieces) for pieces in chunks))

    def _stub(self) -> InferenceAsyncStub:
        if self._channel is None:
            raise RuntimeError("use the client inside `async with`")
        return InferenceStub(self._channel)


def _request(prompt: Prompt, model: str, options: Options) -> inference_pb2.GenerateRequest:
    fields: dict[str, Any] = dict(options)
    stop, n, salt = fields.pop("stop", ()), fields.pop("n", 1), fields.pop("cache_salt", "")
    timeout_s = fields.pop("timeout_s", None)
    try:
        fields["logit_bias"] = [
            types_pb2.LogitBias(token_id=token, bias=bias)
            for token, bias in fields.get("logit_bias", {}).items()
        ]
        request = inference_pb2.GenerateRequest(
            model=model,
            sampling=types_pb2.SamplingParams(**fields),
            stop=stop,
            n=n,
            timeout_ms=0 if timeout_s is None else max(1, round(timeout_s * 1000)),
            cache_salt=salt,
        )
        _set_prompt(request, prompt)
    except (TypeError, ValueError) as error:
        # protobuf's own words name the field or the type.
        raise errors.InvalidRequestError(str(error)) from error
    return request


def _set_prompt(request: inference_pb2.GenerateRequest, prompt: Any) -> None:
    if isinstance(prompt, str):
        request.text = prompt
    elif prompt and not isinstance(prompt[0], int):
        request.chat.messages.extend(inference_pb2.ChatMessage(**message) for message in prompt)
    else:
        request.token_ids.ids.extend(prompt)
        # An empty list is a prompt too: the router says what is wrong with it.
        request.token_ids.SetInParent()


def _chunk(response: inference_pb2.GenerateResponse) -> Chunk:
    finish = None
    if response.HasField("finish"):
        ended = response.finish
        finish = Finish(
            reason=types_pb2.FinishReason.Name(ended.reason).removeprefix("FINISH_REASON_").lower(),
            stop_string=ended.stop_string if ended.HasField("stop_string") else None,
            usage=Usage(
                ended.usage.prompt_tokens, ended.usage.completion_tokens, ended.usage.cached_tokens
            ),
        )
    return Chunk(
        index=response.index,
        text=response.text,
        token_ids=tuple(response.token_ids),
        logprobs=tuple(_token_logprobs(entry) for entry in response.logprobs),
        finish=finish,
    )


def _token_logprobs(entry: types_pb2.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(
        chosen=TokenLogprob(entry.chosen.token_id, entry.chosen.logprob),
        top=tuple(TokenLogprob(one.token_id, one.logprob) for one in entry.top),
    )


def _choice(pieces: list[Chunk]) -> Choice:
    finish = pieces[-1].finish if pieces else None
    if finish is None:
        raise errors.InternalError("the stream ended before the request did")
    return Choice(
        text="".join(piece.text for piece in pieces),
        token_ids=tuple(token for piece in pieces for token in piece.token_ids),
        logprobs=tuple(entry for piece in pieces for entry in piece.logprobs),
        finish=finish,
    )


def _exception(error: aio.AioRpcError) -> errors.OrchestraError:
    """The exception that a gRPC error stands for: by its code where a router sent it, else by its status."""
    # Pairs, whatever the stubs say; values under keys that end in `-bin` are bytes.
    trailing: Any = error.trailing_metadata() or ()
    metadata = {key: value for key, value in trailing if isinstance(value, str)}
    by_status = _BY_STATUS.get(error.code(), errors.InternalError)
    kind = errors.BY_CODE.get(metadata.get(ERROR_CODE_KEY, ""), by_status)
    retry_after = metadata.get(RETRY_AFTER_MS_KEY, "")
    return kind(
        error.details() or error.code().name,
        retry_after_ms=int(retry_after) if retry_after.isdecimal() else None,
        key=metadata.get(ERROR_PARAM_KEY),
    )
