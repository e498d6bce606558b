"""The flags of `orchestra worker`, and what the machine decides where they leave it open."""

import functools
import itertools
from pathlib import Path

import pytest
import torch

from orchestra.errors import ConfigError
from orchestra.worker import device as devices
from orchestra.worker.argument_types import parse_bytes
from orchestra.worker.command_line import parse_arguments
from orchestra.worker.config import WorkerConfig
from orchestra.worker.sharding import Shard, Stage

ROUTER = ["--router", "http://127.0.0.1:8002"]


def test_defaults(tmp_path: Path) -> None:
    config = parse_arguments([str(tmp_path), *ROUTER])
    assert config.model_name == tmp_path.name
    assert config.worker_id
    expected = WorkerConfig(tmp_path, ROUTER[1], config.worker_id, tmp_path.name)
    assert config == expected


def test_every_flag(tmp_path: Path) -> None:
    flags = (
        "--worker-id w --served-model-name m --tp 2 --pp 3 --cp 2 --rank 7 --rendezvous file:///x "
        "--node n1 --context-min-tokens 99 --dtype bfloat16 "
        "--runner hf --device cpu --block-size 32 --kv-cache-memory 1.5GiB --num-host-blocks 12 "
        "--max-num-seqs 9 --max-num-batched-tokens 100 --max-model-len 50 --max-prefill-chunk 16 --tpot-target-ms 40 "
        "--no-prefix-cache --layer-split 4,10,6 --expert-parallel "
        "--kv-transfer tcp --kv-address ::1 --role decode --weights-epoch 3 "
        "--write-through --failure-domain rack7 "
        "--drain-timeout 1.5 --metrics-host ::1 --metrics-port 90 --parent-pid 7"
    )
    assert parse_arguments([str(tmp_path), *ROUTER, *flags.split()]) == WorkerConfig(
        model_dir=tmp_path,
        router=ROUTER[1],
        worker_id="w",
        model_name="m",
        shard=Shard(1, 2),
        stage=Stage(1, 3, (4, 10, 6)),
        context=Shard(1, 2),
        context_min_tokens=99,
        rendezvous="file:///x",
        node="n1",
        dtype="bfloat16",
        runner="hf",
        device="cpu",
        block_size=32,
        kv_cache_memory=3 << 29,
        num_host_blocks=12,
        max_num_seqs=9,
        max_num_batched_tokens=100,
        max_model_len=50,
        max_prefill_chunk=16,
        tpot_target_ms=40,
        enable_prefix_cache=False,
        expert_parallel=True,
        kv_transfer="tcp",
        kv_address="::1",
        write_through=True,
        failure_domain="rack7",
        role="decode",
        weights_epoch=3,
        drain_timeout_s=1.5,
        metrics_host="::1",
        metrics_port=90,
        parent_pid=7,
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--block-size 24", "--block-size: 24 is not a power of two"),
        ("--block-size 0", "argument --block-size: must be at least 1"),
        ("--num-blocks 5 --kv-cache-memory 1GiB", "exclude each other"),
        ("--kv-cache-memory lots", "'lots' is not a size"),
        ("--dtype int8", "argument --dtype"),
        ("--tp 2", "--rank: must be 0 to 1"),
        ("--tp 2 --rank 2", "--rank: must be 0 to 1"),
        ("--tp 2 --rank 1", "--rendezvous: needed"),
        ("--pp 2", "--rank: must be 0 to 1 with --tp 1 --pp 2"),
        ("--tp 2 --pp 2 --rank 4", "--rank: must be 0 to 3"),
        ("--pp 2 --rank 1", "--rendezvous: needed with --tp 1 --pp 2"),
        (
            "--pp 2 --rank 1 --rendezvous file:///x --regroup-timeout 5",
            "--regroup-timeout: with --pp or --cp no rank is replaced",
        ),
        ("--cp 2 --rank 1", "--rendezvous: needed with --tp 1 --cp 2"),
        ("--tp 2 --cp 2 --pp 2 --rank 8", "--rank: must be 0 to 7 with --tp 2 --cp 2 --pp 2"),
        (
            "--cp 2 --rank 1 --rendezvous file:///x --regroup-timeout 5",
            "--regroup-timeout: with --pp or --cp no rank is replaced",
        ),
        ("--context-min-tokens 0", "must be at least 1"),
        ("--pp 2 --layer-split 3,0", "'3,0' is not a list of layers"),
        ("--pp 2 --layer-split 3;2", "'3;2' is not a list of layers"),
        ("--max-num-seqs many", "argument --max-num-seqs: invalid whole number value"),
    ],
)
def test_wrong_flags_end_with_a_line(
    tmp_path: Path, flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_arguments([str(tmp_path), *ROUTER, *flags.split()])
    assert ended.value.code == 64
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("orchestra worker: ")
    assert message in line


def test_model_directory_must_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments([str(tmp_path / "none"), *ROUTER])
    assert "is not a directory" in capsys.readouterr().err


def test_torchrun_tells_the_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "3")
    config = parse_arguments([str(tmp_path), *ROUTER, "--rendezvous", "env://"])
    assert config.shard == Shard(3, 4)
    config = parse_arguments([str(tmp_path), *ROUTER, "--rendezvous", "env://", "--pp", "2"])
    assert (config.shard, config.stage) == (Shard(1, 2), Stage(1, 2))
    assert (config.rank, config.num_ranks, config.sampling_rank) == (3, 4, 2)
    config = parse_arguments([str(tmp_path), *ROUTER, "--rendezvous", "env://", "--cp", "2"])
    assert (config.shard, config.context) == (Shard(1, 2), Shard(1, 2))
    assert (config.rank, config.num_ranks, config.sampling_rank) == (3, 4, 0)


