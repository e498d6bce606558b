"""Several ranks, each with its shard, compute what transformers computes with the whole model."""

import itertools
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import Queue
from typing import Any

import msgpack
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from orchestra.worker import assembly
from orchestra.worker.assembly import Place, Rank, build_rank
from orchestra.worker.config import WorkerConfig
from orchestra.worker.expert_exchange import ExpertGroup
from orchestra.worker.group import Group
from orchestra.worker.loader import WeightReader
from orchestra.worker.model_config import ModelConfig
from orchestra.worker.nvlink import obstacle
from orchestra.worker.sharding import Shard, Stage
from tests.checkpoints import FAMILIES
from tests.worker import rank_process
from tests.worker.conftest import Checkpoints, Reference
from tests.worker.forked import exit_codes, forked
from tests.worker.plans import PlanBuilder, encode_plan, sampling_start
from tests.worker.rank_process import RankOrder
from tests.worker.test_logits import assert_close, prompt

TOLERANCE = 1e-4
ALTERNATIVES = 5


def rank_processes(
    model_dir: Path, sizes: tuple[int, int, int], folder: Path, collectives: str = "auto"
) -> AbstractContextManager[list[BaseProcess]]:
    """The ranks of a worker of so many shards, contexts and stages."""

    def arguments(rank: int) -> tuple[RankOrder]:
        return (RankOrder(model_dir, rank, sizes, folder, collectives),)

    return forked(math.prod(sizes), rank_process.run, arguments)


class ThreadGroup:
    """The collectives of ranks that are threads of this process."""

    def __init__(self, size: int) -> None:
        self._slots: list[Tensor] = [torch.empty(0)] * size
        self._barrier = threading.Barrier(size)

    def exchange(self, rank: int, tensor: Tensor) -> list[Tensor]:
        """Gives every rank all ranks' tensors."""
        self._slots[rank] = tensor.clone()
        self._barrier.wait(timeout=30)
        everyone = list(self._slots)
        self._barrier.wait(timeout=30)
        return everyone


class ThreadCommunicator:
    """One rank's end of a `ThreadGroup`."""

    def __init__(self, shard: Shard, group: ThreadGroup) -> None:
        self.shard = shard
        self.log: list[tuple[str, int]] = []
        """Which sums were started and finished, by their numbers."""
        self.gathered: list[int] = []
        """Columns of what was gathered."""
        self._group = group
        self._num_started = 0

    def all_reduce(self, tensor: Tensor) -> None:
        tensor.copy_(torch.stack(self._group.exchange(self.shard.rank, tensor)).sum(0))

    def start_all_reduce(self, tensor: Tensor) -> Callable[[], None]:
        """Adds up when it is waited for, and not before; who looks sooner finds no numbers."""
        number, own = self._num_started, tensor.clone()
        self._num_started += 1
        self.log.append(("start", number))
        tensor.fill_(math.nan)

        def finish() -> None:
            self.all_reduce(tensor.copy_(own))
            self.log.append(("finish", number))

        return finish

    def gather_columns(self, tensor: Tensor) -> Tensor | None:
        self.gathered.append(tensor.shape[1])
        parts = self._group.exchange(self.shard.rank, tensor)
        return torch.cat(parts, dim=-1) if self.shard.rank == 0 else None

    def all_gather(self, part: Tensor) -> Tensor:
        return torch.stack(self._group.exchange(self.shard.rank, part))

    def close(self) -> None:
        pass


class ThreadLink:
    """Between stages that are threads of this process: a queue to each neighbour."""

    waited_s = 0.0

    def __init__(self, before: Queue[Tensor], after: Queue[Tensor]) -> None:
        self._before = before
        self._after = after

    def send(self, hidden: Tensor) -> None:
        self._after.put(hidden)

    def receive(self, hidden: Tensor) -> None:
        hidden.copy_(self._before.get(timeout=30))

    def close(self) -> None:
        pass


