"""The figures: held-out loss, agreement of draft and teacher, and text to look at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F  # noqa: N812 (torch's own customary name)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from demo_model.llama import LlamaForCausalLM

EVALUATION_WINDOW = 512


@dataclass(frozen=True)
class Perplexity:
    """How surprising the held-out text is, per token and per byte of it."""

    per_token: float
    per_byte: float


@dataclass(frozen=True)
class Agreement:
    """How far a draft model predicts its teacher on the held-out text.

    `greedy` is the share of positions where both choose the same token; `acceptance` the chance
    that speculative sampling at temperature 1 accepts one drafted token.
    """

    greedy: float
    acceptance: float


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, token_ids: list[int]) -> float:
    """Mean cross-entropy per token, in nats, over windows that do not overlap."""
    model.eval()
    total = sum(
        F.cross_entropy(model(inputs)[0], targets[0], reduction="sum").item()
        for inputs, targets in _windows(token_ids)
    )
    return total / (len(token_ids) - 1)


def perplexity(model: LlamaForCausalLM, token_ids: list[int], num_bytes: int) -> Perplexity:
    """Measures the model on a text of `num_bytes` bytes."""
    loss = held_out_loss(model, token_ids)
    return Perplexity(
        per_token=math.exp(loss),
        per_byte=math.exp(loss * len(token_ids) / num_bytes),
    )


@torch.no_grad()
def agreement(
    draft: LlamaForCausalLM, teacher: LlamaForCausalLM, token_ids: list[int]
) -> Agreement:
    """Compares the two models' next-token distributions at every position."""
    draft.eval()
    teacher.eval()
    same, overlap, count = 0, 0.0, 0
    for inputs, _ in _windows(token_ids):
        drafted, wanted = draft(inputs), teacher(inputs)
        same += int((drafted.argmax(-1) == wanted.argmax(-1)).sum())
        overlap += torch.minimum(drafted.softmax(-1), wanted.softmax(-1)).sum().item()
        count += inputs.numel()
    return Agreement(greedy=same / count, acceptance=overlap / count)


@torch.no_grad()
def generate(
    model: LlamaForCausalLM,
    prompt: list[int],
    stop_ids: set[int],
    max_tokens: int,
    temperature: float,
    seed: int,
) -> list[int]:
    """Samples a continuation, the stop token included where one is reached."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    token_ids = list(prompt)
    while len(token_ids) < len(prompt) + max_tokens:
        logits: Tensor = model(torch.tensor([token_ids]))[0, -1]
        probabilities = (logits / temperature).softmax(-1)
        token_ids.append(int(torch.multinomial(probabilities, 1, generator=generator)))
        if token_ids[-1] in stop_ids:
            break
    return token_ids[len(prompt) :]


def _windows(token_ids: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    for start in range(0, len(token_ids) - 1, EVALUATION_WINDOW):
        window = torch.tensor([token_ids[start : start + EVALUATION_WINDOW + 1]])
        yield window[:, :-1], window[:, 1:]
