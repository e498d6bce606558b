"""A worker that writes KV through is killed in the middle of a stream: what its keeper has is not computed again."""

import random
import re
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
# With so many layers two seconds or more, several times what passes until the kill.
MAX_TOKENS = 1300
NUM_LAYERS = 8
FLAGS = (
    *("--dtype", "float32", "--num-blocks", "512", "--num-host-blocks", "512"),
    *("--replicas", "2", "--write-through"),
)
# Nobody waits here for the killed worker to come back: it would be an error.
ENVIRONMENT = {"ORCHESTRA_REPLAY_WAIT": "0s"}


def draw_prompts() -> list[list[int]]:
    """Two that share nothing."""
    draw = random.Random(11)
    return [[draw.randrange(8, VOCAB_SIZE) for _ in range(PROMPT_TOKENS)] for _ in range(2)]


def last_rank(serve: Serve, name: str) -> psutil.Process:
    """The process of a worker; of several, one without which the others begin anew."""
    lines = {it: it.cmdline() for it in serve.children("worker")}
    return max(
        (it for it, line in lines.items() if name in line),
        key=lambda it: lines[it][lines[it].index("--rank") + 1] if "--rank" in lines[it] else "",
    )


def names_running(serve: Serve) -> list[str]:
    """The workers with sequences in their batches."""
    gauge = re.compile(r'^orchestra_worker_requests_running{worker="(.+)"} (.+)$', re.MULTILINE)
    return [name for name, running in gauge.findall(serve.get("/metrics")) if float(running)]


@pytest.mark.parametrize("tp", [1, 2])
def test_a_stream_goes_on_with_kv_that_the_keeper_copied(tmp_path: Path, tp: int) -> None:
    checkpoint = make_checkpoint("llama", tmp_path / "tiny", seed=7, num_hidden_layers=NUM_LAYERS)
    first, second = draw_prompts()
    with start_serve(checkpoint, *FLAGS, "--tp", str(tp), environment=ENVIRONMENT) as serve:
        moved = Stream(serve, first, MAX_TOKENS)
        # Nobody else has any: they are those of its prompt, and perhaps some more.
        eventually(
            lambda: (
                serve.metrics()["orchestra_worker_kv_blocks_kept_total"]
                >= PROMPT_TOKENS // BLOCK_SIZE
            )
        )
        eventually(lambda: bool(names_running(serve)))
        (writer,) = names_running(serve)
        streams = [moved, Stream(serve, second, MAX_TOKENS)]
        wait_for_the_middle(streams)
        assert serve.metrics()["orchestra_worker_kv_host_hit_tokens_total"] == 0
        last_rank(serve, writer).kill()
        assert moved.is_alive()
        disturbed = [stream.answer() for stream in streams]
        # All of the prompt, at least.
        copied = serve.metrics()["orchestra_worker_kv_host_hit_tokens_total"]
        assert copied >= PROMPT_TOKENS
        undisturbed = [Stream(serve, prompt, MAX_TOKENS) for prompt in (first, second)]
        assert [stream.answer() for stream in undisturbed] == disturbed
