"""The loop of rank 0 and its ends: idle, drained, out of time, failed, misconfigured."""

import gc
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from orchestra import _core
from orchestra.errors import ConfigError
from orchestra.worker import runtime
from orchestra.worker.__main__ import main
from orchestra.worker.config import WorkerConfig
from orchestra.worker.leading import Leading
from orchestra.worker.metrics import WorkerMetrics
from orchestra.worker.runtime import agent_config
from orchestra.worker.stopping import StopSignals
from tests.worker.conftest import Checkpoints, MakeRank
from tests.worker.plans import PlanBuilder, encode_plan, sampling_start
from tests.worker.rank_process import ScriptedAgent, empty_stats

ROUTER = ["--router", "http://127.0.0.1:9"]
SMALL = ["--device", "cpu", "--num-blocks", "8", "--dtype", "float32"]


@pytest.fixture(autouse=True)
def restored_process() -> Iterator[None]:
    """`main` takes signals, logging and the garbage collector over, as it may in a process of its own."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    gc.enable()
    gc.unfreeze()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def stop() -> StopSignals:
    return StopSignals(drain_timeout_s=5)


@pytest.fixture
def metrics() -> WorkerMetrics:
    return WorkerMetrics(empty_stats, block_size=16)


def messages() -> list[bytes]:
    """Two steps of one sequence."""
    builder = PlanBuilder(256)
    builder.add("a", list(range(20, 45)))
    first = builder.plan({"a": 25}, [sampling_start(0)], num_top_logprobs=2)
    builder.append("a", 7)
    return [encode_plan(first), encode_plan(builder.plan({"a": 1}))]


def statuses(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# === leading ===


def test_plans_are_executed_and_committed(
    make_rank: MakeRank,
    stop: StopSignals,
    metrics: WorkerMetrics,
    capsys: pytest.CaptureFixture[str],
) -> None:
    agent = ScriptedAgent(messages(), stop)
    Leading(agent, make_rank("llama"), metrics).run(stop)
    assert agent.is_draining
    assert [answer["step_id"] for answer in agent.answers] == [1, 2]
    sizes = [[len(value) for name, value in a.items() if name != "step_id"] for a in agent.answers]
    assert sizes == [[4, 4, 8, 8], [4, 0, 0, 0]]
    assert statuses(capsys.readouterr().out) == [{"status": "ready"}]
    sample = metrics.registry.get_sample_value
    assert sample("orchestra_worker_computed_tokens_total") == 26
    assert sample("orchestra_worker_sampled_tokens_total") == 2
    assert sample("orchestra_worker_step_seconds_count", {"phase": "execute"}) == 2


def test_ready_is_said_when_attached(
    make_rank: MakeRank,
    stop: StopSignals,
    metrics: WorkerMetrics,
    capsys: pytest.CaptureFixture[str],
) -> None:
    agent = ScriptedAgent([], stop)
    agent.is_attached = False
    Leading(agent, make_rank("llama"), metrics).run(stop)
    assert capsys.readouterr().out == ""


class EndlessAgent(ScriptedAgent):
    """Has a sequence that never ends."""

    def __init__(self, stop: StopSignals) -> None:
        super().__init__([], stop)
        self.waits = 0

    @property
    def is_idle(self) -> bool:
        return False

    def next_step(self, timeout_ms: int) -> bytes | None:
        self.waits += 1
        return super().next_step(timeout_ms)


def test_draining_has_a_limit(
    make_rank: MakeRank, stop: StopSignals, metrics: WorkerMetrics
) -> None:
    agent = EndlessAgent(stop)
    stop.drain_timeout_s = 0.02
    Leading(agent, make_rank("llama"), metrics).run(stop)
    assert agent.waits > 1


# === signals ===


def test_first_signal_asks_and_second_ends(
    stop: StopSignals, monkeypatch: pytest.MonkeyPatch
) -> None:
    exits: list[int] = []
    monkeypatch.setattr(os, "_exit", exits.append)
    stop.install()
    stop.is_serving = True
    signal.raise_signal(signal.SIGTERM)
    assert stop.is_requested
    assert exits == []
    signal.raise_signal(signal.SIGINT)
    assert exits == [130]


def test_signal_while_loading_ends_at_once(
    stop: StopSignals, monkeypatch: pytest.MonkeyPatch
) -> None:
    exits: list[int] = []
    monkeypatch.setattr(os, "_exit", exits.append)
    stop.install()
    signal.raise_signal(signal.SIGTERM)
    assert exits == [143]


# === run ===


class FakeAgent:
    """`orchestra._core.Agent` that hands out one message, whatever it is."""

    config: ClassVar[dict[str, Any]] = {}
    message: bytes = b""
    was_closed = False
    is_attached = True
    is_idle = True

    def __init__(self, config: dict[str, Any], kv_pool: _core.KvPool | None) -> None:
        assert kv_pool is not None
        FakeAgent.config = config
        FakeAgent.was_closed = False

    def next_step(self, _timeout_ms: int) -> bytes | None:
        signal.raise_signal(signal.SIGTERM)
        return self.message or None

    def stats(self) -> dict[str, int]:
        return empty_stats()

    def drain(self) -> None:
        pass

    def layer_done(self, step_id: int, layer: int) -> None:
        raise AssertionError((step_id, layer))

    def close(self) -> None:
        FakeAgent.was_closed = True


def test_run_from_flags_to_a_signal(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_core, "Agent", FakeAgent)
    assert main([str(checkpoint("llama")), *ROUTER, *SMALL, "--max-num-seqs", "4"]) == 0
    assert FakeAgent.was_closed
    *loading, ready = statuses(capsys.readouterr().out)
    assert [status["done"] for status in loading] == [1, 2, 3, 4, 5]
    assert {status["total"] for status in loading} == {5}
    assert ready == {"status": "ready"}
    assert FakeAgent.config["model"] == "llama"
    assert FakeAgent.config["vocab_size"] == 512
    assert FakeAgent.config["scheduler"] == {
        "block_size": 16,
        "num_blocks": 8,
        "num_host_blocks": 0,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 256,
        "max_model_len": 128,
        "max_prefill_chunk": 0,
        "tpot_target_us": 0,
        "min_prefill_tokens": 16,
        "max_steps_in_flight": 1,
        "plans_ahead": False,
        "enable_prefix_cache": True,
        "eos_token_ids": [1],
    }


def test_failed_step_ends_the_process(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_core, "Agent", FakeAgent)
    monkeypatch.setattr(FakeAgent, "message", b"\xc1")
    with caplog.at_level(logging.ERROR):
        assert main([str(checkpoint("llama")), *ROUTER, *SMALL]) == 1
    assert FakeAgent.was_closed
    (record,) = caplog.records
    assert record.exc_info is not None


def test_wrong_checkpoint_ends_with_the_code_for_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')
    assert main([str(tmp_path), *ROUTER]) == 64
    (record,) = caplog.records
    assert record.getMessage().startswith("architectures: ")
    assert record.exc_info is None


def test_sequences_longer_than_the_model_are_refused_before_loading(
    checkpoint: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    assert main([str(checkpoint("llama")), *ROUTER, *SMALL, "--max-model-len", "5000"]) == 64
    assert "more than the model's 2048 positions" in caplog.text


def test_agent_needs_a_tokeniser(make_rank: MakeRank, tmp_path: Path) -> None:
    config = WorkerConfig(tmp_path, "", "", "")
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read"):
        agent_config(config, make_rank("llama"))
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert agent_config(config, make_rank("llama"))["model_files"] == {
        "tokenizer_json": b"{}",
        "tokenizer_config_json": b"",
        "generation_config_json": b"",
        "chat_template": "{{ messages }}",
    }
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"chat_template\.jinja is not UTF-8"):
        agent_config(config, make_rank("llama"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
    ids=["limited", "as told", "policy as told"],
)
def test_idle_threads_do_not_spin_for_long(
    given: dict[str, str],
    expected: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        # Set first, so that the patch knows to restore what `main` leaves behind.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert main([str(tmp_path), *ROUTER]) == 64
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_what_is_imported_is_no_garbage(
    checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def lead(*_: object) -> None:
        seen.append((gc.isenabled(), gc.get_freeze_count()))

    monkeypatch.setattr(runtime, "_lead_with_agent", lead)
    assert main([str(checkpoint("llama")), *ROUTER, *SMALL]) == 0
    ((is_collecting, num_frozen),) = seen
    # torch alone brings more.
    assert is_collecting
    assert num_frozen > 100_000


@pytest.mark.timeout(120)
def test_worker_waits_for_its_router_and_stops_when_told(checkpoint: Checkpoints) -> None:
    command = ["-m", "orchestra.worker", str(checkpoint("llama")), *ROUTER, *SMALL]
    with subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True) as worker:
        try:
            assert worker.stderr is not None
            assert (
                "loaded, attaching to the router at http://127.0.0.1:9" in worker.stderr.readline()
            )
            worker.terminate()
            assert worker.wait(timeout=90) == 0
        finally:
            worker.kill()


# === metrics ===


def test_metrics_page_shows_loop_and_agent(metrics: WorkerMetrics) -> None:
    stats = {**empty_stats(), "kv_blocks_used": 5, "kv_blocks_total": 20, "num_running": 3}
    page = WorkerMetrics(lambda: stats, block_size=16)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    stop = page.serve("127.0.0.1", port)
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()
    finally:
        stop()
    assert "orchestra_requests_running 3.0" in lines
    assert "orchestra_kv_cache_usage_ratio 0.25" in lines
    assert 'orchestra_cache_config_info{block_size="16",num_blocks="20"} 1.0' in lines
    assert "orchestra_preemptions_total 0.0" in lines
    assert "orchestra_swaps_total 0.0" in lines
    # Two workers in one process do not share a registry.
    assert metrics.registry is not page.registry
