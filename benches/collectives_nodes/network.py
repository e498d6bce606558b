"""Nodes that are network namespaces of this machine, and a link between two of them whose rate is limited."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What the kernel sends at once, beyond the rate; and how long a packet may wait for its turn before it is dropped.
BURST = "128kb"
LATENCY = "50ms"


class MissingError(Exception):
    """This machine cannot make such nodes; the message says what is missing."""


@dataclass(frozen=True)
class Node:
    """One namespace."""

    name: str
    interface: str
    """Its end of the link."""

    def command(self, arguments: list[str]) -> list[str]:
        """The command that runs `arguments` on the node."""
        return ["ip", "netns", "exec", self.name, *arguments]


@contextmanager
def two_nodes(rate: str) -> Iterator[tuple[Node, Node]]:
    """Makes two nodes and the link between them, and takes both away again.

    Args:
        rate: of the link each way, as `tc` reads it, such as `1gbit`.

    Raises:
        MissingError: it takes root, `ip`, `tc`, namespaces, veth pairs and the token bucket filter (`sch_tbf`).
    """
    if os.geteuid() != 0:
        raise MissingError("root is needed, to make network namespaces")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise MissingError(f"{tool} is needed (iproute2)")
    mark = os.getpid()
    nodes = [Node(f"orchestra-{mark}-{side}", f"orch{mark}{side}") for side in "ab"]
    first, second = nodes
    with ExitStack() as stack:
        for node in nodes:
            _run("ip", "netns", "add", node.name)
            stack.callback(_run, "ip", "netns", "del", node.name)
        _run(
            *("ip", "link", "add", first.interface, "netns", first.name, "type", "veth"),
            *("peer", "name", second.interface, "netns", second.name),
        )
        for number, node in enumerate(nodes, start=1):
            inside, device = ("-n", node.name), ("dev", node.interface)
            _run("ip", *inside, "address", "add", f"10.77.0.{number}/24", *device)
            _run("ip", *inside, "link", "set", "lo", "up")
            _run("ip", *inside, "link", "set", node.interface, "up")
            limit = ("rate", rate, "burst", BURST, "latency", LATENCY)
            _run("tc", *inside, "qdisc", "add", *device, "root", "tbf", *limit)
        yield first, second


def run_ranks(
    nodes: tuple[Node, Node], command: list[str], folder: Path, num_ranks: int
) -> list[Any]:
    """Runs equally many ranks on each node, as `command --rank RANK --folder FOLDER`.

    Returns:
        What each has left as JSON in `result-RANK` in the folder.
    """
    processes = []
    for rank in range(num_ranks):
        node = nodes[rank * len(nodes) // num_ranks]
        own = node.command([*command, "--rank", str(rank), "--folder", str(folder)])
        environment = {**os.environ, "GLOO_SOCKET_IFNAME": node.interface}
        processes.append(subprocess.Popen(own, env=environment))
    try:
        if any(process.wait() != 0 for process in processes):
            raise SystemExit("a rank failed")
    finally:
        for process in processes:
            process.kill()
    return [json.loads((folder / f"result-{rank}").read_text()) for rank in range(num_ranks)]


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise MissingError(f"{' '.join(command)}: {done.stderr.strip()}")
