"""Steps whose sums are overlapped: the bits of the same steps computed whole, and two halves that really take turns."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from orchestra.worker import summing
from orchestra.worker.aside import StreamAside, ThreadAside
from orchestra.worker.assembly import Rank
from orchestra.worker.context_parallel import ROWS_MIN
from orchestra.worker.overlap import PIECE_TOKENS_MIN, OverlappedDecoder, halve, overlapping
from orchestra.worker.parallel import SingleRank
from orchestra.worker.plan import StepPlan
from orchestra.worker.renewable_group import RenewableGroup
from orchestra.worker.sharding import Shard
from orchestra.worker.summing import Summing
from tests.worker.conftest import Checkpoints, MakeRank
from tests.worker.forked import RANKS
from tests.worker.overlap_process import (
    MIN_TOKENS,
    NUM_BLOCKS,
    compare,
    life,
    logits_of,
    lose_a_rank,
    replace_a_rank,
)
from tests.worker.plans import PlanBuilder
from tests.worker.test_logits import prompt
from tests.worker.test_tensor_parallel import ThreadCommunicator, thread_ranks


def forward_together(ranks: list[Rank]) -> Callable[[StepPlan], Tensor | None]:
    """Runs a plan on all ranks of a worker at once; gives the logits of the one that samples."""

    def forward(plan: StepPlan) -> Tensor | None:
        with ThreadPoolExecutor(len(ranks)) as pool:
            every = list(pool.map(lambda rank: rank.runner.forward(plan), ranks))
        logits: Tensor | None = every[ranks[0].sampling_rank]
        return logits

    return forward


def log_of(rank: Rank) -> list[tuple[str, int]]:
    communicator = rank.group.communicator
    assert isinstance(communicator, ThreadCommunicator)
    return communicator.log


# === bit for bit ===


@pytest.mark.parametrize(
    ("kind", "dtype", "settings"),
    [
        *[("llama", dtype, {}) for dtype in ("float32", "bfloat16")],
        *[(kind, "float32", {}) for kind in ("qwen3", "phi3", "gemma2", "gemma3", "qwen3-window")],
        ("gemma3", "bfloat16", {}),
        ("llama-biases", "float32", {"size": 4}),
        ("mixtral", "bfloat16", {}),
        ("mixtral", "float32", {"expert_parallel": True}),
        ("qwen3-moe", "float32", {}),
        ("deepseek3", "float32", {}),
        ("llama", "float32", {"stages": 2}),
        ("llama", "float32", {"attention": "torch"}),
    ],
    ids=str,
)
def test_bits_do_not_depend_on_the_order_of_sums(
    kind: str, dtype: str, settings: dict[str, object], checkpoint: Checkpoints
) -> None:
    both = []
    for min_tokens in (0, MIN_TOKENS):
        ranks = thread_ranks(
            checkpoint(kind),
            **{"size": 2, **settings},  # type: ignore[arg-type]
            dtype=dtype,
            num_blocks=NUM_BLOCKS,
            max_num_seqs=32,
            overlap_min_tokens=min_tokens,
        )
        both.append(logits_of(forward_together(ranks)))
        assert all(bool(log_of(rank)) == (min_tokens > 0) for rank in ranks)
    assert len(both[0]) > 0
    assert torch.equal(both[1], both[0])


@pytest.mark.timeout(120)
@pytest.mark.parametrize("nodes", ["aa", "ab"], ids=["one node", "two nodes"])
def test_bits_over_gloo(nodes: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    pairs = [("llama", "bfloat16"), ("qwen3", "float32"), ("gemma3", "bfloat16")]
    pairs += [("mixtral", "float32")]
    kinds = {pair: checkpoint(pair[0]) for pair in pairs}
    ranks = [
        RANKS.Process(target=compare, args=(rank, nodes, tmp_path, kinds), daemon=True)
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0, 0]
    results = torch.load(tmp_path / "result-0")
    for in_order, overlapped in results.values():
        assert len(in_order) > 0
        assert torch.equal(overlapped, in_order)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("nodes", ["aa", "ab"], ids=["one node", "two nodes"])
def test_a_rank_that_dies_in_an_overlapped_step_is_replaced(
    nodes: str, checkpoint: Checkpoints, tmp_path: Path
) -> None:
    model_dir = checkpoint("llama")
    heard, told = RANKS.Pipe()
    first, second = (
        RANKS.Process(
            target=lose_a_rank, args=(rank, nodes, tmp_path, model_dir, told), daemon=True
        )
        for rank in range(2)
    )
    first.start()
    second.start()
    second.join()
    assert second.exitcode == -9
    third = RANKS.Process(target=replace_a_rank, args=(1, nodes, tmp_path, model_dir), daemon=True)
    third.start()
    assert heard.recv() == "lost"
    assert heard.recv() is True
    first.join()
    third.join()
    assert (first.exitcode, third.exitcode) == (0, 0)


# === turns ===


def test_each_half_computes_while_the_sum_of_the_other_is_under_way(
    checkpoint: Checkpoints,
) -> None:
    ranks = thread_ranks(
        checkpoint("llama"), 2, num_blocks=NUM_BLOCKS, overlap_min_tokens=MIN_TOKENS
    )
    for rank in ranks:
        log_of(rank).clear()
    assert forward_together(ranks)(next(life())) is None
    # Two halves, two sums in each layer but the last, behind whose attention nothing is drawn here.
    count = 2 * 2 * (ranks[0].model_config.num_layers - 1)
    for rank in ranks:
        log = log_of(rank)
        first = log[0][1]
        turns = [
            event
            for number in range(first, first + count - 1)
            for event in (("start", number + 1), ("finish", number))
        ]
        assert log == [("start", first), *turns, ("finish", first + count - 1)]


class Group:
    """Adds nothing up, and notes what it was asked for."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.error: Exception | None = None

    def start_all_reduce(self, tensor: Tensor) -> Callable[[], None]:
        name = f"{tensor.item():.0f}"
        self.log.append(f"+{name}")

        def finish() -> None:
            self.log.append(f"-{name}")
            if self.error is not None:
                raise self.error

        return finish