class ThreadCourier:
    """Between any two stages that are threads of this process: a queue from each to each."""

    def __init__(self, index: int, queues: dict[tuple[int, int], Queue[Tensor]]) -> None:
        self._index = index
        self._queues = queues

    def begin(self, number: int) -> None:
        assert number > 0

    def send(self, stage: int, tensor: Tensor) -> None:
        self._queues[self._index, stage].put(tensor)

    def receive(self, stage: int, tensor: Tensor) -> None:
        sent = self._queues[stage, self._index].get(timeout=30)
        assert sent.shape == tensor.shape
        tensor.copy_(sent)

    def end(self) -> None:
        """Nothing to leave."""


def thread_ranks(
    model_dir: Path,
    size: int,
    stages: int = 1,
    split: tuple[int, ...] = (),
    contexts: int = 1,
    **settings: Any,
) -> list[Rank]:
    """Brings up all ranks of a worker in this process, stage after stage."""
    in_stage = contexts * size
    shards = [[ThreadGroup(size) for _ in range(contexts)] for _ in range(stages)]
    divisions = [[ThreadGroup(contexts) for _ in range(size)] for _ in range(stages)]
    queues: list[list[Queue[Tensor]]] = [
        [Queue() for _ in range(in_stage)] for _ in range(stages + 1)
    ]
    pairs = list(itertools.permutations(range(stages), 2))
    couriers: list[dict[tuple[int, int], Queue[Tensor]]] = [
        {pair: Queue() for pair in pairs} for _ in range(in_stage)
    ]
    model_config = ModelConfig.from_directory(model_dir)
    dtype = getattr(torch, settings.get("dtype", "float32"))
    place = Place(torch.device("cpu"), dtype, local_size=in_stage * stages)
    settings = {"num_blocks": 64, "max_num_seqs": 8, **settings}

    def build(index: int) -> Rank:
        number = index % in_stage
        shard, stage = Shard(number % size, size), Stage(index // in_stage, stages, split)
        context = Shard(number // size, contexts)
        config = WorkerConfig(model_dir, "", "", "", shard, stage, context=context, **settings)
        communicator = ThreadCommunicator(shard, shards[stage.index][context.rank])
        before, after = queues[stage.index][number], queues[stage.index + 1][number]
        division = ThreadCommunicator(
            Shard(context.rank, contexts), divisions[stage.index][shard.rank]
        )
        experts = None
        if contexts > 1 and config.expert_parallel:
            experts = ExpertGroup(division, context)
        courier = ThreadCourier(stage.index, couriers[number])
        joined = Group(
            communicator,
            link=ThreadLink(before, after),
            context=division if contexts > 1 else None,
            experts=experts,
            courier=courier,
        )
        return build_rank(config, model_config, place, joined, lambda _done, _total: None)

    with ThreadPoolExecutor(in_stage * stages) as pool:
        return list(pool.map(build, range(in_stage * stages)))


def script(
    kind: str, reference: Reference, num_top_logprobs: int = ALTERNATIVES, **sampling: Any
) -> tuple[list[bytes], list[list[int]]]:
    """Plans with chunks, decodes and both together; and the sequences that each step samples from.

    The second sequence draws as `sampling` says.
    """
    builder = PlanBuilder(64)
    sequences = {"a": prompt(37), "b": prompt(9, seed=1)}
    for name, tokens in sequences.items():
        builder.add(name, tokens)
    starts = [sampling_start(0), sampling_start(1, **sampling)]
    messages, sampled = [], []
    for step in ({"a": 16}, {"a": 21, "b": 9}, {"a": 1, "b": 1}, {"b": 1}, {"a": 1, "b": 1}):
        plan = builder.plan(step, starts, num_top_logprobs)
        starts = []
        messages.append(encode_plan(plan))
        members = [
            member
            for slot in plan.sample_slots
            for member in builder.sequences.values()
            if member.slot == slot
        ]
        for member in members:
            sampled.append(list(member.tokens))
            member.tokens.append(int(reference(kind, member.tokens)[-1].argmax()))
    return messages, sampled


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        *[pytest.param(kind, 2, id=f"{kind}, each rank has its KV head") for kind in FAMILIES],
        pytest.param("deepseek2-grouped", 4, id="all ranks share the only KV head"),
        pytest.param("llama-biases", 4, id="two ranks share a KV head"),
        pytest.param("llama-tied", 8, id="one head per rank"),
        pytest.param("llama-odd", 3, id="no size but the heads divides"),
        pytest.param("llama-odd", 6, id="not even the intermediate size"),
    ],
)
def test_shards_add_up(kind: str, size: int, checkpoint: Checkpoints, reference: Reference) -> None:
    compare(kind, thread_ranks(checkpoint(kind), size), reference)


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        pytest.param("mixtral", 2, id="three experts each"),
        pytest.param("mixtral", 4, id="one or two experts each"),
        pytest.param("mixtral", 8, id="some ranks have none"),
        pytest.param("qwen3-moe", 2, id="and one layer without"),
        pytest.param("deepseek3", 2, id="and one for every token"),
    ],
)
def test_whole_experts_add_up(
    kind: str, size: int, checkpoint: Checkpoints, reference: Reference
) -> None:
    compare(kind, thread_ranks(checkpoint(kind), size, expert_parallel=True), reference)


