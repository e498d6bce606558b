"""Ten thousand requests that wait: all are answered, none twice, and one more is told to come again."""

import asyncio

import pytest

from tests.faults.clients import CHAT, Asked, is_right, post, request_head
from tests.faults.conftest import StartFleet
from tests.faults.processes import Router, eventually

QUEUED = 10_000
RUNNING = 8


async def ask(router: Router, asked: Asked) -> bytes:
    """A whole answer over a connection of its own."""
    reader, writer = await asyncio.open_connection(*router.address)
    body = asked.body()
    writer.write(request_head(CHAT, len(body), "connection: close") + body)
    answer = await reader.read()
    writer.close()
    return answer


@pytest.mark.timeout(120)
def test_ten_thousand_requests_wait_and_are_answered(start: StartFleet) -> None:
    limits = ("--max-concurrent-requests", str(RUNNING), "--max-queued-requests", str(QUEUED))
    fleet = start(1, (), (*limits, "--max-connections", "16384", "--engine-answer-timeout", "60s"))
    (engine,) = fleet.engines
    engine.arm("hold", count=RUNNING)
    asked = [Asked(2, text=f"{number}") for number in range(RUNNING + QUEUED)]

    def let_go() -> None:
        eventually(lambda: fleet.router.metric("orchestra_requests_waiting") == QUEUED, 60)
        # The queue is full: this one is refused at once, with the time to come again.
        status, body, headers = post(fleet.router, Asked(2))
        assert (status, body["error"]["code"]) == (429, "queue_full")
        assert int(headers["retry-after"]) >= 1
        engine.disarm()

    async def all_at_once() -> list[bytes]:
        asking = [asyncio.ensure_future(ask(fleet.router, one)) for one in asked]
        await asyncio.to_thread(let_go)
        return await asyncio.gather(*asking)

    answers = asyncio.run(all_at_once())
    wrong = [
        answer
        for answer, one in zip(answers, asked, strict=True)
        if not answer.startswith(b"HTTP/1.1 200 ") or one.answer.encode() not in answer
    ]
    assert wrong == []
    assert engine.counters()["requests"] == RUNNING + QUEUED
    assert is_right(fleet.router, Asked(2))
