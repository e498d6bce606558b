"""Drives a real `orchestra serve` over HTTP with a small streaming client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benches.serving.workload import Cell, Sample
from tests.e2e.stack import Serve, start_serve

# A connection: what comes and what goes.
Line = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class Orchestra:
    """A running server under load."""

    serve: Serve
    requests: int = 0
    # CPU that the router used while our cells ran; what it spends idle beside the rival's is not the requests'.
    router_cpu_s: float = 0.0

    def run(self, cell: Cell, prompts: list[list[int]]) -> Sample:
        """Runs one cell and returns what it took."""
        before = self._router_cpu_s()
        sample = asyncio.run(self._closed_loop(cell, prompts))
        self.router_cpu_s += self._router_cpu_s() - before
        self.requests += len(prompts)
        return sample

    async def _closed_loop(self, cell: Cell, prompts: list[list[int]]) -> Sample:
        waiting = iter(prompts)
        sample = Sample(elapsed_s=0.0, output_tokens=0)

        async def client() -> None:
            line = await self.connect()
            for prompt in waiting:
                moments = await self.stream(prompt, cell.output_tokens, line)
                sample.ttft_s.append(moments[0])
                sample.output_tokens += cell.output_tokens
            line[1].close()

        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(cell.concurrency)))
        sample.elapsed_s = time.perf_counter() - started
        return sample

    async def stream(self, prompt: list[int], max_tokens: int, line: Line) -> list[float]:
        """Streams one completion.

        Args:
            prompt: token ids.
            max_tokens: as many come; the end of a text is ignored.
            line: a connection to the HTTP door.

        Returns:
            When the events with tokens came, seconds after the request was sent.

        Raises:
            RuntimeError: the server refused, or gave another number of tokens.
        """
        body = json.dumps(
            {
                "model": self.serve.model,
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
            f"POST /v1/completions HTTP/1.1\r\nHost: {self.serve.http}\r\n"
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
        if tokens != max_tokens:
            raise RuntimeError(f"asked for {max_tokens} tokens, usage says {tokens}")
        return moments

    async def connect(self) -> Line:
        """A connection to the HTTP door."""
        return await asyncio.open_connection(*self.serve.http.split(":"))

    def _router_cpu_s(self) -> float:
        """CPU seconds that the router process has used."""
        (router,) = self.serve.children("router")
        times = router.cpu_times()
        return float(times.user + times.system)


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


@contextlib.contextmanager
def serving(checkpoint: Path, flags: list[str]) -> Iterator[Orchestra]:
    """Starts `orchestra serve` and yields it once it is ready; stops it at the end."""
    with start_serve(checkpoint, *flags) as serve:
        yield Orchestra(serve)
