"""The fork server and its supervisor, without torch: whom it forks, whose they are, and that nobody runs unknown."""

import asyncio
import io
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from orchestra.serve import fork_server as supervisor_side
from orchestra.serve import restarts
from orchestra.serve.child import Child
from orchestra.serve.console import Console
from orchestra.serve.fork_server import ForkServer
from orchestra.serve.restarts import GaveUpError
from orchestra.serve.router import RouterProcess
from orchestra.serve.worker_group import WorkerGroup
from tests.e2e.stack import eventually
from tests.test_serve import parse

# What stands in for `python -m orchestra fork-server`: its loop, with a rank that runs its first argument.
SCRIPT = """
import os, signal, socket, subprocess, sys
from orchestra.worker import fork_server

{prepare}
arguments = fork_server._obey(socket.socket(fileno=os.dup(0)))
if arguments is not None:
    exec(arguments[0])
"""


def start(prepare: str = "") -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """A fork server, and our end of its standard input."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    command = [sys.executable, "-c", SCRIPT.format(prepare=prepare)]
    with theirs:
        return ours, subprocess.Popen(command, stdin=theirs.fileno())


def order(orders: socket.socket, code: str) -> int:
    """Orders a process that runs the code; returns the descriptor of what it writes."""
    output, its_output = os.pipe()
    packet = {"arguments": [code], "environment": {"WORD": "told"}}
    socket.send_fds(orders, [json.dumps(packet).encode()], [its_output, its_output])
    os.close(its_output)
    return output


def test_a_forked_process_has_what_the_order_says() -> None:
    orders, server = start()
    with orders, server:
        for word in ("first", "second"):
            output = order(
                orders, f"print('{word}', os.environ['WORD'], os.getpid(), os.getsid(0))"
            )
            pid = json.loads(orders.recv(4096))["pid"]
            with os.fdopen(output) as lines:
                assert lines.read() == f"{word} told {pid} {pid}\n"
        orders.close()
        assert server.wait(30) == 0


FAIL = """
def fail():
    raise OSError("none to be had")
"""


@pytest.mark.parametrize(
    "failing",
    [
        "os.fork = fail",
        "forks = iter([os.fork, fail]); os.fork = lambda: next(forks)()",
        "os.setsid = fail",
    ],
    ids=["first", "second", "session"],
)
def test_what_cannot_be_forked_is_said(failing: str) -> None:
    orders, server = start(FAIL + failing)
    with orders, server:
        output = order(orders, "print('ran')")
        assert "error" in json.loads(orders.recv(4096))
        # Nobody else listens for orders.
        orders.setblocking(False)
        with pytest.raises(BlockingIOError):
            orders.recv(4096)
        assert psutil.Process(server.pid).children() == []
        orders.close()
        assert server.wait(30) == 0
        with os.fdopen(output) as lines:
            assert lines.read() == ""


def test_an_order_that_is_too_long_is_refused() -> None:
    orders, server = start()
    with orders, server:
        os.close(order(orders, "#" * 70_000))
        assert "error" in json.loads(orders.recv(4096))
        with os.fdopen(order(orders, "print('ran')")) as lines:
            assert lines.read() == "ran\n"
        # Its answer was not read.
        orders.close()
        assert server.wait(30) == 0


def test_nobody_runs_whom_the_supervisor_does_not_know() -> None:
    # The server ends between the fork and its answer, as when somebody kills it.
    orders, server = start("fork_server.json.dumps = lambda _: os._exit(3)")
    with orders, server:
        output = order(orders, "print('ran')")
        assert orders.recv(4096) == b""
        assert server.wait(30) == 3
        # The end of the file: the rank has ended too.
        with os.fdopen(output) as lines:
            assert lines.read() == ""


def test_one_that_is_killed_at_the_gate_has_one_answer() -> None:
    kill_first = """
import select
dumps = fork_server.json.dumps
def dumps_and_kills(answer):
    fork_server.json.dumps = dumps
    ended = os.pidfd_open(answer["pid"])
    os.kill(answer["pid"], signal.SIGKILL)
    select.select([ended], [], [])
    return dumps(answer)