def compare(kind: str, ranks: list[Rank], reference: Reference) -> None:
    """Runs the script on all ranks of a group and compares its logits."""
    messages, sampled = script(kind, reference)
    plans = [ranks[0].reader.read(message) for message in messages]
    row = 0
    with ThreadPoolExecutor(len(ranks)) as pool:
        for plan in plans:
            every = list(pool.map(lambda rank, plan=plan: rank.runner.forward(plan), ranks))
            logits = every.pop(ranks[0].sampling_rank)
            assert every == [None] * len(every)
            for actual in [] if logits is None else logits:
                assert_close(actual, reference(kind, sampled[row])[-1])
                row += 1
    assert row == len(sampled)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("kind", "size"),
    [("llama", 2), ("gemma2", 2), ("llama-tied", 8)],
    ids=["untied", "capped", "tied, padded"],
)
def test_ranks_draw_the_likeliest_token(
    kind: str, size: int, temperature: float, checkpoint: Checkpoints, reference: Reference
) -> None:
    """Of their parts; or of the whole, where a sequence draws at random, even if it has no choice."""
    messages, sampled = script(
        *(kind, reference), num_top_logprobs=-1, temperature=temperature, top_k=1
    )
    ranks = thread_ranks(checkpoint(kind), size)
    communicator = ranks[0].group.communicator
    assert isinstance(communicator, ThreadCommunicator)
    communicator.gathered.clear()
    drawn: list[int] = []
    with ThreadPoolExecutor(size) as pool:
        for message in messages:
            plan = ranks[0].reader.read(message)
            every = list(pool.map(lambda rank, plan=plan: rank.runner.execute(plan), ranks))
            drawn += every[0].token_ids.tolist()
            assert all(len(output.token_ids) == 0 for output in every[1:])
    assert drawn == [int(reference(kind, context)[-1].argmax()) for context in sampled]
    is_whole = [columns > 1 for columns in communicator.gathered]
    # The second sequence draws in all steps but the first, where nobody does.
    assert is_whole == [temperature > 0] * (len(messages) - 1)


