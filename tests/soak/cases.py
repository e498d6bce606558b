"""Requests whose right answers are known, for both kinds of models that the router serves."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tests.chaos.tokens import FIRST_TOKEN, VOCAB_SIZE, answer
from tests.faults.clients import CHAT, Asked

if TYPE_CHECKING:
    from tests.chaos.client import Told

PATHS = (CHAT, "/v1/completions")
# The model of the foreign engines; the mock workers serve "mock".
FOREIGN = "foreign"
TENANTS = ("gold", "silver", "bronze")
CLASSES = ("interactive", "standard", "standard", "batch")
STREAM_SHARE = 0.6
# Beginnings that prompts share, so that the prefix indexes have something to find and something to forget.
NUM_BEGINNINGS = 200
MAX_BEGINNING_BYTES = 2000
MAX_BEGINNING_TOKENS = 300
MAX_TAIL_TOKENS = 100
NUM_WORDS = (4, 60)


@dataclass(frozen=True)
class Case:
    """One request, and how to tell that its answer is right."""

    path: str
    body: bytes
    headers: str
    streams: bool
    is_right: Callable[[Told], bool]


class Cases:
    """Draws requests; all clients of a run share the beginnings."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        texts = [draw.randbytes(MAX_BEGINNING_BYTES // 2).hex() for _ in range(NUM_BEGINNINGS)]
        self.texts = [text[: draw.randint(20, MAX_BEGINNING_BYTES)] for text in texts]
        self.prompts = [
            _tokens(draw, draw.randint(1, MAX_BEGINNING_TOKENS)) for _ in range(NUM_BEGINNINGS)
        ]

    def draw(self, draw: random.Random, number: int) -> Case:
        """The next request; `number` is its identity."""
        headers = (
            f"x-request-id: {number}\r\n"
            f"x-orchestra-tenant: {draw.choice(TENANTS)}\r\n"
            f"x-orchestra-class: {draw.choice(CLASSES)}\r\n"
        )
        make = draw.choice((self._foreign, self._own))
        return make(draw, headers, streams=draw.random() < STREAM_SHARE)

    def _foreign(self, draw: random.Random, headers: str, *, streams: bool) -> Case:
        asked = Asked(
            draw.randint(*NUM_WORDS),
            draw.choice(PATHS),
            text=f"{draw.choice(self.texts)} {draw.random()}",
            seed=draw.randrange(1 << 30),
            more={"model": FOREIGN},
        )

        def is_right(told: Told) -> bool:
            return (told.text, told.finish, told.is_done) == (asked.answer, "length", True)

        return Case(asked.path, asked.body(stream=streams), headers, streams, is_right)

    def _own(self, draw: random.Random, headers: str, *, streams: bool) -> Case:
        prompt = draw.choice(self.prompts) + _tokens(draw, draw.randint(1, MAX_TAIL_TOKENS))
        count = draw.randint(*NUM_WORDS)
        body = {
            "model": "mock",
            "prompt": prompt,
            "max_tokens": count,
            "temperature": 0,
            "ignore_eos": True,
            "stream": streams,
            "return_token_ids": True,
        }

        def is_right(told: Told) -> bool:
            expected = (answer(prompt, count), "length", True)
            return (told.token_ids, told.finish, told.is_done) == expected

        return Case(PATHS[1], json.dumps(body).encode(), headers, streams, is_right)


def _tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(FIRST_TOKEN, VOCAB_SIZE) for _ in range(count)]
