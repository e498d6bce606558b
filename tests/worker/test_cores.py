"""Ranks of one machine compute on cores of their own."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from orchestra.worker.cores import bind, share_of

THREADS = 8


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with eight hardware threads."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _thread: set(range(THREADS)))


def two_a_core(root: Path) -> Path:
    """Four cores with two hardware threads each, numbered as x86 does: the first ones of all, then the second ones."""
    for thread in range(THREADS):
        topology = root / f"cpu{thread}" / "topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text("0\n")
        (topology / "core_id").write_text(f"{thread % 4}\n")
    return root


@pytest.mark.usefixtures("eight")
def test_threads_that_share_a_core_are_of_one_rank(tmp_path: Path) -> None:
    root = two_a_core(tmp_path)
    assert [share_of(rank, 2, root) for rank in range(2)] == [(0, 4, 1, 5), (2, 6, 3, 7)]


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize("size", range(2, THREADS + 1))
def test_every_core_is_of_one_rank(size: int, tmp_path: Path) -> None:
    shares = [share_of(rank, size, tmp_path) for rank in range(size)]
    assert sorted(core for share in shares for core in share) == list(range(THREADS))
    assert {len(share) for share in shares} <= {THREADS // size, -(-THREADS // size)}


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize("size", [1, THREADS + 1], ids=["alone", "too few"])
def test_who_is_alone_or_has_no_core_for_itself_goes_anywhere(size: int, tmp_path: Path) -> None:
    assert [share_of(rank, size, tmp_path) for rank in range(size)] == [()] * size


def in_a_thread(act: Callable[[], None]) -> set[int]:
    """Where a thread may run that has done this."""
    found: set[int] = set()

    def run() -> None:
        act()
        found.update(os.sched_getaffinity(0))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found


def test_who_computes_stays_and_others_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    anywhere = os.sched_getaffinity(0)
    core = max(anywhere)
    assert in_a_thread(lambda: bind((core,))) == {core}
    assert os.sched_getaffinity(0) == anywhere


@pytest.mark.parametrize(
    ("threads", "cores"),
    [(2, (0,)), (1, (1023,)), (1, (1 << 20,)), (1, ())],
    ids=["too many threads", "no such core", "no such number", "any core"],
)
def test_where_that_cannot_be_nothing_is_done(
    threads: int, cores: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    assert in_a_thread(lambda: bind(cores)) == os.sched_getaffinity(0)
