"""Drives a real `orchestra serve` over HTTP with a small streaming client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from benches.serving.workload import Cell, Sample

READY_TIMEOUT_S = 180.0


@dataclass
class Orchestra:
    """A running server: its address, model name and processes."""

    host: str
    port: int
    model: str
    process: subprocess.Popen[str]

    def run(self, cell: Cell, prompts: list[list[int]]) -> Sample:
        """Runs one cell and returns what it took."""
        return asyncio.run(self._closed_loop(cell, prompts))

    async def _closed_loop(self, cell: Cell, prompts: list[list[int]]) -> Sample:
        waiting = iter(prompts)
        sample = Sample(elapsed_s=0.0, output_tokens=0)

        async def client() -> None:
            reader, writer = await asyncio.open_connection(self.host, self.port)
            for prompt in waiting:
                ttft, tokens = await self._stream(reader, writer, prompt, cell.output_tokens)
                sample.ttft_s.append(ttft)
                sample.output_tokens += tokens
            writer.close()

        started = time.perf_counter()
        await asyncio.gather(*(client() for _ in range(cell.concurrency)))
        sample.elapsed_s = time.perf_counter() - started
        return sample

    async def _stream(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        prompt: list[int],
        max_tokens: int,
    ) -> tuple[float, int]:
        """Streams one completion; returns the time to the first token in seconds, and the tokens."""
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
            f"POST /v1/completions HTTP/1.1\r\nHost: {self.host}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        started = time.perf_counter()
        writer.write(head.encode() + body)
        ttft = 0.0
        tokens = 0
        async for event in _events(reader):
            if event.get("usage"):
                tokens = event["usage"]["completion_tokens"]
            elif not ttft and event["choices"][0].get("token_ids"):
                ttft = time.perf_counter() - started
        if tokens != max_tokens:
            raise RuntimeError(f"asked for {max_tokens} tokens, usage says {tokens}")
        return ttft, tokens

    def router_cpu_s(self) -> float:
        """CPU seconds that the router process has used."""
        times = self._child("router").cpu_times()
        return float(times.user + times.system)

    def metrics(self) -> dict[str, float]:
        """The router's metrics summed over labels, by name."""
        with urllib.request.urlopen(f"http://{self.host}:{self.port}/metrics") as answer:
            text = answer.read().decode()
        totals: dict[str, float] = {}
        for line in text.splitlines():
            if match := re.match(r"(\w+)(?:\{[^}]*\})? (\S+)$", line):
                totals[match[1]] = totals.get(match[1], 0.0) + float(match[2])
        return totals

    def _child(self, role: str) -> psutil.Process:
        for child in psutil.Process(self.process.pid).children(recursive=True):
            if role in child.cmdline():
                return child
        raise RuntimeError(f"orchestra serve has no {role} process")


async def _events(reader: asyncio.StreamReader) -> object:
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
    command = [sys.executable, "-m", "orchestra", "serve", str(checkpoint), "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        address = ""
        for line in process.stdout:
            if match := re.search(r"http://([\d.]+):(\d+)", line):
                address = match[1], int(match[2])
                break
        if not address:
            raise RuntimeError("orchestra serve ended before it printed its address")
        yield Orchestra(address[0], address[1], checkpoint.name, process)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)
