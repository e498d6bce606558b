"""Decode steps that were recorded once and are replayed: one launch instead of some hundred.

A decode step of a small batch takes the GPU less time than Python takes to launch its kernels. So the forward pass is
recorded as a CUDA graph for a few batch sizes, with inputs at fixed addresses (`DecodeInputs`); a step takes the next
larger size, and the rows behind its sequences pad: they write no KV and see none.

Steps with prompts, or that another worker waits for, are computed as usual.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from orchestra.worker.attention import AttentionBackend
from orchestra.worker.decode_inputs import DecodeInputs
from orchestra.worker.drawn import LatestTokens
from orchestra.worker.logits import WholeLogits
from orchestra.worker.models import Model
from orchestra.worker.plan import StepPlan

# Above these, every multiple of `_SIZE_STEP`.
_SMALL_SIZES = (1, 2, 4, 8)
_SIZE_STEP = 16

Compute = Callable[[], Tensor | None]
"""Runs a forward pass over inputs that lie where they lie, into an output that does too."""
Record = Callable[[Compute], Compute]
"""Makes of a computation what repeats it."""


class RecordableAttention(AttentionBackend, Protocol):
    """An attention backend whose decode steps can be recorded."""

    def prepare_padded(self, inputs: DecodeInputs, size: int, longest: int) -> Callable[[], None]:
        """Prepares for a step of `size` sequences whose arrays may change, of at most `longest` tokens each.

        Returns:
            What has the layers that are computed next be those of this step. It holds arrays that a recording reads,
            and is to be kept for as long.
        """
        ...


def decode_sizes(max_num_seqs: int) -> list[int]:
    """The batch sizes to record: little padding for a few graphs."""
    sizes = [*_SMALL_SIZES, *range(_SIZE_STEP, max_num_seqs, _SIZE_STEP)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


class DecodeGraphs:
    """Recorded decode steps of one rank.

    Args:
        model: this rank's part.
        attention: over this rank's cache.
        inputs: where the steps' arrays go; it has room for the largest size.
        sizes: batch sizes, ascending.
        longest: sequence that will ever run, tokens.
        record: what records, `CudaRecorder` on a GPU.
    """

    def __init__(
        self,
        model: Model,
        attention: RecordableAttention,
        inputs: DecodeInputs,
        sizes: Sequence[int],
        longest: int,
        record: Record,
    ) -> None:
        self._model = model
        self._attention = attention
        self._inputs = inputs
        self._sizes = list(sizes)
        self._longest = longest
        self._record = record
        self._replays: dict[int, Compute] = {}
        self._kept: list[Callable[[], None]] = []

    def forget(self) -> None:
        """See `RecordedSteps`."""
        self._replays.clear()
        self._kept.clear()

    @torch.inference_mode()
    def record(self) -> None:
        """Records every size, the largest first: the others then fit the memory that it took."""
        self.forget()
        self._inputs.clear()
        shared: Tensor | None = None
        for size in reversed(self._sizes):
            begin = self._attention.prepare_padded(self._inputs, size, self._longest)
            self._kept.append(begin)
            self._replays[size] = self._record(partial(self._compute, begin, size, shared))
            # The logits of every size go where those of the largest are: each in memory of its own, they would take
            # as much as many KV blocks.
            if size == self._sizes[-1]:
                shared = self._replays[size]()

    def takes(self, plan: StepPlan) -> bool:
        """See `RecordedSteps`."""
        is_recorded = bool(self._replays) and 0 < len(plan.token_ids) <= self._sizes[-1]
        return is_recorded and plan.draws_from_all and not plan.fills_blocks

    def run(self, plan: StepPlan, latest: LatestTokens | None = None) -> WholeLogits | None:
        """See `RecordedSteps`."""
        count = len(plan.context_lens)
        size = self._sizes[bisect_left(self._sizes, count)]
        self._inputs.fill(plan)
        if latest is not None:
            latest.fill(self._inputs.token_ids, plan.pending)
        logits = self._replays[size]()
        return None if logits is None else WholeLogits(logits[:count])

    def _compute(
        self, begin: Callable[[], None], size: int, target: Tensor | None
    ) -> Tensor | None:
        """The forward pass of `size` rows; the logits are copied to `target`, where there is one."""
        begin()
        token_ids, positions = self._inputs.token_ids[:size], self._inputs.positions[:size]
        shared = self._model.forward(token_ids, positions, self._attention, None)
        logits = None if shared is None else shared.whole()
        return logits if logits is None or target is None else target[:size].copy_(logits)


class CudaRecorder:
    """Records CUDA graphs, which share one pool of memory: no two of them run at the same time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, compute: Compute) -> Compute:
        """Runs a computation once, so that its kernels are built and its libraries have their memory; then records it.

        Returns:
            What replays it; the output lies where it lay when it was recorded.
        """
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            compute()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        # What other threads ask the driver meanwhile, like NCCL's watchdog, spoils nothing.
        mode = "thread_local"
        with torch.cuda.graph(graph, self._pool, stream, capture_error_mode=mode):
            output = compute()

        def replay() -> Tensor | None:
            graph.replay()
            return output

        return replay
