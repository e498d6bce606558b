"""Attention over the paged KV cache by Triton kernels: the backend of NVIDIA GPUs.

Without a GPU the kernels run in Triton's interpreter (`TRITON_INTERPRET=1`, set before Triton is imported), which is
slow and meant for tests.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from orchestra.worker import attention_triton_kernels as kernels
from orchestra.worker.attention import WatchedLayers
from orchestra.worker.attention_layout import with_whole_heads
from orchestra.worker.decode_inputs import DecodeInputs
from orchestra.worker.kv_cache import KvCacheSpec, PagedCache
from orchestra.worker.model_config import AttentionRule
from orchestra.worker.plan import StepPlan
from orchestra.worker.staging import Staging

DTYPES = {torch.float32, torch.bfloat16, torch.float16}
HEAD_DIM_UNIT, HEAD_DIM_MAX = 16, 256
# bf16 and asynchronous copies came with Ampere.
CAPABILITY_MIN = (8, 0)
# Tokens of the shortest split.
SPLIT = 256
# Sums of splits that one layer may keep: where a step would need more, each sequence is added up by one program.
SPLIT_SUM_BYTES_MAX = 64 << 20
# Programs of a decode step per multiprocessor that its splits are shared out for: enough to hide how unequal they are.
PROGRAMS_PER_PROCESSOR = 16

# More tokens than a sequence has, and little enough that a sum of two fits 32 bits.
_NO_WINDOW = 1 << 30
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Tuning:
    """How work is cut. Rows, keys and splits decide bits, so they are the same for every step; the rest does not."""

    rows: int
    """Query rows of a tile, a power of two from 16 on."""
    keys: int
    """Keys of a tile, likewise."""
    split: int
    """Tokens of the shortest split, a multiple of `keys`."""
    programs: int
    """How many programs a decode step is to have at least, where its splits are that many."""
    num_warps: int = 4
    num_stages: int = 2

    @classmethod
    def of(cls, spec: KvCacheSpec, device: torch.device) -> "Tuning":
        """What fits the registers and the shared memory (99 KB on the smallest GPUs) with keys and values in flight."""
        programs = _processors(device) * PROGRAMS_PER_PROCESSOR
        is_wide = spec.head_dim > 128
        if spec.dtype == torch.float32:
            return cls(16, 16 if is_wide else 32, SPLIT, programs)
        # With fewer warps, the sums of a tile and of a split do not fit the registers.
        num_warps = 4 if spec.head_dim <= 64 else 8
        if is_wide:
            return cls(64, 32, SPLIT, programs, num_warps)
        # Only the GPUs of data centres have room for a third pair of tiles.
        is_roomy = device.type == "cuda" and _shared_memory(device) >= 160 << 10
        return cls(64, 64, SPLIT, programs, num_warps, num_stages=3 if is_roomy else 2)


@dataclass(frozen=True)
class _Tiles:
    """Tiles of query rows, `int32[tiles]` each, on the device."""

    sequences: Tensor
    """Whose rows they are."""
    rows: Tensor
    """The first of them."""


@dataclass(frozen=True)
class _Step:
    """The arrays of one step, `int32`, on the device."""

    slots: Tensor
    query_start: Tensor
    context_lens: Tensor
    block_tables: Tensor
    table_width: Tensor
    decode_tiles: _Tiles
    """Of sequences of one token, which come first."""
    prefill_tiles: _Tiles
    num_decodes: int
    num_splits: int
    """Of the longest decoding sequence."""
    num_sharers: int
    """Programs that share the splits of a decoding sequence; with 1, none keeps sums of single splits."""


class TritonPagedAttention(WatchedLayers):
    """Kernels that read the cache in place; see `attention_triton_kernels` for how they add up.

    What a token gets depends on its sequence and its position alone: a decode step gives the sums of the prefill.

    Args:
        cache: this rank's.
        num_heads: query heads of this rank.
        device: of the tensors.
        rules: what each layer's tokens see and how scores are made; none: every layer is plain.
        tuning: of the launches.
    """

    def __init__(
        self,
        cache: PagedCache,
        num_heads: int,
        device: torch.device,
        rules: Sequence[AttentionRule] = (),
        tuning: "Tuning | None" = None,
    ) -> None:
        spec = cache.spec
        self._spec = spec
        self._num_heads = num_heads
        self._group = num_heads // spec.num_kv_heads
        self._layers = [cache.layer(index) for index in range(spec.num_layers)]
        self._rules = list(rules) or [AttentionRule()] * spec.num_layers
        self._device = device
        self._tuning = tuning or Tuning.of(spec, device)
        self._head_shape: dict[str, Any] = {
            "HEAD_DIM": spec.head_dim,
            "HEAD_DIM_PADDED": triton.next_power_of_2(spec.head_dim),
        }
        self._staging = Staging(device)
        self._step: _Step | None = None
        if device.type == "cuda":
            self.build()

    def build(self) -> None:
        """Has every kernel compiled, by a step that changes nothing: else the first long request would wait for it."""
        spec = self._spec
        inputs = DecodeInputs(1, 1, self._device)
        heads = torch.zeros(
            (1, self._num_heads + 2 * spec.num_kv_heads, spec.head_dim),
            dtype=spec.dtype,
            device=self._device,
        )
        for rule in set(self._rules):
            layer = self._rules.index(rule)
            # With one split, and with several.
            for longest in (1, 2 * self._tuning.split):
                self.prepare_padded(inputs, 1, longest)()
                self.forward(layer, heads[:, : self._num_heads], heads[:, self._num_heads :])
        self._step = None

    def prepare(self, plan: StepPlan) -> None:
        """Cuts the step into tiles and sends its arrays, all in one copy."""
        self._begin_step(plan)
        lengths = np.diff(plan.query_start)
        longer = np.flatnonzero(lengths != 1)
        num_decodes = int(longer[0]) if longer.size else len(lengths)
        sequences, rows = self._cut(lengths)
        num_tiles = int(np.searchsorted(sequences, num_decodes))
        width = plan.block_tables.shape[1]
        longest = int(plan.context_lens[:num_decodes].max(initial=1))
        sent = self._staging.send(
            [
                *(plan.slot_mapping, plan.query_start, plan.context_lens),
                *(plan.block_tables.reshape(-1), np.array([width])),
                *(sequences[:num_tiles], rows[:num_tiles]),
                # Backwards, so that a prompt's last tiles, which see most, are not what is waited for in the end.
                *(sequences[num_tiles:][::-1], rows[num_tiles:][::-1]),
            ]
        )
        slots, starts, lens, tables, columns, *tiles = sent
        decodes, prefills = _Tiles(*tiles[:2]), _Tiles(*tiles[2:])
        splits = self._splits(num_decodes, longest)
        arrays = (slots, starts, lens, tables, columns)
        self._step = _Step(*arrays, decodes, prefills, num_decodes, *splits)

    def prepare_padded(self, inputs: DecodeInputs, size: int, longest: int) -> Callable[[], None]:
        """Prepares to compute, and to record, a step of `size` sequences of one token whose arrays may change later.

        Args:
            inputs: where the arrays lie.
            size: sequences, those that pad among them.
            longest: sequence that will ever be there, tokens.

        Returns:
            What has `forward` compute this step from now on. It holds the arrays that do not change, and is to be kept
            for as long as a recording reads them.
        """
        arrays = np.arange(size + 1), *self._cut(np.ones(size, np.int64)), np.empty(0)
        starts, sequences, rows, nothing = (_constant(array, self._device) for array in arrays)
        step = _Step(
            inputs.slots[:size],
            starts,
            inputs.context_lens[:size],
            inputs.block_tables,
            inputs.table_width,
            _Tiles(sequences, rows),
            _Tiles(nothing, nothing),
            size,
            *self._splits(size, longest),
        )

        def begin() -> None:
            self._step, self._watched_step = step, None

        return begin

    def forward(self, layer: int, query: Tensor, key_value: Tensor) -> Tensor:
        """Computes one layer; see `AttentionBackend`."""
        step = self._step
        assert step is not None
        query, key_value = with_whole_heads(query), with_whole_heads(key_value)
        spec = self._spec
        tokens = query.shape[0]
        kernels.write_kv[(tokens,)](
            self._layers[layer],
            key_value,
            step.slots,
            key_value.stride(0),
            HEADS=2 * spec.num_kv_heads,
            HEADS_PADDED=triton.next_power_of_2(2 * spec.num_kv_heads),
            BLOCK_SIZE=spec.block_size,
            **self._head_shape,
        )
        self._announce(layer)
        output = query.new_empty(tokens, self._num_heads * spec.head_dim)
        if step.num_decodes and step.num_sharers > 1:
            self._attend_split(step, layer, query, output)
        elif step.num_decodes:
            self._attend(step, layer, query, output, step.decode_tiles)
        if len(step.prefill_tiles.rows):
            self._attend(step, layer, query, output, step.prefill_tiles)
        return output

    def _cut(self, lengths: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The tiles of sequences of so many new tokens: whose they are, and their first rows."""
        counts = -(-lengths.astype(np.int64) * self._group // self._tuning.rows)
        sequences = np.repeat(np.arange(len(counts)), counts)
        rows = np.arange(len(sequences)) - np.repeat(np.cumsum(counts) - counts, counts)
        return sequences, rows * self._tuning.rows

    def _attend_split(self, step: _Step, layer: int, query: Tensor, output: Tensor) -> None:
        """Decodes with the splits of each sequence shared out."""
        spec = self._spec
        shape = (step.num_decodes, self._num_heads, step.num_splits, spec.head_dim)
        sums = torch.empty(shape, dtype=torch.float32, device=self._device)
        stats = torch.empty((*shape[:3], 2), dtype=torch.float32, device=self._device)
        self._attend(step, layer, query, output, step.decode_tiles, (sums, stats))
        kernels.combine[(step.num_decodes, spec.num_kv_heads)](
            output,
            sums,
            stats,
            step.context_lens,
            step.num_splits,
            self._rules[layer].window or _NO_WINDOW,
            KV_HEADS=spec.num_kv_heads,
            GROUP=self._group,
            GROUP_PADDED=triton.next_power_of_2(self._group),
            SPLIT=self._tuning.split,
            **self._head_shape,
        )

    def _attend(
        self,
        step: _Step,
        layer: int,
        query: Tensor,
        output: Tensor,
        tiles: _Tiles,
        parts: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Computes some tiles: into `output`, or into the sums and statistics of splits."""
        rule, spec = self._rules[layer], self._spec
        scale = (1 / math.sqrt(spec.head_dim) if rule.scale is None else rule.scale) * _LOG2_E
        cap = 1.0
        if rule.soft_cap is not None:
            scale, cap = scale / _LOG2_E / rule.soft_cap, rule.soft_cap * _LOG2_E
        sharers = 1 if parts is None else step.num_sharers
        sums, stats = (output, output) if parts is None else parts
        kernels.attend[(len(tiles.rows), spec.num_kv_heads, sharers)](
            output,
            sums,
            stats,
            query,
            self._layers[layer],
            tiles.sequences,
            tiles.rows,
            step.query_start,
            step.context_lens,
            step.block_tables,
            step.table_width,
            query.stride(0),
            step.num_splits,
            rule.window or _NO_WINDOW,
            scale,
            cap,
            KV_HEADS=spec.num_kv_heads,
            GROUP=self._group,
            BLOCK_SIZE=spec.block_size,
            ROWS=self._tuning.rows,
            KEYS=self._tuning.keys,
            SPLIT=self._tuning.split,
            IS_SPLIT=parts is not None,
            HAS_WINDOW=rule.window is not None,
            HAS_CAP=rule.soft_cap is not None,
            IS_INTERPRETED=is_interpreted(),
            num_warps=self._tuning.num_warps,
            num_stages=self._tuning.num_stages,
            **self._head_shape,
        )

    def _splits(self, num_decodes: int, longest: int) -> tuple[int, int]:
        """How many splits the longest decoding sequence has, and how many programs share them."""
        count = kernels.split_of(max(longest, 1) - 1, self._tuning.split) + 1
        wanted = -(-self._tuning.programs // max(1, num_decodes * self._spec.num_kv_heads))
        size = num_decodes * self._num_heads * count * (self._spec.head_dim + 2) * 4
        return count, 1 if size > SPLIT_SUM_BYTES_MAX else max(1, min(wanted, count))


def obstacle(spec: KvCacheSpec, device: torch.device) -> str | None:
    """Why the kernels cannot compute over such a cache; None: they can."""
    if spec.dtype not in DTYPES:
        return f"the numbers are {spec.dtype}"
    if spec.head_dim % HEAD_DIM_UNIT or spec.head_dim > HEAD_DIM_MAX:
        unit, most = HEAD_DIM_UNIT, HEAD_DIM_MAX
        return f"heads of {spec.head_dim} are no multiple of {unit} up to {most}"
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        return None if found >= CAPABILITY_MIN else f"the GPU's compute capability is {found}"
    return None if is_interpreted() else "there is no GPU"


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels."""
    return not isinstance(kernels.attend, triton.JITFunction)


def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _shared_memory(device: torch.device) -> int:
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 0))


def _constant(array: NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(array.astype(np.int32)).to(device)
