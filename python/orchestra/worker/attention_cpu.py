"""Attention over the paged KV cache by the Rust kernels, on the CPU."""

from collections.abc import Sequence

import torch
from torch import Tensor

from orchestra._core import PagedAttention
from orchestra.worker.attention import WatchedLayers
from orchestra.worker.attention_layout import with_whole_heads
from orchestra.worker.kv_cache import KvCacheSpec, PagedCache
from orchestra.worker.model_config import AttentionRule
from orchestra.worker.plan import StepPlan
from orchestra.worker.row_kernels import KERNEL_DTYPES

# The kernels' vectors: heads and blocks are made of whole ones.
_LANES = 8
_HEAD_DIM_MAX = 1024


class CpuPagedAttention(WatchedLayers):
    """Kernels that read the cache in place, block by block, on torch's own threads.

    What a token gets depends on its sequence and its position alone, to the bit: not on the batch, nor on how its
    prompt was cut. On another kind of processor the bits may be others.

    Args:
        cache: this rank's, on the CPU.
        num_heads: query heads of this rank.
        rules: what each layer's tokens see and how scores are made; none: every layer is plain.
        portable: whether to leave away what only some processors can, for comparisons.

    Raises:
        InvalidRequestError: `supports` would have said no.
    """

    def __init__(
        self,
        cache: PagedCache,
        num_heads: int,
        rules: Sequence[AttentionRule] = (),
        *,
        portable: bool = False,
    ) -> None:
        spec = cache.spec
        # The kernels know its addresses only: it has to live as long as they do.
        self._cache = cache
        self._head_dim = spec.head_dim
        self._kernels = PagedAttention(
            (num_heads, spec.num_kv_heads, spec.head_dim, spec.block_size, cache.num_blocks),
            KERNEL_DTYPES[spec.dtype],
            [
                (cache.layer(index).data_ptr(), rule.window, rule.scale, rule.soft_cap)
                for index, rule in enumerate(list(rules) or [AttentionRule()] * spec.num_layers)
            ],
            portable=portable,
        )

    def prepare(self, plan: StepPlan) -> None:
        """Hands the plan's arrays over.

        Raises:
            InvalidRequestError: they do not fit each other or the cache.
        """
        self._begin_step(plan)
        self._kernels.prepare(
            plan.slot_mapping.tobytes(),
            plan.query_start.tobytes(),
            plan.context_lens.tobytes(),
            plan.block_tables.tobytes(),
            torch.get_num_threads(),
        )

    def forward(self, layer: int, query: Tensor, key_value: Tensor) -> Tensor:
        """Computes one layer; see `AttentionBackend`."""
        query, key_value = with_whole_heads(query), with_whole_heads(key_value)
        output = query.new_empty(query.shape[0], query.shape[1] * self._head_dim)
        self._kernels.forward(
            layer,
            query.data_ptr(),
            query.stride(0),
            key_value.data_ptr(),
            key_value.stride(0),
            output.data_ptr(),
        )
        self._announce(layer)
        return output


def supports(spec: KvCacheSpec, device: torch.device) -> bool:
    """Whether the kernels can compute over such a cache."""
    return (
        device.type == "cpu"
        and spec.dtype in KERNEL_DTYPES
        and spec.head_dim % _LANES == 0
        and spec.head_dim <= _HEAD_DIM_MAX
        and spec.block_size % _LANES == 0
    )
