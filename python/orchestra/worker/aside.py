"""What does work of a group of ranks in order while the thread that computes goes on."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch

Work = Callable[[], None]


class Aside(Protocol):
    """Does one piece of work after the other."""

    def start(self, work: Work) -> Callable[[], None]:
        """Begins work when what was begun before is done; what it returns waits for it, and raises what it raises."""
        ...


class ThreadAside:
    """A thread of its own, which a CPU's collectives spend waiting.

    Not those of gloo: it has two, which would add up two tensors at a time. The one that is needed first would then
    come when both are done.
    """

    def __init__(self) -> None:
        # It begins with the first work.
        self._pool = ThreadPoolExecutor(1, "orchestra-sums")

    def start(self, work: Work) -> Callable[[], None]:
        """See `Aside`."""
        return self._pool.submit(_infer, work).result


class StreamAside:
    """A stream of its own on a GPU: neither the thread nor the stream that computes waits before it has to.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def start(self, work: Work) -> Callable[[], None]:
        """See `Aside`; only the GPU waits."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work()
        done = self._stream.record_event()
        return lambda: torch.cuda.current_stream().wait_event(done)


def make_aside(device: torch.device) -> Aside:
    """What fits the device on which a group's tensors live."""
    return StreamAside(device) if device.type == "cuda" else ThreadAside()


@torch.inference_mode()
def _infer(work: Work) -> None:
    """The tensors of a step may be written to in this mode alone, which is a thread's own."""
    work()
