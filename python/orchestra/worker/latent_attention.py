"""Multi-head latent attention (DeepSeek-V2, section 2.1) in the form in which the cache keeps what is compressed.

A head's key is `W_uk · c` and its value `W_uv · c`, where `c` is the token's compressed vector. The score
`q · (W_uk · c)` is `(W_ukᵀ · q) · c`, and a sum of values is `W_uv` of the sum of the `c`. So queries go where `c` is,
all heads attend over the same vector of each token (behind the rotated key that they share), and `W_uv` comes last.
"""

from dataclasses import replace

import torch
from torch import Tensor

from orchestra.worker.attention import AttentionBackend
from orchestra.worker.latent_config import LatentConfig
from orchestra.worker.layers import LoadContext, Op, RMSNorm
from orchestra.worker.linear import make_head_linears, make_linear
from orchestra.worker.model_config import ModelConfig
from orchestra.worker.rotary import rotate
from orchestra.worker.sharding import Span

# Of the norms of compressed vectors, whatever `rms_norm_eps` says of the others.
_EPS = 1e-6


class LatentAttention:
    """One layer's attention over this rank's heads, without the output projection.

    Args:
        index: of the layer in this rank's KV cache.
        inputs: maps `[T, H]` to queries (or what they are made from), `c` and the shared key, side by side.
        queries: maps the first part of that to this rank's query heads; None: it is them.
        kv_norm: normalises `c`.
        up: maps each head's `nope_dim` to `kv_rank` by `W_ukᵀ`, and `kv_rank` to `v_dim` by `W_uv`.
        shape: of the parts.
    """

    def __init__(
        self,
        index: int,
        inputs: Op,
        queries: Op | None,
        kv_norm: RMSNorm,
        up: tuple[Op, Op],
        shape: LatentConfig,
    ) -> None:
        self.index = index
        self._inputs = inputs
        self._queries = queries
        self._kv_norm = kv_norm
        self._key_up, self._value_up = up
        self._shape = shape

    @classmethod
    def load(
        cls, context: LoadContext, name: str, index: int, config: ModelConfig
    ) -> "LatentAttention":
        """Loads `name` + `.q_a_proj` and `.q_b_proj` (or `.q_proj`), `.kv_a_proj_with_mqa`, `.kv_b_proj` and norms."""
        shape = config.latent
        assert shape is not None
        config = replace(config, rms_norm_eps=_EPS)
        own = context.communicator.shard.heads(config.num_heads, 1)
        query_rows = own.query_rows(shape.query_dim)
        heads = [config.num_heads * shape.query_dim, config.hidden_size]
        compressed = [shape.cached_dim, config.hidden_size]
        kv = (f"{name}.kv_a_proj_with_mqa.weight", compressed, [Span(0, shape.cached_dim)])
        first = (f"{name}.q_proj.weight", heads, [query_rows])
        if shape.q_rank is None:
            queries = None
        else:
            rank = shape.q_rank
            first = (f"{name}.q_a_proj.weight", [rank, config.hidden_size], [Span(0, rank)])
            norm = RMSNorm.load(context, f"{name}.q_a_layernorm", rank, config)
            weight = context.rows(f"{name}.q_b_proj.weight", [heads[0], rank], [query_rows])
            linear = make_linear(weight, None)

            def queries(x: Tensor) -> Tensor:
                return linear(norm(x))

        inputs = make_linear(context.stacked_rows([first, kv]), None)
        kv_norm = RMSNorm.load(context, f"{name}.kv_a_layernorm", shape.kv_rank, config)
        width = shape.nope_dim + shape.v_dim
        up = context.rows(
            f"{name}.kv_b_proj.weight",
            [config.num_heads * width, shape.kv_rank],
            [own.query_rows(width)],
        )
        key_up, value_up = torch.split(
            up.view(-1, width, shape.kv_rank), [shape.nope_dim, shape.v_dim], dim=1
        )
        parts = make_head_linears(key_up.transpose(1, 2)), make_head_linears(value_up)
        index = context.cache_index(index, config)
        return cls(index, inputs, queries, kv_norm, parts, shape)

    def __call__(self, hidden: Tensor, rotations: Tensor, attention: AttentionBackend) -> Tensor:
        """Maps `[T, H]` to this rank's attended heads, `[T, heads * v_dim]`."""
        shape, tokens = self._shape, hidden.shape[0]
        joined = self._inputs(hidden)
        first, compressed, shared = torch.split(
            joined,
            [joined.shape[1] - shape.cached_dim, shape.kv_rank, shape.rope_dim],
            dim=1,
        )
        queries = first if self._queries is None else self._queries(first)
        queries = queries.view(tokens, -1, shape.query_dim)
        # Both are laid out as | rotated | compressed |.
        query = hidden.new_empty(tokens, queries.shape[1], shape.cached_dim)
        query[..., : shape.rope_dim] = queries[..., shape.nope_dim :]
        query[..., shape.rope_dim :] = self._key_up(queries[..., : shape.nope_dim])
        key_value = hidden.new_empty(tokens, 2, shape.cached_dim)
        key = key_value[:, :1]
        key[:, 0, : shape.rope_dim] = shared
        key[:, 0, shape.rope_dim :] = self._kv_norm(compressed)
        rotate(query[..., : shape.rope_dim], rotations)
        rotate(key[..., : shape.rope_dim], rotations)
        key_value[:, 1:] = key
        attended = attention.forward(self.index, query, key_value).view(query.shape)
        return self._value_up(attended[..., shape.rope_dim :]).reshape(tokens, -1)
