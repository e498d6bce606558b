"""The experts of a mixture by Triton kernels, on NVIDIA GPUs: nothing that the host would have to wait for."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from orchestra.worker import experts_triton_kernels as kernels
from orchestra.worker import row_triton
from orchestra.worker.attention_triton import DTYPES
from orchestra.worker.loader import empty_weight

_MIX_BLOCK = 1024


@dataclass(frozen=True)
class Tiles:
    """How products are cut, for one number of pairs."""

    rows: int
    """Pairs of a tile, a power of two from 16 on."""
    columns: int
    """Outputs of a tile, likewise."""
    depth: int
    """Inputs that are multiplied at a time, likewise."""
    num_stages: int

    @classmethod
    def of(cls, pairs: int, experts: int, dtype: torch.dtype) -> "Tiles":
        """Small tiles where experts have few rows, and weights take the time; estimates, to be measured."""
        is_few = pairs <= 32 * experts
        if dtype == torch.float32:
            return cls(16 if is_few else 32, 64, 32, 2)
        return cls(16, 64, 128, 3) if is_few else cls(64, 128, 64, 3)


@dataclass(frozen=True)
class _Runs:
    """The pairs of token and pick, sorted by expert, on the device."""

    order: Tensor
    """`int64[pairs]`: the pair at each place."""
    starts: Tensor
    """`int64[experts + 1]`: where the runs of this rank's experts begin, and where the last one ends."""
    tile_ends: Tensor
    """`int64[experts]`: tiles up to the end of each run."""
    num_tiles: int
    """As many as there can be."""


class TritonExperts:
    """See `experts.Experts`.

    Args:
        first: number of the rank's first expert.
        gate_up: `[experts, 2 * width, H]`, gates and values side by side.
        down: `[experts, H, width]`
        activation: applied to the gates; one of `layers.ACTIVATIONS`.
    """

    def __init__(self, first: int, gate_up: Tensor, down: Tensor, activation: str) -> None:
        self._first = first
        self._gate_up = gate_up
        self._down = down
        self._activation = activation
        # Numbers that an expert's run begins behind, and those of the last one end before.
        self._bounds = torch.arange(first, first + len(down) + 1, device=down.device)

    @classmethod
    def stack(
        cls, first: int, count: int, weights: Iterable[tuple[Tensor, Tensor]], activation: str
    ) -> "TritonExperts":
        """Copies the weights of experts one after the other into tensors of all of them.

        Args:
            first: number of the rank's first expert.
            count: how many are to come, at least one.
            weights: gates and values side by side, and what follows.
            activation: applied to the gates.
        """
        stacks: tuple[Tensor, Tensor] | None = None
        for place, (gate_up, down) in enumerate(weights):
            stacks = stacks or (_stack_of(count, gate_up), _stack_of(count, down))
            stacks[0][place] = gate_up
            stacks[1][place] = down
        assert stacks is not None
        return cls(first, *stacks, activation)

    def __call__(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """See `experts.Experts`; `chosen` are `int64`."""
        x = x.contiguous()
        picks, hidden = chosen.shape[1], x.shape[1]
        tiles = Tiles.of(chosen.numel(), len(self._down), x.dtype)
        runs = self._sort(chosen, tiles)
        gates = self._project(x, self._gate_up, runs, tiles, picks=picks)
        rows = self._project(
            row_triton.gate(gates, self._activation), self._down, runs, tiles, picks=0
        )
        return _mix(rows.view(len(x), picks, hidden), weights, chosen, self._first, len(self._down))

    def _sort(self, chosen: Tensor, tiles: Tiles) -> _Runs:
        numbers, order = chosen.flatten().sort(stable=True)
        starts = torch.searchsorted(numbers, self._bounds)
        tile_ends = (starts.diff() + (tiles.rows - 1)).div_(tiles.rows, rounding_mode="floor")
        # No more of them are cut than have pairs.
        most = len(order) // tiles.rows + min(len(order), len(self._down))
        return _Runs(order, starts, tile_ends.cumsum(0), most)

    def _project(
        self, x: Tensor, weight: Tensor, runs: _Runs, tiles: Tiles, *, picks: int
    ) -> Tensor:
        """One layer of all pairs.

        Args:
            x: of tokens, where each has `picks`; with 0 of pairs in the sorted order, and the result is in their own.
            weight: of all experts.
            runs: which pairs each has.
            tiles: how products are cut.
            picks: see `x`.
        """
        experts, outputs, inputs = weight.shape
        # Rows of other ranks' experts stay as they are, and what follows computes with them: they are some numbers.
        y = x.new_zeros(len(runs.order), outputs)
        kernels.project[(triton.cdiv(outputs, tiles.columns), runs.num_tiles)](
            *(y, x, weight, runs.order, runs.starts, runs.tile_ends),
            DIVISOR=picks,
            IS_SCATTERED=picks == 0,
            EXPERTS=experts,
            EXPERTS_PADDED=triton.next_power_of_2(experts),
            INPUTS=inputs,
            OUTPUTS=outputs,
            ROWS=tiles.rows,
            COLUMNS=tiles.columns,
            DEPTH=tiles.depth,
            IS_INTERPRETED=x.device.type != "cuda",
            num_warps=4,
            num_stages=tiles.num_stages,
        )
        return y


def mix(rows: Tensor, weights: Tensor) -> Tensor:
    """See `expert_exchange.Mix`."""
    anyone = torch.zeros_like(weights, dtype=torch.int64)
    return _mix(rows, weights, anyone, 0, 1)


def _mix(rows: Tensor, weights: Tensor, chosen: Tensor, first: int, count: int) -> Tensor:
    """Adds up those rows of each token whose experts are among `count` from `first` on."""
    tokens, picks, hidden = rows.shape
    y = rows.new_empty(tokens, hidden)
    kernels.mix[(tokens, triton.cdiv(hidden, _MIX_BLOCK))](
        *(y, rows, weights.contiguous(), chosen.contiguous(), first, count),
        PICKS=picks,
        SIZE=hidden,
        BLOCK=_MIX_BLOCK,
    )
    return y


def _stack_of(count: int, like: Tensor) -> Tensor:
    return empty_weight([count, *like.shape], like.dtype, like.device)


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether there are such kernels: on NVIDIA GPUs of compute capability 8.0 or newer, for fp32, bf16 and fp16."""
    return device.type == "cuda" and dtype in DTYPES and row_triton.is_new_enough(device)
