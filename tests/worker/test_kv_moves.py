"""KV that moves between two torch workers: the tokens are those of a worker that computes everything itself.

Where a worker has several ranks, all of them have to come to the same tokens: each has a part of the KV.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.worker.conftest import Checkpoints
from tests.worker.scripted_router import Attached, ScriptedRouter, load_messages

# 33 whole blocks of 16 tokens, in three steps of 200 tokens.
PROMPT_TOKENS = 540
BLOCKS = 33
FLAGS = ["--dtype", "float32", "--num-blocks", "200", "--max-num-batched-tokens", "200"]
MAX_TOKENS = 24
TIMEOUT_MS = 20_000


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_messages(tmp_path_factory.mktemp("proto"))


@pytest.fixture(scope="module", params=[("shm", 1), ("tcp", 1), ("shm", 2), ("tcp", 2)])
def workers(
    request: pytest.FixtureRequest,
    messages: Any,
    checkpoint: Checkpoints,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Attached, Attached]]:
    """One that computes prompts and one that goes on with them, each of one rank or of several."""
    transport, num_ranks = request.param
    router = ScriptedRouter(messages)
    flags = [*FLAGS, "--max-num-seqs", "4", "--kv-transfer", transport]
    model_dir: Path = checkpoint("llama")

    def start(role: str) -> Attached:
        meet = (tmp_path_factory.mktemp(role) / "meet").as_uri()
        ranks = ["--tp", str(num_ranks), "--rendezvous", meet] if num_ranks > 1 else []
        return router.start_worker(role, model_dir, *flags, "--role", role, *ranks, ranks=num_ranks)

    try:
        yield start("prefill"), start("decode")
    finally:
        router.close()


def make_prompt(seed: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(5, 512, PROMPT_TOKENS)]


def test_hello_says_what_moves(workers: tuple[Attached, Attached], messages: Any) -> None:
    prefill, decode = (worker.hello for worker in workers)
    assert prefill.kv_transfer.layout == decode.kv_transfer.layout
    assert prefill.kv_transfer.host == decode.kv_transfer.host
    assert prefill.kv_transfer.epoch != decode.kv_transfer.epoch
    # Keys and values of 16 tokens in 3 layers, 2 heads of 16 numbers each, whoever has them.
    assert prefill.kv_transfer.bytes_per_block == 2 * 16 * 3 * 2 * 16 * 4
    roles = [messages.WorkerRole.Name(hello.role) for hello in (prefill, decode)]
    assert roles == ["WORKER_ROLE_PREFILL", "WORKER_ROLE_DECODE"]


def test_fetched_and_pushed_kv_gives_the_tokens_of_computed_kv(
    workers: tuple[Attached, Attached], messages: Any
) -> None:
    prefill, decode = workers
    moves = {"num_blocks": BLOCKS, "timeout_ms": TIMEOUT_MS}

    fetched = make_prompt(1)
    expected, _ = prefill.run(fetched, MAX_TOKENS)
    source = messages.KvSource(peer=prefill.peer(), transfer_id=1, **moves)
    tokens, last = decode.run(fetched, MAX_TOKENS, kv_source=source)
    assert tokens == expected
    assert last.fetched_tokens == 16 * BLOCKS

    pushed = make_prompt(2)
    source = messages.KvSource(peer=prefill.peer(), transfer_id=2, is_pushed=True, **moves)
    target = messages.KvTarget(peer=decode.peer(), transfer_id=2, **moves)
    decode.start(pushed, MAX_TOKENS, kv_source=source)
    none, ended = prefill.run(pushed, MAX_TOKENS, kv_target=target)
    assert none == []
    assert ended.finish_reason == 5, "PREFILLED"
    tokens, last = decode.finish()
    assert last.fetched_tokens == 16 * BLOCKS
    # What it was computed for took nothing away: the prefix cache still has all of it.
    expected, last = prefill.run(pushed, MAX_TOKENS)
    assert tokens == expected
    assert (last.cached_tokens, last.fetched_tokens) == (16 * BLOCKS, 0)