def test_ranks_are_numbered_stage_after_stage(tmp_path: Path) -> None:
    flags = ["--tp", "2", "--cp", "3", "--pp", "2", "--rendezvous", "file:///x"]
    places = []
    for rank in range(12):
        config = parse_arguments([str(tmp_path), *ROUTER, *flags, "--rank", str(rank)])
        assert config.rank == rank
        assert config.stage_place == Shard(rank % 6, 6)
        assert (config.num_ranks, config.sampling_rank) == (12, 6)
        places.append((config.stage.index, config.context.rank, config.shard.rank))
    assert places == list(itertools.product(range(2), range(3), range(2)))


@pytest.mark.parametrize(
    ("text", "size"),
    [("17", 17), ("1k", 1000), ("2 KiB", 2048), ("0.5GB", 500_000_000), ("3gi", 3 << 30)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


# === the machine ===


def test_dtype_is_the_checkpoints_where_it_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    fp32, fp16, bf16 = torch.float32, torch.float16, torch.bfloat16
    for is_native in (False, True):
        monkeypatch.setattr(devices, "has_native_bf16", lambda is_native=is_native: is_native)
        for by_torch in (False, True):
            select = functools.partial(devices.select_dtype, by_torch=by_torch)
            half = fp32 if by_torch and not is_native else bf16
            assert select("auto", bf16, cpu) == half
            assert select("auto", fp16, cpu) == half
            assert select("auto", fp32, cpu) == fp32
            assert select("auto", fp16, cuda) == fp16
            assert select("bfloat16", fp32, cpu) == bf16
            assert select("float32", bf16, cpu) == fp32


def test_each_rank_has_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert devices.select_device("auto", 1) == torch.device("cuda", 1)
    assert chosen == [torch.device("cuda", 1)]
    assert devices.select_device("cpu", 1) == torch.device("cpu")
    with pytest.raises(ConfigError, match="rank 2 has no GPU"):
        devices.select_device("cuda", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert devices.select_device("auto", 0) == torch.device("cpu")
    with pytest.raises(ConfigError, match="sees no GPU"):
        devices.select_device("cuda", 0)


def test_a_step_suits_the_device_and_holds_every_sequence(tmp_path: Path) -> None:
    required = [str(tmp_path), *ROUTER]
    plain = parse_arguments(required)
    assert plain.step_tokens("cuda") == 2048
    assert plain.step_tokens("cpu") == 256
    assert parse_arguments([*required, "--max-num-seqs", "300"]).step_tokens("cpu") == 300
    asked = parse_arguments([*required, "--max-num-batched-tokens", "512"])
    assert {asked.step_tokens(device) for device in ("cpu", "cuda")} == {512}
