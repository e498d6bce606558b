"""Records what a computation of our kernels calls, so that it can be repeated without Python between the calls.

What CUDA graphs are to a GPU: of a decode step of a small model a fifth was Python that called the kernels. While a
`Recorder` is entered, kernels note their calls instead of computing; tensors are made in memory that the recording
keeps, where no two that are needed at a time lie on each other; and whatever torch itself would compute is refused.
Sums over memory that the ranks share are kernels too; others stand between the kernels' calls, and are called anew each
time.
"""

import math
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from orchestra import _core
from orchestra.errors import InternalError
from orchestra.worker.parallel import Communicator
from orchestra.worker.plan_socket import RankLostError
from orchestra.worker.renewable_group import RenewableGroup
from orchestra.worker.shared_group import SharedMemoryGroup

# Where buffers begin: at the kernels' widest vectors, and at cache lines.
_ALIGNMENT = 64

# What may be asked of a tensor while a recorder is entered, and which views may be made of it, by the names of torch's
# functions and methods. `__get__` are all properties.
_ALLOWED = frozenset(
    [
        *("__get__", "__getitem__", "__len__", "chunk", "contiguous", "data_ptr", "dim"),
        *("element_size", "flatten", "is_contiguous", "numel", "reshape", "size", "split"),
        *("squeeze", "stride", "unsqueeze", "view", "view_as_complex", "view_as_real"),
    ]
)

Part = Callable[[int], None]
"""Some of a recording's calls, for so many rows."""


class NotRecordableError(Exception):
    """A computation does something that is not one of our kernels."""


class _Thread(threading.local):
    """What is said of one thread."""

    recorder: "Recorder | None" = None


_here = _Thread()


class Buffers:
    """Memory for the tensors of a recording: what a tensor had goes to a later one of the same size.

    A tensor's memory is free when nothing in Python has it, nor a view of it.
    """

    def __init__(self) -> None:
        self._free: defaultdict[int, list[np.ndarray[Any, Any]]] = defaultdict(list)
        self._at: dict[int, np.ndarray[Any, Any]] = {}

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor without gaps, of whatever numbers."""
        count = math.prod(shape)
        size = count * dtype.itemsize
        free = self._free[size]
        memory = free.pop() if free else self._allocate(size)
        # The tensor keeps this view, and only it: the end of the one is the end of the other.
        view = memory.view()
        weakref.finalize(view, free.append, memory)
        return torch.frombuffer(view, dtype=dtype, count=count).view(*shape)

    def alias(self, tensor: Tensor) -> Tensor:
        """The same tensor, which does not keep its memory from being taken again."""
        memory = self._at[tensor.data_ptr()]
        return torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel()).view_as(tensor)

    def _allocate(self, size: int) -> np.ndarray[Any, Any]:
        room = np.zeros(size + _ALIGNMENT, np.uint8)
        begin = -room.ctypes.data % _ALIGNMENT
        memory = room[begin : begin + size]
        self._at[memory.ctypes.data] = memory
        return memory


class Recorder(TorchFunctionMode):
    """Records what a thread computes: `with Recorder(rows, buffers) as recorder: …`, then `recorder.parts`.

    Args:
        rows: of the tensors, in their first dimension; a part can be called for fewer.
        buffers: where the tensors go.

    Raises:
        NotRecordableError: from inside, where the computation is not of our kernels alone.
    """

    def __init__(self, rows: int, buffers: Buffers) -> None:
        super().__init__()
        self.parts: list[Part] = []
        """The calls in their order; the recorded tensors have to be kept for as long."""
        self._rows = rows
        self._buffers = buffers

    def __enter__(self) -> Self:
        """Begins."""
        _core.begin_recording(self._rows)
        _here.recorder = self
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends."""
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        _here.recorder = None
        self._end_part()

    def all_reduce(self, communicator: Communicator, tensor: Tensor) -> None:
        """Notes that `tensor` is to be added up over the ranks."""
        if _is_kernel(communicator):
            communicator.all_reduce(tensor)
            return
        self._end_part()
        with torch._C.DisableTorchFunction():
            whole = self._buffers.alias(tensor)
        self.parts.append(lambda rows: communicator.all_reduce(whole[:rows]))
        _core.begin_recording(self._rows)

    def _end_part(self) -> None:
        program = _core.end_recording()
        if len(program):
            self.parts.append(partial(_run, program))

    def __torch_function__(
        self,
        function: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Makes tensors, and views of them."""
        kwargs, name = kwargs or {}, function.__name__
        if name in ("new_empty", "empty_like"):
            like, *sizes = args
            shape = sizes if name == "new_empty" else like.shape
            return self._buffers.take(shape, kwargs.get("dtype") or like.dtype)
        if name not in _ALLOWED:
            raise NotRecordableError(f"torch computes {name}")
        result = function(*args, **kwargs)
        parts = result if isinstance(result, (list, tuple)) else [result]
        views = [part for part in parts if isinstance(part, Tensor)]
        if any(_memory(view) != _memory(args[0]) for view in views):
            raise NotRecordableError(f"torch copies in {name}")
        return result


def _memory(tensor: Tensor) -> int:
    """Where the memory begins that a tensor is a view of."""
    return tensor.untyped_storage().data_ptr()


def _is_kernel(communicator: Communicator) -> bool:
    """Whether its collectives are calls that are noted."""
    if isinstance(communicator, RenewableGroup):
        communicator = communicator.group
    return isinstance(communicator, SharedMemoryGroup)


def _run(program: _core.KernelProgram, rows: int) -> None:
    try:
        program.run(rows)
    except InternalError as error:
        # What ends a sum is that a rank is lost, or was given up for lost; no other kernel fails.
        raise RankLostError(str(error)) from error


def gather_columns(communicator: Communicator, tensor: Tensor) -> Tensor | None:
    """Joins the ranks' columns (see `Communicator`); where a step is recorded, when that is repeated.

    Raises:
        NotRecordableError: a step is recorded, and the ranks do not do so by a kernel.
    """
    if _here.recorder is not None and not _is_kernel(communicator):
        raise NotRecordableError("the ranks gather by other means than a kernel")
    return communicator.gather_columns(tensor)


def all_reduce(communicator: Communicator, tensor: Tensor) -> None:
    """Replaces `tensor` by its sum over all ranks; where a step is recorded, when that is repeated."""
    if _here.recorder is None:
        communicator.all_reduce(tensor)
    else:
        _here.recorder.all_reduce(communicator, tensor)
