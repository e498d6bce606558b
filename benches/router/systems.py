"""The routers: how each is installed and started in front of some engines, everything else at its defaults."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benches.router import trained
from benches.router.processes import (
    READY_TIMEOUT_S,
    ROUTER_CORE,
    free_port,
    load,
    orchestra_flags,
    running,
    settle,
)
from tests.faults.processes import ROOT

OURS = "orchestra"
DIRECT = "direct"
NGINX = "nginx"
RIVALS = {"sglang-router": "0.3.2", "smg": "1.13.0", "vllm-router": "0.1.17"}
ENVIRONMENTS = ROOT / "target" / "rivals"


@dataclass(frozen=True)
class System:
    """One router with one policy.

    Args:
        name: as the tables call it.
        command: the command line for a port, the engines' URLs and a folder for its files.
    """

    name: str
    command: Callable[[int, list[str], Path], list[str]]


@dataclass(frozen=True)
class Router:
    """A router that answers; without a process for the engines themselves."""

    name: str
    ports: list[int]
    pid: int | None


def systems(policies: list[str]) -> list[System]:
    """Ours, the rivals with each policy, and nginx where it is installed."""
    # As one would ship it, like theirs.
    found = [System(OURS, _orchestra(trained.program()))]
    for package in RIVALS:
        _install(package)
        found += [
            System(f"{package} {policy}", _rival(package, policy))
            for policy in policies
            # It asks every engine to render every prompt: 4 ms of CPU a request with 64 of them.
            if (package, policy) != ("vllm-router", "cache_aware")
        ]
    if shutil.which("nginx"):
        found.append(System(NGINX, _nginx))
    else:
        print("nginx is not installed: the tables have no floor", file=sys.stderr)
    return found


@contextlib.contextmanager
def started(system: System, engines: list[int], folder: Path) -> Iterator[Router]:
    """A router in front of engines, from its first answers on."""
    port = free_port()
    urls = [f"http://127.0.0.1:{engine}" for engine in engines]
    log = folder / f"{system.name.replace(' ', '-')}.log"
    with running(system.command(port, urls, folder), ROUTER_CORE, log) as process:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{system.name} did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.2)
            flags = ["--count", str(2 * len(engines)), "-c", "2", "--seconds", "5"]
            report = load([port], flags)
            if report["requests"] and not any(report["errors"].values()):
                break
        settle(process.pid)
        yield Router(system.name, [port], process.pid)


def _orchestra(program: Path) -> Callable[[int, list[str], Path], list[str]]:
    def command(port: int, urls: list[str], _folder: Path) -> list[str]:
        return [str(program), *orchestra_flags(port, urls)]

    return command


def _rival(package: str, policy: str) -> Callable[[int, list[str], Path], list[str]]:
    def command(port: int, urls: list[str], _folder: Path) -> list[str]:
        program = str(ENVIRONMENTS / package / "bin" / package)
        is_vllm = package == "vllm-router"
        launch = [] if is_vllm else ["launch"]
        # Nor do we write a line for each request.
        quiet = ["--log-level", "warning" if is_vllm else "warn"]
        listen = ["--host", "127.0.0.1", "--port", str(port)]
        metrics = ["--prometheus-port", str(free_port())]
        return [
            program,
            *launch,
            *listen,
            *metrics,
            *quiet,
            "--policy",
            policy,
            "--worker-urls",
            *urls,
        ]

    return command


def _nginx(port: int, urls: list[str], folder: Path) -> list[str]:
    servers = "\n".join(f"server {url.removeprefix('http://')};" for url in urls)
    config = folder / "nginx.conf"
    config.write_text(f"""
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log stderr;
events {{ worker_connections 4096; }}
http {{
  access_log off; client_max_body_size 64m; client_body_buffer_size 64k; keepalive_requests 100000000;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  upstream engines {{ {servers} keepalive 1024; keepalive_requests 100000000; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://engines; proxy_http_version 1.1; proxy_set_header Connection "";
      proxy_buffering off;
    }}
  }}
}}
""")
    return ["nginx", "-c", str(config), "-p", str(folder), "-e", "stderr"]


def _install(package: str) -> None:
    """Installs a rival of the pinned version in an environment of its own, once."""
    home = ENVIRONMENTS / package
    if (home / "bin" / package).exists():
        return
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    pip = [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, f"{package}=={RIVALS[package]}"], check=True)
