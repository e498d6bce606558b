"""Waiting in event loops for what the thread that drives a buffer manager does."""

import asyncio
import itertools
import threading
import weakref
from collections.abc import Callable

from orchestra import _core

__all__ = ["Doorbells"]

_EVENTS = 0
"""The number under which a chime tells of events."""


class Doorbells:
    """How the driving thread reaches event loops: a descriptor for each, so that it never needs the interpreter."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_loop: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Doorbell] = (
            weakref.WeakKeyDictionary()
        )

    def _here(self) -> "_Doorbell":
        loop = asyncio.get_running_loop()
        with self._lock:
            doorbell = self._by_loop.get(loop)
            if doorbell is None:
                doorbell = self._by_loop[loop] = _Doorbell()
            return doorbell

    async def wait(self, ask: Callable[[_core.Chime, int], bool]) -> None:
        """Asks to be told of one thing, and waits for it; `ask` says whether it is so already."""
        doorbell = self._here()
        number = next(doorbell.numbers)
        await doorbell.wait(number, lambda: ask(doorbell.chime, number))

    async def wait_for_events(self, listen: Callable[[_core.Chime], bool]) -> None:
        """Waits until there are events, or something has happened that makes it worth looking."""
        doorbell = self._here()
        await doorbell.wait(_EVENTS, lambda: listen(doorbell.chime))


class _Doorbell:
    """The waits of one event loop. The loop watches the chime while there are any, so nothing is left in it after."""

    def __init__(self) -> None:
        self.chime = _core.Chime()
        self.numbers = itertools.count(_EVENTS + 1)
        self._waits: dict[int, list[asyncio.Future[None]]] = {}

    async def wait(self, number: int, ask: Callable[[], bool]) -> None:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        if not self._waits:
            loop.add_reader(self.chime.fileno(), self._ring)
        waits = self._waits.setdefault(number, [])
        waits.append(future)
        try:
            if not ask():
                await future
        finally:
            waits.remove(future)
            if not waits:
                del self._waits[number]
            if not self._waits:
                loop.remove_reader(self.chime.fileno())

    def _ring(self) -> None:
        for number in self.chime.take():
            for future in self._waits.get(number, ()):
                if not future.done():
                    future.set_result(None)
