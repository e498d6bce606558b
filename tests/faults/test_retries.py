"""What goes wrong before the first byte is another engine's turn; what goes wrong everywhere is said at once."""

from collections.abc import Callable

import pytest

from tests.faults.clients import Asked, assert_whole, is_right, post, stream
from tests.faults.conftest import PACED, Fleet, StartFleet
from tests.faults.processes import eventually

# Faults before anything was sent, and what else they need.
EARLY: dict[str, dict[str, object]] = {
    "reset": {},
    "fin": {},
    "garbage_json": {},
    "truncated": {},
    "500": {"fault": "status", "status": 500},
    "503": {"fault": "status", "status": 503},
    "429": {"fault": "status", "status": 429},
    "hang_headers": {},
}
OF_WHOLE_ANSWERS = ("garbage_json", "truncated")
SHORT = ("--engine-ttft-timeout", "500ms", "--engine-answer-timeout", "500ms")


def ask_until_it_happens(fleet: Fleet, name: str, ask: Callable[[Asked], None]) -> None:
    """Spoils one request; asks, each time for something else, until it was, with a right answer each time."""
    ask(Asked(5))
    # Where all are idle and know nothing of a prompt, the one that was chosen before may be for ever.
    (favourite,) = (engine for engine in fleet.engines if engine.counters()["requests"])
    favourite.arm(**{"fault": name, **EARLY[name]})  # type: ignore[arg-type]
    for number in range(200):
        ask(Asked(5, text=f"{number} is the number."))
        if fleet.sum("faults") == 1:
            return
    pytest.fail("the engine that was to fail got no request")


@pytest.mark.parametrize("name", EARLY)
def test_one_bad_engine_is_not_noticed_in_whole_answers(start: StartFleet, name: str) -> None:
    fleet = start(2, (), SHORT)

    def ask(asked: Asked) -> None:
        assert is_right(fleet.router, asked)

    ask_until_it_happens(fleet, name, ask)


@pytest.mark.parametrize("name", [name for name in EARLY if name not in OF_WHOLE_ANSWERS])
def test_one_bad_engine_is_not_noticed_in_streams(start: StartFleet, name: str) -> None:
    fleet = start(2, (), SHORT)

    def ask(asked: Asked) -> None:
        assert_whole(stream(fleet.router, asked), asked)

    ask_until_it_happens(fleet, name, ask)


@pytest.mark.parametrize("status", [500, 503, 429])
def test_what_all_engines_answer_is_passed_on_after_few_tries(
    start: StartFleet, status: int
) -> None:
    fleet = start()
    for engine in fleet.engines:
        engine.arm("status", status=status, count=0)
    answered, body, _ = post(fleet.router, Asked(5))
    # An engine that is overloaded or broken is never the client's own fault.
    assert answered in {500: (500, 502), 503: (503,), 429: (429, 503)}[status]
    assert body["error"]["message"]
    assert 1 <= fleet.sum("requests") <= 3


@pytest.mark.parametrize("fault", ["reset", "fin"])
def test_when_all_engines_break_no_address_leaks(start: StartFleet, fault: str) -> None:
    fleet = start()
    for engine in fleet.engines:
        engine.arm(fault, count=0)
    status, body, _ = post(fleet.router, Asked(5))
    assert status in (502, 503)
    assert "127.0.0.1" not in str(body)
    assert 1 <= fleet.sum("requests") <= 3


def test_bad_requests_are_no_engine_s_fault(start: StartFleet) -> None:
    fleet = start()
    for engine in fleet.engines:
        engine.arm("status", status=400, count=0)
    for _ in range(30):
        assert post(fleet.router, Asked(5))[0] == 400
    # Nobody tried a second engine for what is wrong with the request.
    assert fleet.sum("requests") == 30
    for engine in fleet.engines:
        engine.disarm()
    assert all(is_right(fleet.router, Asked(5)) for _ in range(5))


def test_a_sick_pool_is_not_hammered(start: StartFleet) -> None:
    fleet = start()
    for engine in fleet.engines:
        engine.arm("status", status=500, count=0)
    for _ in range(40):
        assert post(fleet.router, Asked(5))[0] >= 500
    # Breakers and the retry budget: far from the 120 of three tries each.
    assert fleet.sum("requests") <= 70
    for engine in fleet.engines:
        engine.disarm()
    eventually(lambda: is_right(fleet.router, Asked(5)))


def test_the_body_reaches_the_engine_unchanged(start: StartFleet) -> None:
    fleet = start(1)
    asked = Asked(3, more={"unknown": {"b": [1.50, "é"], "a": None}, "n": 1})
    assert is_right(fleet.router, asked)
    assert fleet.engines[0].last()[1] == asked.body()
    told = stream(fleet.router, asked)
    assert_whole(told, asked)


def test_a_slow_reader_loses_nothing_and_stops_nobody(start: StartFleet) -> None:
    fleet = start(1, ("--words", "65536"))
    slow = Asked(60_000)
    last = 0

    def engine_waits() -> bool:
        nonlocal last
        before, last = last, fleet.engines[0].counters()["words"]
        return bool(last == before)

    def pause() -> None:
        # The engine has more to say than all buffers on the way hold; once they are full, it has to wait.
        eventually(engine_waits)
        assert last < slow.num_words
        assert is_right(fleet.router, Asked(5))

    told = stream(fleet.router, slow, pause)
    assert_whole(told, slow)


def test_answers_that_are_as_slow_as_engines_are(start: StartFleet) -> None:
    fleet = start(2, PACED)
    asked = Asked(10)
    told = stream(fleet.router, asked)
    assert_whole(told, asked)
    assert len(told.times) == 10
