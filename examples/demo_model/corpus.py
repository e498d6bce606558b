"""From one text file to training windows: split, tokenizer, plain and chat documents."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)

# ChatML. Only concatenation, one loop and one condition: every Jinja dialect renders it alike.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

VOCAB_SIZE = 2048
HELD_OUT_FRACTION = 0.05
CHAT_SHARE = 0.35
SYSTEM_TURN_SHARE = 0.5
BEGIN_TOKEN_SHARE = 0.5
MAX_TURNS = 8

SPEECH = re.compile(r"(?P<speaker>[^\n:]+):\n(?P<lines>.+)", re.DOTALL)


@dataclass(frozen=True)
class Speech:
    """One speech of a play."""

    speaker: str
    lines: str


def split_held_out(text: str) -> tuple[str, str]:
    """Cuts the text at the last gap between speeches before its held-out tail."""
    cut = text.rindex("\n\n", 0, int(len(text) * (1 - HELD_OUT_FRACTION))) + len("\n\n")
    return text[:cut], text[cut:]


def parse_speeches(text: str) -> list[Speech]:
    """Lists the speeches in order; a speaker's name without lines is skipped."""
    matches = (SPEECH.fullmatch(block) for block in text.strip().split("\n\n"))
    return [Speech(match["speaker"], match["lines"]) for match in matches if match]


def train_tokenizer(text: str) -> Tokenizer:
    """Trains a byte-level BPE on `text`; any other text still encodes, byte by byte."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # The play's prose lacks the role names of the chat template; repeated, each earns one token.
    role_names = "user\nassistant\nsystem\n" * 1_000
    tokenizer.train_from_iterator([text, role_names], trainer)
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Looks up a token that is certain to exist, a special token or a single byte."""
    (found,) = tokenizer.encode(token).ids
    return found


def render_turn(role: str, content: str) -> str:
    """Renders one message exactly as `CHAT_TEMPLATE` does."""
    return f"{TURN_START}{role}\n{content}{TURN_END}\n"


class WindowSampler:
    """Draws training windows, reproducibly, from plain text and from chat made of it."""

    def __init__(self, text: str, tokenizer: Tokenizer, seed: int) -> None:
        """Tokenizes the text once as a whole and once as chat turns."""
        self._random = random.Random(seed)
        self._tokens: list[int] = tokenizer.encode(text).ids
        self._end_of_text = token_id(tokenizer, END_OF_TEXT)
        newline = token_id(tokenizer, "\n")
        self._line_starts = [0] + [
            index + 1 for index, token in enumerate(self._tokens) if token == newline
        ]
        # Turns are encoded singly: special tokens bound them, so joining ids equals joining text.
        speeches = parse_speeches(text)
        self._turns = {
            role: _encode_all(tokenizer, [render_turn(role, speech.lines) for speech in speeches])
            for role in ("user", "assistant")
        }
        self._personas = _encode_all(
            tokenizer, [render_turn("system", f"You are {speech.speaker}.") for speech in speeches]
        )

    @property
    def num_tokens(self) -> int:
        """The length of the training text in tokens."""
        return len(self._tokens)

    def batch(self, batch_size: int, length: int) -> torch.Tensor:
        """Draws [batch_size, length + 1] token ids: inputs and, shifted by one, targets."""
        return torch.tensor([self._window(length + 1) for _ in range(batch_size)])

    def _window(self, length: int) -> list[int]:
        is_chat = self._random.random() < CHAT_SHARE
        return self._chat_window(length) if is_chat else self._plain_window(length)

    def _plain_window(self, length: int) -> list[int]:
        """A passage from the start of some line, half of the time behind the begin token."""
        prefix = [self._end_of_text] if self._random.random() < BEGIN_TOKEN_SHARE else []
        start = self._random.choice(self._line_starts)
        start = min(start, len(self._tokens) - length)
        return (prefix + self._tokens[start : start + length])[:length]

    def _chat_window(self, length: int) -> list[int]:
        """Conversations one after another until the window is full."""
        window: list[int] = []
        while len(window) < length:
            window += self._conversation()
        return window[:length]

    def _conversation(self) -> list[int]:
        """Consecutive speeches as alternating turns, the assistant's always last.

        A system turn, where there is one, names the speaker of the first answer.
        """
        num_turns = 2 * self._random.randint(1, MAX_TURNS // 2)
        first = self._random.randrange(len(self._personas) - num_turns)
        conversation: list[int] = []
        if self._random.random() < SYSTEM_TURN_SHARE:
            conversation += self._personas[first + 1]
        for turn in range(num_turns):
            role = "assistant" if turn % 2 else "user"
            conversation += self._turns[role][first + turn]
        return [*conversation, self._end_of_text]


def _encode_all(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch(texts)]
