"""A streaming client that remembers who said what, when."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

ANSWER_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Change:
    """The answer was continued by another engine or worker."""

    # Who spoke before, and the time between its last piece and the next one, by the monotonic clock.
    speaker: str
    last_at: float
    gap_s: float


@dataclass
class Told:
    """One answer as its client got it."""

    status: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish: str = ""
    error: str = ""
    is_done: bool = False
    speaker: str = ""
    last_at: float = 0.0
    changes: list[Change] = field(default_factory=list)
    # Times between two pieces of one speaker, seconds.
    gaps: list[float] = field(default_factory=list)

    def take(self, event: dict[str, Any], speaker_of: Callable[[dict[str, Any]], str]) -> None:
        """One event, or a whole answer."""
        if "error" in event:
            self.error = str(event["error"].get("code"))
        for choice in event.get("choices", ()):
            inner = choice.get("delta") or choice.get("message") or {}
            piece = choice.get("text") or inner.get("content") or ""
            self.finish = choice.get("finish_reason") or self.finish
            self.token_ids += choice.get("token_ids") or ()
            if piece or choice.get("token_ids"):
                self.text += piece
                self._spoke(speaker_of(event))

    def _spoke(self, speaker: str) -> None:
        now = time.monotonic()
        if self.speaker:
            gap = now - self.last_at
            if speaker == self.speaker:
                self.gaps.append(gap)
            else:
                self.changes.append(Change(self.speaker, self.last_at, gap))
        self.speaker, self.last_at = speaker, now


async def ask(
    address: tuple[str, int],
    path: str,
    body: bytes,
    told: Told,
    speaker_of: Callable[[dict[str, Any]], str],
    headers: str = "",
) -> None:
    """Fills `told` in while the answer comes. What goes wrong is an `error` in it, never an exception.

    `headers` are further ones, each with its end of line.
    """
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{headers}"
    request = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            await _ask(address, request, told, speaker_of)
    except TimeoutError:
        told.error = "no answer in time"
    except (OSError, asyncio.IncompleteReadError, ValueError) as error:
        told.error = told.error or type(error).__name__


async def _ask(
    address: tuple[str, int],
    request: bytes,
    told: Told,
    speaker_of: Callable[[dict[str, Any]], str],
) -> None:
    reader, writer = await asyncio.open_connection(*address)
    with contextlib.closing(writer):
        writer.write(request)
        answer = (await reader.readuntil(b"\r\n\r\n")).lower()
        told.status = int(answer[9:12])
        if b"transfer-encoding: chunked" not in answer:
            length = int(answer.split(b"content-length:")[1].split(b"\r\n")[0])
            told.take(json.loads(await reader.readexactly(length)), speaker_of)
            told.is_done = not told.error
            return
        async for data in _events(reader):
            if data == b"[DONE]":
                told.is_done = True
            else:
                told.take(json.loads(data), speaker_of)


async def _events(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The data of each event of a chunked body."""
    buffer = b""
    while size := int(await reader.readuntil(b"\r\n"), 16):
        buffer += (await reader.readexactly(size + 2))[:-2]
        *events, buffer = buffer.split(b"\n\n")
        for event in events:
            if event.startswith(b"data: "):
                yield event[6:]
    await reader.readexactly(2)
