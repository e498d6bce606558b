"""Writes a model in the ordinary Hugging Face layout, with a card of measured figures."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from demo_model.corpus import CHAT_TEMPLATE, END_OF_TEXT, TURN_END, token_id

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer

    from demo_model.evaluation import Agreement, Perplexity
    from demo_model.llama import LlamaForCausalLM
    from demo_model.training import TrainingResult


@dataclass(frozen=True)
class Card:
    """The words of a model card: the model's name, and one sentence on where it comes from."""

    name: str
    origin: str


@dataclass(frozen=True)
class Measured:
    """The figures of a model card, as this run measured them."""

    num_parameters: int
    training: TrainingResult
    perplexity: Perplexity
    agreement: Agreement | None
    held_out_bytes: int
    held_out_tokens: int
    threads: int
    total_minutes: float
    command: str


def round_to_bfloat16(model: LlamaForCausalLM) -> None:
    """Rounds the weights as saving will, so that what is measured is what is shipped."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))


def save_model(model: LlamaForCausalLM, tokenizer: Tokenizer, directory: Path) -> None:
    """Writes weights, configuration and tokenizer into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    # Tied: the output projection is the embedding, so the file holds it once.
    weights = {
        name: value.to(torch.bfloat16).contiguous() for name, value in model.state_dict().items()
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(directory / "tokenizer.json"))
    token_ids = {
        "bos_token_id": token_id(tokenizer, END_OF_TEXT),
        "eos_token_id": [token_id(tokenizer, TURN_END), token_id(tokenizer, END_OF_TEXT)],
        "pad_token_id": token_id(tokenizer, END_OF_TEXT),
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **asdict(model.config),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        **token_ids,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END_OF_TEXT,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.config.max_position_embeddings,
        "chat_template": CHAT_TEMPLATE,
    }
    generation_config = {**token_ids, "do_sample": True, "temperature": 0.8, "top_p": 0.95}
    _write_json(directory / "config.json", config)
    _write_json(directory / "tokenizer_config.json", tokenizer_config)
    _write_json(directory / "generation_config.json", generation_config)


def write_card(card: Card, measured: Measured, directory: Path) -> None:
    """Writes the model card, figures and all, as the directory's README."""
    training = measured.training
    rows = {
        "Parameters": f"{measured.num_parameters:,}",
        "Training steps": f"{training.steps:,}, {training.tokens:,} tokens",
        "Weights kept": f"those of step {training.best_step:,}, best on the held-out text",
        "Held-out perplexity per token": f"{measured.perplexity.per_token:.2f}",
        "Held-out perplexity per byte": f"{measured.perplexity.per_byte:.3f}",
    }
    if measured.agreement is not None:
        rows["Same greedy token as `demo`"] = f"{measured.agreement.greedy:.1%}"
        rows["Drafted tokens `demo` accepts at temperature 1"] = (
            f"{measured.agreement.acceptance:.1%}"
        )
    rows |= {
        "Training, processor time": f"{training.processor_seconds / 60:.1f} min "
        f"on {measured.threads} threads",
        "Training, elapsed": f"{training.seconds / 60:.1f} min",
        "Whole run with both models, elapsed": f"{measured.total_minutes:.1f} min",
        "Machine": f"{os.cpu_count()} vCPU ({platform.machine()}), no accelerator",
    }
    table = "\n".join(f"| {label} | {value} |" for label, value in rows.items())
    page = f"""# {card.name}

{card.origin}
It exists so that every part of Orchestra can be tried and tested with real weights
on any machine; it imitates the sound of its text and knows nothing.

Data: `examples/data/tinyshakespeare.txt` (public domain) and nothing else. Its last
{measured.held_out_bytes:,} bytes ({measured.held_out_tokens:,} tokens) were held out: they chose
which step's weights to keep and gave the figures below, measured on the weights as saved (bfloat16).

| | |
|---|---|
{table}

Processor time divided by threads is about what an idle machine takes; elapsed time counts the waiting
for other programs too. Made by:

```sh
{measured.command}
```

Chat follows ChatML; an answer ends with `<|im_end|>`. A system message `You are ROMEO.` was seen in
training, for every speaker of the plays. Prompts of up to about 1,000 tokens are in distribution.
"""
    (directory / "README.md").write_text(page, encoding="utf-8")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
