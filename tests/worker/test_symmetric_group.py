"""Sums over memory that GPUs share: which bits, in which pieces, and when it is chosen."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._C._distributed_c10d import HashStore

from orchestra.errors import ConfigError
from orchestra.worker import collectives, nvlink, symmetric_group
from orchestra.worker.collectives import join_group
from orchestra.worker.config import WorkerConfig
from orchestra.worker.parallel import SingleRank
from orchestra.worker.plan_socket import RankLostError
from orchestra.worker.renewable_group import RenewableGroup
from orchestra.worker.sharding import Shard
from orchestra.worker.symmetric_group import Cut
from orchestra.worker.topology import add_up
from tests.worker import symmetric_process
from tests.worker.forked import RANKS
from tests.worker.symmetric_process import COUNTS, DTYPES, FIRST_EPOCH, numbers

CUDA = torch.device("cuda", 0)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """As integers: zeros of either sign are different."""
    kind = torch.int32 if expected.dtype == torch.float32 else torch.int16
    assert torch.equal(actual.view(kind), expected.view(kind))


interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="with a GPU the kernel is compiled: test_symmetric_gpus"
)


def total(parts: list[Tensor]) -> Tensor:
    """By definition; but Triton's interpreter cuts what does not fit bf16 off, where a GPU rounds."""
    if parts[0].dtype != torch.bfloat16:
        return add_up(parts)
    exact = add_up([part.float() for part in parts])
    return exact.view(torch.int32).bitwise_and(-1 << 16).view(torch.float32).bfloat16()


@interpreted
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("size", "first_epoch"), [(2, 0), (3, FIRST_EPOCH)], ids=["two ranks", "three, epochs wrap"]
)
def test_every_rank_gets_the_sum_in_the_order_of_the_ranks(
    size: int, first_epoch: int, tmp_path: Path
) -> None:
    ranks = [
        RANKS.Process(target=symmetric_process.add_up, args=(rank, size, tmp_path, first_epoch))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0] * size
    wide = add_up([numbers(rank, 64, torch.float32) for rank in range(size)]).view(8, 8)
    columns = [numbers(rank, 6, torch.float32).view(3, 2) for rank in range(size)]
    for rank in range(size):
        results, strided, joined = torch.load(tmp_path / str(rank), weights_only=True)
        cases = [(dtype, count) for dtype in DTYPES for count in COUNTS]
        for (dtype, count), actual in zip(cases, results, strict=True):
            parts = [numbers(each, count, dtype) for each in range(size)]
            assert_same_bits(actual, total(parts))
        assert_same_bits(strided[:, ::2], wide[:, ::2])
        assert_same_bits(strided[:, 1::2], numbers(rank, 64, torch.float32).view(8, 8)[:, 1::2])
        if rank == 0:
            assert torch.equal(joined, torch.cat(columns, dim=1))
        else:
            assert joined is None


@interpreted
@pytest.mark.timeout(120)
def test_an_aborted_group_waits_for_nobody(tmp_path: Path) -> None:
    pipes = [RANKS.Pipe() for _ in range(3)]
    ranks = [
        RANKS.Process(
            target=symmetric_process.lose_a_rank, args=(rank, 3, tmp_path, told), daemon=True
        )
        for rank, (_, told) in enumerate(pipes)
    ]
    for process in ranks:
        process.start()
    heard = [pipe for pipe, _ in pipes]
    assert [pipe.recv() for pipe in heard] == ["met"] * 3
    took = [pipe.recv() for pipe in heard[:2]]
    assert all(0.2 < seconds < 30 for seconds in took)
    ranks[2].kill()
    for process in ranks:
        process.join()


def test_a_step_of_an_aborted_group_counts_for_nothing() -> None:
    group = RenewableGroup(Shard(), lambda _generation: Mute(), 0)
    with group.step():
        pass
    with pytest.raises(RankLostError, match="during the step"), group.step():
        group.abort()
    assert group.progress().num_steps == 1
    group.leave()
    group.renew(1)
    with group.step():
        pass
    assert group.progress().num_steps == 1


class Mute(SingleRank):
    """A group whose collectives say nothing when they are aborted, like recorded ones."""

    def abort(self) -> None:
        """Ends nothing."""


# === how a message is divided ===


