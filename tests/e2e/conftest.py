"""One real stack on the demonstration model, shared by the tests that do not break it."""

from collections.abc import Iterator

import pytest

from tests.e2e.stack import DEMO, Serve, start_serve


@pytest.fixture(scope="session")
def serve() -> Iterator[Serve]:
    """`orchestra serve` on the demonstration model: one worker of one rank, in fp32."""
    with start_serve(DEMO, "--dtype", "float32", "--num-blocks", "512") as running:
        yield running
