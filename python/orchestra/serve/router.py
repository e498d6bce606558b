"""Keeps the router running, at the same addresses across restarts."""

import asyncio
import contextlib
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from orchestra.serve.child import Child, describe_exit
from orchestra.serve.console import Console
from orchestra.serve.options import ServeOptions
from orchestra.serve.restarts import EXIT_FAILED, GaveUpError, Restarts

# The router ends by itself when its drain time is over; it gets this much more before it is killed.
STOP_MARGIN_S = 5.0
PROBE_TIMEOUT_S = 1.0


@dataclass(frozen=True)
class Addresses:
    """Where the router listens, each as `host:port`."""

    http: str
    grpc: str
    workers: str


class RouterProcess:
    """The router of one `orchestra serve`."""

    def __init__(self, options: ServeOptions, console: Console) -> None:
        self._options = options
        self._console = console
        self._restarts = Restarts()
        self._addresses: asyncio.Future[Addresses] = asyncio.get_running_loop().create_future()
        self.child: Child | None = None

    async def addresses(self) -> Addresses:
        """Waits until the router listens; the answer stays the same across its restarts."""
        return await asyncio.shield(self._addresses)

    async def run(self) -> None:
        """Runs until cancelled, which lets running requests finish.

        Raises:
            GaveUpError: it never listened.
        """
        while True:
            started = time.monotonic()
            last_words: Iterable[str] = ()
            try:
                child = await self._start()
                status = await child.wait()
                end, last_words = f"router {describe_exit(status)}", child.tail
            except OSError as error:
                status, end = EXIT_FAILED, f"router could not be started: {error}"
            finally:
                if self.child is not None:
                    await self.child.stop(self._options.drain_timeout_s + STOP_MARGIN_S)
            delay_s = self._restarts.failed(status, time.monotonic() - started)
            if delay_s is None:
                raise GaveUpError(end, last_words, status)
            self._console.line(f"{end}; starting it again in {delay_s:g} s")
            await asyncio.sleep(delay_s)

    async def _start(self) -> Child:
        command = self._command()
        self.child = await Child.start("router", command, self._console, self._on_status)
        return self.child

    def _command(self) -> list[str]:
        options = self._options
        if self._addresses.done():
            known = self._addresses.result()
            http, grpc, workers = known.http, known.grpc, known.workers
        else:
            address = options.ip_address()
            host = f"[{address}]" if ":" in address else address
            http, grpc = f"{host}:{options.port}", f"{host}:{options.grpc_port}"
            workers = "127.0.0.1:0"
        return [
            *["router", "--http", http, "--grpc", grpc, "--workers", workers],
            # Any free port, which the router's log names: two servers on one machine must not meet there.
            *["--admin", "127.0.0.1:0"],
            *["--drain-timeout", f"{options.drain_timeout_s:g}s", "--print-addresses"],
        ]

    def _on_status(self, status: dict[str, Any]) -> None:
        with contextlib.suppress(KeyError):
            addresses = Addresses(status["http"], status["grpc"], status["workers"])
            self._restarts.ready()
            if not self._addresses.done():
                self._addresses.set_result(addresses)


async def is_ready(http_address: str) -> bool:
    """Whether the router says that a request could be served."""
    host, _, port = http_address.rpartition(":")
    try:
        return await asyncio.wait_for(_probe(host.strip("[]"), int(port)), PROBE_TIMEOUT_S)
    except (OSError, asyncio.TimeoutError):
        return False


async def _probe(host: str, port: int) -> bool:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(b"GET /ready HTTP/1.1\r\nhost: orchestra\r\nconnection: close\r\n\r\n")
        return b" 200 " in await reader.readline()
    finally:
        writer.close()