@contextmanager
def bytes_read() -> Iterator[list[int]]:
    """What each rank that is brought up inside has read of its checkpoint."""
    read: list[int] = []

    class CountingReader(WeightReader):
        def finish(self, ignored: Callable[[str], bool]) -> None:
            super().finish(ignored)
            read.append(self.bytes_read)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembly, "WeightReader", CountingReader)
        yield read


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {}),
        ("phi3", {}),
        ("mixtral", {}),
        ("mixtral", {"expert_parallel": True}),
    ],
    ids=str,
)
def test_every_rank_reads_its_slices_only(
    kind: str, settings: dict[str, Any], checkpoint: Checkpoints
) -> None:
    model_dir = checkpoint(kind)
    with bytes_read() as read:
        thread_ranks(model_dir, 2, **settings)
    weights = load_file(model_dir / "model.safetensors")
    whole = sum(weight.nbytes for weight in weights.values())
    shared = sum(
        weight.nbytes
        for name, weight in weights.items()
        if weight.dim() == 1 or name.endswith(".gate.weight")
    )
    # Both ranks need every norm and router; each other byte is read once.
    assert sum(read) == whole + shared
    assert max(read) == min(read)


def test_ranks_of_the_same_shard_read_each_expert_once(checkpoint: Checkpoints) -> None:
    model_dir = checkpoint("mixtral")
    with bytes_read() as read:
        thread_ranks(model_dir, 1, contexts=2, expert_parallel=True)
    weights = load_file(model_dir / "model.safetensors")
    whole = sum(weight.nbytes for weight in weights.values())
    experts = sum(weight.nbytes for name, weight in weights.items() if ".experts." in name)
    assert sum(read) == 2 * (whole - experts) + experts
    assert max(read) == min(read)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("collectives", "sizes"),
    [
        ("gloo", (2, 1, 1)),
        ("shm", (2, 1, 2)),
        ("gloo", (1, 2, 1)),
        ("auto", (2, 2, 1)),
        # With recorded decode steps, the collectives in them.
        pytest.param(
            *("nccl", (2, 1, 1)),
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(torch.cuda.device_count() < 2, reason="a GPU for each rank"),
            ],
        ),
        pytest.param(
            *("nvlink", (2, 1, 1)),
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(bool(obstacle([0, 1], regroups=False)), reason="NVLink"),
            ],
        ),
    ],
)
def test_processes(
    collectives: str,
    sizes: tuple[int, int, int],
    checkpoint: Checkpoints,
    reference: Reference,
    tmp_path: Path,
) -> None:
    kind = "llama"
    messages, sampled = script(kind, reference)
    (tmp_path / "plans").write_bytes(msgpack.packb(messages))
    with rank_processes(checkpoint(kind), sizes, tmp_path, collectives) as processes:
        assert exit_codes(processes) == [0] * math.prod(sizes)

    answers = msgpack.unpackb((tmp_path / "answers").read_bytes())
    assert [answer["step_id"] for answer in answers] == list(range(1, len(messages) + 1))
    tokens = np.concatenate([np.frombuffer(answer["token_ids"], "<i4") for answer in answers])
    chosen = np.concatenate([np.frombuffer(answer["chosen_logprobs"], "<f4") for answer in answers])
    top = np.concatenate([np.frombuffer(answer["top_logprobs"], "<f4") for answer in answers])
    assert len(tokens) == len(sampled)
    for row, (context, token) in enumerate(zip(sampled, tokens, strict=True)):
        expected = torch.log_softmax(reference(kind, context)[-1], 0)
        assert token == expected.argmax()
        assert chosen[row] == pytest.approx(float(expected.max()), abs=TOLERANCE)
        alternatives = top.reshape(-1, ALTERNATIVES)[row]
        assert alternatives == pytest.approx(expected.topk(ALTERNATIVES).values, abs=TOLERANCE)


@pytest.mark.timeout(120)
def test_lost_rank_ends_the_group(
    checkpoint: Checkpoints, reference: Reference, tmp_path: Path
) -> None:
    messages, _ = script("llama", reference)
    # A plan that no rank can read: rank 0 fails on it, and must take the other rank with it.
    (tmp_path / "plans").write_bytes(msgpack.packb([messages[0], b"\xc1"]))
    with rank_processes(checkpoint("llama"), (2, 1, 1), tmp_path) as processes:
        assert exit_codes(processes) == [1, 1]
