"""Processes kept ready to take the place of a lost rank: what a rank needs before its weights takes seconds."""

import asyncio
from collections.abc import Mapping
from typing import Any

from orchestra.serve.child import Child, describe_exit
from orchestra.serve.console import Console
from orchestra.serve.options import ServeOptions

STOP_GRACE_S = 5.0
# The next spare starts so long after one that was taken, which then has the cores for itself, or that ended.
PAUSE_S = 5.0


class Spares:
    """The spares of all workers of one `orchestra serve`.

    Args:
        options: what was asked for.
        router: where ranks attach, `host:port`.
        environment: added to ours; whoever is assigned gets that of its rank.
        console: for lines.
    """

    def __init__(
        self, options: ServeOptions, router: str, environment: Mapping[str, str], console: Console
    ) -> None:
        self.console = console
        self._options = options
        self._router = router
        self._environment = environment
        self._waiting: dict[Child, asyncio.Event] = {}

    def take(self) -> Child | None:
        """A process that is to be assigned; None: there is none."""
        if not self._waiting:
            return None
        child, is_taken = self._waiting.popitem()
        is_taken.set()
        return child

    async def run(self) -> None:
        """Keeps as many as were asked for, until cancelled."""
        await asyncio.gather(*(self._keep(number) for number in range(self._options.spare_ranks)))

    async def _keep(self, number: int) -> None:
        while True:
            child = await self._start(f"spare {number}")
            is_taken = self._waiting[child] = asyncio.Event()
            ended, taken = (
                asyncio.create_task(child.wait()),
                asyncio.create_task(is_taken.wait()),
            )
            try:
                await asyncio.wait({ended, taken}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                ended.cancel()
                taken.cancel()
                if not is_taken.is_set():
                    del self._waiting[child]
                    await child.stop(STOP_GRACE_S)
            if not is_taken.is_set():
                end = describe_exit(await child.wait())
                self.console.line(f"{child.name} {end}; starting another in {PAUSE_S:g} s")
            await asyncio.sleep(PAUSE_S)

    async def _start(self, name: str) -> Child:
        options = self._options
        command = [
            *["worker", str(options.model_dir), "--router", f"http://{self._router}", "--spare"],
            *options.worker_arguments,
        ]
        return await Child.start(
            *(name, command, self.console, _ignore, self._environment), is_spare=True
        )


def _ignore(_status: dict[str, Any]) -> None:
    """A spare has nothing to say but that it waits."""
