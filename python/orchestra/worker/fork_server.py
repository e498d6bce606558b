"""A process that has imported what a rank needs, and forks ranks: they begin in milliseconds instead of seconds.

The idea is that of Python's own `multiprocessing.forkserver`, and of Android's zygote. Unlike theirs, what is forked
belongs to the supervisor as if that had started it: it is its child, which the supervisor waits for, and its end ends
the rank, while the end of the fork server harms nobody. To get there the fork server forks twice and the process in
between ends; the kernel then gives the orphan to the supervisor, which has asked for orphans.

Orders come through standard input, a Unix socket of packets. An order brings the descriptors that become the rank's
standard output and error, and is answered with the rank's process number.
"""

import contextlib
import gc
import json
import os
import socket
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from setproctitle import setproctitle

from orchestra.worker.__main__ import main as run_rank
from orchestra.worker.__main__ import prepare_to_import

ORDER_BYTES_MAX = 1 << 16
# Standard output and error.
NUM_STREAMS = 2
GO = b"!"


def main(arguments: Sequence[str]) -> int:
    """Forks ranks until the supervisor has no more orders; in each of them, runs it.

    Args:
        arguments: the checkpoint's directory.

    Returns:
        The exit code of the process: the fork server's own, or the rank's.
    """
    (model_dir,) = arguments
    _import_all()
    _read_ahead(Path(model_dir))
    # Pages whose objects no collection touches stay shared with the ranks.
    gc.freeze()
    with socket.socket(fileno=os.dup(0)) as orders:
        rank_arguments = _obey(orders)
    return 0 if rank_arguments is None else run_rank(rank_arguments)


def _import_all() -> None:
    prepare_to_import()
    # numpy's own threads, which nothing here uses, would be missing after a fork.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    import_module("orchestra.worker.runtime")


def _read_ahead(model_dir: Path) -> None:
    """Has the kernel fetch the weights into memory meanwhile; whether they can be read is the ranks' concern."""
    for path in model_dir.glob("*.safetensors"):
        with contextlib.suppress(OSError), path.open("rb") as weights:
            os.posix_fadvise(weights.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)


def _obey(orders: socket.socket) -> list[str] | None:
    """Forks a rank per order; returns in each of them, with its arguments, and here at the end, with None."""
    while True:
        try:
            packet, streams, _, _ = socket.recv_fds(orders, ORDER_BYTES_MAX, NUM_STREAMS)
        except ConnectionResetError:  # the supervisor has ended without reading the last answer
            return None
        if not packet:
            return None
        gate = None
        try:
            order = json.loads(packet)
            gate = _fork_rank(orders)
        except (OSError, ValueError) as error:
            # Too many processes, too little memory, an order that is cut off because it is too long; or the supervisor
            # has just ended, which the next packet tells.
            with contextlib.suppress(OSError):
                orders.send(json.dumps({"error": str(error)}).encode())
        if gate is not None:
            _become(order, streams, gate)
            return list(order["arguments"])
        for stream in streams:
            os.close(stream)


def _fork_rank(orders: socket.socket) -> socket.socket | None:
    """Forks a process and answers with its number.

    Returns:
        In the new process, the gate through which it is told to go on; in this one None.

    Raises:
        OSError: there is no process to be had.
    """
    ours, gate = socket.socketpair()
    with ours, gate:
        between = os.fork()
        if between == 0:
            return _fork_once_more(gate)
        # When this returns it has ended, and the rank, if there is one, is the supervisor's.
        os.waitpid(between, 0)
        gate.close()
        number = ours.recv(32)
        if not number:
            raise OSError("no second process could be forked")
        orders.send(json.dumps({"pid": int(number)}).encode())
        # The supervisor may have killed it since; there must be no second answer.
        with contextlib.suppress(OSError):
            ours.send(GO)
    return None


def _fork_once_more(gate: socket.socket) -> socket.socket:
    """Ends the process between, and returns in the rank. Whatever goes wrong, neither becomes a second fork server."""
    try:
        if os.fork() != 0:
            os._exit(0)
        # A session of its own: what kills the rank kills what it started.
        os.setsid()
        gate.send(str(os.getpid()).encode())
        return gate.dup()
    except OSError:
        os._exit(1)


def _become(order: dict[str, Any], streams: Sequence[int], gate: socket.socket) -> None:
    """Makes a forked process what an order says, as soon as the supervisor knows of it."""
    with gate:
        if gate.recv(1) != GO:
            os._exit(1)
    null = os.open(os.devnull, os.O_RDONLY)
    for place, descriptor in enumerate((null, *streams)):
        os.dup2(descriptor, place)
        os.close(descriptor)
    # Before CUDA is asked for anything: it counts its devices once.
    os.environ.update(order["environment"])
    setproctitle(" ".join(["orchestra", "worker", *order["arguments"]]))
