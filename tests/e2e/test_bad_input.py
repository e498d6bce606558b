"""Bad input gets an error that names the field, in OpenAI's shape, and changes nothing."""

import json
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.e2e.stack import Serve

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def http(serve: Serve) -> Iterator[httpx.Client]:
    """A plain HTTP client; nothing that it sent is left running at the end."""
    with httpx.Client(base_url=serve.url, timeout=30) as client:
        yield client
    metrics = serve.metrics()
    assert metrics["orchestra_requests_running"] == 0
    assert metrics["orchestra_requests_waiting"] == 0


def post(http: httpx.Client, path: str, body: dict[str, Any]) -> httpx.Response:
    """Sends what JSON of the standard library makes of it, which may include NaN and lone surrogates."""
    headers = {"content-type": "application/json"}
    return http.post(path, content=json.dumps(body).encode(), headers=headers)


def error_of(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error object, after its shape was checked."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"].startswith("application/json")
    (key,) = answer.json()
    error = answer.json()[key]
    assert key == "error"
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"]
    return dict(error)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", 2.5),
        ("temperature", "hot"),
        ("temperature", float("nan")),
        ("temperature", 1e400),
        ("top_p", 0),
        ("top_p", 1.1),
        ("top_k", -5),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("repetition_penalty", 2.1),
        ("presence_penalty", 3),
        ("frequency_penalty", -3),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 1.5),
        ("max_tokens", 2**40),
        ("n", 0),
        ("n", 1000),
        ("n", "two"),
        ("seed", "abc"),
        ("stop", 5),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("stop", ["x" * 257]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", list(range(65))),
        ("stream", "yes"),
        ("ignore_eos", 3),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"five": 1}),
        ("logit_bias", {"4000000000": 1}),
        ("model", 7),
        ("stream_options", {"include_usage": "yes"}),
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_bad_value_names_its_field(
    http: httpx.Client, serve: Serve, path: str, field: str, value: object
) -> None:
    prompt = {"messages": MESSAGES} if path == CHAT else {"prompt": "hi"}
    stream = {"stream": True} if field == "stream_options" else {}
    body = {"model": serve.model, "max_tokens": 1, **prompt, **stream, field: value}
    error = error_of(post(http, path, body), 400)
    assert error["code"] in ("invalid_request", "context_too_long")
    assert error["type"] == "invalid_request_error"
    # NaN is no JSON at all; everything else is.
    if value == value and value != float("inf"):
        assert error["param"].split(".")[0].split("[")[0] == field


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        [],
        [[]],
        [""],
        [1, "two"],
        [-1],
        [1.5],
        [10**12],
        [1_000_000],
        5,
        None,
        {"text": "hi"},
        ["hi"] * 5000,
    ],
    ids=lambda prompt: str(prompt)[:20],
)
def test_bad_prompt(http: httpx.Client, serve: Serve, prompt: object) -> None:
    error = error_of(post(http, COMPLETIONS, {"model": serve.model, "prompt": prompt}), 400)
    assert error["param"].split("[")[0].split(".")[0] == "prompt"


@pytest.mark.parametrize(
    "messages",
    [
        [],
        "hi",
        [5],
        [{}],
        [{"role": "user"}],
        [{"content": "hi"}],
        [{"role": 3, "content": "hi"}],
        [{"role": "user", "content": 5}],
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
        None,
    ],
    ids=lambda messages: str(messages)[:30],
)
def test_bad_messages(http: httpx.Client, serve: Serve, messages: object) -> None:
    answer = post(http, CHAT, {"model": serve.model, "messages": messages})
    error = error_of(answer, answer.status_code)
    assert answer.status_code in (400, 501)
    assert error["param"].split("[")[0].split(".")[0] == "messages"


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("field", ["model", "prompt-or-messages"])
def test_missing_field(http: httpx.Client, serve: Serve, path: str, field: str) -> None:
    prompt = "messages" if path == CHAT else "prompt"
    body = {"model": serve.model, prompt: MESSAGES if path == CHAT else "hi"}
    missing = prompt if field == "prompt-or-messages" else field
    del body[missing]
    assert error_of(post(http, path, body), 400)["param"] == missing


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b'{"model": "m", "prompt": "\xff\xfe"}',
        b'{"model": "m", "prompt": "\\ud800"}',
        b"[" * 100_000,
        b'{"model": "m",}',
        b'{"prompt": ' + b"[" * 5000,
    ],
    ids=[
        "empty",
        "cut",
        "list",
        "null",
        "text",
        "utf-8",
        "surrogate",
        "deep",
        "comma",
        "deep-prompt",
    ],
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_body_that_is_no_request(http: httpx.Client, path: str, content: bytes) -> None:
    answer = http.post(path, content=content, headers={"content-type": "application/json"})
    assert error_of(answer, 400)["code"] == "invalid_request"


def test_unknown_model(http: httpx.Client) -> None:
    error = error_of(post(http, CHAT, {"model": "gpt-none", "messages": MESSAGES}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    error_of(http.get("/v1/models/gpt-none"), 404)


def test_unknown_route_and_method(http: httpx.Client) -> None:
    error_of(http.post("/v1/no-such-route", json={}), 404)
    error_of(http.get(CHAT), 405)


def test_prompt_longer_than_the_context(http: httpx.Client, serve: Serve) -> None:
    body = {"model": serve.model, "prompt": [5] * 50_000, "max_tokens": 1}
    assert error_of(post(http, COMPLETIONS, body), 400)["code"] == "context_too_long"


def test_oversized_body(http: httpx.Client, serve: Serve) -> None:
    body = {"model": serve.model, "prompt": "x" * (17 * 2**20)}
    assert error_of(post(http, COMPLETIONS, body), 413)["code"] == "invalid_request"


def test_announced_oversize_is_refused_before_it_is_sent(serve: Serve) -> None:
    host, port = serve.http.split(":")
    head = f"POST {COMPLETIONS} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as client:
        client.sendall(f"{head}content-length: {10**12}\r\n\r\n".encode())
        assert client.recv(64).startswith(b"HTTP/1.1 413")


def test_input_is_not_repeated_in_the_log_or_the_error(http: httpx.Client, serve: Serve) -> None:
    secret = "correct-horse-battery-staple"
    body = {"model": serve.model, "prompt": secret, "temperature": secret, "stop": secret}
    answer = post(http, COMPLETIONS, body)
    assert secret not in error_of(answer, 400)["message"]
    post(http, COMPLETIONS, {"model": serve.model, "prompt": secret, "max_tokens": 1})
    assert secret not in serve.log.read_text()


def test_good_request_after_all_that(http: httpx.Client, serve: Serve) -> None:
    body = {"model": serve.model, "prompt": "hi", "max_tokens": 3, "ignore_eos": True}
    answer = post(http, COMPLETIONS, body)
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] == 3
