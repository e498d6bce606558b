"""How the ranks of a worker find each other, and what each of them has of the others."""

import struct
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from torch.distributed.distributed_c10d import PrefixStore, Store

from orchestra.worker.collectives import join_context_group, join_group
from orchestra.worker.config import WorkerConfig
from orchestra.worker.context_runner import ContextGroup
from orchestra.worker.expert_exchange import ExpertGroup
from orchestra.worker.layer_courier import Courier, ProcessCourier
from orchestra.worker.parallel import Communicator, SingleRank, rendezvous
from orchestra.worker.plan_channel import NO_TERMS, CacheTerms, Follower, Leader
from orchestra.worker.renewable_group import AbortableCommunicator, RenewableGroup
from orchestra.worker.sharding import Shard
from orchestra.worker.shared_group import SharedMemoryGroup
from orchestra.worker.stage_link import ProcessLink, SingleStage, StageLink

_COUNT = struct.Struct("<Q")


@dataclass(frozen=True)
class Group:
    """How this rank speaks to the others."""

    communicator: Communicator
    """Of this rank's stage."""
    leader: Leader | None = None
    """Rank 0's end of the plan channel; None with a single rank."""
    follower: Follower | None = None
    """The end of any other rank."""
    renewable: RenewableGroup | None = None
    """The communicator, where it can go on with another group after a rank was lost."""
    link: StageLink = field(default_factory=SingleStage)
    """To the stages before and after it."""
    context: ContextGroup | None = None
    """Of the ranks that divide prompts with this one."""
    experts: ExpertGroup | None = None
    """The same ranks, where they have the experts between them."""
    courier: Courier | None = None
    """To all other stages, for layers that move; None with a single stage."""

    @property
    def terms(self) -> CacheTerms:
        """What the caches are like of the ranks that this one joins late; `NO_TERMS` where it was there before."""
        return NO_TERMS if self.follower is None else self.follower.terms

    @property
    def shares_memory(self) -> bool:
        """Whether its ranks add up in memory that all of them see."""
        own = None if self.renewable is None else self.renewable.group
        return isinstance(own, SharedMemoryGroup)

    @property
    def slowest_round_s(self) -> float:
        """Longest time between two collectives of the step that ran last, seconds; 0: nobody asks."""
        return 0.0 if self.renewable is None else self.renewable.slowest_round_s

    def step(self) -> AbstractContextManager[None]:
        """Brackets a step, so that others see how far this rank is."""
        return nullcontext() if self.renewable is None else self.renewable.step()

    def check(self) -> None:
        """Finds out whether steps that were computed can be used.

        Raises:
            RankLostError: the group was aborted.
        """
        if self.renewable is not None:
            self.renewable.check()

    def agree_on_least(self, count: int) -> int:
        """The least of the ranks' numbers."""
        if self.leader is not None:
            others = [_COUNT.unpack(answer)[0] for answer in self.leader.collect()]
            least = min([count, *others])
            self.leader.broadcast(_COUNT.pack(least))
            return int(least)
        if self.follower is not None:
            self.follower.send(_COUNT.pack(count))
            answer = self.follower.receive()
            return count if answer is None else int(_COUNT.unpack(answer)[0])
        return count

    def close(self) -> None:
        """Leaves the other ranks."""
        self.link.close()
        if self.context is not None:
            self.context.close()
        self.communicator.close()


def join_ranks(config: WorkerConfig, device: torch.device) -> Group:
    """Meets the worker's other ranks, where it has some.

    Args:
        config: says which rank this is, of how many, and where they meet.
        device: where this rank computes.

    Raises:
        ConfigError: they cannot meet in the way that was asked for.
        RankLostError: not every rank came.
    """
    if config.num_ranks == 1:
        return Group(SingleRank())
    store = rendezvous(config.rendezvous, Shard(config.rank, config.num_ranks))
    leader = follower = None
    generation = 0
    if config.rank == 0:
        leader = Leader(store, config.num_ranks, config.rendezvous)
    else:
        follower = Follower(store, config.rank)
        generation = follower.generation
    if config.stage.count * config.context.size > 1:
        return _join_parts(config, device, store, Group(SingleRank(), leader, follower))

    def join(generation: int) -> AbortableCommunicator:
        return join_group(config, store, device, generation)

    group = RenewableGroup(config.shard, join, generation)
    return Group(group, leader, follower, renewable=group)


def _join_parts(config: WorkerConfig, device: torch.device, store: Store, group: Group) -> Group:
    """Joins the groups of a rank whose worker is more than one group that shares each layer."""
    # Each is a world of its own, with its collectives among its ranks.
    own = PrefixStore(f"stage-{config.stage.index}", store)
    if config.shard.size > 1:
        shards = PrefixStore(f"context-{config.context.rank}", own)
        group = replace(group, communicator=join_group(config, shards, device, 0))
    if config.context.size > 1:
        contexts = PrefixStore(f"shard-{config.shard.rank}", own)
        context = join_context_group(config, contexts, device)
        experts = ExpertGroup(context, config.context) if config.expert_parallel else None
        group = replace(group, context=context, experts=experts)
    if config.stage.count > 1:
        link = ProcessLink(config.stage, config.stage_place, store, device)
        courier = ProcessCourier(config.stage, config.stage_place, store, device)
        group = replace(group, link=link, courier=courier)
    return group
