"""Engines that come and go through a real etcd, also while that is dead."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.faults.clients import Asked, is_right
from tests.faults.processes import ROOT, call, eventually, running_engine, running_router

OWN_ETCD = ROOT / "target/tools/etcd"


def free_port() -> int:
    """A port that nobody has now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@dataclass
class Etcd:
    """An etcd of one member, which is spoken to as `curl` would."""

    folder: Path
    port: int = field(default_factory=free_port)
    peer_port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> None:
        """Starts it; again with what it had where it ran before."""
        program = OWN_ETCD if OWN_ETCD.exists() else shutil.which("etcd")
        if program is None:
            pytest.skip("no etcd; `make test` brings one where it can")
        clients, peers = (f"http://127.0.0.1:{port}" for port in (self.port, self.peer_port))
        flags = {
            "data-dir": str(self.folder),
            "listen-client-urls": clients,
            "advertise-client-urls": clients,
            "listen-peer-urls": peers,
            "initial-advertise-peer-urls": peers,
            "initial-cluster": f"default={peers}",
        }
        command = [str(program), *(f"--{name}={value}" for name, value in flags.items())]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(command, stdout=quiet, stderr=quiet)
        eventually(self._answers)

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):
            return call(self.port, "GET", "/health")[0] == 200
        return False

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait()

    def put(self, key: str, value: dict[str, object]) -> None:
        """Writes a key."""
        self._ask("put", {"key": key, "value": json.dumps(value)})

    def delete(self, key: str) -> None:
        """Removes a key."""
        self._ask("deleterange", {"key": key})

    def _ask(self, what: str, fields: dict[str, str]) -> None:
        coded = {name: base64.b64encode(text.encode()).decode() for name, text in fields.items()}
        status, answer = call(self.port, "POST", f"/v3/kv/{what}", json.dumps(coded).encode())
        assert status == 200, answer


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Etcd]:
    """A fresh etcd."""
    store = Etcd(tmp_path / "etcd")
    store.start()
    try:
        yield store
    finally:
        store.kill()


def test_engines_come_and_go_through_the_store(etcd: Etcd, tmp_path: Path) -> None:
    key = "/blue/engines/{}".format
    flags = ("--store", f"etcd://127.0.0.1:{etcd.port}/blue")
    with (
        running_engine() as first,
        running_engine() as second,
        running_router(tmp_path, [], *flags) as router,
    ):
        assert not router.is_ready()
        etcd.put(key("broken"), {"url": "http://127.0.0.1:1", "no_such_field": 1})
        etcd.put(key("first"), {"url": first.url})
        eventually(router.is_ready)
        assert is_right(router, Asked(5))

        etcd.kill()
        # The store is gone; its engines serve on.
        assert all(is_right(router, Asked(5)) for _ in range(20))

        etcd.start()
        etcd.put(key("second"), {"url": second.url})
        eventually(lambda: second.counters()["probes"] > 0)
        etcd.delete(key("first"))
        asked_before = 0

        def first_is_left_alone() -> bool:
            nonlocal asked_before
            before, asked_before = asked_before, first.counters()["requests"]
            assert is_right(router, Asked(5))
            return bool(second.counters()["requests"]) and before == asked_before

        eventually(first_is_left_alone)
        etcd.delete(key("second"))
        eventually(lambda: not router.is_ready())
