"""`orchestra._core` beside the scheduler: the agent's binding, the router's entry, and what a process does at start."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import pytest

import orchestra
from orchestra import _core, errors


def python(program: str, **options: Any) -> subprocess.Popen[str]:
    """Starts a Python program."""
    command = [sys.executable, "-c", program]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options)


def test_the_version_is_written_once() -> None:
    assert orchestra.__version__ == version("orchestra")


# === agent ===

CONFIG: dict[str, Any] = {
    "router": "http://127.0.0.1:9",  # the discard port: nobody answers, and an agent waits for its router
    "worker_id": "w",
    "model": "m",
    "weights_epoch": 0,
    "vocab_size": 100,
    "model_files": {"tokenizer_json": b"{}"},
    "scheduler": {"num_blocks": 64, "max_model_len": 128, "eos_token_ids": [0]},
}


@pytest.fixture
def agent() -> Iterator[_core.Agent]:
    agent = _core.Agent(CONFIG)
    yield agent
    agent.close()


def test_an_agent_without_a_router_waits_and_closes(agent: _core.Agent) -> None:
    assert agent.next_step(timeout_ms=1) is None
    assert agent.is_idle
    assert not agent.is_attached
    agent.drain()
    stats = agent.stats()
    assert (stats["kv_blocks_total"], stats["steps"], stats["is_draining"]) == (64, 0, True)
    agent.close()
    agent.close()
    with pytest.raises(errors.ShuttingDownError):
        agent.next_step()


def test_a_step_that_was_not_handed_out_cannot_be_committed(agent: _core.Agent) -> None:
    with pytest.raises(errors.InvalidRequestError):
        agent.commit(1, b"")


def test_a_failed_agent_says_so(agent: _core.Agent) -> None:
    agent.fail("the device is gone")
    with pytest.raises(errors.InternalError, match="the device is gone"):
        agent.next_step(timeout_ms=1)


def test_other_threads_run_while_next_step_waits(agent: _core.Agent) -> None:
    endings: list[BaseException] = []

    def wait() -> None:
        try:
            agent.next_step(timeout_ms=600_000)
        except errors.ShuttingDownError as error:
            endings.append(error)

    waiter = threading.Thread(target=wait)
    waiter.start()
    # With the GIL held by the waiter, none of these lines would run before its ten minutes are over.
    assert agent.stats()["steps"] == 0
    agent.close()
    waiter.join(30)
    assert len(endings) == 1


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"router": "ftp://nowhere"}, "router"),
        ({"worker_id": ""}, "worker_id"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_size": 1.5}, "vocab_size"),
        ({"heartbeat": "soon"}, "heartbeat"),
        ({"unknown": 1}, "unknown"),
        ({"scheduler": {"num_blocks": 0, "max_model_len": 128}}, "scheduler.num_blocks"),
        ({"scheduler": {"block": 1}}, "scheduler.block"),
        ({"model_files": {"tokenizer_json": 5}}, "model_files.tokenizer_json"),
    ],
    ids=str,
)
def test_a_wrong_agent_setting_is_named(changes: dict[str, Any], key: str) -> None:
    with pytest.raises(errors.ConfigError) as raised:
        _core.Agent({**CONFIG, **changes})
    assert raised.value.key == key


def test_nesting_is_bounded() -> None:
    deep: dict[str, Any] = {}
    for _ in range(10_000):
        deep = {"x": deep}
    with pytest.raises(errors.ConfigError):
        _core.Agent({"scheduler": deep})


# === router and process ===


def test_the_router_refuses_what_it_cannot_use() -> None:
    assert _core.run_router(["--http", "nonsense"]) == 64


def test_the_router_runs_until_it_is_told_to_stop() -> None:
    doors = ("http", "grpc", "workers", "admin")
    listen = [part for door in doors for part in (f"--{door}", "127.0.0.1:0")]
    program = f"""
from orchestra import _core
raise SystemExit(_core.run_router({[*listen, "--print-addresses"]!r}))
"""
    with python(program) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith('{"http":"127.0.0.1:')
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals the death of a parent")
def test_a_child_dies_with_its_parent() -> None:
    program = """
import os, subprocess, sys, time
child = '''
import sys, time
from orchestra import _core
_core.die_with_parent(int(sys.argv[1]))
print("bound", flush=True)
time.sleep(600)
'''
subprocess.Popen([sys.executable, "-c", child, str(os.getpid())])
time.sleep(600)
"""
    with python(program) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "bound\n"
        parent.kill()
        # The child inherited standard output, so its end comes when both have ended; else the test times out.
        assert parent.stdout.read() == ""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals the death of a parent")
def test_a_child_whose_parent_is_gone_already_dies_at_once() -> None:
    program = "from orchestra import _core; _core.die_with_parent(1); print('alive')"
    with python(program) as process:
        output, _ = process.communicate(timeout=30)
    # This process, not 1, started it: as if its parent had died before it could ask.
    assert (process.returncode, output) == (-signal.SIGKILL, "")


def test_logging_is_set_up_on_demand() -> None:
    with pytest.raises(errors.ConfigError) as raised:
        orchestra.init_logging("=nonsense=")
    assert raised.value.key == "log"
    program = (
        "import orchestra; orchestra.init_logging('warn', json=True); orchestra.init_logging()"
    )
    with python(program) as process:
        assert process.wait(30) == 0
