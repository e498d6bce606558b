"""A router that cannot start says why, in one line, and exits."""

import socket
import subprocess

import pytest

from tests.faults.processes import router_command


@pytest.mark.parametrize("door", ["http", "grpc", "workers", "admin"])
def test_a_taken_port_ends_the_start(door: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        command = router_command()
        command[command.index(f"--{door}") + 1] = address
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode not in (0, 101)
    assert "panicked" not in done.stderr
    assert address in done.stderr
    assert door in done.stderr
