"""Layers that move between the stages of a pipeline change no token, and move where the solver says that it pays."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgpack
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from orchestra import _core
from orchestra.errors import InternalError, InvalidRequestError
from orchestra.worker import host_memory
from orchestra.worker.assembly import Rank
from orchestra.worker.command_line import parse_arguments
from orchestra.worker.layer_mover import MoveAnswer, MoveOrder, Phase
from orchestra.worker.metrics import WorkerMetrics
from orchestra.worker.pipeline import FinishedStep, execute
from orchestra.worker.plan import StepPlan
from orchestra.worker.repartition import Repartition, StageTimes, StageWindow, obey
from orchestra.worker.runner import warm_up_plan
from tests.checkpoints import make_checkpoint
from tests.worker import moving_process
from tests.worker.conftest import Checkpoints
from tests.worker.forked import exit_codes, forked
from tests.worker.moving_process import Record, Settings
from tests.worker.plans import PlanBuilder, encode_plan, sampling_start
from tests.worker.rank_process import empty_stats
from tests.worker.test_logits import prompt
from tests.worker.test_tensor_parallel import ThreadCourier, thread_ranks

HOST_BLOCKS = 8
Event = StepPlan | tuple[int, ...]


@pytest.fixture(scope="module")
def six_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of six layers."""
    folder = tmp_path_factory.mktemp("six") / "llama"
    return make_checkpoint("llama", folder, seed=3, num_hidden_layers=6)


def plans_and_moves(*splits: tuple[int, ...]) -> list[Event]:
    """Steps with chunks, decodes, KV in host memory and a shared prefix; the splits come between them in turn."""
    builder, events, left = PlanBuilder(64), list[Event](), list(splits)

    def step(**scheduled: int) -> None:
        events.append(builder.plan(scheduled))
        for name, member in builder.sequences.items():
            if name in scheduled and member.num_computed == len(member.tokens):
                builder.append(name, (7 * len(member.tokens)) % 400 + 8)

    def move() -> None:
        if left:
            events.append(left.pop(0))

    builder.add("a", prompt(37))
    builder.add("b", prompt(25, seed=1))
    step(a=16)
    move()
    step(a=21, b=25)
    step(a=1, b=1)
    builder.swap_out("b", [5, 2])
    step(a=1)
    move()
    # Takes the blocks that were given back: what comes back gets some in which nothing was ever written.
    builder.add("d", prompt(19, seed=3))
    step(a=1, d=19)
    builder.swap_in("b")
    builder.add("c", builder.sequences["a"].tokens[:32] + prompt(5, seed=2), "a", 2)
    step(a=1, b=1, c=5)
    move()
    step(a=1, b=1, c=1)
    return events


def run(ranks: list[Rank], events: Sequence[Event]) -> list[Tensor]:
    """Carries everything out on all ranks; returns the logits of each step that has some."""
    results = []
    with ThreadPoolExecutor(len(ranks)) as pool:

        def compute(rank: Rank, plan: StepPlan) -> Tensor | None:
            if rank.mover is not None:
                rank.mover.note(plan)
            return rank.runner.forward(plan)

        for event in events:
            if not isinstance(event, StepPlan):
                assert order_all(ranks, Phase.LOAD, event) == [""] * len(ranks)
                assert order_all(ranks, Phase.EXCHANGE, event) == [""] * len(ranks)
                assert order_all(ranks, Phase.SWITCH, event) == [""] * len(ranks)
                continue
            every = list(pool.map(lambda rank, plan=event: compute(rank, plan), ranks))
            logits = every[ranks[0].sampling_rank]
            if logits is not None:
                results.append(logits.clone())
    return results


def order_all(ranks: list[Rank], phase: Phase, split: tuple[int, ...]) -> list[str]:
    """Gives every rank an order; returns what went wrong with each."""
    order = MoveOrder.decode(MoveOrder(phase, 1, split).encode())
    assert order is not None
    with ThreadPoolExecutor(len(ranks)) as pool:
        answers = list(pool.map(lambda rank: obey(rank, order), ranks))
    return [MoveAnswer.decode(answer.encode()).error for answer in answers]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    """Bit for bit."""
    assert len(actual) == len(expected) > 0
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


