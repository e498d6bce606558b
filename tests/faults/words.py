"""The words of a mock answer, computed here once more: `benches/rig/src/words.rs` says what they are.

A reader that shared the engine's code would share its faults too.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _fold(state: int, text: bytes) -> int:
    text += b"\0" * (-len(text) % 8)
    for (number,) in struct.iter_unpack("<Q", text):
        product = ((state ^ number) * _GOLDEN) & _MASK
        state = product ^ (product >> 32)
    return state


def key(conversation: str, seed: int, choice: int = 0) -> int:
    """What the tags of an answer hang from."""
    text = conversation.encode()
    state = _fold(0, text)
    for end in (len(text), seed, choice):
        state = _fold(state, struct.pack("<Q", end))
    return state


def word(answer_key: int, index: int) -> str:
    """Word `index` with its space."""
    tag = _fold(answer_key, struct.pack("<Q", index)) >> 56
    return f"w{index:04}-{tag:02x} "


def chat(messages: Sequence[dict[str, str]]) -> str:
    """A conversation as the mock's template writes it."""
    turns = "".join(f"<|{message['role']}|>{message['content']}\n" for message in messages)
    return turns + "<|assistant|>"


def answer(conversation: str, seed: int, count: int) -> str:
    """The first `count` words of the answer."""
    answer_key = key(conversation, seed)
    return "".join(word(answer_key, index) for index in range(count))