def counting(first: int, count: int, fails_at: int = -1) -> Summing[int]:
    """Has as many sums, of tensors that are numbered."""
    for number in range(first, first + count):
        if number == fails_at:
            raise ValueError(number)
        yield torch.tensor(number)
    return count


def test_turns_are_strict_and_results_in_order() -> None:
    group = Group()
    assert summing.run_in_turns([counting(10, 2), counting(20, 3)], group) == [2, 3]
    assert group.log == ["+10", "+20", "-10", "+11", "-20", "+21", "-11", "-21", "+22", "-22"]
    assert summing.run(counting(0, 5), SingleRank()) == 5


def test_no_sum_is_under_way_after_an_error() -> None:
    group = Group()
    with pytest.raises(ValueError, match="11"):
        summing.run_in_turns([counting(10, 3, fails_at=11), counting(20, 3)], group)
    assert group.log == ["+10", "+20", "-10", "-20"]
    group.log.clear()
    group.error = RuntimeError("lost")
    with pytest.raises(RuntimeError, match="lost"):
        summing.run_in_turns([counting(10, 3), counting(20, 3)], group)
    assert group.log == ["+10", "+20", "-10", "-10", "-20"]


def test_work_aside_is_done_in_order_by_another_thread() -> None:
    aside, may_begin = ThreadAside(), threading.Event()
    log: list[object] = []

    def first() -> None:
        may_begin.wait(10)
        log.append(threading.current_thread())

    finish_first = aside.start(first)
    finish_second = aside.start(lambda: log.append(torch.is_inference_mode_enabled()))
    assert log == []
    may_begin.set()
    finish_second()
    finish_first()
    assert log[0] is not threading.current_thread()
    assert log[1] is True

    def fail() -> None:
        raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        aside.start(fail)()