# === the same tokens ===


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        ("llama-tied", 1),
        # A window in some layers; two rotations; latent attention and a layer without experts.
        ("qwen3-window", 2),
        ("gemma3", 1),
        ("deepseek3", 2),
    ],
)
def test_there_and_back(kind: str, size: int, checkpoint: Checkpoints) -> None:
    settings = {"num_host_blocks": HOST_BLOCKS}
    still = thread_ranks(checkpoint(kind), size, 2, (2, 1), **settings)
    moving = thread_ranks(checkpoint(kind), size, 2, (2, 1), repartition="auto", **settings)
    moves = plans_and_moves((1, 2), (2, 1), (1, 2))
    assert_same(run(moving, moves), run(still, plans_and_moves()))
    assert [rank.mover.split for rank in moving if rank.mover] == [(1, 2)] * len(moving)


def test_layers_go_past_a_stage(six_layers: Path) -> None:
    settings = {"num_host_blocks": HOST_BLOCKS}
    still = thread_ranks(six_layers, 1, 3, (4, 1, 1), **settings)
    moving = thread_ranks(six_layers, 1, 3, (4, 1, 1), repartition="auto", **settings)
    moves = plans_and_moves((1, 1, 4), (2, 3, 1), (1, 4, 1))
    assert_same(run(moving, moves), run(still, plans_and_moves()))


def test_sequences_go_on_drawing_as_they_were_asked_to(checkpoint: Checkpoints) -> None:
    """How a sequence draws is said once, when it starts."""

    def drawn(split: tuple[int, ...] | None) -> list[int]:
        ranks = thread_ranks(checkpoint("llama"), 1, 2, (2, 1), repartition="auto")
        builder = PlanBuilder(64)
        builder.add("a", prompt(20))
        starts = [sampling_start(0, temperature=1.0, seed=5)]
        with ThreadPoolExecutor(len(ranks)) as pool:
            for step in range(8):
                if step == 3 and split is not None:
                    for phase in (Phase.LOAD, Phase.EXCHANGE, Phase.SWITCH):
                        assert order_all(ranks, phase, split) == [""] * len(ranks)
                plan = builder.plan({"a": 1 if step else 20}, [] if step else starts)
                reports = list(pool.map(lambda rank, plan=plan: execute(rank, plan), ranks))
                builder.append("a", int(reports[-1].output.token_ids[0]))
        return builder.sequences["a"].tokens[20:]

    assert drawn((1, 2)) == drawn(None)


def test_what_fails_on_the_way_leaves_everything_as_it_was(
    six_layers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"num_host_blocks": HOST_BLOCKS}
    expected = run(thread_ranks(six_layers, 1, 2, (3, 3), **settings), plans_and_moves())
    ranks = thread_ranks(six_layers, 1, 2, (3, 3), repartition="auto", **settings)
    events = plans_and_moves()
    results = run(ranks, events[:3])

    with monkeypatch.context() as patch:
        patch.setattr(host_memory, "free_bytes", lambda *_: 100_000)
        giver, taker = order_all(ranks, Phase.LOAD, (2, 4))
        assert giver == ""
        assert taker.startswith("MoveError: the layers that come take")
        assert taker.endswith("bytes, but 100000 are free")
        assert order_all(ranks, Phase.DROP, (2, 4)) == ["", ""]
    results += run(ranks, events[3:5])

    def fail(*_: object) -> None:
        raise RuntimeError("connection lost")

    with monkeypatch.context() as patch:
        patch.setattr(ThreadCourier, "send", fail)
        patch.setattr(ThreadCourier, "receive", fail)
        assert order_all(ranks, Phase.LOAD, (2, 4)) == ["", ""]
        errors = order_all(ranks, Phase.EXCHANGE, (2, 4))
        assert errors == ["RuntimeError: connection lost"] * 2
        assert order_all(ranks, Phase.DROP, (2, 4)) == ["", ""]
    assert order_all(ranks, Phase.EXCHANGE, (2, 4)) == ["MoveError: no move has begun"] * 2
    assert "does not give 6 layers" in order_all(ranks, Phase.LOAD, (2, 2))[0]
    assert_same(results + run(ranks, events[5:]), expected)


def test_another_checkpoint_in_the_same_place_is_refused(tmp_path: Path) -> None:
    model_dir = make_checkpoint("llama", tmp_path / "m", seed=1)
    ranks = thread_ranks(model_dir, 1, 2, (2, 1), repartition="auto")
    make_checkpoint("llama", model_dir, seed=2)
    errors = order_all(ranks, Phase.LOAD, (1, 2))
    assert (
        errors == ["MoveError: the checkpoint is not the one that was loaded at start any more"] * 2
    )


