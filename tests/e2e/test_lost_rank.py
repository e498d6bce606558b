"""A rank of a worker dies or hangs in the middle of streams: they go on with the tokens they would have had."""

import os
import signal
from pathlib import Path

import psutil
import pytest

from tests.checkpoints import make_checkpoint
from tests.e2e.stack import Serve, eventually, start_serve
from tests.e2e.streams import Stream, wait_for_the_middle

pytestmark = pytest.mark.timeout(240)

FLAGS = ("--dtype", "float32", "--num-blocks", "256")
# Far above what a replacement takes on a busy machine: how long it takes is not what is tested.
PATIENT = {"ORCHESTRA_REPLAY_WAIT": "100s"}
NUM_STREAMS = 3
# Long enough that none has ended when the last has begun, on a machine that has other things to do too.
MAX_TOKENS = 1000


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint: these tests start many processes and compute little."""
    return make_checkpoint("llama", tmp_path_factory.mktemp("lost-rank") / "tiny", seed=7)


def start_streams(serve: Serve) -> list[Stream]:
    return [Stream(serve, f"prompt {number}", MAX_TOKENS) for number in range(NUM_STREAMS)]


def strike(streams: list[Stream], rank: psutil.Process, number: signal.Signals) -> None:
    """Sends a rank a signal when every stream has begun and none has ended."""
    wait_for_the_middle(streams)
    rank.send_signal(number)


def ranks(serve: Serve, worker: int = 0) -> dict[int, psutil.Process]:
    """The ranks of a worker by their number."""
    found = {}
    for process in serve.children("worker"):
        command = process.cmdline()
        if f"worker-{worker}" in command:
            found[int(command[command.index("--rank") + 1])] = process
    return found


def lines(serve: Serve, words: str) -> int:
    """How often something was logged."""
    return serve.log.read_text().count(words)


def test_streams_of_an_only_worker_wait_for_another_rank(checkpoint: Path) -> None:
    # Of four ranks, two are neither the lost one nor the one that notices. How fast a hang is found is not tested here:
    # on a busy machine a second more keeps the other ranks from being taken for hung.
    flags = (*FLAGS, "--tp", "4", "--rank-hang-timeout-ms", "1000")
    with start_serve(checkpoint, *flags, environment=PATIENT) as serve:
        expected = [stream.answer() for stream in start_streams(serve)]
        before = ranks(serve)
        (fork_server,) = serve.children("fork-server")

        streams = start_streams(serve)
        strike(streams, before[1], signal.SIGKILL)
        # One that comes when nobody is there waits too.
        eventually(lambda: lines(serve, "worker detached") == 1)
        late = Stream(serve, "prompt 0", MAX_TOKENS)
        assert [stream.answer() for stream in (*streams, late)] == [*expected, expected[0]]

        # The next one hangs, and there is nobody to fork: the one after starts as a process of its own.
        second = ranks(serve)[1]
        assert second.cmdline()[0] == "orchestra"
        fork_server.kill()
        streams = start_streams(serve)
        strike(streams, second, signal.SIGSTOP)
        assert [stream.answer() for stream in streams] == expected
        assert not second.is_running()
        assert lines(serve, "hangs: killing it") == 1
        assert lines(serve, "is whole again after") == 2
        after = ranks(serve)
        assert after[1].cmdline()[1:3] == ["-m", "orchestra"]

        # The others are the processes that they were, and rank 0 has the weights that it had.
        assert {**after, 1: before[1]} == before
        assert lines(serve, "loaded, attaching to the router") == 1


def assert_own_cores(ranks: dict[int, psutil.Process]) -> None:
    """Of two ranks, also of one that replaced another; what else rank 0 does may be done on any core."""
    anywhere = os.sched_getaffinity(0)
    computing = [os.sched_getaffinity(rank.pid) for rank in ranks.values()]
    if len(anywhere) < len(ranks):
        assert computing == [anywhere] * len(ranks)
        return
    assert sum(map(len, computing)) == len(set.union(*computing)) == len(anywhere)
    tasks = Path(f"/proc/{ranks[0].pid}/task").iterdir()
    (agent,) = (int(it.name) for it in tasks if (it / "comm").read_text() == "orchestra-agent\n")
    assert os.sched_getaffinity(agent) == anywhere


def test_streams_wait_for_a_rank_where_two_steps_are_in_flight(checkpoint: Path) -> None:
    ahead = ("--async-scheduling", "on", "--kv-transfer", "off")
    flags = (*FLAGS, *ahead, "--tp", "2", "--rank-hang-timeout-ms", "1000")
    with start_serve(checkpoint, *flags, environment=PATIENT) as serve:
        expected = [stream.answer() for stream in start_streams(serve)]
        before = ranks(serve)
        streams = start_streams(serve)
        strike(streams, before[1], signal.SIGKILL)
        assert [stream.answer() for stream in streams] == expected

        streams = start_streams(serve)
        strike(streams, ranks(serve)[1], signal.SIGSTOP)
        assert [stream.answer() for stream in streams] == expected
        assert lines(serve, "hangs: killing it") == 1
        assert lines(serve, "is whole again after") == 2
        after = ranks(serve)
        assert after[0] == before[0]
        assert_own_cores(after)


def test_streams_go_on_at_another_worker_at_once(checkpoint: Path) -> None:
    # Nobody waits here for a worker to come back: it would be an error.
    environment = {"ORCHESTRA_REPLAY_WAIT": "0s"}
    flags = (*FLAGS, "--tp", "2", "--replicas", "2")
    with start_serve(checkpoint, *flags, environment=environment) as serve:
        expected = [stream.answer() for stream in start_streams(serve)]
        streams = start_streams(serve)
        strike(streams, ranks(serve)[1], signal.SIGKILL)
        assert [stream.answer() for stream in streams] == expected
        eventually(lambda: lines(serve, "worker 0 is whole again after") == 1, 90)
        assert lines(serve, "loaded, attaching to the router") == 2
