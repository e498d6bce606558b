"""A small streaming client of an OpenAI server, which measures when tokens come.

It shares the processor with what it measures, so it does little for an event: no streams and no tasks of asyncio, whose
cost per token was more than that of the router and the worker's agent together.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from benches.serving.workload import Cell, Sample

OnEvent = Callable[[float, dict[str, Any]], None]
"""Is told when an event came, and what it says."""


class Line(asyncio.Protocol):
    """A connection that reads one chunked answer of server-sent events after the other."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._answered: asyncio.Future[None] | None = None
        self._on_event: OnEvent = _ignore
        self._came = b""
        """What is not read yet; `_text` of it has been taken out of its chunks."""
        self._text = b""
        self._is_in_body = False

    async def ask(self, request: bytes, on_event: OnEvent) -> None:
        """Sends a request and waits for the end of its answer.

        Raises:
            RuntimeError: the server refused, or closed the connection.
        """
        assert self._transport is not None
        assert self._answered is None, "one request at a time"
        self._answered = asyncio.get_running_loop().create_future()
        self._on_event, self._text, self._is_in_body = on_event, b"", False
        self._transport.write(request)
        await self._answered
        self._answered = None

    def close(self) -> None:
        """Ends the connection."""
        assert self._transport is not None
        self._transport.close()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, error: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        self._fail(f"the server closed the connection: {error}")

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        now = time.perf_counter()
        self._came += data
        if not self._is_in_body and not self._read_head():
            return
        while (size := self._read_chunk()) is not None:
            if size == 0 and self._answered is not None:
                self._answered.set_result(None)
        *events, self._text = self._text.split(b"\n\n")
        for event in events:
            if event.startswith(b"data: {"):
                self._on_event(now, json.loads(event[6:]))

    def _read_head(self) -> bool:
        """Returns whether it is there, and no refusal."""
        head, end, rest = self._came.partition(b"\r\n\r\n")
        if not end:
            return False
        self._came, self._is_in_body = rest, True
        status = head.split(b"\r\n", 1)[0].decode()
        if " 200 " in status:
            return True
        self._fail(f"the server answered {status}")
        return False

    def _read_chunk(self) -> int | None:
        """Its size; None: it is not here yet."""
        line, end, rest = self._came.partition(b"\r\n")
        if not end or len(rest) < (size := int(line, 16)) + 2:
            return None
        self._text += rest[:size]
        self._came = rest[size + 2 :]
        return size

    def _fail(self, message: str) -> None:
        if self._answered is not None and not self._answered.done():
            self._answered.set_exception(RuntimeError(message))


def _ignore(_moment: float, _event: dict[str, Any]) -> None:
    """Nobody has asked."""


@dataclass(frozen=True)
class StreamingClient:
    """Asks one model of one server.

    Args:
        address: `host:port` of the server.
        model: the name that requests give.
    """

    address: str
    model: str

    async def closed_loop(self, cell: Cell, prompts: list[list[int]]) -> Sample:
        """Runs a cell: each of its clients asks again when it has been answered."""
        waiting = iter(prompts)
        sample = Sample(elapsed_s=0.0, output_tokens=0)

        async def client() -> None:
            line = await self.connect()
            for prompt in waiting:
                moments = await self.stream(prompt, cell.output_tokens, line)
                sample.ttft_s.append(moments[0])
                pairs = itertools.pairwise(moments)
                sample.gaps_s.extend(after - before for before, after in pairs)
                sample.output_tokens += cell.output_tokens
            line.close()

        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(cell.concurrency)))
        sample.elapsed_s = time.perf_counter() - started
        return sample

    async def stream(
        self,
        prompt: list[int],
        max_tokens: int,
        line: Line,
        on_event: Callable[[int], None] = lambda _: None,
    ) -> list[float]:
        """Streams one completion.

        Args:
            prompt: token ids.
            max_tokens: as many come; the end of a text is ignored.
            line: a connection to the server.
            on_event: called with each event with tokens, with how many there were.

        Returns:
            When the events with tokens came, seconds after the request was sent.

        Raises:
            RuntimeError: the server refused, or gave another number of tokens.
        """
        body = json.dumps(
            {
                "model": self.model,
                "prompt": prompt,
                "max_tokens": max_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
                "stream_options": {"include_usage": True},
                "return_token_ids": True,
            }
        ).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {self.address}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        moments = []
        tokens = 0

        def note(moment: float, event: dict[str, Any]) -> None:
            nonlocal tokens
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
            elif event["choices"][0].get("token_ids"):
                moments.append(moment - started)
                on_event(len(moments))

        started = time.perf_counter()
        await line.ask(head.encode() + body, note)
        if tokens != max_tokens:
            raise RuntimeError(f"asked for {max_tokens} tokens, usage says {tokens}")
        return moments

    async def connect(self) -> Line:
        """A connection to the server."""
        host, port = self.address.split(":")
        _, line = await asyncio.get_running_loop().create_connection(Line, host, int(port))
        return line
