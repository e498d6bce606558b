"""Greedy tokens equal transformers' `generate` in fp32, through the whole HTTP path.

Every case sends 32 concurrent requests of 1 to 1,000 prompt tokens twice: the second time the prompts hit the prefix
cache. `roomy` leaves prefill whole; `tight` forces chunks of 16 tokens and a block pool so small that sequences are
preempted and come back; `swapped` keeps what they computed in host memory meanwhile, and so does `shared`, in one
memory of all ranks; in `divided` two ranks share the tokens of larger chunks; in `ahead` a step is computed before
the tokens of the one before are committed.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.checkpoints import make_checkpoint
from tests.e2e.oracle import OUTPUT_TOKENS, Reference, references
from tests.e2e.stack import Serve, start_serve

DEMO = Path(__file__).parents[2] / "examples" / "models" / "demo"
SEED = 20

POOLS = {
    "roomy": ["--num-blocks", "1024"],
    # The longest request alone needs 255 of these blocks. Each grows by five while it decodes, which is what preempts.
    "tight": ["--block-size", "4", "--num-blocks", "272", "--max-prefill-chunk", "16"],
}
# As tight, with host memory for what preempted sequences have computed.
POOLS["swapped"] = [*POOLS["tight"], "--num-host-blocks", "272"]
# As swapped, in memory that all ranks share and other workers could reach.
POOLS["shared"] = [*POOLS["swapped"], "--kv-transfer", "shm"]
# As tight, with chunks that two ranks divide.
POOLS["divided"] = [*POOLS["tight"][:-1], "64", "--cp", "2", "--context-min-tokens", "32"]
# As divided, with experts that the two have between them.
POOLS["exchanged"] = [*POOLS["divided"], "--expert-parallel"]
# As swapped, each step planned before the tokens of the one before are known.
POOLS["ahead"] = [*POOLS["swapped"], "--async-scheduling", "on", "--kv-transfer", "off"]
CASES = [
    *itertools.product(["llama", "qwen3", "demo"], [1, 2], [1], ["roomy", "tight"]),
    ("llama", 2, 1, "shared"),
    # Two steps in flight.
    ("qwen3", 1, 2, "swapped"),
    ("qwen3", 1, 1, "divided"),
    ("qwen3-moe", 1, 1, "exchanged"),
    ("llama", 1, 1, "ahead"),
]


@pytest.fixture(scope="module")
def checkpoint_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the random checkpoints of this module live."""
    return tmp_path_factory.mktemp("oracle")


@cache
def _reference(checkpoint: Path) -> list[Reference]:
    return references(checkpoint, SEED)


def _checkpoint(kind: str, folder: Path) -> Path:
    if kind == "demo":
        return DEMO
    target = folder / kind
    return target if target.exists() else make_checkpoint(kind, target, seed=SEED)


async def _complete(
    client: httpx.AsyncClient, model: str, prompt: list[int], n: int
) -> dict[str, Any]:
    answer = await client.post(
        "/v1/completions",
        json={
            "model": model,
            "prompt": prompt,
            "n": n,
            "max_tokens": OUTPUT_TOKENS,
            "temperature": 0,
            "ignore_eos": True,
            "logprobs": 1,
            "return_token_ids": True,
            "repetition_penalty": 1.0,
        },
    )
    body: dict[str, Any] = answer.json()
    assert answer.status_code == 200, f"{answer.status_code}: {body}"
    return body


def _all_at_once(serve: Serve, expected: list[Reference], n: int) -> list[dict[str, Any]]:
    """The longest prompt gets `n` choices, the others one."""

    async def run() -> list[dict[str, Any]]:
        limits = httpx.Limits(max_connections=len(expected))
        async with httpx.AsyncClient(base_url=serve.url, limits=limits, timeout=300) as client:
            prompts = [reference.prompt for reference in expected]
            longest = max(prompts, key=len)
            return await asyncio.gather(
                *(
                    _complete(client, serve.model, prompt, n if prompt is longest else 1)
                    for prompt in prompts
                )
            )

    return asyncio.run(run())


def _largest_difference(answers: list[dict[str, Any]], expected: list[Reference]) -> float:
    """Asserts equal tokens; returns the largest difference of a chosen token's log-probability."""
    largest = 0.0
    for answer, reference in zip(answers, expected, strict=True):
        for choice in answer["choices"]:
            tokens = choice["token_ids"]
            assert tokens == reference.output, f"prompt of {len(reference.prompt)} tokens"
            got = choice["logprobs"]["token_logprobs"]
            differences = [abs(a - b) for a, b in zip(got, reference.logprobs, strict=True)]
            largest = max(largest, *differences)
    return largest


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Lines that are shown whether the test passes or not."""
    lines: list[str] = []
    yield lines
    plugins = request.config.pluginmanager
    reporter, capture = plugins.get_plugin("terminalreporter"), plugins.get_plugin("capturemanager")
    if reporter is not None and capture is not None:
        with capture.global_and_fixture_disabled():
            reporter.ensure_newline()
            for line in lines:
                reporter.write_line(line)


@pytest.mark.timeout(420)
@pytest.mark.parametrize(("kind", "tp", "pp", "pool"), CASES)
def test_greedy_tokens_equal_transformers(
    kind: str, tp: int, pp: int, pool: str, checkpoint_folder: Path, report: list[str]
) -> None:
    checkpoint = _checkpoint(kind, checkpoint_folder)
    expected = _reference(checkpoint)
    flags = ["--tp", str(tp), "--pp", str(pp), *POOLS[pool]]
    # How fast a hang is found is tested elsewhere; here a busy host must not make one of two ranks look hung.
    flags += ["--dtype", "float32", "--max-num-seqs", "32", "--rank-hang-timeout-ms", "2000"]
    if pp > 1:
        # Its layers may move, but need not: the machine decides.
        flags += ["--repartition", "auto"]
    # The router starts a request where there is room for it, and its further choices in any case: six of the longest
    # prompt would need 255 + 6 x 5 blocks, so mostly the worker has to preempt some. The report says how often.
    n = 1 if pool == "roomy" else 6
    with start_serve(checkpoint, *flags) as serve:
        first = _largest_difference(_all_at_once(serve, expected, n), expected)
        again = _all_at_once(serve, expected, n)
        second = _largest_difference(again, expected)
        preemptions = serve.metrics()["orchestra_preemptions_total"]

    cached = sum(answer["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in again)
    report.append(
        f"{kind} tp={tp} pp={pp} {pool}: largest logprob difference {max(first, second):.2e}, "
        f"{cached} cached tokens in the second pass, {preemptions:.0f} preemptions"
    )
    # fp32 sums in another order; a wrong block or position would be off by orders of magnitude more.
    assert max(first, second) < 2e-3
    assert cached > 0
    assert preemptions == 0 or pool != "roomy"
