"""Random use of `Scheduler` against a small model that keeps lists."""

import dataclasses

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from orchestra import Reservation, Scheduler, errors

BLOCK_SIZE = 4
NUM_BLOCKS = 12
MAX_NUM_SEQS = 3
FAMILIES = st.integers(0, 2)


@dataclasses.dataclass
class Held:
    """A reservation, and what it asks of its worker."""

    reservation: Reservation
    num_blocks: int
    prefill_tokens: int


@dataclasses.dataclass
class Worker:
    """A worker with everything recomputed from lists when asked."""

    held: list[Held] = dataclasses.field(default_factory=list)
    # Blocks of each family's prompt that are cached, from its start.
    depths: dict[int, int] = dataclasses.field(default_factory=dict)

    def rank(self, family: int, length: int, num_blocks: int) -> tuple[bool, int]:
        """Ascending: room, cost. Which of several equals is taken is the scheduler's to choose."""
        depth = self.depth(family, length)
        left = length - depth * BLOCK_SIZE
        queued = sum(held.prefill_tokens for held in self.held)
        free = NUM_BLOCKS - sum(held.num_blocks for held in self.held)
        has_room = len(self.held) < MAX_NUM_SEQS and num_blocks - depth <= free
        return (not has_room, (left + queued) * (len(self.held) + 1))

    def depth(self, family: int, length: int) -> int:
        """Cached blocks of a prompt; one token is always computed."""
        return min(self.depths.get(family, 0), (length - 1) // BLOCK_SIZE)


def prompt(family: int, length: int) -> list[int]:
    """Prompts of a family share their prefix."""
    return [family * 1000 + position for position in range(length)]


class Routing(RuleBasedStateMachine):
    """Workers come, cache, take requests and go."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = Scheduler()
        self.workers: dict[str, Worker] = {}
        self.num_named = 0

    @rule()
    def add_worker(self) -> None:
        self.num_named += 1
        name = f"w{self.num_named}"
        self.scheduler.add_worker(
            name,
            model="m",
            num_blocks=NUM_BLOCKS,
            max_model_len=100,
            block_size=BLOCK_SIZE,
            max_num_seqs=MAX_NUM_SEQS,
        )
        self.workers[name] = Worker()

    @precondition(lambda self: self.workers)
    @rule(data=st.data())
    def remove_worker(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.workers)))
        assert self.scheduler.remove_worker(name)
        for held in self.workers.pop(name).held:
            assert not held.reservation.release()

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), family=FAMILIES, depth=st.integers(0, 4))
    def cache(self, data: st.DataObject, family: int, depth: int) -> None:
        name = data.draw(st.sampled_from(sorted(self.workers)))
        hashes = self.scheduler.block_hashes(name, prompt(family, 4 * BLOCK_SIZE))
        self.scheduler.kv_stored(name, hashes[:depth])
        self.scheduler.kv_removed(name, hashes[depth:])
        self.workers[name].depths[family] = depth

    @rule(family=FAMILIES, length=st.integers(1, 40), max_tokens=st.integers(1, 20))
    def route(self, family: int, length: int, max_tokens: int) -> None:
        num_blocks = -(-(length + max_tokens) // BLOCK_SIZE)
        try:
            reservation = self.scheduler.route(
                prompt(family, length), model="m", max_tokens=max_tokens
            )
        except errors.ModelNotFoundError:
            assert not self.workers
            return
        except errors.ContextTooLongError:
            assert num_blocks > NUM_BLOCKS
            return
        assert num_blocks <= NUM_BLOCKS
        ranks = {
            name: worker.rank(family, length, num_blocks) for name, worker in self.workers.items()
        }
        assert ranks[reservation.worker] == min(ranks.values())
        worker = self.workers[reservation.worker]
        depth = worker.depth(family, length)
        assert reservation.num_cached_tokens == depth * BLOCK_SIZE
        worker.held.append(Held(reservation, num_blocks - depth, length - depth * BLOCK_SIZE))

    @precondition(lambda self: any(worker.held for worker in self.workers.values()))
    @rule(data=st.data(), finish=st.booleans())
    def end(self, data: st.DataObject, finish: bool) -> None:
        pairs = [(worker, held) for worker in self.workers.values() for held in worker.held]
        index = data.draw(st.integers(0, len(pairs) - 1))
        worker, held = pairs[index]
        if finish:
            assert held.reservation.release()
            worker.held.remove(held)
        else:
            assert held.reservation.prefill_done() is (held.prefill_tokens > 0)
            held.prefill_tokens = 0

    @invariant()
    def figures_agree(self) -> None:
        self.scheduler.check_integrity()
        for figures in self.scheduler.workers():
            held = self.workers[figures.name].held
            assert figures.num_reservations == len(held)
            assert figures.queued_prefill_tokens == sum(each.prefill_tokens for each in held)


TestRouting = Routing.TestCase
TestRouting.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
