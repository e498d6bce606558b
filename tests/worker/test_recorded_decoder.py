"""Recorded steps compute what the same steps compute as usual, to the bit; and what cannot be recorded is not."""

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from orchestra import _core
from orchestra.errors import InvalidRequestError
from orchestra.worker import recording, row_kernels
from orchestra.worker.assembly import Rank
from orchestra.worker.models.decoder import Decoder
from orchestra.worker.recorded_decoder import RECORDED_ROWS, RecordedDecoder
from orchestra.worker.recording import Buffers, NotRecordableError, Recorder
from orchestra.worker.sharding import Shard
from tests.worker.conftest import MakeRank
from tests.worker.plans import PlanBuilder, sampling_start
from tests.worker.test_logits import prompt

# Plain, with head norms, joined projections, windows, norms on both sides and caps, two rotations, experts.
RECORDED = ["llama", "qwen3", "phi3", "mistral-window", "gemma2", "gemma3", "qwen3-moe"]


def model_of(rank: Rank) -> RecordedDecoder:
    model = rank.runner._model
    assert isinstance(model, RecordedDecoder)
    return model


def logits_of_many_steps(rank: Rank) -> list[Tensor | None]:
    """Prompts below and above what is recorded, steps of every kind between, and some that draw nothing."""
    builder = PlanBuilder(rank.num_blocks, seed=2)
    lengths = {"a": 50, "b": 90, "c": 7}
    for index, (name, length) in enumerate(lengths.items()):
        builder.add(name, prompt(length, seed=index))
    results = []
    for step in (
        {"a": 40},  # not to its end: nothing is drawn
        {"a": 10, "c": 7},
        {"a": 1, "b": RECORDED_ROWS - 1},
        {"b": 27},
        *[dict.fromkeys("abc", 1)] * 3,
        {"b": 1},
    ):
        for name in step:
            if builder.sequences[name].num_computed == len(builder.sequences[name].tokens):
                builder.append(name, 5)
        logits = rank.runner.forward(builder.plan(step))
        # Recorded ones are overwritten by the next step.
        results.append(None if logits is None else logits.clone())
    return results


