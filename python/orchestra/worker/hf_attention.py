"""The attention function that transformers' modules call instead of their own, and what watching those calls tells.

transformers looks an attention function and a mask function up by name, `attn_implementation`. Ours makes no mask: the
mask object only carries the rule that the model wanted one for, and the attention backend has its own way to follow it.
The rules are read off one watched run of the model, so that nothing is taken from keys which each model means its own
way. What a model asks of its attention that a backend cannot do is refused there.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from orchestra.errors import UnsupportedError
from orchestra.worker.attention import AttentionBackend
from orchestra.worker.model_config import AttentionRule

IMPLEMENTATION = "orchestra_paged"
"""What both functions are registered as."""

# Arguments of an attention call that ask for nothing more: the mask's rule says it too, or it is read by name, or it
# only matters in training.
_IDLE_ARGUMENTS = {"dropout", "sliding_window", "is_causal", "position_ids", "softcap"}
# Up to here every position's mask is looked at, beyond it those around powers of two.
_DENSE_POSITIONS = 64

Sees = Callable[..., Tensor]
"""transformers' mask function: (batch, head, query position, key positions) to whether the query sees the key."""


@dataclass(frozen=True)
class AttentionCall:
    """What one attention module handed over in a watched run."""

    query: torch.Size
    """`[1, num_heads, T, head_dim]`"""
    key: torch.Size
    """`[1, num_kv_heads, T, head_dim]`"""
    value: torch.Size
    """`[1, num_kv_heads, T, head_dim]`"""
    sees: Sees | None
    """The rule of the mask; None: the model gave none, or one that it made itself."""
    scale: float | None
    soft_cap: float | None
    unknown: tuple[str, ...]
    """Further arguments with a value that are no part of plain attention."""


class LayerTable:
    """The attention modules of one model, and where their calls go."""

    def __init__(self) -> None:
        self.calls: list[AttentionCall] = []
        """Of the watched run: one for each module, in the order in which they ran."""
        self._layers: dict[nn.Module, int] = {}

    def watch(self, module: nn.Module, call: AttentionCall) -> None:
        """Notes a call of the watched run.

        Raises:
            UnsupportedError: the module attends twice.
        """
        if module in self._layers:
            raise UnsupportedError("num_hidden_layers: a layer attends more than once in a step")
        self._layers[module] = len(self.calls)
        self.calls.append(call)

    def layer_of(self, module: nn.Module) -> int:
        """Index in the cache of a module that was watched."""
        return self._layers[module]


# Whose modules run, over which cache; without one they are watched. A rank computes one step at a time, in one thread.
_running: list[tuple[LayerTable, AttentionBackend | None]] = []


@contextmanager
def running(table: LayerTable, backend: AttentionBackend | None) -> Iterator[None]:
    """While the block lasts, attention calls come from this model.

    Args:
        table: the model's.
        backend: prepared for the step; None to watch the calls.
    """
    _running.append((table, backend))
    try:
        yield
    finally:
        _running.pop()


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' interface.

    Args:
        module: the attention module that calls.
        query: `[1, num_heads, T, head_dim]`, all tokens of a step.
        key: `[1, num_kv_heads, T, head_dim]`
        value: `[1, num_kv_heads, T, head_dim]`
        attention_mask: what `no_mask` made.
        scaling: multiplies the scores.
        arguments: what the module says besides.

    Returns:
        `[1, T, num_heads, head_dim]` and no weights.
    """
    table, backend = _running[-1]
    if backend is not None:
        heads = query[0].transpose(0, 1).contiguous()
        key_value = torch.cat([key[0].transpose(0, 1), value[0].transpose(0, 1)], dim=1)
        attended = backend.forward(table.layer_of(module), heads, key_value)
        return attended.view(1, *heads.shape), None
    given = {name for name, value in arguments.items() if value is not None and value is not False}
    call = AttentionCall(
        query.shape,
        key.shape,
        value.shape,
        getattr(attention_mask, _SEES, None),
        scaling,
        arguments.get("softcap"),
        tuple(sorted(given - _IDLE_ARGUMENTS)),
    )
    table.watch(module, call)
    return torch.zeros_like(query).transpose(1, 2).contiguous(), None


# The attribute of a mask that says what it would have shown.
_SEES = "orchestra_sees"


def no_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Sees,
    device: torch.device | str = "cpu",
    **_arguments: Any,
) -> Tensor:
    """The mask function of transformers' interface: one number in the shape of a mask, with the rule attached."""
    mask = torch.zeros((), dtype=torch.bool, device=device)
    mask = mask.expand(batch_size, 1, q_length, kv_length)
    setattr(mask, _SEES, mask_function)
    return mask


AttentionInterface.register(IMPLEMENTATION, paged_attention)
AttentionMaskInterface.register(IMPLEMENTATION, no_mask)


def read_rule(call: AttentionCall, longest: int, device: torch.device) -> AttentionRule:
    """What the tokens of a watched layer see, and how their scores are made.

    Args:
        call: of the layer.
        longest: sequence that may ever run, tokens.
        device: where the model computes.

    Raises:
        UnsupportedError: this is not causal attention over all tokens or a window of the last ones.
    """
    if call.unknown:
        raise UnsupportedError(f"{call.unknown[0]}: attention with it is not supported")
    if call.sees is None:
        raise UnsupportedError("attention_mask: the model makes its own, which cannot be followed")
    window = _window(call.sees, longest, device)
    return AttentionRule(window, call.scale, call.soft_cap)


def _window(sees: Sees, longest: int, device: torch.device) -> int | None:
    """How many tokens, the last ones and itself, a token sees; None: all before it."""
    zero = torch.zeros(1, dtype=torch.int64, device=device)
    keys = torch.arange(longest, device=device)

    def visible(position: int) -> Tensor:
        return torch.broadcast_to(sees(zero, zero, zero + position, keys), keys.shape)

    if visible(0)[1:].any():
        raise UnsupportedError("is_causal: tokens see those that come after them")
    window = int(visible(longest - 1).sum())
    for position in _positions(longest):
        expected = (keys <= position) & (keys > position - window)
        if not torch.equal(visible(position), expected):
            raise UnsupportedError(
                f"layer_types: the token at position {position} does not see the last {window} tokens;"
                " supported are causal attention and sliding windows"
            )
    return None if window >= longest else window


def _positions(longest: int) -> list[int]:
    """Positions at which a rule is looked at."""
    powers = [1 << exponent for exponent in range(longest.bit_length())]
    around = {power + offset for power in powers for offset in (-1, 0, 1)}
    return sorted(
        position for position in around | {*range(_DENSE_POSITIONS)} if position < longest
    )
