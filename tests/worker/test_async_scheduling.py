"""Steps that are started before the tokens of the one before are on the host."""

from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from orchestra.errors import ConfigError
from orchestra.worker import sampling
from orchestra.worker.assembly import Rank
from orchestra.worker.config import WorkerConfig
from orchestra.worker.drawn import Drawn, Packed
from orchestra.worker.leading import Leading
from orchestra.worker.metrics import WorkerMetrics
from orchestra.worker.plan import PENDING_TOKEN, SequenceStart, StepOutput
from orchestra.worker.scheduling_choice import STEPS_AHEAD, plans_ahead
from orchestra.worker.sharding import Shard, Stage
from orchestra.worker.stopping import StopSignals
from tests.worker.conftest import Checkpoints, MakeRank
from tests.worker.plans import PlanBuilder, encode_plan, sampling_start
from tests.worker.rank_process import ScriptedAgent, empty_stats
from tests.worker.test_logits import prompt
from tests.worker.test_tensor_parallel import thread_ranks

AHEAD: dict[str, Any] = {"async_scheduling": "on", "kv_transfer": "off"}
LENGTHS = {"a": 40, "b": 3, "c": 17}
# Greedy; by rank, with a history; by nucleus.
STARTS = [
    sampling_start(0),
    sampling_start(1, temperature=0.9, top_k=20, repetition_penalty=1.3, prompt_token_ids=[3, 4]),
    sampling_start(2, temperature=1.2, top_p=0.8, seed=7),
]
NUM_STEPS = 8


def run(ranks: list[Rank], ahead: int) -> list[StepOutput]:
    """Three sequences, drawn as `STARTS` says, each step started when `ahead` ones are not fetched.

    One of them stops for two steps in the middle, so that its next token is known when it goes on.
    """
    builder, drawn = PlanBuilder(ranks[0].num_blocks, seed=5), deque[tuple[list[str], Drawn]]()
    outputs: list[StepOutput] = []
    pool = ThreadPoolExecutor(len(ranks))

    def fetch() -> None:
        names, draws = drawn.popleft()
        output = draws.fetch()
        outputs.append(output)
        for name, token in zip(names, output.token_ids.tolist(), strict=True):
            tokens = builder.sequences[name].tokens
            tokens[tokens.index(PENDING_TOKEN)] = token

    for index, (name, length) in enumerate(LENGTHS.items()):
        builder.add(name, prompt(length, seed=index))
    for step in range(NUM_STEPS):
        members = [name for name in LENGTHS if not (name == "b" and step in (3, 4))]
        scheduled = dict.fromkeys(members, 1) if step else dict(LENGTHS)
        starts: list[SequenceStart] = [] if step else STARTS
        plan = builder.plan(scheduled, starts, num_top_logprobs=2 if step % 2 else -1)
        names = sorted(scheduled, key=lambda name: scheduled[name] > 1)
        draws, *others = pool.map(lambda rank, plan=plan: rank.runner.start(plan), ranks)
        assert draws is not None
        assert others == [None] * len(others)
        drawn.append((names, draws))
        for name in names:
            builder.append(name, PENDING_TOKEN)
        while len(drawn) > ahead:
            fetch()
    while drawn:
        fetch()
    pool.shutdown()
    return outputs


@pytest.mark.parametrize("candidates", [None, 2], ids=["", "too few candidates for a nucleus"])
@pytest.mark.parametrize("kind", ["llama", "qwen3-moe"])
def test_steps_ahead_draw_the_same(
    kind: str, candidates: int | None, make_rank: MakeRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    if candidates is not None:
        monkeypatch.setattr(sampling, "CANDIDATES", candidates)
    rank = make_rank(kind, **AHEAD)
    assert_same(run([rank], ahead=1), run([rank], ahead=0))


def test_ranks_go_on_with_tokens_that_only_one_of_them_has_drawn(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "CANDIDATES", 2)
    ranks = thread_ranks(checkpoint("llama"), 2, **AHEAD)
    assert all(rank.plans_ahead for rank in ranks)
    assert_same(run(ranks, ahead=1), run(ranks, ahead=0))


def assert_same(outputs: list[StepOutput], expected: list[StepOutput]) -> None:
    """Bit for bit."""
    for actual, wanted in zip(outputs, expected, strict=True):
        for name, values in vars(wanted).items():
            np.testing.assert_array_equal(getattr(actual, name), values, err_msg=name)


def test_what_may_be_undecided_is_settled_before_the_next_step(
    make_rank: MakeRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "CANDIDATES", 2)
    rank = make_rank("llama", **AHEAD)
    builder = PlanBuilder(rank.num_blocks)
    builder.add("a", prompt(5))
    start = sampling_start(0, temperature=2.0, top_p=0.99, seed=3)
    first = rank.runner.start(builder.plan({"a": 5}, [start]))
    assert first is not None
    assert isinstance(first._drawn, Packed)
    builder.append("a", PENDING_TOKEN)
    rank.runner.start(builder.plan({"a": 1}))
    assert isinstance(first._drawn, StepOutput)


# === the loop ===


class AheadAgent(ScriptedAgent):
    """Plans a second step before the first is committed, and notes what comes when."""

    def __init__(self, messages: list[bytes], stop: StopSignals) -> None:
        super().__init__(messages, stop)
        self.events: list[str] = []

    def next_step(self, timeout_ms: int) -> bytes | None:
        """The next plan."""
        message = super().next_step(timeout_ms)
        self.events.append("nothing" if message is None else "plan")
        return message

    def commit(self, step_id: int, *arrays: bytes) -> None:
        """Keeps the answer."""
        self.events.append(f"commit {step_id}")
        super().commit(step_id, *arrays)


def test_the_next_step_is_started_before_the_last_is_committed(make_rank: MakeRank) -> None:
    builder = PlanBuilder(256)
    builder.add("a", prompt(30))
    messages = [encode_plan(builder.plan({"a": count})) for count in (10, 10, 10)]
    stop = StopSignals(drain_timeout_s=5)
    agent = AheadAgent(messages, stop)
    rank = make_rank("llama", **AHEAD)
    assert rank.plans_ahead
    assert rank.steps_in_flight == STEPS_AHEAD
    metrics = WorkerMetrics(empty_stats, block_size=16)
    Leading(agent, rank, metrics).run(stop)
    expected = ["plan", "plan", "commit 1", "plan", "commit 2", "nothing", "commit 3"]
    assert agent.events[: len(expected)] == expected
    sizes = [len(answer["token_ids"]) for answer in agent.answers]
    assert sizes == [0, 0, 4]


# === who does ===


def choose(device: str, *, moves_kv: bool = False, **settings: Any) -> bool:
    config = WorkerConfig(model_dir=None, router="", worker_id="", model_name="", **settings)  # type: ignore[arg-type]
    return plans_ahead(config, torch.device(device), moves_kv=moves_kv)


def test_a_gpu_of_one_rank_has_its_steps_planned_ahead() -> None:
    assert choose("cuda")
    assert not choose("cpu")
    assert choose("cpu", async_scheduling="on")
    assert not choose("cuda", async_scheduling="off")
    assert not choose("cuda", moves_kv=True)


def test_several_ranks_have_it_where_they_are_asked_to() -> None:
    shard = Shard(0, 2)
    assert not choose("cuda", shard=shard)
    assert choose("cuda", shard=shard, async_scheduling="on")


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        pytest.param({"stage": Stage(0, 2)}, "ranks of other stages", id="two stages"),
        pytest.param({"context": Shard(0, 2)}, "ranks of other stages", id="two contexts"),
        pytest.param({"moves_kv": True}, "KV moves to this worker", id="KV moves"),
    ],
)
def test_asked_for_where_it_cannot_be_is_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as raised:
        choose("cuda", async_scheduling="on", **settings)
    assert raised.value.key == "async_scheduling"