def assert_equal(actual: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.equal(one, other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", RECORDED)
def test_recorded_steps_compute_the_same(kind: str, dtype: str, make_rank: MakeRank) -> None:
    recorded, usual = (make_rank(kind, dtype=dtype, record_steps=on) for on in ("auto", "off"))
    assert model_of(recorded).is_recorded, model_of(recorded).obstacle
    assert isinstance(usual.runner._model, Decoder)
    assert_equal(logits_of_many_steps(recorded), logits_of_many_steps(usual))


def test_what_torch_computes_is_not_recorded(
    make_rank: MakeRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_kernels, "supports", lambda _x: False)
    tried, usual = (make_rank("mixtral", record_steps=on) for on in ("auto", "off"))
    model = model_of(tried)
    assert not model.is_recorded
    assert model.obstacle is not None
    assert "torch computes" in model.obstacle
    assert_equal(logits_of_many_steps(tried), logits_of_many_steps(usual))


class NoTorch(TorchFunctionMode):
    """Refuses whatever torch is asked for."""

    def __torch_function__(self, function: Any, *_: Any) -> Any:
        raise AssertionError(function)


def drawn_tokens(rank: Rank, mode: Callable[[], AbstractContextManager[object]]) -> list[list[int]]:
    """Greedy tokens of some decode steps of one to three sequences, computed in a mode."""
    builder = PlanBuilder(rank.num_blocks, seed=3)
    names = "abc"
    for index, name in enumerate(names):
        builder.add(name, prompt(5 + index, seed=index))
    starts = [sampling_start(slot) for slot in range(len(names))]
    output = rank.runner.execute(builder.plan({"a": 5, "b": 6, "c": 7}, starts))
    results = []
    for count in (3, 2, 1, 3):
        results.append(output.token_ids.tolist())
        for name, token in zip(names, results[-1], strict=False):
            builder.append(name, token)
        plan = builder.plan(dict.fromkeys(names[:count], 1))
        with torch.inference_mode(), mode():
            output = rank.runner.execute(plan)
    return [*results, output.token_ids.tolist()]


def test_greedy_decode_steps_do_without_torch(make_rank: MakeRank) -> None:
    recorded, usual = (make_rank("llama", record_steps=on) for on in ("auto", "off"))
    assert drawn_tokens(recorded, NoTorch) == drawn_tokens(usual, nullcontext)


def test_a_step_that_is_watched_is_computed_layer_by_layer(make_rank: MakeRank) -> None:
    rank = make_rank("llama")
    heard: list[int] = []
    rank.runner.watch(lambda _step, layer: heard.append(layer))
    builder = PlanBuilder(rank.num_blocks)
    builder.add("a", prompt(20))
    rank.runner.forward(builder.plan({"a": 10}))
    assert heard == []
    rank.runner.forward(replace(builder.plan({"a": 10}), fills_blocks=True))
    assert heard == list(range(rank.model_config.num_layers))


# === the recorder ===


class Doubling:
    """Stands for a group of two ranks with equal numbers."""

    shard = Shard(0, 2)

    def all_reduce(self, tensor: Tensor) -> None:
        tensor.mul_(2)

    def gather_columns(self, tensor: Tensor) -> Tensor | None:
        raise AssertionError(tensor)

    def close(self) -> None:
        pass


@torch.inference_mode()
def test_calls_and_sums_are_repeated_in_their_order() -> None:
    x, ones, weight = torch.zeros(8, 16), torch.ones(8, 16), torch.ones(16)
    recorder = Recorder(8, Buffers())
    with recorder:
        row_kernels.add_(x, ones)
        y = torch.empty_like(x)
        row_kernels.rms_norm(x, weight, 0.0, out=y)
        recording.all_reduce(Doubling(), y)
        row_kernels.add_(x, y)
    assert torch.equal(x, torch.zeros(8, 16)), "nothing is computed while it is recorded"
    assert len(recorder.parts) == 3
    for expected in (3.0, 6.0):
        for part in recorder.parts:
            part(5)
        # (0 + 1) + 2 * 1, then (3 + 1) + 2 * 1, of the first five rows.
        assert torch.equal(x[:5], torch.full((5, 16), expected))
        assert torch.equal(x[5:], torch.zeros(3, 16))


@pytest.mark.parametrize("rows", [3, 9])
def test_calls_of_other_rows_are_refused(rows: int) -> None:
    x, ones = torch.zeros(rows, 8), torch.ones(rows, 8)
    message = f"rows: {rows}, while calls of 8"
    with pytest.raises(InvalidRequestError, match=message), Recorder(8, Buffers()):
        row_kernels.add_(x, ones)
    # That recording is over.
    row_kernels.add_(x, ones)
    assert torch.equal(x, torch.ones(rows, 8))


def test_programs_serve_for_fewer_rows_alone() -> None:
    x, ones = torch.zeros(4, 8), torch.ones(4, 8)
    _core.begin_recording(4)
    with pytest.raises(InvalidRequestError, match="records already"):
        _core.begin_recording(4)
    row_kernels.add_(x, ones)
    program = _core.end_recording()
    assert len(program) == 1
    with pytest.raises(InvalidRequestError, match="rows: 5, the calls were noted for 4"):
        program.run(5)
    assert torch.equal(x, torch.zeros(4, 8))
    assert len(_core.end_recording()) == 0


@torch.inference_mode()
def test_what_torch_computes_or_copies_is_refused() -> None:
    x = torch.ones(4, 6)
    with (
        pytest.raises(NotRecordableError, match="torch computes mul"),
        Recorder(4, Buffers()),
    ):
        x * 2
    with pytest.raises(NotRecordableError, match="torch copies in reshape"), Recorder(4, Buffers()):
        x[:, :3].reshape(12)
    with Recorder(4, Buffers()):
        view = x.view(2, 12)[:, 3:]
    assert view.data_ptr() == x[0, 3:].data_ptr()


def test_recording_loads_no_compiler() -> None:
    # Modes of another kind have torch import its compiler, and that takes longer than loading most models does.
    script = """
import sys, torch
from orchestra.worker.recording import Buffers, Recorder
x = torch.zeros(4, 8)
with Recorder(4, Buffers()):
    x.new_empty(4, 8).view(8, 4)
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_buffers_in_use_do_not_overlap_and_others_are_taken_again() -> None:
    buffers = Buffers()
    first, second = (buffers.take([4, 8], torch.bfloat16) for _ in range(2))
    address = first.data_ptr()
    assert address % 64 == 0
    assert abs(address - second.data_ptr()) >= first.nbytes
    view = first[1:, 2:]
    del first
    third = buffers.take([8, 4], torch.bfloat16)
    assert third.data_ptr() != address, "a view still has it"
    alias = buffers.alias(second)
    assert alias.data_ptr() == second.data_ptr()
    assert (alias.shape, alias.dtype) == (second.shape, second.dtype)
    del view
    assert buffers.take([2, 8], torch.float32).data_ptr() == address, "as many bytes"
