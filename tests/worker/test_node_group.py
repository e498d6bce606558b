"""Sums over several nodes between real processes: the same bits by every algorithm, for every size, on every rank."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from orchestra.errors import ConfigError
from orchestra.worker import algorithm_table
from orchestra.worker.algorithm_table import SIZES_BYTES, Algorithm, AlgorithmTable, measure
from orchestra.worker.collectives import join_group
from orchestra.worker.config import WorkerConfig
from orchestra.worker.sharding import Shard
from orchestra.worker.topology import Topology, own_node
from tests.worker.forked import RANKS
from tests.worker.node_process import COUNTS, DTYPES, Results, add_up, lose_a_rank, numbers

CPU = torch.device("cpu")
FLAT = [Algorithm.GATHER, Algorithm.EXCHANGE]


def by_definition(names: list[str], count: int, dtype: torch.dtype) -> Tensor:
    """Each node's ranks in order, rounded; then the nodes in the order in which their first ranks come."""
    sums = []
    for name in dict.fromkeys(names):
        total = torch.zeros(count)
        for rank, node in enumerate(names):
            if node == name:
                total = total + numbers(rank, count, dtype).float()
        sums.append(total.to(dtype).float())
    total = sums[0]
    for other in sums[1:]:
        total = total + other
    return total.to(dtype)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("names", "collectives", "algorithms"),
    [
        pytest.param("aabb", "auto", [*FLAT, Algorithm.BY_NODE], id="two nodes of two"),
        pytest.param("abab", "gloo", [*FLAT, Algorithm.BY_NODE], id="without shared memory"),
        pytest.param("aabbcc", "auto", [*FLAT, Algorithm.BY_NODE], id="three nodes of two"),
        pytest.param("aab", "auto", FLAT, id="nodes of different sizes"),
        pytest.param("aaa", "gloo", FLAT, id="one node"),
    ],
)
def test_every_algorithm_gives_every_rank_the_same_bits(
    names: str, collectives: str, algorithms: list[Algorithm], tmp_path: Path
) -> None:
    nodes = list(names)
    ranks = [
        RANKS.Process(target=add_up, args=(rank, nodes, tmp_path, collectives))
        for rank in range(len(nodes))
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0] * len(nodes)
    saved = [torch.load(tmp_path / str(rank), weights_only=False) for rank in range(len(nodes))]
    for dtype in DTYPES:
        for count in COUNTS:
            expected = by_definition(nodes, count, dtype)
            for algorithm in [*algorithms, None]:
                for results, _, _ in saved:
                    check_bits(results, (dtype, count, algorithm), expected)
    parts = [numbers(rank, 6, torch.float32).view(3, 2) for rank in range(len(nodes))]
    for rank, (_, (columns, rows), _) in enumerate(saved):
        assert torch.equal(rows, torch.stack(parts))
        if rank > 0:
            assert columns is None
        else:
            assert torch.equal(columns, torch.cat(parts, dim=1))
    tables = {table for _, _, table in saved}
    assert len(tables) == 1
    assert {algorithm for _, algorithm in AlgorithmTable.decode(tables.pop()).rows} <= set(
        algorithms
    )


def check_bits(
    results: Results, key: tuple[torch.dtype, int, Algorithm | None], expected: Tensor
) -> None:
    """As integers: zeros of either sign are different."""
    kind = torch.int32 if key[0] == torch.float32 else torch.int16
    assert torch.equal(results[key].view(kind), expected.view(kind)), key


@pytest.mark.timeout(120)
@pytest.mark.parametrize("algorithm", list(Algorithm))
def test_a_lost_rank_ends_the_wait_on_every_node_and_the_rest_regroup(
    algorithm: Algorithm, tmp_path: Path
) -> None:
    names = list("aabb")
    pipes = [RANKS.Pipe() for _ in names]
    ranks = [
        RANKS.Process(
            target=lose_a_rank, args=(rank, names, tmp_path, algorithm, told), daemon=True
        )
        for rank, (_, told) in enumerate(pipes)
    ]
    for process in ranks:
        process.start()
    heard = [pipe for pipe, _ in pipes]
    assert [pipe.recv() for pipe in heard] == ["met"] * 4
    ranks[3].kill()
    assert [pipe.recv() for pipe in heard[:3]] == ["lost"] * 3
    assert [pipe.recv() for pipe in heard[:3]] == [[6.0] * 3] * 3
    for process in ranks:
        process.join()


# === which algorithm ===


def test_the_table_covers_every_size() -> None:
    table = AlgorithmTable(((100, Algorithm.GATHER), (1000, Algorithm.BY_NODE)))
    picked = [table.pick(size) for size in (0, 100, 101, 1000, 1 << 30)]
    assert picked == [Algorithm.GATHER] * 2 + [Algorithm.BY_NODE] * 3
    assert AlgorithmTable.decode(table.encode()) == table


class Clock:
    """Time that passes only while something is added up."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        """The time."""
        return self.now


@pytest.mark.parametrize(
    ("turn_s", "bandwidth", "measured"),
    [pytest.param(1e-4, 1e9, 4, id="fast"), pytest.param(3e-2, 1e6, 2, id="slow")],
)
def test_the_fastest_is_taken_and_time_is_bounded(
    turn_s: float, bandwidth: float, measured: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(algorithm_table, "time", clock)
    sizes = []

    def run(algorithm: Algorithm, tensor: Tensor) -> None:
        # One turn and a quarter of the bandwidth, or two turns and all of it.
        share, turns = (0.25, 1) if algorithm == Algorithm.GATHER else (1.0, 2)
        clock.now += turns * turn_s + tensor.nbytes / (bandwidth * share)
        sizes.append(tensor.nbytes)

    table = measure(run, FLAT, agree=lambda said: said, device=CPU)
    algorithms = [algorithm for _, algorithm in table.rows]
    # The crossing is where one turn more costs what three quarters of the bandwidth do.
    crossing = turn_s * bandwidth / 3
    expected = [FLAT[size > crossing] for size in SIZES_BYTES[:measured]]
    assert set(expected) == set(FLAT)
    # Beyond what there was time for: the one that sends the fewest bytes.
    assert algorithms == [*expected, FLAT[1]][: len(SIZES_BYTES)]
    assert max(sizes) == SIZES_BYTES[measured - 1]
    borders = zip(SIZES_BYTES, table.rows, strict=False)
    assert all(small < border < 8 * small for small, (border, _) in borders)


# === where the ranks are ===


def test_nodes_are_sorted_by_their_first_ranks() -> None:
    topology = Topology.of(["b", "a", "b", "a"])
    assert topology.nodes == ((0, 2), (1, 3))
    assert [topology.place(rank) for rank in range(4)] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert topology.is_even
    assert not Topology.of(["a", "b", "b"]).is_even


def test_shared_memory_alone_is_for_one_node(tmp_path: Path) -> None:
    store = HashStore()
    store.set("topology-0/node-of/1", "elsewhere")
    config = WorkerConfig(
        *(tmp_path, "http://router", "w", "m", Shard(0, 2)), collectives="shm", node="here"
    )
    with pytest.raises(ConfigError, match="--collectives: shm is for CPU ranks of one") as raised:
        join_group(config, store, CPU, generation=0)
    assert raised.value.key == "collectives"


def test_a_nodes_name_says_what_can_share_memory() -> None:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert own_node().startswith(f"{boot}/pid:[")
