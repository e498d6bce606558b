"""A small Llama in plain torch, with the parameter names of the Hugging Face layout.

Only what training needs: whole sequences, no KV cache. The forward pass follows the reference
conventions exactly (pre-norm, rotate-half RoPE, grouped-query attention, SwiGLU, tied embeddings),
so the saved weights give the same logits in any server that implements `LlamaForCausalLM`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 (torch's own customary name)

INIT_STD = 0.02


@dataclass(frozen=True)
class LlamaConfig:
    """The shape of a model; field names are those of `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 32
    max_position_embeddings: int = 2048
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5


class Attention(nn.Module):
    """Causal grouped-query attention with rotary position embedding."""

    def __init__(self, config: LlamaConfig) -> None:
        """Creates the four projections, without biases."""
        super().__init__()
        self.head_dim = config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attends over `hidden` ([batch, length, hidden]); each token sees itself and the past."""
        query = apply_rope(self._split_heads(self.q_proj(hidden)), cos, sin)
        key = apply_rope(self._split_heads(self.k_proj(hidden)), cos, sin)
        value = self._split_heads(self.v_proj(hidden))
        # Repeated rather than `enable_gqa`: the CPU's fused kernel takes equal head counts only.
        groups = query.shape[1] // key.shape[1]
        key = key.repeat_interleave(groups, dim=1)
        value = value.repeat_interleave(groups, dim=1)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        output: Tensor = self.o_proj(attended.transpose(1, 2).flatten(2))
        return output

    def _split_heads(self, projected: Tensor) -> Tensor:
        batch, length, _ = projected.shape
        return projected.view(batch, length, -1, self.head_dim).transpose(1, 2)


class Mlp(nn.Module):
    """The SwiGLU feed-forward block."""

    def __init__(self, config: LlamaConfig) -> None:
        """Creates the three projections, without biases."""
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Maps each token on its own."""
        output: Tensor = self.down_proj(F.silu(self.gate_proj(hidden)) * self.up_proj(hidden))
        return output


class DecoderLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to the residual stream."""

    def __init__(self, config: LlamaConfig) -> None:
        """Creates the two blocks and their norms."""
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = Mlp(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Runs one layer over the residual stream."""
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), cos, sin)
        output: Tensor = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return output


class Decoder(nn.Module):
    """Embedding, layers and final norm: everything under the `model.` prefix."""

    def __init__(self, config: LlamaConfig) -> None:
        """Creates the stack and its rotary tables."""
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        cos, sin = rope_tables(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Returns the normed hidden state of every token."""
        length = token_ids.shape[1]
        cos, sin = self.get_buffer("cos")[:length], self.get_buffer("sin")[:length]
        hidden = self.embed_tokens(token_ids)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin)
        output: Tensor = self.norm(hidden)
        return output


class LlamaForCausalLM(nn.Module):
    """The language model; its output projection is the embedding table itself."""

    def __init__(self, config: LlamaConfig) -> None:
        """Creates and initialises the model from torch's global random state."""
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        # Two additions per layer reach the residual stream; scaling them keeps its variance flat.
        residual_std = INIT_STD / math.sqrt(2 * config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                ends_branch = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(parameter, std=residual_std if ends_branch else INIT_STD)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Returns next-token logits, [batch, length, vocab]."""
        return F.linear(self.model(token_ids), self.model.embed_tokens.weight)

    def num_parameters(self) -> int:
        """Counts the parameters, the tied embedding once."""
        return sum(parameter.numel() for parameter in self.parameters())


def rope_tables(config: LlamaConfig) -> tuple[Tensor, Tensor]:
    """Computes cos and sin of every position's angles, each [positions, head_dim]."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    inverse_frequencies = 1.0 / config.rope_theta**exponents
    positions = torch.arange(config.max_position_embeddings, dtype=torch.float32)
    angles = torch.outer(positions, inverse_frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates [batch, heads, length, head_dim] in the rotate-half convention."""
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin
