"""Greedy references from transformers' own `generate`, and the prompts that both sides answer."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

OUTPUT_TOKENS = 20

# Lengths around every boundary that matters (one token, block size 16 and chunk 16, powers of two) up to 1,000.
LENGTHS = (
    1,
    2,
    3,
    7,
    15,
    16,
    17,
    31,
    32,
    33,
    48,
    63,
    64,
    65,
    90,
    100,
    127,
    128,
    129,
    150,
    190,
    240,
)
LONG_LENGTHS = (255, 257, 300, 350, 400, 512, 600, 750, 900, 1000)
SHARED_PREFIX_TOKENS = 96


@dataclass(frozen=True)
class Reference:
    """One prompt with transformers' greedy continuation."""

    prompt: list[int]
    output: list[int]
    # Natural log-probability of each output token.
    logprobs: list[float]


def prompts(vocab_size: int, seed: int) -> list[list[int]]:
    """32 prompts of 1 to 1,000 tokens; every second one of those that are long enough starts alike."""
    draw = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [draw.randrange(8, vocab_size) for _ in range(count)]

    shared = tokens(SHARED_PREFIX_TOKENS)
    made = []
    for index, length in enumerate(LENGTHS + LONG_LENGTHS):
        if index % 2 and length > SHARED_PREFIX_TOKENS:
            made.append(shared + tokens(length - SHARED_PREFIX_TOKENS))
        else:
            made.append(tokens(length))
    # Neighbours in length would otherwise arrive together.
    draw.shuffle(made)
    return made


@torch.inference_mode()
def references(checkpoint: Path, seed: int) -> list[Reference]:
    """Runs transformers in fp32, prompt by prompt."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    model.eval()
    answers = []
    for prompt in prompts(model.config.vocab_size, seed):
        ids = torch.tensor([prompt])
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=OUTPUT_TOKENS,
            # No end-of-sequence token: all references have the same length.
            eos_token_id=-1,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
            repetition_penalty=1.0,
        )
        output = out.sequences[0, len(prompt) :].tolist()
        logprobs = [
            float(torch.log_softmax(logits[0].float(), dim=-1)[token])
            for logits, token in zip(out.logits, output, strict=True)
        ]
        answers.append(Reference(prompt, output, logprobs))
    return answers
