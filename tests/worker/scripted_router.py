"""A router that a test plays: real workers dial it, and it hands on what they say to each other."""

import contextlib
import importlib.util
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from orchestra.worker.__main__ import main as run_worker
from tests.worker.forked import forked

PROTO = Path(__file__).resolve().parents[2] / "proto"
PATIENCE_S = 60


def load_messages(folder: Path) -> Any:
    """The wire types between worker and router, which Python needs nowhere else."""
    # In a process of its own: the compiler's C++ libraries and NIXL's do not get along in one.
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO}", f"--python_out={folder}"]
    subprocess.run([*command, "orchestra/v1/worker.proto"], check=True)
    spec = importlib.util.spec_from_file_location(
        "worker_pb2", folder / "orchestra/v1/worker_pb2.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Attached:
    """One worker's stream."""

    def __init__(self, pb: Any, hello: Any) -> None:
        self.hello = hello
        self.down: queue.Queue[Any] = queue.Queue()
        self.outputs: queue.Queue[Any] = queue.Queue()
        self._pb = pb
        self._sequences = 0

    def peer(self) -> Any:
        """What other workers need to reach this one."""
        moves = self.hello.kv_transfer
        return self._pb.KvPeer(
            worker_id=self.hello.worker_id,
            epoch=moves.epoch,
            metadata=dict(moves.metadata),
            host=moves.host,
        )

    def start(self, prompt: list[int], max_tokens: int, **moves: Any) -> None:
        """Starts a greedy sequence."""
        self._sequences += 1
        start = self._pb.StartSequence(
            sequence_id=self._sequences, prompt_token_ids=prompt, **moves
        )
        sampling = start.sampling
        sampling.max_tokens, sampling.temperature, sampling.ignore_eos = max_tokens, 0.0, True
        sampling.top_p, sampling.top_k, sampling.min_p, sampling.seed = 1.0, 0, 0.0, 0
        sampling.repetition_penalty = 1.0
        sampling.presence_penalty = sampling.frequency_penalty = 0.0
        self.down.put(self._pb.RouterMessage(start=start))

    def finish(self) -> tuple[list[int], Any]:
        """The tokens of the sequence started last, and its last output."""
        tokens: list[int] = []
        while True:
            output = self.outputs.get(timeout=PATIENCE_S)
            if output.sequence_id != self._sequences:
                continue
            tokens.extend(output.token_ids)
            if output.finish_reason:
                return tokens, output

    def run(self, prompt: list[int], max_tokens: int, **moves: Any) -> tuple[list[int], Any]:
        """Runs a sequence to its end."""
        self.start(prompt, max_tokens, **moves)
        return self.finish()


class ScriptedRouter:
    """The router's end of the streams; `start_worker` runs workers as processes of their own."""

    def __init__(self, pb: Any) -> None:
        self._pb = pb
        self._attached: dict[str, Attached] = {}
        self._news = threading.Condition()
        self._workers = contextlib.ExitStack()
        self._server = grpc.server(ThreadPoolExecutor(8))
        attach = grpc.stream_stream_rpc_method_handler(
            self._attach,
            request_deserializer=pb.WorkerMessage.FromString,
            response_serializer=pb.RouterMessage.SerializeToString,
        )
        handler = grpc.method_handlers_generic_handler(
            "orchestra.v1.WorkerGateway", {"Attach": attach}
        )
        self._server.add_generic_rpc_handlers((handler,))
        self._port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()

    def start_worker(self, name: str, model_dir: Path, *flags: str, ranks: int = 1) -> Attached:
        """Runs a worker, each rank a process, and waits until it has attached."""
        command = [str(model_dir), "--worker-id", name, "--device", "cpu", *flags]
        command += ["--router", f"http://127.0.0.1:{self._port}"]

        def arguments(rank: int) -> tuple[list[str]]:
            return ([*command, "--rank", str(rank)] if ranks > 1 else command,)

        self._workers.enter_context(forked(ranks, run_worker, arguments))
        with self._news:
            assert self._news.wait_for(lambda: name in self._attached, PATIENCE_S)
            return self._attached[name]

    def close(self) -> None:
        """Ends the workers and the server."""
        self._workers.close()
        for attached in self._attached.values():
            attached.down.put(None)
        self._server.stop(grace=None).wait()

    def _attach(self, messages: Iterator[Any], _context: Any) -> Iterator[Any]:
        worker = Attached(self._pb, next(messages).hello)
        worker.down.put(self._pb.RouterMessage(welcome=self._pb.Welcome()))
        reader = threading.Thread(target=self._read, args=(worker, messages), daemon=True)
        reader.start()
        with self._news:
            self._attached[worker.hello.worker_id] = worker
            self._news.notify_all()
        yield from iter(worker.down.get, None)

    def _read(self, worker: Attached, messages: Iterator[Any]) -> None:
        try:
            for message in messages:
                for output in message.tokens.outputs:
                    worker.outputs.put(output)
                if message.HasField("to_peer"):
                    other = self._attached[message.to_peer.worker_id]
                    message.to_peer.worker_id = worker.hello.worker_id
                    other.down.put(self._pb.RouterMessage(from_peer=message.to_peer))
        except grpc.RpcError:
            return  # The worker has gone.
