"""Processes pinned to a core, and what they use of it."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from tests.faults.processes import RELEASE

# The router has one core for itself; engines and load share the other one.
ROUTER_CORE = 0
RIG_CORE = 1
STOP_TIMEOUT_S = 10.0
READY_TIMEOUT_S = 90.0
SETTLE_TIMEOUT_S = 10.0
# Longer than any answer takes; a request that a router lost is an error of the run.
ANSWER_TIMEOUT_S = 10.0


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pinned(core: int, command: list[str]) -> list[str]:
    """A command that runs on one core, as do its children."""
    return ["taskset", "-c", str(core), *command]


@contextlib.contextmanager
def running(
    command: list[str], core: int, log: Path, *, is_read: bool = False
) -> Iterator[subprocess.Popen[bytes]]:
    """A process on a core, killed with its children at the end.

    What it says goes to `log`; its standard output can be read instead, and has to be then.
    """
    with log.open("wb") as output:
        process = subprocess.Popen(
            pinned(core, command),
            stdout=subprocess.PIPE if is_read else output,
            stderr=output,
            cwd=tempfile.gettempdir(),
        )
    try:
        yield process
    finally:
        children = []
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        psutil.wait_procs(children, timeout=STOP_TIMEOUT_S)
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.kill()
        process.wait(STOP_TIMEOUT_S)
        if process.stdout is not None:
            process.stdout.close()


@contextlib.contextmanager
def mock_engines(flags: list[str], folder: Path) -> Iterator[list[int]]:
    """Mock engines in one process; their ports."""
    command = [str(RELEASE / "mock-engine"), *flags]
    with running(command, RIG_CORE, folder / "mock-engine.log", is_read=True) as process:
        assert process.stdout is not None
        yield json.loads(process.stdout.readline())["ports"]


def orchestra_flags(port: int, engines: list[str]) -> list[str]:
    """Our router's flags: HTTP on a port, the other doors on any, these engines."""
    flags = ["--http", f"127.0.0.1:{port}"]
    for door in ("grpc", "workers", "admin"):
        flags += [f"--{door}", "127.0.0.1:0"]
    for engine in engines:
        flags += ["--worker", engine]
    return flags


def load(targets: list[int], flags: list[str]) -> dict[str, Any]:
    """Runs the load generator to its end; its report."""
    addresses = [f"127.0.0.1:{port}" for port in targets]
    limit = ["--timeout", str(ANSWER_TIMEOUT_S)]
    command = pinned(RIG_CORE, [str(RELEASE / "loadgen"), *addresses, *flags, *limit])
    done = subprocess.run(command, capture_output=True, check=True)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def family(pid: int) -> list[psutil.Process]:
    """A process and its children, nginx's workers for one."""
    parent = psutil.Process(pid)
    return [parent, *parent.children(recursive=True)]


def cpu_s(pid: int) -> float:
    """CPU seconds that a family has used, in user mode and in the kernel."""
    times = [process.cpu_times() for process in family(pid)]
    return float(sum(one.user + one.system for one in times))


def rss_mb(pid: int) -> float:
    """Resident memory of a family."""
    return float(sum(process.memory_info().rss for process in family(pid))) / 1e6


def settle(pid: int) -> None:
    """Waits until a router has done what it does at its start: under 2 % of its core, or what it is like when idle."""
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while time.monotonic() < deadline:
        before = cpu_s(pid)
        time.sleep(0.5)
        if cpu_s(pid) - before <= 0.01:
            return
