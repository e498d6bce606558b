"""A rank of a worker dies or hangs in the middle of streams: they go on with the tokens they would have had."""

import json
import signal
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.checkpoints import make_checkpoint
from tests.e2e.stack import Serve, eventually, start_serve

pytestmark = pytest.mark.timeout(240)

FLAGS = ("--dtype", "float32", "--num-blocks", "256", "--tp", "2")
# Far above what a replacement takes on a busy machine: how long it takes is not what is tested.
PATIENT = {"ORCHESTRA_REPLAY_WAIT": "100s"}
NUM_STREAMS = 3
MAX_TOKENS = 400


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint: these tests start many processes and compute little."""
    return make_checkpoint("llama", tmp_path_factory.mktemp("lost-rank") / "tiny", seed=7)


class Stream(threading.Thread):
    """A streamed completion, read as it comes."""

    def __init__(self, serve: Serve, prompt: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.finish_reason: str | None = None
        body = {"model": serve.model, "prompt": prompt, "max_tokens": MAX_TOKENS, "stream": True}
        self._request = urllib.request.Request(
            f"{serve.url}/v1/completions",
            json.dumps({**body, "ignore_eos": True, "temperature": 0}).encode(),
            {"content-type": "application/json"},
        )
        self.start()

    def run(self) -> None:
        """Reads to the end."""
        with urllib.request.urlopen(self._request, timeout=120) as answer:
            for line in answer:
                event = line.decode().strip().removeprefix("data: ")
                if event.startswith("{"):
                    (choice,) = json.loads(event)["choices"]
                    self.texts.append(choice["text"])
                    self.finish_reason = choice["finish_reason"]

    def answer(self) -> str:
        """All of its text, which has to have come to its end."""
        self.join(120)
        assert not self.is_alive()
        assert self.finish_reason == "length"
        return "".join(self.texts)


def start_streams(serve: Serve) -> list[Stream]:
    return [Stream(serve, f"prompt {number}") for number in range(NUM_STREAMS)]


def strike(streams: list[Stream], rank: psutil.Process, number: signal.Signals) -> None:
    """Sends a rank a signal when every stream has begun and none has ended."""
    eventually(lambda: all(len(stream.texts) > 10 for stream in streams))
    assert all(stream.is_alive() for stream in streams)
    rank.send_signal(number)


def ranks(serve: Serve, worker: int = 0) -> dict[int, psutil.Process]:
    """The ranks of a worker that were started as such, by their number."""
    found = {}
    for process in serve.children("worker"):
        command = process.cmdline()
        if "--rank" in command and f"worker-{worker}" in command:
            found[int(command[command.index("--rank") + 1])] = process
    return found


def spares(serve: Serve) -> Iterator[psutil.Process]:
    """The processes that were started as spares."""
    return (it for it in serve.children("worker") if "--spare" in it.cmdline())


def lines(serve: Serve, words: str) -> int:
    """How often something was logged."""
    return serve.log.read_text().count(words)


def test_streams_of_an_only_worker_wait_for_a_spare_and_for_a_new_process(checkpoint: Path) -> None:
    with start_serve(checkpoint, *FLAGS, "--spare-ranks", "1", environment=PATIENT) as serve:
        expected = [stream.answer() for stream in start_streams(serve)]
        rank_0, rank_1 = (ranks(serve)[rank] for rank in (0, 1))
        (spare,) = spares(serve)

        streams = start_streams(serve)
        strike(streams, rank_1, signal.SIGKILL)
        assert [stream.answer() for stream in streams] == expected
        assert lines(serve, "a spare takes its place") == 1

        # The spare is rank 1 now, and hangs before there is another: its place goes to a new process.
        streams = start_streams(serve)
        strike(streams, spare, signal.SIGSTOP)
        assert [stream.answer() for stream in streams] == expected
        assert not spare.is_running()
        assert lines(serve, "hangs: killing it") == 1
        assert lines(serve, "is whole again after") == 2

        # Rank 0 is the process that it was, with the weights that it had.
        assert ranks(serve)[0] == rank_0
        assert lines(serve, "loaded, attaching to the router") == 1


def test_streams_go_on_at_another_worker_at_once(checkpoint: Path) -> None:
    # Nobody waits here for a worker to come back: it would be an error.
    environment = {"ORCHESTRA_REPLAY_WAIT": "0s"}
    with start_serve(checkpoint, *FLAGS, "--replicas", "2", environment=environment) as serve:
        expected = [stream.answer() for stream in start_streams(serve)]
        streams = start_streams(serve)
        strike(streams, ranks(serve)[1], signal.SIGKILL)
        assert [stream.answer() for stream in streams] == expected
        eventually(lambda: lines(serve, "worker 0 is whole again after") == 1, 90)
        assert lines(serve, "loaded, attaching to the router") == 2
