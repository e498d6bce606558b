"""Attention over the paged KV cache by FlashInfer's kernels (Ye et al., 2025), where that library is installed.

Its pages are our blocks: `[num_blocks, 2, num_kv_heads, block_size, head_dim]` is what it calls HND. One kind of kernel
takes decodes and prompts together, planned once a step for each kind of layer. Splits of long contexts are off, so that
a sequence's sums do not depend on how many others a step has.
"""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from orchestra.worker.attention import WatchedLayers
from orchestra.worker.attention_layout import LayoutPlanner
from orchestra.worker.kv_cache import KvCacheSpec, PagedCache
from orchestra.worker.model_config import AttentionRule
from orchestra.worker.plan import Int32Array, StepPlan
from orchestra.worker.staging import send

DTYPES = {torch.bfloat16, torch.float16}
HEAD_DIMS = {64, 128, 256}
CAPABILITY_MIN = (8, 0)
# What the library advises; all kinds of layers take turns with it. It fits what is set aside for the keys and values
# that torch's attention gathers.
WORKSPACE_BYTES = 128 << 20


class Wrapper(Protocol):
    """What is used of `flashinfer.BatchPrefillWithPagedKVCacheWrapper`."""

    def plan(
        self,
        starts: Tensor,
        page_starts: Tensor,
        pages: Tensor,
        last_lengths: Tensor,
        /,
        **options: Any,
    ) -> None:
        """Lays a step out: first rows of sequences, then their pages as `pages_of` gives them, all `int32`."""
        ...

    def run(self, query: Tensor, cache: Tensor) -> Tensor:
        """Attends: `[T, num_heads, head_dim]` of both."""
        ...


MakeWrapper = Callable[[Tensor], Wrapper]


def make_wrapper(workspace: Tensor) -> Wrapper:
    """The library's own."""
    # Not declared by a stub, and installed only with the extra.
    import flashinfer  # type: ignore[import-not-found]

    wrapper: Wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
    return wrapper


class FlashInferPagedAttention(WatchedLayers):
    """The backend; see the module.

    Args:
        cache: this rank's.
        num_heads: query heads of this rank.
        device: of the tensors.
        rules: what each layer's tokens see and how scores are made; none: every layer is plain.
        make: what gives a wrapper over a workspace.
    """

    def __init__(
        self,
        cache: PagedCache,
        num_heads: int,
        device: torch.device,
        rules: Sequence[AttentionRule] = (),
        make: MakeWrapper = make_wrapper,
    ) -> None:
        spec = cache.spec
        self._spec = spec
        self._num_heads = num_heads
        self._device = device
        self._layers = [cache.layer(index) for index in range(spec.num_layers)]
        self._rules = list(rules) or [AttentionRule()] * spec.num_layers
        self._planner = LayoutPlanner(spec, num_heads // spec.num_kv_heads, device)
        workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self._wrappers = {rule: make(workspace) for rule in set(self._rules)}
        self._written = torch.empty(0, dtype=torch.int64)

    def prepare(self, plan: StepPlan) -> None:
        """Plans the step, once for each kind of layer."""
        self._begin_step(plan)
        self._written = self._planner.written(plan)
        page_start, pages, last_lengths = pages_of(plan, self._spec.block_size)
        # What is on the host is read there, and copied without waiting; the pages are only read on the device.
        arrays = (
            *(torch.from_numpy(plan.query_start), torch.from_numpy(page_start)),
            *(send(pages, self._device), torch.from_numpy(last_lengths)),
        )
        for rule, wrapper in self._wrappers.items():
            wrapper.plan(
                *arrays,
                num_qo_heads=self._num_heads,
                num_kv_heads=self._spec.num_kv_heads,
                head_dim_qk=self._spec.head_dim,
                page_size=self._spec.block_size,
                causal=True,
                sm_scale=rule.scale,
                # It counts the tokens before a token's own.
                window_left=-1 if rule.window is None else rule.window - 1,
                logits_soft_cap=rule.soft_cap,
                q_data_type=self._spec.dtype,
                disable_split_kv=True,
            )

    def forward(self, layer: int, query: Tensor, key_value: Tensor) -> Tensor:
        """Computes one layer; see `AttentionBackend`."""
        cache, head_dim = self._layers[layer], self._spec.head_dim
        vectors = key_value.reshape(-1, head_dim)
        cache.view(-1, head_dim).index_copy_(0, self._written, vectors)
        self._announce(layer)
        attended = self._wrappers[self._rules[layer]].run(query.contiguous(), cache)
        return attended.reshape(query.shape[0], -1)


def pages_of(plan: StepPlan, block_size: int) -> tuple[Int32Array, Int32Array, Int32Array]:
    """The blocks that a step's `S` sequences read, as FlashInfer counts them.

    Returns:
        `[S + 1]`, where each sequence's pages begin; the pages; `[S]`, tokens in the last page of each.
    """
    counts = -(-plan.context_lens // block_size)
    start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    is_read = np.arange(plan.block_tables.shape[1]) < counts[:, None]
    last_lengths = plan.context_lens - (counts - 1) * block_size
    return start, plan.block_tables[is_read], last_lengths.astype(np.int32)


def obstacle(spec: KvCacheSpec, device: torch.device) -> str | None:
    """Why it cannot compute over such a cache; None where it can."""
    if importlib.util.find_spec("flashinfer") is None:
        return "is not installed: pip install 'orchestra[flashinfer]'"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < CAPABILITY_MIN:
        return "needs an NVIDIA GPU of compute capability 8.0 or newer"
    if spec.dtype not in DTYPES or spec.head_dim not in HEAD_DIMS:
        return "needs bf16 or fp16, and heads of 64, 128 or 256"
    return None
