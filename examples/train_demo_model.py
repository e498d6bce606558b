"""Trains the bundled demonstration models: a small Llama of Shakespeare and a draft for it.

Both come from one text file and nothing else, on a CPU, in minutes:

    pip install torch tokenizers safetensors
    python examples/train_demo_model.py

The draft, a tenth of the size, is distilled from the first and serves speculative decoding. Results
land in `examples/models/`. The same seed, thread count and torch version give the same weights.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from demo_model.corpus import (
    END_OF_TEXT,
    TURN_END,
    TURN_START,
    VOCAB_SIZE,
    WindowSampler,
    render_turn,
    split_held_out,
    token_id,
    train_tokenizer,
)
from demo_model.evaluation import agreement, generate, perplexity
from demo_model.export import Card, Measured, round_to_bfloat16, save_model, write_card
from demo_model.llama import LlamaConfig, LlamaForCausalLM
from demo_model.training import TrainingPlan, distillation_loss, language_loss, train

if TYPE_CHECKING:
    from tokenizers import Tokenizer

HERE = Path(__file__).resolve().parent

DEMO = LlamaConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
)
DRAFT = LlamaConfig(
    vocab_size=VOCAB_SIZE,
    hidden_size=96,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
DEMO_PLAN = TrainingPlan(
    steps=600,
    tokens_per_step=2048,
    matrix_learning_rate=0.02,
    vector_learning_rate=3e-3,
    weight_decay=0.1,
)
DRAFT_PLAN = TrainingPlan(
    steps=280,
    tokens_per_step=4096,
    matrix_learning_rate=0.02,
    vector_learning_rate=5e-3,
    weight_decay=0.0,
)
DEMO_CARD = Card(
    name="demo",
    origin="A Llama of four million parameters, trained from scratch on Shakespeare's plays.",
)
DRAFT_CARD = Card(
    name="demo-draft",
    origin="A tenth of `demo`'s size, distilled from it to draft for it in speculative decoding.",
)

SAMPLE_PROMPT = "ROMEO:\n"
SAMPLE_QUESTION = "What news from Verona, good sir?"
SAMPLE_TOKENS = 120
SAMPLE_TEMPERATURE = 0.7


def parse_arguments() -> argparse.Namespace:
    """Reads the command line; its defaults made the bundled models."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, default=HERE / "data" / "tinyshakespeare.txt")
    parser.add_argument("--output", type=Path, default=HERE / "models")
    parser.add_argument("--steps", type=int, default=DEMO_PLAN.steps, help="steps of the model")
    parser.add_argument(
        "--draft-steps", type=int, default=DRAFT_PLAN.steps, help="steps of its draft"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1616)
    return parser.parse_args()


def show_samples(model: LlamaForCausalLM, tokenizer: Tokenizer, seed: int) -> None:
    """Prints a continuation and a chat answer."""
    chat_prompt = render_turn("user", SAMPLE_QUESTION) + f"{TURN_START}assistant\n"
    stop_ids = {token_id(tokenizer, TURN_END), token_id(tokenizer, END_OF_TEXT)}
    for prompt in (SAMPLE_PROMPT, chat_prompt):
        prompt_token_ids = tokenizer.encode(prompt).ids
        output_token_ids = generate(
            model, prompt_token_ids, stop_ids, SAMPLE_TOKENS, SAMPLE_TEMPERATURE, seed
        )
        text = tokenizer.decode(prompt_token_ids + output_token_ids, skip_special_tokens=False)
        print(f"--- sample\n{text}", flush=True)


def main() -> None:
    """Trains, measures and saves both models."""
    arguments = parse_arguments()
    started = time.perf_counter()
    torch.set_num_threads(arguments.threads)
    torch.use_deterministic_algorithms(mode=True)
    torch.manual_seed(arguments.seed)

    text, held_out_text = split_held_out(arguments.text.read_text(encoding="utf-8"))
    tokenizer = train_tokenizer(text)
    held_out = tokenizer.encode(held_out_text).ids
    sampler = WindowSampler(text, tokenizer, arguments.seed)
    print(f"text: {sampler.num_tokens:,} tokens to train on, {len(held_out):,} held out")

    demo = LlamaForCausalLM(DEMO)
    print(f"demo: {demo.num_parameters():,} parameters")
    demo_training = train(
        demo, language_loss(demo), sampler, held_out, replace(DEMO_PLAN, steps=arguments.steps)
    )
    round_to_bfloat16(demo)
    demo.eval()

    draft = LlamaForCausalLM(DRAFT)
    print(f"demo-draft: {draft.num_parameters():,} parameters")
    draft_training = train(
        draft,
        distillation_loss(draft, demo),
        sampler,
        held_out,
        replace(DRAFT_PLAN, steps=arguments.draft_steps),
    )
    round_to_bfloat16(draft)

    minutes = (time.perf_counter() - started) / 60
    for model, training, card in (
        (demo, demo_training, DEMO_CARD),
        (draft, draft_training, DRAFT_CARD),
    ):
        measured = Measured(
            num_parameters=model.num_parameters(),
            training=training,
            perplexity=perplexity(model, held_out, len(held_out_text.encode())),
            agreement=agreement(model, demo, held_out) if model is draft else None,
            held_out_bytes=len(held_out_text.encode()),
            held_out_tokens=len(held_out),
            threads=arguments.threads,
            total_minutes=minutes,
            command=shlex.join(["python", "examples/train_demo_model.py", *sys.argv[1:]]),
        )
        print(f"{card.name}: {measured}")
        show_samples(model, tokenizer, arguments.seed)
        save_model(model, tokenizer, arguments.output / card.name)
        write_card(card, measured, arguments.output / card.name)


if __name__ == "__main__":
    main()
