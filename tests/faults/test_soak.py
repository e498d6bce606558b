"""A soak of seconds: `make soak` runs half an hour of the same, and judges memory too."""

from pathlib import Path

import pytest

from tests.soak.run import run

SECONDS = 11.0


@pytest.mark.timeout(120)
def test_each_request_ends_once_and_nothing_is_left_open(tmp_path: Path) -> None:
    soak = run(tmp_path, 1, SECONDS, 1.0, print)
    assert soak.wrong == []
    # It has seen what it is about.
    assert sum(soak.kills.values()) >= 2
    assert soak.ends["whole"] > 0
    assert soak.rotations > 0
