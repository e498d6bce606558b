"""Real processes: mock engines that fail on demand, and the router binary in front of them."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
RELEASE = TARGET / "release"
START_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 20.0


def build() -> None:
    """Builds both programs unless they are newer than every source; costs nothing then."""
    programs = [RELEASE / name for name in ("orchestra-router", "mock-engine", "loadgen")]
    sources = [
        path for folder in ("rust", "proto", "benches/rig") for path in (ROOT / folder).rglob("*")
    ]
    newest = max(
        path.stat().st_mtime for path in sources if path.suffix in (".rs", ".toml", ".proto")
    )
    if any(not path.exists() or path.stat().st_mtime < newest for path in programs):
        packages = ["-p", "orchestra-router", "-p", "orchestra-rig"]
        subprocess.run(
            ["cargo", "build", "--release", "--locked", "--quiet", *packages], cwd=ROOT, check=True
        )
        for path in programs:
            # cargo leaves a program alone that nothing changed.
            path.touch()


def eventually(check: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Waits until a condition holds; fails when it does not within the time."""
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.005)


def call(port: int, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
    """One request on a connection of its own: status and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    with contextlib.closing(connection):
        connection.request(method, path, body)
        answer = connection.getresponse()
        return answer.status, answer.read()


def _first_line(output: IO[str], what: str) -> dict[str, Any]:
    readable, _, _ = select.select([output], [], [], START_TIMEOUT_S)
    line = output.readline() if readable else ""
    assert line, f"{what} did not start"
    answer: dict[str, Any] = json.loads(line)
    return answer


@dataclass
class Engine:
    """One mock engine in a process of its own."""

    flags: tuple[str, ...]
    port: int = 0
    process: subprocess.Popen[str] = field(init=False)

    def start(self) -> None:
        """Starts it; again on the same port where it ran before."""
        command = [str(RELEASE / "mock-engine"), "--ports", f"{self.port}:1", "--print-ports"]
        self.process = subprocess.Popen([*command, *self.flags], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        (self.port,) = _first_line(self.process.stdout, "the engine")["ports"]

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://127.0.0.1:{self.port}"

    def counters(self) -> dict[str, Any]:
        """What it has seen."""
        counters: dict[str, Any] = json.loads(call(self.port, "GET", "/_control")[1])
        return counters

    def arm(self, fault: str, **more: object) -> None:
        """Orders a fault."""
        order = json.dumps({"fault": fault, **more}).encode()
        status, answer = call(self.port, "POST", "/_control", order)
        assert status == 200, answer

    def disarm(self) -> None:
        """Takes all orders back, and lets go of what is held."""
        assert call(self.port, "DELETE", "/_control")[0] == 200

    def last(self) -> tuple[str, bytes]:
        """Head and body of the last generation request, as they came."""
        message = call(self.port, "GET", "/_control/last")[1]
        head, _, body = message.partition(b"\r\n\r\n")
        return head.decode(), body

    def send_signal(self, number: signal.Signals) -> None:
        """SIGKILL, SIGSTOP, SIGCONT."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """Ends it at once, also where it is stopped."""
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


@dataclass
class Router:
    """A running `orchestra-router`."""

    process: subprocess.Popen[str]
    http: str
    workers: str
    admin: str
    log: Path

    @property
    def address(self) -> tuple[str, int]:
        """Where clients go."""
        host, port = self.http.rsplit(":", 1)
        return host, int(port)

    def is_ready(self) -> bool:
        """What `/ready` says."""
        return call(self.address[1], "GET", "/ready")[0] == 200

    def metric(self, name: str) -> float:
        """A metric, summed over its labels."""
        lines = call(self.address[1], "GET", "/metrics")[1].decode().splitlines()
        found = [line for line in lines if line.split("{")[0].split(" ")[0] == name]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found)


@contextlib.contextmanager
def running_engine(*flags: str) -> Iterator[Engine]:
    """A mock engine, to the end of the block."""
    engine = Engine(flags)
    engine.start()
    try:
        yield engine
    finally:
        engine.kill()


def router_command(*flags: str) -> list[str]:
    """The router with every door on a free port."""
    doors = [
        flag
        for door in ("http", "grpc", "workers", "admin")
        for flag in (f"--{door}", "127.0.0.1:0")
    ]
    return [str(RELEASE / "orchestra-router"), *doors, "--print-addresses", *flags]


@contextlib.contextmanager
def running_router(folder: Path, engines: list[Engine], *flags: str) -> Iterator[Router]:
    """The router in front of engines, from the moment when it knows all of them; stopped as Ctrl-C does."""
    log = folder / "router.log"
    workers = [flag for engine in engines for flag in ("--worker", engine.url)]
    with log.open("w") as errors:
        process = subprocess.Popen(
            router_command(*workers, *flags), stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        assert process.stdout is not None
        addresses = _first_line(process.stdout, "the router")
        http, workers, admin = (addresses[door] for door in ("http", "workers", "admin"))
        router = Router(process, http, workers, admin, log)
        eventually(lambda: all(engine.counters()["probes"] > 1 for engine in engines))
        if engines:
            eventually(router.is_ready)
        yield router
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            # The second one ends what is still running.
            process.send_signal(signal.SIGINT)
        code = process.wait(STOP_TIMEOUT_S)
        if process.stdout is not None:
            process.stdout.close()
    assert "panicked" not in log.read_text()
    assert code == 0, log.read_text()[-2000:]
