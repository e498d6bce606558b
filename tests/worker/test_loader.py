"""Reading slices of safetensors files, and the errors that name the tensor."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from orchestra.errors import ConfigError
from orchestra.worker.loader import WeightReader
from orchestra.worker.sharding import Span
from tests.worker.conftest import Checkpoints, MakeRank
from tests.worker.plans import PlanBuilder

MATRIX = torch.arange(24, dtype=torch.float32).view(6, 4)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_file({"a": MATRIX, "b": torch.ones(3)}, tmp_path / "model.safetensors")
    return tmp_path


def test_rows_and_columns(directory: Path) -> None:
    rows, columns = torch.empty(3, 4, dtype=torch.bfloat16), torch.empty(6, 2)
    with WeightReader(directory) as reader:
        reader.copy_rows("a", [6, 4], [Span(4, 6), Span(2, 2), Span(0, 1)], rows)
        reader.copy_columns("a", [6, 4], Span(1, 3), columns)
        assert reader.bytes_read == 3 * 4 * 4 + 6 * 2 * 4
    assert torch.equal(rows.float(), MATRIX[[4, 5, 0]])
    assert torch.equal(columns, MATRIX[:, 1:3])


def test_missing_weight_is_named(directory: Path) -> None:
    with WeightReader(directory) as reader, pytest.raises(ConfigError, match="no weight c"):
        reader.copy_rows("c", [1], [Span(0, 1)], torch.empty(1))


def test_wrong_shape_is_named(directory: Path) -> None:
    with (
        WeightReader(directory) as reader,
        pytest.raises(ConfigError, match=r"a has shape \[6, 4\], config.json means \[6, 5\]"),
    ):
        reader.copy_rows("a", [6, 5], [Span(0, 1)], torch.empty(1, 5))


def test_weights_that_nothing_reads_are_named(directory: Path) -> None:
    with WeightReader(directory) as reader:
        with pytest.raises(ConfigError, match="a, b"):
            reader.finish(lambda _name: False)
        reader.finish(lambda name: name in {"a", "b"})


def test_weights_of_other_ranks_are_checked_and_not_read(directory: Path) -> None:
    with WeightReader(directory) as reader:
        reader.leave("a", [6, 4])
        with pytest.raises(ConfigError, match=r"b has shape \[3\]"):
            reader.leave("b", [4])
        with pytest.raises(ConfigError, match=r"does not: b$"):
            reader.finish(lambda _name: False)
        assert reader.bytes_read == 0


def test_not_a_safetensors_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"not a header")
    with pytest.raises(ConfigError, match=r"model\.safetensors is not a safetensors file"):
        WeightReader(tmp_path)


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor"):
        WeightReader(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_damaged_index(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(ConfigError, match="no readable weight_map"):
        WeightReader(tmp_path)


def test_index_names_a_missing_file(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "part-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=r"missing: part-1\.safetensors"):
        WeightReader(tmp_path)


def test_layers_that_only_draft_are_left(
    checkpoint: Checkpoints, make_rank: MakeRank, tmp_path: Path
) -> None:
    shutil.copytree(checkpoint("deepseek3"), tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({**weights, "model.layers.3.eh_proj.weight": MATRIX}, tmp_path / "model.safetensors")
    make_rank("deepseek3", model_dir=tmp_path)
    save_file({**weights, "model.layers.4.eh_proj.weight": MATRIX}, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"does not: model\.layers\.4\.eh_proj\.weight"):
        make_rank("deepseek3", model_dir=tmp_path)


def test_model_in_several_files(
    checkpoint: Checkpoints, make_rank: MakeRank, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2

    logits = []
    for rank in (make_rank("llama"), make_rank("llama", model_dir=tmp_path)):
        builder = PlanBuilder(rank.num_blocks)
        builder.add("a", list(range(20)))
        logits.append(rank.runner.forward(builder.plan({"a": 20})))
    assert logits[0] is not None
    assert logits[1] is not None
    assert torch.equal(logits[0], logits[1])