fork_server.json.dumps = dumps_and_kills
"""
    orders, server = start(kill_first)
    with orders, server:
        os.close(order(orders, "print('ran')"))
        killed = json.loads(orders.recv(4096))["pid"]
        output = order(orders, "print(os.getpid())")
        pid = json.loads(orders.recv(4096))["pid"]
        assert pid != killed
        with os.fdopen(output) as lines:
            assert lines.read() == f"{pid}\n"
        orders.close()
        assert server.wait(30) == 0


# === the supervisor's side ===


@asynccontextmanager
async def supervised(lines: Console) -> AsyncIterator[tuple[ForkServer, Child]]:
    """A supervisor's fork server that is running, and its process."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    with ours:
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", SCRIPT.format(prepare="")),
                stdin=theirs.fileno(),
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        server = ForkServer(parse("unread"), {}, lines)
        child = server._child = Child("fork server", process, lines, lambda _: None)
        server._orders = ours
        server._has_tried.set()
        try:
            yield server, child
        finally:
            child.kill()
            await child.wait()


@pytest.fixture
def console() -> Console:
    return Console(sys.stderr)


async def run(server: ForkServer, code: str, statuses: list[dict[str, Any]]) -> Child:
    return await server.start("rank", ["worker", code], statuses.append, {"WORD": "told"})


async def test_a_forked_process_is_the_supervisors_child(console: Console) -> None:
    statuses: list[dict[str, Any]] = []
    async with supervised(console) as (server, child):
        told = "print('{\"parent\": %d}' % os.getppid()); print('last words', file=sys.stderr); sys.exit(5)"
        rank = await run(server, told, statuses)
        assert await rank.wait() == 5
        assert statuses == [{"parent": os.getpid()}]
        assert list(rank.tail) == ["last words"]
        # The fork server's end is not that of a rank that runs.
        waiting = await run(server, "print('{}', flush=True); signal.pause()", statuses)
        await asyncio.to_thread(eventually, lambda: statuses[1:] == [{}])
        child.kill()
        assert await child.wait() == -signal.SIGKILL
        assert psutil.pid_exists(waiting.pid)
        await waiting.stop(grace_s=30)
        assert await waiting.wait() == -signal.SIGTERM


async def test_what_a_rank_started_ends_with_it(console: Console) -> None:
    statuses: list[dict[str, Any]] = []
    async with supervised(console) as (server, _):
        code = (
            "it = subprocess.Popen(['sleep', '1000']); print('{\"pid\": %d}' % it.pid, flush=True)"
        )
        rank = await run(server, f"{code}; os._exit(1)", statuses)
        assert await rank.wait() == 1
        await asyncio.to_thread(eventually, lambda: not psutil.pid_exists(statuses[0]["pid"]))


async def test_a_fork_server_that_hangs_is_killed_and_nobody_waits(
    console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_side, "ANSWER_TIMEOUT_S", 0.2)
    async with supervised(console) as (server, child):
        os.kill(child.pid, signal.SIGSTOP)
        # As a process of its own it says that this is no checkpoint.
        rank = await run(server, "sys.exit(5)", [])
        assert await rank.wait() == 64
        assert await child.wait() == -signal.SIGKILL


async def test_an_order_that_is_given_up_leaves_nobody_behind(console: Console) -> None:
    async with supervised(console) as (server, child):
        os.kill(child.pid, signal.SIGSTOP)
        order = asyncio.create_task(run(server, "sys.exit(5)", []))
        await asyncio.to_thread(eventually, server._turn.locked)
        order.cancel()
        with pytest.raises(asyncio.CancelledError):
            await order
        assert await child.wait() == -signal.SIGKILL


async def test_where_none_is_wanted_none_is_started(console: Console) -> None:
    server = ForkServer(parse("unread", "--no-fork-server"), {}, console)
    await server.run()
    rank = await run(server, "sys.exit(5)", [])
    assert await rank.wait() == 64


async def test_what_cannot_be_started_is_tried_again_and_given_up_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def start(*_: object, **__: object) -> Child:
        raise BlockingIOError("no process to be had")

    lines = io.StringIO()
    server = ForkServer(parse("unread"), {}, Console(lines))
    monkeypatch.setattr(Child, "start", start)
    running = asyncio.create_task(server.run())
    # Nobody waits for it; what cannot do without a process says so.
    group = WorkerGroup(0, parse("unread"), "", tmp_path, cuda_devices=None, fork_server=server)
    monkeypatch.setattr(restarts, "BACKOFF_FIRST_S", 0.0)
    with pytest.raises(GaveUpError, match=r"worker 0 could not be started: .*no process to be had"):
        await group.run()
    with pytest.raises(GaveUpError, match=r"router could not be started: no process to be had"):
        await RouterProcess(parse("unread"), Console(lines)).run()
    assert not running.done()
    assert lines.getvalue().startswith("fork server could not be started: no process to be had")
    running.cancel()
