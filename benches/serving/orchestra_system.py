"""Drives a real `orchestra serve` over HTTP with a small streaming client."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from benches.serving.client import StreamingClient
from tests.e2e.stack import Serve, start_serve

if TYPE_CHECKING:
    from benches.serving.workload import Cell, Sample


@dataclass
class Orchestra:
    """A running server under load."""

    serve: Serve
    requests: int = 0
    # CPU that the router used while our cells ran; what it spends idle beside the rival's is not the requests'.
    router_cpu_s: float = 0.0
    elapsed_s: float = 0.0
    """That our cells took."""

    def run(self, cell: Cell, prompts: list[list[int]]) -> Sample:
        """Runs one cell and returns what it took."""
        before = self._router_cpu_s()
        sample = uvloop.run(self.client.closed_loop(cell, prompts))
        self.router_cpu_s += self._router_cpu_s() - before
        self.requests += len(prompts)
        self.elapsed_s += sample.elapsed_s
        return sample

    @property
    def client(self) -> StreamingClient:
        """Of its HTTP door."""
        return StreamingClient(self.serve.http, self.serve.model)

    def _router_cpu_s(self) -> float:
        """CPU seconds that the router process has used."""
        (router,) = self.serve.children("router")
        times = router.cpu_times()
        return float(times.user + times.system)


@contextlib.contextmanager
def serving(checkpoint: Path, flags: list[str]) -> Iterator[Orchestra]:
    """Starts `orchestra serve` and yields it once it is ready; stops it at the end."""
    with start_serve(checkpoint, *flags) as serve:
        yield Orchestra(serve)