@pytest.mark.parametrize("size", [2, 3, 4, 8])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("count", [1, 1024, 1025, 4096, 65536, 131_073, 5_000_000])
def test_pieces_fit_slots_and_cover_the_message(count: int, itemsize: int, size: int) -> None:
    cut = Cut.of(count, itemsize, size)
    assert 1 <= cut.programs <= symmetric_group.PROGRAMS
    assert cut.piece * itemsize <= symmetric_group.SLOT_BYTES
    assert cut.piece % symmetric_group.BLOCK == cut.share % symmetric_group.BLOCK == 0
    if count * itemsize <= symmetric_group.PROGRAMS * symmetric_group.SLOT_BYTES:
        assert cut.programs * cut.piece >= count
    if cut.share:
        assert size > 2
        assert cut.share * size >= cut.piece
    else:
        assert size == 2 or count * itemsize <= symmetric_group.ALONE_BYTES_MAX


# === when it is chosen ===


class ByThemselves:
    """Stands for a group that would need GPUs."""

    def __init__(self, *arguments: object) -> None:
        pass


class ByNccl(ByThemselves):
    """For one that would need NCCL too."""


def config(collectives: str = "auto", regroup_timeout_s: float = 0.0) -> WorkerConfig:
    return WorkerConfig(
        *(Path("model"), "http://router", "w", "m", Shard(0, 2)),
        collectives=collectives,
        node="a",
        regroup_timeout_s=regroup_timeout_s,
    )


def store(other_node: str = "a", other_gpu: int = 1) -> HashStore:
    """With what the other rank says of itself."""
    meeting = HashStore()
    meeting.set("topology-0/node-of/1", other_node)
    meeting.set("gpus-0/gpu-of/1", str(other_gpu))
    return meeting


def chosen(config: WorkerConfig) -> object:
    """The group that a rank with the first of two GPUs joins."""
    return join_group(config, store(), CUDA, 0)


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Two GPUs that are not there; returns the links between them."""
    links = [[0, 4], [4, 0]]

    class Connectivity:
        matrix = links

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _gpu: (9, 0))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda _own, _other: True)
    monkeypatch.setattr(nvlink, "_detect_dma_connectivity", lambda _type, _kind: Connectivity)
    monkeypatch.setattr(symmetric_group, "SymmetricGroup", ByThemselves)
    monkeypatch.setattr(collectives, "ProcessGroup", ByNccl)
    return links


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize("asked", ["auto", "nvlink"])
def test_joined_gpus_add_up_by_themselves(asked: str) -> None:
    assert type(chosen(config(asked))) is ByThemselves


@pytest.mark.usefixtures("gpus")
def test_nccl_can_be_asked_for() -> None:
    assert type(chosen(config("nccl"))) is ByNccl


def test_gpus_without_links_take_nccl(gpus: list[list[int]]) -> None:
    gpus[1][0] = 0
    assert type(chosen(config())) is ByNccl
    with pytest.raises(ConfigError, match="GPUs 1 and 0 are not joined by NVLink") as raised:
        join_group(config("nvlink"), store(), CUDA, 0)
    assert raised.value.key == "collectives"


@pytest.mark.usefixtures("gpus")
@pytest.mark.parametrize(
    ("other_gpu", "reason"), [(0, "share a GPU"), (2, "another does not see")], ids=str
)
def test_ranks_that_see_other_gpus_are_told_apart(other_gpu: int, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        join_group(config("nvlink"), store(other_gpu=other_gpu), CUDA, 0)


@pytest.mark.usefixtures("gpus")
def test_old_torch_cannot_regroup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.11.0+cu128")
    assert type(chosen(config())) is ByThemselves
    assert type(chosen(config(regroup_timeout_s=60.0))) is ByNccl


@pytest.mark.usefixtures("gpus")
def test_old_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _gpu: (7, 0))
    with pytest.raises(ConfigError, match="the GPUs are too old for the kernel"):
        join_group(config("nvlink"), store(), CUDA, 0)


@pytest.mark.parametrize("asked", ["nvlink", "nccl"])
def test_cpus_have_no_nvlink(asked: str) -> None:
    with pytest.raises(ConfigError, match=f"{asked} is for GPUs"):
        join_group(config(asked), store(), torch.device("cpu"), 0)


@pytest.mark.usefixtures("gpus")
def test_several_nodes_have_no_nvlink() -> None:
    with pytest.raises(ConfigError, match="nvlink is for GPUs of one node"):
        join_group(config("nvlink"), store(other_node="b"), CUDA, 0)
