"""Each request's two ends: what its client saw, and the line that the router's access log has of it."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path

from tests.faults.processes import eventually

# Of each way to be wrong, so many are described.
MAX_SHOWN = 5


class End(IntEnum):
    """How a request ended for its client."""

    OPEN = 0
    # Every word, once and in its place, and a proper end.
    WHOLE = 1
    # 429: the queue, or the tenant's part of it, is full.
    REFUSED = 2
    # The client left after some of a stream.
    LEFT = 3
    # The client left before anything came.
    LEFT_EARLY = 4
    # None of these.
    WRONG = 5


class Ledger:
    """Requests by their numbers, a byte for each fact, so that a long run costs no memory to speak of."""

    def __init__(self) -> None:
        self.ends = array("B")
        self.lines = array("B")
        self.statuses = array("H")
        # Descriptions of what is wrong, the first of each sort.
        self.shown: Counter[str] = Counter()
        self.wrong: list[str] = []

    def begin(self) -> int:
        """The number of a new request."""
        for facts in (self.ends, self.lines, self.statuses):
            facts.append(0)
        return len(self.ends) - 1

    def end(self, number: int, end: End, told: str = "") -> None:
        """What its client saw."""
        if self.ends[number] != End.OPEN:
            self.complain("ended twice for its client", number)
        self.ends[number] = end
        if end is End.WRONG:
            self.complain("no proper end", number, told)

    def take(self, line: str) -> None:
        """A line of the access log."""
        said = json.loads(line)
        if not said["request_id"].isdigit():
            self.complain("a line without a request", -1, said["request_id"])
            return
        number = int(said["request_id"])
        self.lines[number] += 1
        self.statuses[number] = said["status"]
        if self.lines[number] > 1:
            self.complain("ended twice for the router", number)

    def check(self) -> Counter[str]:
        """Compares both sides of every request; how many ended how."""
        counts: Counter[str] = Counter()
        for number, (end, lines) in enumerate(zip(self.ends, self.lines, strict=True)):
            counts[End(end).name.lower()] += 1
            status = self.statuses[number]
            if lines == 0:
                # Its connection may have been gone before the router had read a request from it.
                if end == End.LEFT_EARLY:
                    counts["unseen"] += 1
                else:
                    self.complain("no end for the router", number, End(end).name)
            elif end == End.OPEN:
                self.complain("no end for its client", number)
            elif status != {End.WHOLE: 200, End.LEFT: 200, End.REFUSED: 429}.get(End(end), status):
                self.complain("another end for the router", number, f"{End(end).name}, {status}")
        return counts

    def complain(self, what: str, number: int, more: str = "") -> None:
        """Counts something wrong, and describes it where there are not many of its sort yet."""
        self.shown[what] += 1
        if self.shown[what] <= MAX_SHOWN:
            self.wrong.append(f"request {number}: {what}{': ' if more else ''}{more}")


class AccessLog:
    """The router's access log, which is rotated as its documentation says."""

    def __init__(self, path: Path, ledger: Ledger) -> None:
        self.path = path
        self.ledger = ledger
        self.num_read = 0

    def read(self) -> None:
        """Takes the lines that are new and whole."""
        with self.path.open() as log:
            log.seek(self.num_read)
            text, end, _ = log.read().rpartition("\n")
            self.num_read += len(text) + len(end)
            for line in text.splitlines():
                self.ledger.take(line)

    def is_complete(self) -> bool:
        """Whether every request has its line by now."""
        self.read()
        return all(self.ledger.lines)

    def rotate(self, ask_for_it: Callable[[], None]) -> None:
        """Puts the file aside, has the router open a new one, and takes what the old one has."""
        old = self.path.with_suffix(".old")
        self.path.rename(old)
        ask_for_it()
        eventually(self.path.exists)
        self.path, new = old, self.path
        self.read()
        old.unlink()
        self.path, self.num_read = new, 0
