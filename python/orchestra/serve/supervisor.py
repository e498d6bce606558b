"""The life of one `orchestra serve`: start, watch, and stop in order."""

import asyncio
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from orchestra.serve.console import Console
from orchestra.serve.fork_server import ForkServer
from orchestra.serve.options import ServeOptions, group_devices
from orchestra.serve.restarts import GaveUpError
from orchestra.serve.router import Addresses, RouterProcess, is_ready
from orchestra.serve.run_directory import run_directory
from orchestra.serve.worker_group import WorkerGroup, rank_environment

POLL_S = 0.1
EXIT_OK = 0


class Supervisor:
    """Starts the router and the workers, restarts what dies, and stops everything on a signal.

    Args:
        options: what was asked for; already checked.
        console: for progress and log lines.
        output: for the addresses, once there are any to use.
    """

    def __init__(self, options: ServeOptions, console: Console, output: Console) -> None:
        self._options = options
        self._console = console
        self._output = output
        self._router = RouterProcess(options, console)
        self._groups: list[WorkerGroup] = []
        self._stop = asyncio.Event()
        self._started = time.monotonic()

    async def run(self) -> int:
        """Serves until a signal comes or nothing can be served; returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal)
        stop = asyncio.create_task(self._stop.wait())
        router = asyncio.create_task(self._router.run())
        workers = None
        try:
            with run_directory() as directory:
                try:
                    workers = asyncio.create_task(self._run_workers(directory))
                    done, _ = await asyncio.wait(
                        {stop, router, workers}, return_when=asyncio.FIRST_COMPLETED
                    )
                    for task in done - {stop}:
                        task.result()
                    return EXIT_OK
                finally:
                    # The router first: it refuses new requests and lets the running ones finish on the workers.
                    await _cancel(router)
                    if workers is not None:
                        await _cancel(workers)
        except GaveUpError as error:
            self._console.progress("")
            self._console.line(f"orchestra serve: giving up: {error}")
            return error.exit_code
        finally:
            stop.cancel()

    async def _run_workers(self, directory: Path) -> None:
        """Runs the workers until cancelled, and tells when they are ready."""
        environment = rank_environment(self._options, None)
        fork_server = ForkServer(self._options, environment, self._console)
        # Imports torch while the router starts.
        tasks = [asyncio.create_task(fork_server.run())]
        try:
            self._console.progress("starting the router")
            addresses = await self._router.addresses()
            for index, devices in enumerate(group_devices(self._options)):
                self._groups.append(
                    WorkerGroup(
                        *(index, self._options, addresses.workers, directory),
                        cuda_devices=devices,
                        fork_server=fork_server,
                    )
                )
            tasks += [asyncio.create_task(group.run()) for group in self._groups]
            tasks.append(asyncio.create_task(self._announce_ready(addresses)))
            # The announcement ends well, and the fork server may; a group's task ends only with an error. Not `gather`:
            # it would cancel them itself, and `_cancel` once more those that still stop what they have started.
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in ended:
                task.result()
        finally:
            await _cancel(*tasks)

    async def _announce_ready(self, addresses: Addresses) -> None:
        while not (
            all(group.is_ready for group in self._groups) and await is_ready(addresses.http)
        ):
            self._console.progress(self._loading_text())
            await asyncio.sleep(POLL_S)
        self._console.progress("")
        if self._options.print_addresses:
            self._output.line(json.dumps({**vars(addresses), "model": self._options.model_name}))
            return
        for line in _ready_lines(self._options, addresses, time.monotonic() - self._started):
            self._output.line(line)

    def _loading_text(self) -> str:
        # Steps of ten: where progress is not redrawn, each change is a line.
        percents = [f"{int(group.loaded * 10) * 10} %" for group in self._groups]
        return f"loading {self._options.model_name}: {', '.join(percents)}"

    def _on_signal(self) -> None:
        if self._stop.is_set():
            for child in [
                self._router.child,
                *(c for group in self._groups for c in group.children),
            ]:
                if child is not None:
                    child.kill()
            return
        self._stop.set()
        self._console.progress("")
        self._console.line("stopping: running requests may finish; a second signal stops at once")


async def _cancel(*tasks: "asyncio.Task[None]") -> None:
    """Cancels tasks and waits until they have cleaned up; their outcome was looked at before."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _ready_lines(options: ServeOptions, addresses: Addresses, took_s: float) -> list[str]:
    url = f"http://{_reachable(addresses.http)}/v1"
    body: dict[str, Any] = {"model": options.model_name}
    if has_chat_template(options.model_dir):
        route, body["messages"] = "chat/completions", [{"role": "user", "content": "Hello!"}]
    else:
        route, body["prompt"] = "completions", "Once upon a time"
    body |= {"max_tokens": 64, "stream": True}
    size = f"{options.replicas} worker(s) of {options.num_ranks} rank(s)"
    if options.prefill:
        size += f", {options.prefill} for prompts"
    return [
        f"ready in {took_s:.1f} s: {options.model_name} on {size}",
        f"  OpenAI  {url}",
        f"  gRPC    {_reachable(addresses.grpc)}",
        "try",
        f"  curl -N {url}/{route} -H 'content-type: application/json'{_key_header()}"
        f" -d '{json.dumps(body)}'",
    ]


def _key_header() -> str:
    # The router reads the same variable; the key itself is not shown.
    return (
        ' -H "authorization: Bearer $ORCHESTRA_API_KEY"'
        if os.environ.get("ORCHESTRA_API_KEY")
        else ""
    )


def has_chat_template(model_dir: Path) -> bool:
    """Whether the checkpoint brings a chat template."""
    if (model_dir / "chat_template.jinja").is_file():
        return True
    try:
        config = json.loads((model_dir / "tokenizer_config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and bool(config.get("chat_template"))


def _reachable(address: str) -> str:
    """An address that a client on this machine can use: all interfaces include the loopback."""
    return address.replace("0.0.0.0:", "127.0.0.1:", 1).replace("[::]:", "[::1]:", 1)
