"""Stages, each with its layers, compute what transformers computes with the whole model."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from orchestra.errors import ConfigError, InternalError
from orchestra.worker.metrics import WorkerMetrics
from orchestra.worker.pipeline import StageReport
from orchestra.worker.plan import StepOutput
from orchestra.worker.sharding import Span, Stage
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.worker.conftest import Checkpoints, Reference
from tests.worker.rank_process import empty_stats
from tests.worker.test_tensor_parallel import bytes_read, compare, thread_ranks


@pytest.mark.parametrize("kind", [*FAMILIES, "deepseek3", "llama-tied"])
def test_stages_follow_each_other(kind: str, checkpoint: Checkpoints, reference: Reference) -> None:
    compare(kind, thread_ranks(checkpoint(kind), 1, stages=2), reference)


@pytest.mark.parametrize(
    ("size", "stages", "split"),
    [
        pytest.param(1, 2, (1, 2), id="most layers last"),
        pytest.param(1, 3, (), id="one layer each"),
        pytest.param(2, 2, (), id="two ranks each"),
    ],
)
def test_any_product_of_stages_and_shards(
    size: int, stages: int, split: tuple[int, ...], checkpoint: Checkpoints, reference: Reference
) -> None:
    # A window in two of three layers: a layer that is not the stage's first has a rule of its own.
    kind = "qwen3-window"
    compare(kind, thread_ranks(checkpoint(kind), size, stages, split), reference)


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_every_stage_reads_its_layers_only(kind: str, checkpoint: Checkpoints) -> None:
    model_dir = checkpoint(kind)
    with bytes_read() as read:
        ranks = thread_ranks(model_dir, 1, stages=3)
    weights = load_file(model_dir / "model.safetensors")
    whole = sum(weight.nbytes for weight in weights.values())
    # Tied, the last stage reads the first one's embedding too.
    twice = weights["model.embed_tokens.weight"].nbytes if kind == "llama-tied" else 0
    assert sum(read) == whole + twice
    assert max(read) < whole / 2
    assert [rank.num_blocks for rank in ranks] == [64] * 3


def test_what_is_in_no_stage_is_named(tmp_path: Path) -> None:
    model_dir = make_checkpoint("llama", tmp_path / "m", seed=1)
    config = (model_dir / "config.json").read_text()
    (model_dir / "config.json").write_text(
        config.replace('"num_hidden_layers": 3', '"num_hidden_layers": 2')
    )
    with pytest.raises(ConfigError, match=r"weights that the model does not: model\.layers\.2\."):
        thread_ranks(model_dir, 1, stages=2)


# === reports ===


def test_reports_survive_the_way() -> None:
    output = StepOutput(
        token_ids=np.array([5, 9], np.int32),
        chosen_logprobs=np.array([-0.5, -1.5], np.float32),
        top_ids=np.array([[5, 2], [9, 1]], np.int32),
        top_logprobs=np.array([[-0.5, -2], [-1.5, -3]], np.float32),
    )
    report = StageReport.decode(StageReport(7, 0.25, output).encode())
    assert (report.step_id, report.busy_s) == (7, 0.25)
    for name, expected in vars(output).items():
        assert getattr(report.output, name).tobytes() == expected.tobytes()


@pytest.mark.parametrize("message", [b"\xc1", b"\x80", b"\x01", b""])
def test_damaged_reports_are_refused(message: bytes) -> None:
    with pytest.raises(InternalError, match="report cannot be read"):
        StageReport.decode(message)


# === figures ===


def test_the_bubble_is_what_a_stage_waits_while_a_step_is_in_flight() -> None:
    metrics = WorkerMetrics(empty_stats, block_size=16)
    for _ in range(4):
        metrics.note_stages([0.3, 0.1], alone_s=0.5)
    sample = metrics.registry.get_sample_value
    assert sample("orchestra_worker_pipeline_seconds_total") == pytest.approx(2.0)
    for stage, busy_s, bubble in (("0", 1.2, 0.4), ("1", 0.4, 0.8)):
        labels = {"stage": stage}
        assert sample("orchestra_worker_stage_busy_seconds_total", labels) == pytest.approx(busy_s)
        assert sample("orchestra_worker_pipeline_bubble_ratio", labels) == pytest.approx(bubble)
    for _ in range(2000):
        metrics.note_stages([0.5, 0.25], alone_s=0.5)
    assert sample("orchestra_worker_pipeline_bubble_ratio", {"stage": "1"}) == pytest.approx(
        0.5, abs=0.01
    )


def test_a_single_stage_has_no_bubble() -> None:
    metrics = WorkerMetrics(empty_stats, block_size=16)
    metrics.note_stages([0.3], alone_s=0.5)
    assert (
        metrics.registry.get_sample_value("orchestra_worker_pipeline_bubble_ratio", {"stage": "0"})
        is None
    )


# === the division of the layers ===


@pytest.mark.parametrize(
    ("num_layers", "count", "split", "expected"),
    [
        (3, 1, (), [3]),
        (8, 2, (), [4, 4]),
        (7, 3, (), [3, 2, 2]),
        (3, 3, (), [1, 1, 1]),
        (16, 2, (10, 6), [10, 6]),
    ],
)
def test_layers_are_divided_without_a_gap(
    num_layers: int, count: int, split: tuple[int, ...], expected: list[int]
) -> None:
    spans = [Stage(index, count, split).layers(num_layers) for index in range(count)]
    assert [len(span) for span in spans] == expected
    assert spans[0].start == 0
    ends = [span.stop for span in spans]
    assert [span.start for span in spans[1:]] == ends[:-1]
    assert spans[-1] == Span(num_layers - expected[-1], num_layers)


@pytest.mark.parametrize(
    ("count", "split", "message"),
    [
        (5, (), "--pipeline-parallel: 5 stages for 4 layers"),
        (2, (3, 2), "--layer-split: 3,2 does not give 4 layers to 2 stages"),
        (2, (4,), "--layer-split: 4 does not give 4 layers to 2 stages"),
        (2, (0, 4), "--layer-split: 0,4 does not"),
    ],
)
def test_impossible_divisions_are_refused(count: int, split: tuple[int, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Stage(0, count, split).layers(4)
