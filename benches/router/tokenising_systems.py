"""Ours and Dynamo's frontend, each with workers of its own that compute nothing."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benches.router.processes import (
    READY_TIMEOUT_S,
    RIG_CORE,
    ROUTER_CORE,
    free_port,
    load,
    running,
    settle,
)
from benches.router.systems import ENVIRONMENTS, OURS, Router
from tests.e2e.stack import DEMO
from tests.faults.processes import RELEASE, ROOT

VERSION = "1.6.1"
RIVAL = f"dynamo {VERSION}"
HOME = ENVIRONMENTS / "dynamo"
# What the two programs import of what the package asks for; the rest is for engines and clusters.
IMPORTED = (
    "aiohttp", "msgspec", "packaging", "prometheus-client", "pydantic>=2.10.6,<=2.13.5", "pyyaml", "pyzmq", "tqdm",
    "typing-extensions", "uvloop", "zstandard",
)  # fmt: skip
MODEL = "mock"
# More than any prompt here has; the demonstration model's own limit is 2,048.
MAX_MODEL_LEN = 32_768
BLOCK_SIZE = 16
NUM_BLOCKS = 16_384
# Of the time that its model of an engine would take.
SPEEDUP = 1000
# Of one step: no prompt is cut up.
MAX_NUM_BATCHED_TOKENS = 65_536


def install() -> None:
    """Installs it in an environment of its own, once."""
    if (HOME / "installed").exists():
        return
    subprocess.run([sys.executable, "-m", "venv", str(HOME)], check=True)
    pip = [str(HOME / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    packages = [f"ai-dynamo=={VERSION}", f"ai-dynamo-runtime=={VERSION}"]
    subprocess.run([*pip, "--no-deps", *packages], check=True)
    subprocess.run([*pip, *IMPORTED], check=True)
    (HOME / "installed").touch()


def model_files(folder: Path) -> Path:
    """The demonstration model's tokeniser, with room for long prompts."""
    files = folder / "model"
    files.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(DEMO / name, files)
    config = json.loads((DEMO / "config.json").read_text())
    config["max_position_embeddings"] = MAX_MODEL_LEN
    (files / "config.json").write_text(json.dumps(config))
    return files


@contextlib.contextmanager
def orchestra(folder: Path, num_workers: int) -> Iterator[Router]:
    """Our router, and Orchestra workers that draw hashes instead of computing."""
    http, workers = free_port(), free_port()
    doors = ["--http", f"127.0.0.1:{http}", "--workers", f"127.0.0.1:{workers}"]
    other_doors = ["--grpc", "127.0.0.1:0", "--admin", "127.0.0.1:0"]
    command = [str(RELEASE / "orchestra-router"), *doors, *other_doors]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    worker = ["env", f"PYTHONPATH={path}", sys.executable, "-m", "tests.chaos.mock_worker"]
    limits = [
        *("--max-model-len", str(MAX_MODEL_LEN), "--num-blocks", str(NUM_BLOCKS)),
        *("--max-num-batched-tokens", str(MAX_NUM_BATCHED_TOKENS)),
    ]
    with contextlib.ExitStack() as stack:
        log = folder / "orchestra.log"
        process = stack.enter_context(running(command, ROUTER_CORE, log))
        for number in range(num_workers):
            asked = [*worker, f"http://127.0.0.1:{workers}", str(number), "0", *limits]
            stack.enter_context(running(asked, RIG_CORE, folder / f"worker-{number}.log"))
        ready(http, process, log)
        yield Router(OURS, [http], process.pid)


@contextlib.contextmanager
def dynamo(folder: Path, num_workers: int) -> Iterator[Router]:
    """The frontend with its KV-aware router, and its mocker. It does without etcd and NATS."""
    install()
    port = free_port()
    # Nor does ours write a line for each request.
    environment = ["env", f"DYN_FILE_KV={folder / 'discovery'}", "DYN_LOG=error"]
    python = [*environment, str(HOME / "bin" / "python"), "-m"]
    planes = ["--discovery-backend", "file", "--request-plane", "tcp", "--event-plane", "zmq"]
    mocker = [
        *("dynamo.mocker", "--model-path", str(model_files(folder)), "--model-name", MODEL),
        *("--num-workers", str(num_workers), "--num-gpu-blocks-override", str(NUM_BLOCKS)),
        *("--block-size", str(BLOCK_SIZE), "--speedup-ratio", str(SPEEDUP), "--startup-time", "0"),
        *("--max-num-batched-tokens", str(MAX_NUM_BATCHED_TOKENS)),
    ]
    frontend = ["dynamo.frontend", "--http-host", "127.0.0.1", "--http-port", str(port)]
    policy = ["--router-mode", "kv", "--router-min-initial-workers", str(num_workers)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(
            running([*python, *mocker, *planes], RIG_CORE, folder / "dynamo-mocker.log")
        )
        log = folder / "dynamo.log"
        process = stack.enter_context(
            running([*python, *frontend, *policy, *planes], ROUTER_CORE, log)
        )
        ready(port, process, log)
        yield Router(RIVAL, [port], process.pid)


def ready(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    """Waits for the first answers, and until what a start takes is over."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while True:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"no answers:\n{log.read_text()[-2000:]}")
        time.sleep(0.2)
        report = load([port], ["--count", "8", "-c", "4", "--seconds", "5"])
        if report["requests"] and not any(report["errors"].values()):
            return settle(process.pid)