def test_only_what_was_written_goes_along(
    six_layers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = thread_ranks(six_layers, 1, 2, (3, 3), repartition="auto")
    sent: list[Tensor] = []
    send = ThreadCourier.send

    def keep(courier: ThreadCourier, stage: int, tensor: Tensor) -> None:
        sent.append(tensor)
        send(courier, stage, tensor)

    monkeypatch.setattr(ThreadCourier, "send", keep)
    events = plans_and_moves()[:2]
    run(ranks, [*events, (2, 4)])
    # 37 and 25 tokens in blocks of 16.
    assert [len(piece) for piece in sent] == [5]


# === words ===


def test_plans_are_no_orders() -> None:
    assert MoveOrder.decode(encode_plan(warm_up_plan(3))) is None


@pytest.mark.parametrize("tail", [b"", b"\xc1", b"\x93\xa4load\x01", b"\x93\xa4read\x01\x90"])
def test_damaged_orders_and_answers_are_refused(tail: bytes) -> None:
    mark = MoveOrder(Phase.LOAD, 1, ()).encode()[:5]
    with pytest.raises(InternalError, match="order to move layers cannot be read"):
        MoveOrder.decode(mark + tail)
    with pytest.raises(InternalError, match="answer to an order cannot be read"):
        MoveAnswer.decode(tail)


def test_a_rank_that_was_not_told_says_so(checkpoint: Checkpoints) -> None:
    (rank, _) = thread_ranks(checkpoint("llama"), 1, 2)
    with pytest.raises(InternalError, match="not told so at start"):
        obey(rank, MoveOrder(Phase.SURVEY, 1, (2, 1)))


def test_one_stage_has_nowhere_to_move_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse_arguments([str(tmp_path), "--router", "http://r:1", "--repartition", "auto"])
    assert "--repartition: needs stages" in capsys.readouterr().err


# === when ===


def finished(busy_s: list[float], took_s: float, alone_s: float) -> FinishedStep:
    plan = warm_up_plan(1)
    output: Any = None
    return FinishedStep(plan, output, busy_s, took_s, alone_s)


def test_a_window_needs_steps_and_time() -> None:
    window = StageWindow(num_steps=3, seconds=1.0)
    short = finished([0.2, 0.1], took_s=0.4, alone_s=0.2)
    assert [window.note(short) for _ in range(4)] == [None] * 4
    assert window.note(short) == StageTimes((200_000_000, 100_000_000), 2)
    long = finished([0.2, 0.8], took_s=1.0, alone_s=1.0)
    assert [window.note(long) for _ in range(2)] == [None] * 2
    assert window.note(long) == StageTimes((200_000_000, 800_000_000), 1)


def lead_alone(rank: Rank, others: list[Rank], monkeypatch: pytest.MonkeyPatch) -> Repartition:
    """Rank 0's decisions, the orders of which reach the other ranks by a call."""

    class CallingLeader:
        """Stands for the plan channel."""

        def __init__(self) -> None:
            self.answers: list[bytes] = []

        def broadcast(self, message: bytes) -> None:
            order = MoveOrder.decode(message)
            assert order is not None
            self.answers = [obey(rank, order).encode() for rank in others]

        def collect(self) -> list[bytes]:
            return self.answers

    leader: Any = CallingLeader()
    monkeypatch.setattr(rank, "group", type(rank.group)(rank.group.communicator, leader=leader))
    metrics = WorkerMetrics(empty_stats, 16)
    return Repartition(rank, metrics, StageWindow(num_steps=2, seconds=0.0))


def test_two_windows_have_to_agree(six_layers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = thread_ranks(six_layers, 1, 2, (3, 3), repartition="auto")
    repartition = lead_alone(ranks[0], ranks[1:], monkeypatch)
    slow = finished([0.5, 0.1], took_s=1.0, alone_s=0.5)
    even = finished([0.3, 0.3], took_s=0.6, alone_s=0.3)

    def due_after(*steps: FinishedStep) -> bool:
        for step in steps:
            repartition.note(step)
        return repartition.is_due

    assert not due_after(even, even, slow, slow, even, even, slow, slow)
    assert due_after(slow, slow)
    repartition.carry_out()
    # One layer then takes 167 ms on the first stage; five and the head 200 ms or less on the other.
    assert ranks[0].mover is not None
    assert ranks[0].mover.split == (1, 5)
    assert not repartition.is_due
    metrics = repartition._metrics.registry.get_sample_value
    count = "orchestra_worker_repartition_seconds_count"
    assert metrics(count, {"outcome": "moved"}) == 1
    assert metrics("orchestra_worker_stage_layers", {"stage": "1"}) == 5


def test_what_is_refused_is_not_tried_at_once_again(
    six_layers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = thread_ranks(six_layers, 1, 2, (3, 3), repartition="auto")
    repartition = lead_alone(ranks[0], ranks[1:], monkeypatch)
    slow = finished([0.5, 0.1], took_s=1.0, alone_s=0.5)
    monkeypatch.setattr(host_memory, "free_bytes", lambda *_: 1000)
    waits = []
    for _ in range(4):
        waits.append(0)
        while not repartition.is_due:
            repartition.note(slow)
            waits[-1] += 1
        repartition.carry_out()
    # Two windows of two steps, and 1, 3 and 7 more.
    assert waits == [4, 6, 10, 18]
    assert ranks[0].mover is not None
    assert ranks[0].mover.split == (3, 3)


def test_the_solver_names_what_is_wrong() -> None:
    with pytest.raises(InvalidRequestError, match="busy_ns: must be 1 to") as caught:
        _core.plan_layer_move([(1, 1)], [(1, 0, 0, 0)], (1, 1, 1, 1))
    assert caught.value.key == "busy_ns"


# === processes ===


def run_processes(settings: Settings, plans: list[StepPlan]) -> Record:
    folder = Path(settings.folder)
    (folder / "plans").write_bytes(msgpack.packb([encode_plan(plan) for plan in plans]))
    num = settings.size * len(settings.split)
    with forked(num, moving_process.run, lambda rank: (rank, settings)) as processes:
        assert exit_codes(processes) == [0] * num
    return Record(**json.loads((folder / "record").read_text()))


def decodes(num_steps: int) -> tuple[list[StepPlan], dict[str, list[int]], list[str]]:
    """Two sequences that decode in turns, so that two steps are in flight; and who draws in each step."""
    builder, plans, turns = PlanBuilder(64), [], []
    for name, tokens in {"a": prompt(37), "b": prompt(9, seed=1)}.items():
        builder.add(name, tokens)
    starts = [sampling_start(member.slot) for member in builder.sequences.values()]
    for index in range(num_steps):
        name = "ab"[index % 2]
        member = builder.sequences[name]
        plans.append(builder.plan({name: len(member.tokens) - member.num_computed}, starts))
        starts = []
        turns.append(name)
        builder.append(name, prompt(1, seed=index)[0])
    return plans, {name: it.tokens for name, it in builder.sequences.items()}, turns


def greedy(model_dir: Path, sequences: dict[str, list[int]], turns: list[str]) -> list[list[int]]:
    """What transformers would draw in each step."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    best = {}
    for name, tokens in sequences.items():
        first = len(tokens) - turns.count(name)
        with torch.inference_mode():
            logits = model(torch.tensor([tokens])).logits[0]
        best[name] = iter(logits.argmax(-1).tolist()[first - 1 :])
    return [[next(best[name])] for name in turns]


@pytest.mark.timeout(120)
def test_processes_move_there_and_back(checkpoint: Checkpoints, tmp_path: Path) -> None:
    plans, sequences, turns = decodes(24)
    forced = [(5, [1, 2]), (13, [2, 1]), (14, [1, 2])]
    model_dir = checkpoint("llama")
    settings = Settings(str(model_dir), str(tmp_path), [2, 1], size=2, forced=forced)
    record = run_processes(settings, plans)
    assert [(split, moved) for _, split, moved in record.moves] == [
        ([1, 2], True),
        ([2, 1], True),
        ([1, 2], True),
    ]
    assert record.token_ids == greedy(model_dir, sequences, turns)


@pytest.mark.timeout(120)
def test_a_slow_stage_is_relieved(six_layers: Path, tmp_path: Path) -> None:
    plans, sequences, turns = decodes(60)
    # A layer takes 15 ms longer in the first stage, where it takes half a millisecond in the other: the best split
    # leaves it one.
    settings = Settings(
        *(str(six_layers), str(tmp_path), [3, 3]),
        window=(8, 0.0),
        slow_stage=0,
        slow_layer_s=0.015,
    )
    record = run_processes(settings, plans)
    _, split, has_moved = record.moves[0]
    assert (split, has_moved) == ([1, 5], True)
    assert record.split == [1, 5]
    assert record.token_ids == greedy(six_layers, sequences, turns)
