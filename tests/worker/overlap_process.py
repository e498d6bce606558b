"""What the processes of `test_overlap` run, each one rank of two whose sums go over gloo."""

import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor
from torch._C._distributed_c10d import FileStore

from orchestra.worker.assembly import Place, Rank, build_rank
from orchestra.worker.collectives import join_group
from orchestra.worker.config import WorkerConfig
from orchestra.worker.group import Group
from orchestra.worker.model_config import ModelConfig
from orchestra.worker.plan import StepPlan
from orchestra.worker.recovery import LOSSES
from orchestra.worker.renewable_group import RenewableGroup
from orchestra.worker.sharding import Shard
from tests.worker.plans import PlanBuilder
from tests.worker.test_logits import prompt

CPU = torch.device("cpu")
MIN_TOKENS = 16
NUM_BLOCKS = 128


def life() -> Iterator[StepPlan]:
    """Prompts that are chunked and mixed with decoding, cut in the middle and between; steps of every length."""
    builder = PlanBuilder(NUM_BLOCKS)
    for seed, (name, length) in enumerate({"a": 150, "b": 70, "c": 33}.items()):
        builder.add(name, prompt(length, seed))
    for step in (
        {"a": 100},
        {"a": 49, "b": 30},
        {"a": 1, "b": 39},
        {"a": 1, "b": 1},
        {"a": 1, "b": 1, "c": 15},
        {"a": 1, "b": 1, "c": 18},
        {"a": 1, "b": 1, "c": 1},
    ):
        for name in step:
            member = builder.sequences[name]
            if member.num_computed == len(member.tokens):
                builder.append(name, 7 + len(member.tokens))
        yield builder.plan(step)
    # As many decodes as a step has to have to be cut, and a prompt behind them.
    names = [f"d{number}" for number in range(MIN_TOKENS)]
    for number, name in enumerate(names):
        builder.add(name, prompt(3, seed=number))
    yield builder.plan(dict.fromkeys(names, 2))
    builder.add("e", prompt(40, seed=9))
    yield builder.plan({**dict.fromkeys(names[:8], 1), "e": 21})
    yield builder.plan({**dict.fromkeys(names[8:], 1), "e": 19})
    for name in names:
        builder.append(name, 11)
    yield builder.plan(dict.fromkeys(names, 1))


def logits_of(forward: Callable[[StepPlan], Tensor | None]) -> Tensor:
    """What is drawn from in a whole life."""
    # What is recorded is overwritten by the next step.
    every = [logits.clone() for plan in life() if (logits := forward(plan)) is not None]
    return torch.cat(every) if every else torch.empty(0)


class Member:
    """One of two ranks, of a node of its own or not.

    Args:
        rank: its number.
        nodes: the names of both ranks' nodes.
        folder: where they meet.
        generation: of the group that it joins first.
    """

    def __init__(self, rank: int, nodes: str, folder: Path, generation: int = 0) -> None:
        torch.set_num_threads(1)
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        self.shard = Shard(rank, len(nodes))
        self._node = nodes[rank]
        store = FileStore(str(folder / "store"), len(nodes))
        config = self.config(folder, 0, "float32")
        self.group = RenewableGroup(
            self.shard, lambda generation: join_group(config, store, CPU, generation), generation
        )

    def config(self, model_dir: Path, min_tokens: int, dtype: str) -> WorkerConfig:
        """The settings of a rank that overlaps steps of so many tokens."""
        return WorkerConfig(
            *(model_dir, "", "", "", self.shard),
            dtype=dtype,
            collectives="gloo",
            node=self._node,
            num_blocks=NUM_BLOCKS,
            max_num_seqs=32,
            overlap_min_tokens=min_tokens,
        )

    def load(self, model_dir: Path, dtype: str, min_tokens: int) -> Rank:
        """Brings a model up in the group, together with the other rank."""
        config = self.config(model_dir, min_tokens, dtype)
        place = Place(CPU, getattr(torch, dtype), local_size=2)
        group = Group(self.group, renewable=self.group)
        model_config = ModelConfig.from_directory(model_dir)
        return build_rank(config, model_config, place, group, lambda _done, _total: None)


def compare(rank: int, nodes: str, folder: Path, kinds: dict[tuple[str, str], Path]) -> None:
    """Leaves in a file what each kind of model computes, with sums in order and overlapped."""
    member = Member(rank, nodes, folder)
    results = {}
    for (kind, dtype), model_dir in kinds.items():
        pair = [member.load(model_dir, dtype, min_tokens).runner for min_tokens in (0, MIN_TOKENS)]
        results[kind, dtype] = [logits_of(runner.forward) for runner in pair]
    torch.save(results, folder / f"result-{rank}")
    member.group.close()


def lose_a_rank(rank: int, nodes: str, folder: Path, model_dir: Path, told: Connection) -> None:
    """Rank 1 dies in the middle of an overlapped step; rank 0 leaves it and goes on with another one."""
    member = Member(rank, nodes, folder)
    ready = member.load(model_dir, "float32", MIN_TOKENS)
    expected = logits_of(ready.runner.forward)
    plan = next(life())
    if rank == 1:
        _die_in_sum(member.group, number=5)
    try:
        with member.group.step():
            ready.runner.forward(plan)
    except LOSSES:
        told.send("lost")
    member.group.leave()
    member.group.renew(1)
    ready.settle()
    told.send(torch.equal(logits_of(ready.runner.forward), expected))
    member.group.close()


def replace_a_rank(rank: int, nodes: str, folder: Path, model_dir: Path) -> None:
    """The process that takes a lost rank's place."""
    member = Member(rank, nodes, folder, generation=1)
    logits_of(member.load(model_dir, "float32", MIN_TOKENS).runner.forward)
    member.group.close()


def _die_in_sum(group: RenewableGroup, number: int) -> None:
    """Has this process end when a sum has begun, with another one under way."""
    start, left = group.start_all_reduce, [number]

    def start_or_die(tensor: Tensor) -> Callable[[], None]:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return start(tensor)

    group.start_all_reduce = start_or_die  # type: ignore[method-assign]
