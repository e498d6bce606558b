"""Starts the real thing: `orchestra serve` as a user would, and stops it as a user would."""

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

DEMO = Path(__file__).parents[2] / "examples" / "models" / "demo"
READY_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Serve:
    """A running `orchestra serve`.

    Args:
        process: the supervisor.
        http: `host:port` of the OpenAI door.
        grpc: `host:port` of the gRPC door.
        workers: `host:port` where workers attach.
        model: the name that requests give.
        log: the file with everything that was written to standard error.
    """

    process: subprocess.Popen[str]
    http: str
    grpc: str
    workers: str
    model: str
    log: Path

    @property
    def url(self) -> str:
        """Where the HTTP door is; OpenAI's routes are below `/v1`."""
        return f"http://{self.http}"

    def get(self, path: str) -> str:
        """The body of a GET request."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=10) as answer:
            return str(answer.read().decode())

    def metrics(self) -> dict[str, float]:
        """The router's metrics by name, summed over their labels."""
        return parse_metrics(self.get("/metrics"))

    def children(self, role: str = "") -> list[psutil.Process]:
        """The processes of a role, `router`, `fork-server` or `worker`; without one, all of them."""
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [child for child in children if not role or _role(child) == role]


def parse_metrics(text: str) -> dict[str, float]:
    """Metrics by name, summed over their labels."""
    totals: dict[str, float] = {}
    for name, value in re.findall(r"^([a-z_]+)(?:\{.*\})? (\S+)$", text, re.MULTILINE):
        totals[name] = totals.get(name, 0.0) + float(value)
    return totals


@contextlib.contextmanager
def start_serve(
    checkpoint: Path, *flags: str, environment: Mapping[str, str] | None = None
) -> Iterator[Serve]:
    """Runs `orchestra serve CHECKPOINT FLAGS…` on free ports, from ready until the end of the block.

    Args:
        checkpoint: the model directory.
        flags: further options.
        environment: added to ours.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "orchestra", "serve", str(checkpoint), *flags]
        command += ["--port", "0", "--print-addresses"]
        with log.open("w") as errors:
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, **(environment or {})},
            )
        try:
            assert process.stdout is not None
            yield Serve(process=process, log=log, **_addresses(process.stdout, log))
        except BaseException:
            # Beside what failed, which knows only what a client sees.
            sys.stderr.write(_tail(log))
            raise
        finally:
            stop(process, log)
            if process.stdout is not None:
                process.stdout.close()


def stop(process: subprocess.Popen[str], log: Path) -> int:
    """Ends a supervisor as Ctrl-C does; returns its exit code."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        return process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise AssertionError(f"did not stop within {STOP_TIMEOUT_S} s:\n{_tail(log)}") from None


def eventually(check: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Waits until a condition holds; fails when it does not within the time."""
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.05)


def _addresses(output: IO[str], log: Path) -> dict[str, str]:
    readable, _, _ = select.select([output], [], [], READY_TIMEOUT_S)
    line = output.readline() if readable else ""
    assert line, f"not ready within {READY_TIMEOUT_S} s, or ended before:\n{_tail(log)}"
    addresses = json.loads(line)
    assert isinstance(addresses, dict)
    return addresses


def _tail(log: Path) -> str:
    return "\n".join(log.read_text().splitlines()[-40:])


def _role(process: psutil.Process) -> str:
    """The subcommand: of `python -m orchestra ROLE …`, or of a forked `orchestra ROLE …`."""
    try:
        command = process.cmdline()
    except psutil.NoSuchProcess:
        return ""
    return command[command.index("orchestra") + 1] if "orchestra" in command else ""
