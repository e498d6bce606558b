"""Clients that keep what they were told, to the byte and the second."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.faults import words

if TYPE_CHECKING:
    from tests.faults.processes import Router

CHAT = "/v1/chat/completions"
TIMEOUT_S = 30.0
_seeds = itertools.count(1)


@dataclass
class Asked:
    """A request whose right answer is known."""

    num_words: int
    path: str = CHAT
    text: str = "Tell me a story."
    seed: int = field(default_factory=lambda: next(_seeds))
    more: dict[str, object] = field(default_factory=dict)

    @property
    def _messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.text}]

    def body(self, **more: object) -> bytes:
        """What is sent."""
        prompt = {"messages": self._messages} if self.path == CHAT else {"prompt": self.text}
        asked = {"model": "mock", "max_tokens": self.num_words, "seed": self.seed, **prompt}
        return json.dumps({**asked, **self.more, **more}).encode()

    @property
    def answer(self) -> str:
        """What has to come back."""
        conversation = words.chat(self._messages) if self.path == CHAT else self.text
        return words.answer(conversation, self.seed, self.num_words)


@dataclass
class Stream:
    """What a streaming client was told."""

    status: int = 0
    text: str = ""
    finish: list[str] = field(default_factory=list)
    errors: list[dict[str, Any]] = field(default_factory=list)
    usage: dict[str, Any] | None = None
    is_done: bool = False
    # The body broke off.
    is_cut: bool = False
    # When each piece of text came, by the monotonic clock.
    times: list[float] = field(default_factory=list)

    def take(self, event: str) -> None:
        """One event."""
        if event == "[DONE]":
            self.is_done = True
            return
        said = json.loads(event)
        if "error" in said:
            self.errors.append(said["error"])
        if said.get("usage"):
            self.usage = said["usage"]
        for choice in said.get("choices", ()):
            piece = choice.get("text") or choice.get("delta", {}).get("content") or ""
            if piece:
                self.text += piece
                self.times.append(time.monotonic())
            if choice.get("finish_reason"):
                self.finish.append(choice["finish_reason"])

    @property
    def longest_gap_s(self) -> float:
        """The longest time between two pieces."""
        return max(after - before for before, after in itertools.pairwise(self.times))


def post(router: Router, asked: Asked) -> tuple[int, dict[str, Any], http.client.HTTPMessage]:
    """A request for a whole answer on its own connection."""
    connection = http.client.HTTPConnection(*router.address, timeout=TIMEOUT_S)
    with contextlib.closing(connection):
        connection.request("POST", asked.path, asked.body(), {"content-type": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read()), answer.headers


def said(body: dict[str, Any]) -> str:
    """The text of a whole answer."""
    choice = body["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def is_right(router: Router, asked: Asked) -> bool:
    """Whether a whole answer comes and is the right one."""
    status, body, _ = post(router, asked)
    return status == 200 and said(body) == asked.answer


def events(answer: http.client.HTTPResponse) -> Iterator[str]:
    """The data of each event, as it comes."""
    buffer = b""
    while piece := answer.read1(65536):
        buffer += piece
        *whole, buffer = buffer.split(b"\n\n")
        for event in whole:
            for line in event.split(b"\n"):
                if line.startswith(b"data: "):
                    yield line[6:].decode()


def stream(
    router: Router, asked: Asked, after_first: Callable[[], object] = lambda: None
) -> Stream:
    """A streamed answer to its end; `after_first` is called once, when the first words have come."""
    told = Stream()
    connection = http.client.HTTPConnection(*router.address, timeout=TIMEOUT_S)
    with contextlib.closing(connection):
        body = asked.body(stream=True, stream_options={"include_usage": True})
        connection.request("POST", asked.path, body, {"content-type": "application/json"})
        answer = connection.getresponse()
        told.status = answer.status
        is_first = True
        try:
            for event in events(answer):
                told.take(event)
                if told.times and is_first:
                    is_first = False
                    after_first()
        except (http.client.IncompleteRead, ConnectionError):
            told.is_cut = True
    return told


def assert_whole(told: Stream, asked: Asked) -> None:
    """Every word came once and in its place, and the answer ended as it should."""
    assert told.errors == []
    assert told.text == asked.answer
    assert (told.status, told.finish, told.is_done, told.is_cut) == (200, ["length"], True, False)
    assert told.usage is not None
    assert told.usage["completion_tokens"] == asked.num_words


@contextlib.contextmanager
def raw(router: Router) -> Iterator[socket.socket]:
    """A socket to say anything over."""
    with socket.create_connection(router.address, timeout=TIMEOUT_S) as connection:
        yield connection


def request_head(path: str, length: int, *more: str) -> bytes:
    """A request's head with the right length."""
    lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", *more]
    return "\r\n".join([*lines, f"content-length: {length}", "", ""]).encode()


def read_to_end(connection: socket.socket) -> bytes:
    """Everything up to the peer's close; a reset is one."""
    said_so_far = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            said_so_far += piece
    return said_so_far
