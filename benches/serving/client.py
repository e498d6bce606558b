"""A small streaming client of an OpenAI server, which measures when tokens come."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from benches.serving.workload import Cell, Sample

# A connection: what comes and what goes.
Line = tuple[asyncio.StreamReader, asyncio.StreamWriter]


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
            line[1].close()

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
        reader, writer = line
        started = time.perf_counter()
        writer.write(head.encode() + body)
        moments = []
        tokens = 0
        async for event in _events(reader):
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
            elif event["choices"][0].get("token_ids"):
                moments.append(time.perf_counter() - started)
                on_event(len(moments))
        if tokens != max_tokens:
            raise RuntimeError(f"asked for {max_tokens} tokens, usage says {tokens}")
        return moments

    async def connect(self) -> Line:
        """A connection to the server."""
        return await asyncio.open_connection(*self.address.split(":"))


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The JSON events of one chunked SSE response, up to `[DONE]`; the connection stays usable."""
    status = (await reader.readline()).decode()
    while (await reader.readline()).strip():
        pass
    if " 200 " not in status:
        raise RuntimeError(f"the server answered {status.strip()}")
    buffer = b""
    while size := int(await reader.readline(), 16):
        buffer += await reader.readexactly(size)
        await reader.readline()
        while b"\n\n" in buffer:
            event, buffer = buffer.split(b"\n\n", 1)
            if event.startswith(b"data: {"):
                yield json.loads(event[6:])
    await reader.readline()
