"""Grouped-query self-attention: projections, head norms and rotation around an attention backend."""

import torch
from torch import Tensor

from orchestra.worker.attention import AttentionBackend
from orchestra.worker.layers import LoadContext, Op, RMSNorm, load_row_parallel
from orchestra.worker.linear import make_linear
from orchestra.worker.model_config import ModelConfig
from orchestra.worker.rotary import interleave, rotate
from orchestra.worker.sharding import HeadShard, Span


class SelfAttention:
    """One layer's attention over this rank's heads, without the output projection.

    Args:
        index: of the layer in this rank's KV cache.
        qkv: maps `[T, H]` to the rank's query, key and value heads, side by side.
        qk_norm: normalises query and key heads (`[T, heads, head_dim]`); None: not normalised.
        num_heads: query heads of this rank.
        num_kv_heads: KV heads of this rank.
        head_dim: size of a head.
    """

    def __init__(
        self,
        index: int,
        qkv: Op,
        qk_norm: RMSNorm | None,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
    ) -> None:
        self.index = index
        self._qkv = qkv
        self._qk_norm = qk_norm
        self._num_heads = num_heads
        self._num_kv_heads = num_kv_heads
        self._head_dim = head_dim

    @classmethod
    def load(
        cls, context: LoadContext, name: str, index: int, config: ModelConfig
    ) -> "SelfAttention":
        """Loads `name` + `.q_proj`, `.k_proj`, `.v_proj` (or all as `.qkv_proj`), and head norms if there are some."""
        heads = context.communicator.shard.heads(config.num_heads, config.num_kv_heads)
        weight = _load_qkv(context, name, config, heads, "weight")
        bias = _load_qkv(context, name, config, heads, "bias") if config.qkv_bias else None
        norm = _load_head_norms(context, name, config, heads) if config.qk_norm else None
        linear = make_linear(weight, bias)
        counts = len(heads.heads), len(heads.kv_heads)
        return cls(context.cache_index(index, config), linear, norm, *counts, config.head_dim)

    def __call__(self, hidden: Tensor, rotations: Tensor, attention: AttentionBackend) -> Tensor:
        """Maps `[T, H]` to this rank's attended heads, `[T, num_heads * head_dim]`."""
        tokens = hidden.shape[0]
        heads = self._qkv(hidden).view(tokens, -1, self._head_dim)
        # heads:  0 .. num_heads .. +num_kv_heads .. +num_kv_heads
        #         | queries      | keys           | values         |
        rotated = heads[:, : self._num_heads + self._num_kv_heads]
        if self._qk_norm is not None:
            self._qk_norm.in_place(rotated)
        rotate(rotated, rotations)
        return attention.forward(
            self.index, heads[:, : self._num_heads], heads[:, self._num_heads :]
        )


def load_output(context: LoadContext, name: str, config: ModelConfig) -> Op:
    """Loads the output projection of this rank's heads, `name` + `.weight`: see `load_row_parallel`."""
    heads = context.communicator.shard.heads(config.num_heads, config.num_kv_heads)
    shape = [config.hidden_size, config.num_heads * config.head_dim]
    columns = heads.query_rows(config.head_dim)
    return load_row_parallel(context, name, shape, columns, bias=config.o_bias)


def _load_qkv(
    context: LoadContext, name: str, config: ModelConfig, heads: HeadShard, kind: str
) -> Tensor:
    """Loads the weight or bias of all three projections, query and key rows in pairs."""
    head_dim = config.head_dim
    query, kv = heads.query_rows(head_dim), heads.kv_rows(head_dim)
    rest = [config.hidden_size] if kind == "weight" else []
    queries, keys = config.num_heads * head_dim, config.num_kv_heads * head_dim
    if config.has_joined_projections:
        runs = [query, *(run.after(queries) for run in kv)]
        runs += [run.after(queries + keys) for run in kv]
        stacked = context.rows(f"{name}.qkv_proj.{kind}", [queries + 2 * keys, *rest], runs)
    else:
        stacked = context.stacked_rows(
            [
                (f"{name}.q_proj.{kind}", [queries, *rest], [query]),
                (f"{name}.k_proj.{kind}", [keys, *rest], kv),
                (f"{name}.v_proj.{kind}", [keys, *rest], kv),
            ]
        )
    rotated = stacked[: (len(heads.heads) + len(heads.kv_heads)) * head_dim]
    rotated.copy_(interleave(rotated, head_dim, config.rope.rotary_dim(head_dim)))
    return stacked


def _load_head_norms(
    context: LoadContext, name: str, config: ModelConfig, heads: HeadShard
) -> RMSNorm:
    """One norm for query and key heads together: a row of weights for each."""
    head_dim = config.head_dim
    rotary_dim = config.rope.rotary_dim(head_dim)

    def weight(part: str, count: int) -> Tensor:
        loaded = context.rows(f"{name}.{part}.weight", [head_dim], [Span(0, head_dim)])
        return interleave(loaded, head_dim, rotary_dim).expand(count, head_dim)

    query = weight("q_norm", len(heads.heads))
    key = weight("k_norm", len(heads.kv_heads))
    return RMSNorm(torch.cat([query, key]), config)
