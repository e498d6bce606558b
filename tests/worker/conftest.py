"""Checkpoints, references and ranks that the worker's tests share."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

# Without a GPU, Triton's interpreter runs the kernels. Said before Triton is imported, as transformers does.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from transformers import AutoModelForCausalLM

from orchestra.worker.assembly import Rank, assemble
from orchestra.worker.config import WorkerConfig
from tests.checkpoints import make_checkpoint

Checkpoints = Callable[[str], Path]
Reference = Callable[[str, list[int]], Tensor]
MakeRank = Callable[..., Rank]


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    """The models are tiny: a second thread costs more than it gives."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Makes a kind of checkpoint once; returns its directory."""
    folder = tmp_path_factory.mktemp("checkpoints")

    @cache
    def make(kind: str) -> Path:
        return make_checkpoint(kind, folder / kind, seed=1)

    return make


@pytest.fixture(scope="session")
def reference(checkpoint: Checkpoints) -> Reference:
    """Logits of every position by transformers in fp32, `[tokens, vocab]`."""

    @cache
    def model(kind: str) -> torch.nn.Module:
        loaded: torch.nn.Module = AutoModelForCausalLM.from_pretrained(
            checkpoint(kind), dtype=torch.float32, attn_implementation="eager"
        )
        return loaded

    def logits(kind: str, tokens: list[int]) -> Tensor:
        with torch.inference_mode():
            output: Tensor = model(kind)(torch.tensor([tokens])).logits[0]
        return output

    return logits


@pytest.fixture(scope="session")
def make_rank(checkpoint: Checkpoints, monkeypatch_session: pytest.MonkeyPatch) -> MakeRank:
    """Brings up a single rank over a kind of checkpoint; further arguments are settings."""
    # `assemble` divides the cores among ranks unless this is set.
    monkeypatch_session.setenv("OMP_NUM_THREADS", "1")

    def make(kind: str, **settings: object) -> Rank:
        values: dict[str, object] = {
            "model_dir": checkpoint(kind),
            "router": "http://127.0.0.1:1",
            "worker_id": "w",
            "model_name": kind,
            "device": "cpu",
            "dtype": "float32",
            "num_blocks": 256,
            "max_num_seqs": 64,
            **settings,
        }
        return assemble(WorkerConfig(**values), lambda _done, _total: None)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def monkeypatch_session() -> object:
    """`monkeypatch` for the whole session."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="session")
def fast_interpreter(monkeypatch_session: pytest.MonkeyPatch) -> None:
    """Has Triton's interpreter prepare its language once for a launch, and not again for each function called in it."""
    if "TRITON_INTERPRET" in os.environ:
        from triton.runtime import interpreter

        prepared: set[str] = set()

        def call(function: Any, *arguments: Any, **options: Any) -> Any:
            module = function.fn.__module__
            if module.startswith("triton.") and module not in prepared:
                prepared.add(module)
                interpreter._patch_lang(function.fn)
            return function.rewrite()(*arguments, **options)

        monkeypatch_session.setattr(interpreter.InterpretedFunction, "__call__", call)
