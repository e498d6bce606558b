"""A soak of seconds, and its judges: `make soak` runs half an hour of the same, and judges memory too."""

import json
from pathlib import Path

import pytest

from tests.soak.ledger import End, Ledger
from tests.soak.run import run
from tests.soak.samples import Growth, Sample

SECONDS = 11.0


@pytest.mark.timeout(120)
def test_each_request_ends_once_and_nothing_is_left_open(tmp_path: Path) -> None:
    soak = run(tmp_path, 1, SECONDS, 1.0, print)
    assert soak.wrong == []
    # It has seen what it is about.
    assert sum(soak.kills.values()) > 0
    assert soak.ends["whole"] > 0
    assert soak.rotations > 0


def line(number: int, status: int) -> str:
    return json.dumps({"request_id": str(number), "status": status})


@pytest.mark.parametrize(
    ("end", "statuses", "complaint"),
    [
        (End.WHOLE, (200,), None),
        (End.REFUSED, (429,), None),
        (End.LEFT, (200,), None),
        (End.LEFT_EARLY, (0,), None),
        (End.LEFT_EARLY, (), None),
        (End.WHOLE, (), "no end for the router"),
        (End.LEFT, (), "no end for the router"),
        (End.WHOLE, (200, 200), "ended twice for the router"),
        (End.WHOLE, (503,), "another end for the router"),
        (End.REFUSED, (200,), "another end for the router"),
        (End.WRONG, (200,), "no proper end"),
        (End.OPEN, (200,), "no end for its client"),
    ],
)
def test_each_request_has_one_end_on_both_sides(
    end: End, statuses: tuple[int, ...], complaint: str | None
) -> None:
    ledger = Ledger()
    number = ledger.begin()
    if end is not End.OPEN:
        ledger.end(number, end)
    for status in statuses:
        ledger.take(line(number, status))
    ledger.check()
    assert list(ledger.shown) == [complaint] * (complaint is not None)


@pytest.mark.parametrize(("mb_per_minute", "is_flat"), [(0.0, True), (0.05, True), (0.1, False)])
def test_half_an_hour_may_grow_by_a_megabyte_in_its_second_half(
    mb_per_minute: float, is_flat: bool
) -> None:
    def sample(minute: int) -> Sample:
        # The first minutes fill what may be full, the last digit is noise.
        rss = 20 + min(minute, 10) + mb_per_minute * minute + 0.03 * (minute % 3)
        return Sample(60.0 * minute, rss, 20, 4, 0.2, 48, 30, 96, 3, 4, 0)

    assert Growth.of([sample(minute) for minute in range(31)]).is_flat is is_flat
