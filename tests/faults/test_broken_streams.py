"""A stream whose engine breaks in the middle is continued on another one: the client sees a pause."""

import signal
from collections.abc import Callable

import pytest

from tests.faults.clients import CHAT, Asked, assert_whole, stream
from tests.faults.conftest import PACED, StartFleet
from tests.faults.processes import Engine

COMPLETIONS = "/v1/completions"
BREAK: dict[str, Callable[[Engine], None]] = {
    "killed": Engine.kill,
    "stopped": lambda engine: engine.send_signal(signal.SIGSTOP),
    **{
        fault: lambda engine, fault=fault: engine.arm(fault, now=True)  # type: ignore[misc]
        for fault in (
            "reset",
            "fin",
            "exit",
            "garbage",
            "garbage_chunk",
            "truncated",
            "early_end",
            "hang_stream",
        )
    },
}
SHORT = ("--engine-stall-timeout", "500ms")


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("how", BREAK)
def test_every_word_comes_once_and_in_order(start: StartFleet, how: str, path: str) -> None:
    fleet = start(2, PACED, SHORT)
    asked = Asked(60, path)
    told = stream(fleet.router, asked, lambda: BREAK[how](fleet.busy()))
    assert_whole(told, asked)
    assert fleet.router.is_ready()


def test_a_stream_outlives_one_engine_after_another(start: StartFleet) -> None:
    fleet = start(2, PACED)
    asked = Asked(120)

    def restart() -> None:
        broken = fleet.busy()
        broken.kill()
        broken.start()
        fleet.busy().arm("reset", after_events=0, now=True)

    assert_whole(stream(fleet.router, asked, restart), asked)


def test_with_no_engine_left_the_client_is_told_so(start: StartFleet) -> None:
    fleet = start(1, PACED, ("--replay-wait", "500ms"))
    asked = Asked(60)
    told = stream(fleet.router, asked, fleet.engines[0].kill)
    assert told.status == 200
    assert asked.answer.startswith(told.text)
    assert len(told.errors) == 1
    assert told.errors[0]["code"] in ("worker_failed", "no_workers")
    assert fleet.engines[0].url not in str(told.errors)
    # The body is whole, and says that the answer is not.
    assert (told.is_cut, told.finish) == (False, [])
