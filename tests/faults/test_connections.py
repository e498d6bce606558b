"""What a client can do to a connection, and input that no engine is to see."""

import contextlib
import socket
import time

import pytest

from tests.faults.clients import (
    CHAT,
    TIMEOUT_S,
    Asked,
    is_right,
    raw,
    read_to_end,
    request_head,
)
from tests.faults.conftest import Fleet


def status_of(answer: bytes) -> int:
    """The status of the first answer; 0 where there is none."""
    return int(answer[9:12]) if answer.startswith(b"HTTP/1.1 ") else 0


def exchange(fleet: Fleet, message: bytes) -> bytes:
    """Sends bytes; everything that comes back before the router closes."""
    with raw(fleet.router) as connection:
        # The router may have answered and closed before it read all of it.
        with contextlib.suppress(OSError):
            connection.sendall(message)
        return read_to_end(connection)


BAD_BODIES = {
    "malformed": (b'{"model": "mock", ', 400),
    "empty": (b"", 400),
    "bad UTF-8": (Asked(5, text="hi").body().replace(b"hi", b"\xff\xfe"), 400),
    "NaN": (Asked(5).body().replace(b'"max_tokens": 5', b'"temperature": NaN'), 400),
    "NUL": (b"\0" * 10, 400),
    "deep": (b"[" * 100_000, 400),
    "no object": (b"[1, 2]", 400),
    "unknown model": (Asked(5).body(model="other"), 404),
    "no model": (b'{"messages": [{"role": "user", "content": "hi"}]}', 400),
    "no messages": (b'{"model": "mock"}', 400),
    "an empty list": (b'{"model": "mock", "messages": []}', 400),
    "temperature of 99": (Asked(5).body(temperature=99), 400),
    "a million choices": (Asked(5).body(n=1_000_000), 400),
    "stream is a word": (Asked(5).body(stream="yes"), 400),
    "max_tokens is a word": (Asked(5).body(max_tokens="many"), 400),
}


@pytest.fixture(scope="module")
def patient(tmp_path_factory: pytest.TempPathFactory) -> object:
    """A fleet that no test of this module breaks."""
    from tests.faults.processes import running_engine, running_router

    folder = tmp_path_factory.mktemp("patient")
    with running_engine() as engine:
        times = ("--header-timeout", "500ms", "--body-timeout", "500ms", "--idle-timeout", "500ms")
        with running_router(folder, [engine], *times, "--max-body-size", "1MiB") as router:
            yield Fleet(router, [engine])


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_bodies_are_refused_and_seen_by_no_engine(patient: Fleet, name: str) -> None:
    body, status = BAD_BODIES[name]
    before = patient.sum("requests")
    answer = exchange(patient, request_head(CHAT, len(body), "connection: close") + body)
    assert status_of(answer) == status, answer
    assert b'"error"' in answer
    assert patient.sum("requests") == before
    assert is_right(patient.router, Asked(3))


HEAD = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n".encode()
# In these the router closes because it has to, not because it was asked to.
BAD_HEADS = {
    "a Content-Length above the limit": (request_head(CHAT, 600_000_000), {413}),
    "a body above the limit": (request_head(CHAT, 2 << 20) + b" " * (2 << 20), {413}),
    "two Content-Lengths": (HEAD + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}", {400}),
    "a megabyte of header": (HEAD + b"x: " + b"a" * (1 << 20) + b"\r\n\r\n", {431, 0}),
    "three hundred headers": (HEAD + b"x: a\r\n" * 300 + b"\r\n", {431}),
    "a URI of 100 KB": (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", {414, 431, 0}),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", {400, 0}),
    "the wrong type": (b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: text/plain\r\n"
                       b"content-length: 2\r\n\r\n{}", {400, 415}),
    "gzip claimed": (HEAD + b"content-encoding: gzip\r\ncontent-length: 2\r\n\r\n{}", {400, 415}),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_HEADS)
def test_bad_heads_are_refused_and_seen_by_no_engine(patient: Fleet, name: str) -> None:
    message, statuses = BAD_HEADS[name]
    before = patient.sum("requests")
    assert status_of(exchange(patient, message)) in statuses
    assert patient.sum("requests") == before
    assert is_right(patient.router, Asked(3))


def test_two_lengths_of_different_kinds_end_the_connection(patient: Fleet) -> None:
    # Whoever disagrees about where the first request ends could hide a second one in it.
    body = Asked(3).body()
    chunked = HEAD + b"transfer-encoding: chunked\r\ncontent-length: 4\r\n\r\n"
    smuggled = request_head(CHAT, len(body)) + body
    before = patient.sum("requests")
    answer = exchange(patient, chunked + b"0\r\n\r\n" + smuggled)
    assert answer.count(b"HTTP/1.1 ") == 1
    assert status_of(answer) == 400
    assert patient.sum("requests") == before


@pytest.mark.parametrize("part", ["head", "body"])
def test_a_client_of_one_byte_at_a_time_is_shown_out(patient: Fleet, part: str) -> None:
    body = Asked(3).body()
    message = request_head(CHAT, len(body)) + body
    sent = 0 if part == "head" else message.index(b"\r\n\r\n") + 4
    with raw(patient.router) as connection:
        connection.sendall(message[:sent])
        connection.settimeout(0.1)
        deadline = time.monotonic() + TIMEOUT_S
        is_open = True
        while is_open and sent < len(message) - 1:
            assert time.monotonic() < deadline
            try:
                connection.sendall(message[sent : sent + 1])
                sent += 1
                is_open = connection.recv(1) != b""
                # An answer is the end as well: 408 comes before the close.
                break
            except TimeoutError:
                continue
            except ConnectionError:
                break
    assert sent < len(message) - 1
    assert is_right(patient.router, Asked(3))


def test_two_thousand_half_open_connections_stop_nobody(patient: Fleet) -> None:
    sockets = [socket.create_connection(patient.router.address) for _ in range(2000)]
    try:
        for one in sockets:
            one.sendall(b"POST /v1/chat")
        assert is_right(patient.router, Asked(3))
    finally:
        for one in sockets:
            one.close()
