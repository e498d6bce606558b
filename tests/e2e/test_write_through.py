"""A worker that writes its KV through is killed in the middle of streams: what its keeper has is not computed again."""

import random
from pathlib import Path

import psutil
import pytest

from tests.checkpoints import VOCAB_SIZE, make_checkpoint
from tests.e2e.stack import Serve, eventually, start_serve
from tests.e2e.streams import Stream, wait_for_the_middle

pytestmark = pytest.mark.timeout(240)

BLOCK_SIZE = 16
# Forty whole blocks.
PROMPT_TOKENS = 640
# With so many layers some seconds, several times what the copies take.
MAX_TOKENS = 1300
NUM_LAYERS = 8
FLAGS = (
    *("--dtype", "float32", "--num-blocks", "512", "--num-host-blocks", "512"),
    *("--replicas", "2", "--write-through"),
)
# Nobody waits here for the killed worker to come back: it would be an error.
ENVIRONMENT = {"ORCHESTRA_REPLAY_WAIT": "0s"}


def start_streams(serve: Serve) -> list[Stream]:
    """One for each worker, whose prompts share nothing."""
    draw = random.Random(11)
    prompts = [[draw.randrange(8, VOCAB_SIZE) for _ in range(PROMPT_TOKENS)] for _ in range(2)]
    return [Stream(serve, prompt, MAX_TOKENS) for prompt in prompts]


def last_rank(serve: Serve, name: str) -> psutil.Process:
    """The process of a worker; of several, one without which the others begin anew."""
    lines = {it: it.cmdline() for it in serve.children("worker")}
    return max(
        (it for it, line in lines.items() if name in line),
        key=lambda it: lines[it][lines[it].index("--rank") + 1] if "--rank" in lines[it] else "",
    )


def num_running(serve: Serve, name: str) -> float:
    """Sequences in a worker's batch."""
    gauge = f'orchestra_worker_requests_running{{worker="{name}"}}'
    (line,) = (it for it in serve.get("/metrics").splitlines() if it.startswith(gauge))
    return float(line.rsplit(" ", 1)[1])


@pytest.mark.parametrize("tp", [1, 2])
def test_streams_go_on_with_kv_that_the_keeper_copied(tmp_path: Path, tp: int) -> None:
    checkpoint = make_checkpoint("llama", tmp_path / "tiny", seed=7, num_hidden_layers=NUM_LAYERS)
    with start_serve(checkpoint, *FLAGS, "--tp", str(tp), environment=ENVIRONMENT) as serve:
        streams = start_streams(serve)
        # Of a stream at most all its blocks are kept: where more than that are, the prompt of the other is, too.
        num_blocks = (PROMPT_TOKENS + MAX_TOKENS + PROMPT_TOKENS) // BLOCK_SIZE
        eventually(lambda: serve.metrics()["orchestra_worker_kv_blocks_kept_total"] > num_blocks)
        wait_for_the_middle(streams)
        assert serve.metrics()["orchestra_worker_kv_host_hit_tokens_total"] == 0
        num_lost = num_running(serve, "worker-0")
        assert num_lost >= 1
        last_rank(serve, "worker-0").kill()
        disturbed = [stream.answer() for stream in streams]
        # All of the prompt, at least, of each stream that had to move.
        copied = serve.metrics()["orchestra_worker_kv_host_hit_tokens_total"]
        assert copied >= num_lost * PROMPT_TOKENS
        assert [stream.answer() for stream in start_streams(serve)] == disturbed
