"""Engines that die, hang and come back; clients that leave."""

import contextlib
import http.client
import json
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.faults.clients import CHAT, Asked, events, is_right, raw, request_head
from tests.faults.conftest import PACED, Fleet, StartFleet
from tests.faults.processes import Engine, eventually


def test_one_killed_engine_costs_no_request(start: StartFleet) -> None:
    fleet = start()
    assert is_right(fleet.router, Asked(5))
    fleet.engines[0].kill()
    assert all(is_right(fleet.router, Asked(5)) for _ in range(20))


def test_the_engine_that_knows_the_prompt_is_not_tried_when_it_is_dead(start: StartFleet) -> None:
    fleet = start()
    prompt = "The same long beginning. " * 100
    assert is_right(fleet.router, Asked(5, text=prompt))
    (hot,) = (engine for engine in fleet.engines if engine.counters()["requests"])
    hot.kill()
    assert all(is_right(fleet.router, Asked(5, text=prompt)) for _ in range(30))


def gets_requests(fleet: Fleet, engine: Engine) -> bool:
    """Asks for something new; whether the engine has been asked since it was started."""
    assert is_right(fleet.router, Asked(3, text=f"{time.monotonic()} is new."))
    return bool(engine.counters()["requests"])


def test_a_restarted_engine_is_used_again(start: StartFleet) -> None:
    fleet = start()
    engine, other = fleet.engines
    engine.kill()
    assert is_right(fleet.router, Asked(5))
    # One that is busy is no better choice than one that has just come back.
    other.arm("hold")
    with ThreadPoolExecutor() as pool:
        held = pool.submit(is_right, fleet.router, Asked(5))
        eventually(lambda: other.counters()["running"] == 1)
        engine.start()
        # The rivals take a minute.
        eventually(lambda: gets_requests(fleet, engine), timeout_s=5)
        other.disarm()
        assert held.result()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_ready_tells_the_truth(start: StartFleet, how: signal.Signals) -> None:
    fleet = start()
    assert fleet.router.is_ready()
    for engine in fleet.engines:
        engine.send_signal(how)
    began = time.monotonic()
    eventually(lambda: not fleet.router.is_ready())
    told_after = time.monotonic() - began
    # A second is the promise for one that hangs; a dead one is seen at once. The rest is this machine's.
    assert told_after < 3
    engine = fleet.engines[1]
    if how == signal.SIGKILL:
        engine.kill()
        engine.start()
    else:
        engine.send_signal(signal.SIGCONT)
    eventually(fleet.router.is_ready, timeout_s=5)
    assert is_right(fleet.router, Asked(5))


def test_with_all_engines_dead_the_answer_says_when_to_come_again(start: StartFleet) -> None:
    fleet = start()
    for engine in fleet.engines:
        engine.kill()
    eventually(lambda: not fleet.router.is_ready())
    connection = http.client.HTTPConnection(*fleet.router.address, timeout=30)
    with contextlib.closing(connection):
        connection.request("POST", CHAT, Asked(5).body(), {"content-type": "application/json"})
        answer = connection.getresponse()
        error = json.loads(answer.read())["error"]
    assert (answer.status, error["code"]) == (503, "no_workers")
    assert int(answer.headers["retry-after"]) >= 1


# What the engine does when its client leaves: fault, and whether a stream was asked for.
SITUATIONS = {
    "words flow": (None, True),
    "the stream is silent": ("hang_stream", True),
    "no head has come": ("hang_headers", True),
    "no whole answer has come": ("hang_headers", False),
}


def leave(fleet: Fleet, fault: str | None, *, streams: bool) -> float:
    """Asks, leaves in the middle, and returns how long the engine was not told, in seconds."""
    engine = fleet.engines[0]
    if fault:
        engine.arm(fault, after_events=2 if fault == "hang_stream" else 0)
    gone = engine.counters()["client_gone"]
    asked = Asked(1000)
    with raw(fleet.router) as connection:
        body = asked.body(stream=streams)
        connection.sendall(request_head(CHAT, len(body)) + body)
        eventually(lambda: engine.counters()["running"] == 1)
        if streams and fault != "hang_headers":
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            said = events(answer)
            # Until two words are here.
            for _ in range(3):
                next(said)
            # It holds the socket open as well.
            answer.close()
        connection.close()
        left = time.time()
    eventually(lambda: engine.counters()["client_gone"] == gone + 1)
    return float(engine.counters()["client_gone_unix_ms"][-1]) / 1e3 - left


@pytest.mark.parametrize("situation", SITUATIONS)
def test_an_engine_is_told_when_its_client_leaves(start: StartFleet, situation: str) -> None:
    fault, streams = SITUATIONS[situation]
    fleet = start(1, PACED)
    # The best of three: what a busy machine adds is not the router's.
    assert min(leave(fleet, fault, streams=streams) for _ in range(3)) < 0.1
    assert fleet.engines[0].counters()["completed"] == 0
    eventually(lambda: fleet.router.metric("orchestra_requests_running") == 0)