@pytest.mark.gpu
def test_work_aside_on_a_gpu_is_waited_for_by_the_stream() -> None:
    device = torch.device("cuda")
    aside, x = StreamAside(device), torch.zeros(1 << 22, device=device)

    def add() -> None:
        for _ in range(100):
            x.add_(1)

    for round_ in range(1, 20):
        aside.start(add)()
        assert torch.equal(x.clone(), torch.full_like(x, 100.0 * round_))


# === the cut ===


@given(
    lengths=st.lists(st.one_of(st.just(1), st.integers(1, 300)), min_size=1, max_size=40),
    computed=st.integers(0, 40),
)
# One that cannot be cut, and one that can, but not at the beginning of the sequence in its middle.
@example(lengths=[1, 7], computed=0)
@example(lengths=[1, 8], computed=0)
def test_every_token_is_in_one_half(lengths: list[int], computed: int) -> None:
    builder = PlanBuilder(1200)
    names = [str(number) for number in range(len(lengths))]
    for name, length in zip(names, lengths, strict=True):
        builder.add(name, prompt(length + computed))
    if computed > 0:
        builder.plan(dict.fromkeys(names, computed))
    plan = builder.plan(dict(zip(names, lengths, strict=True)))
    num_tokens, halves = sum(lengths), halve(plan)
    if halves is None:
        starts = plan.query_start.tolist()
        for cut in range(ROWS_MIN, num_tokens - ROWS_MIN + 1):
            assert min(abs(cut - start) for start in starts) in range(1, PIECE_TOKENS_MIN)
        return
    cut, *parts = halves
    assert abs(cut - num_tokens / 2) < PIECE_TOKENS_MIN
    assert min(cut, num_tokens - cut) >= ROWS_MIN
    for name in ("token_ids", "positions", "slot_mapping"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        assert np.array_equal(joined, getattr(plan, name))
    assert [len(part.token_ids) for part in parts] == [cut, num_tokens - cut]
    assert [int(part.query_start[-1]) for part in parts] == [cut, num_tokens - cut]
    for part in parts:
        assert len(part.sample_sequences) == 0
        # A sequence ends in a half where its last token there says.
        ends = part.query_start[1:] - 1
        assert np.array_equal(part.context_lens, part.positions[ends] + 1)
        blocks = part.slot_mapping[ends] // 16
        columns = part.positions[ends] // 16
        assert np.array_equal(part.block_tables[np.arange(len(ends)), columns], blocks)
    pieces = np.concatenate([np.diff(part.query_start) for part in parts])
    if len(pieces) > len(lengths):
        at = len(parts[0].query_start) - 1
        assert min(pieces[at - 1 : at + 1]) >= PIECE_TOKENS_MIN


# === which steps ===


def test_steps_that_others_wait_for_are_computed_whole(checkpoint: Checkpoints) -> None:
    ranks = thread_ranks(
        checkpoint("llama"), 2, num_blocks=NUM_BLOCKS, overlap_min_tokens=MIN_TOKENS
    )
    for rank in ranks:
        log_of(rank).clear()
    forward_together(ranks)(replace(next(life()), fills_blocks=True))
    assert [log_of(rank) for rank in ranks] == [[], []]


class Abortable(SingleRank):
    """A group whose sums end at once, like those over shared memory."""

    def abort(self) -> None:
        """Nothing to end."""


class AbortableAside(Abortable, Group):
    """One whose sums go on beside the next compute."""


def test_whether_sums_overlap_is_asked_of_the_group_of_the_day() -> None:
    generations = [Abortable(), AbortableAside()]
    group = RenewableGroup(Shard(0, 2), generations.__getitem__, 0)
    assert overlapping(group) is None
    group.leave()
    group.renew(1)
    assert overlapping(group) is group


def test_where_nothing_can_overlap_nothing_does(
    checkpoint: Checkpoints, make_rank: MakeRank
) -> None:
    assert overlapping(SingleRank()) is None
    alone = make_rank("llama", overlap_min_tokens=1)
    assert not isinstance(alone.runner._model, OverlappedDecoder)
    ranks = thread_ranks(checkpoint("llama"), 2, contexts=2, overlap_min_tokens=1)
    assert not any(isinstance(rank.runner._model, OverlappedDecoder) for rank in ranks)
