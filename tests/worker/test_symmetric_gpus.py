"""Sums in the memory of GPUs that NVLink joins, with the kernel compiled; run by `make gpu`, where there are two."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from orchestra.worker.nvlink import obstacle
from orchestra.worker.topology import add_up
from tests.worker import symmetric_gpu_process
from tests.worker.symmetric_gpu_process import COUNTS, REPLAYS, replayed_numbers
from tests.worker.symmetric_process import DTYPES, numbers
from tests.worker.test_symmetric_group import assert_same_bits

# Also those of a group of more than two, which share the work, where there are so many.
SIZES = [2, 4, 8]

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]


def run(target: Callable[..., None], size: int, path: Path) -> None:
    """Runs a process for each rank."""
    if reason := obstacle(range(size), regroups=True):
        pytest.skip(reason)
    # Not forked: nothing of CUDA survives that.
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=target, args=(rank, size, path)) for rank in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    assert [process.exitcode for process in ranks] == [0] * size


@pytest.mark.parametrize("size", SIZES)
def test_sums_have_the_bits_of_the_definition(size: int, tmp_path: Path) -> None:
    run(symmetric_gpu_process.add_up, size, tmp_path)
    cases = [(dtype, count) for dtype in DTYPES for count in COUNTS]
    columns = [numbers(rank, 6, torch.float32).view(3, 2) for rank in range(size)]
    for rank in range(size):
        results, replayed, joined = torch.load(tmp_path / str(rank), weights_only=True)
        for (dtype, count), actual in zip(cases, results, strict=True):
            assert_same_bits(actual, add_up([numbers(each, count, dtype) for each in range(size)]))
        for turn in range(REPLAYS):
            expected = add_up([replayed_numbers(each, turn) for each in range(size)])
            recorded, usual = replayed[2 * turn : 2 * turn + 2]
            assert_same_bits(recorded, expected)
            assert_same_bits(usual, expected[0])
        if rank == 0:
            assert torch.equal(joined, torch.cat(columns, dim=1))


def test_an_aborted_group_leaves_the_gpu_usable(tmp_path: Path) -> None:
    run(symmetric_gpu_process.lose_a_rank, 2, tmp_path)
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / str(rank)), torch.full((4096,), 4.0))
