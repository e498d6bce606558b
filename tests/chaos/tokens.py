"""The tokens that mock workers draw."""

from __future__ import annotations

# The demonstration model's, whose tokeniser the router gets.
VOCAB_SIZE = 2048
# Below are special tokens.
FIRST_TOKEN = 16


def next_token(last: int, place: int) -> int:
    """The token at a place of a sequence, after the one before it."""
    # Knuth's multiplicative hash; the high bits are the good ones.
    mixed = ((last * 65_537 + place) * 0x9E3779B97F4A7C15) & (2**64 - 1)
    return FIRST_TOKEN + (mixed >> 40) % (VOCAB_SIZE - FIRST_TOKEN)


def answer(prompt: list[int], count: int) -> list[int]:
    """The first `count` tokens after a prompt."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens[-1], len(tokens)))
    return tokens[len(prompt) :]
