"""The parts of `orchestra serve` and of the command line that need no process."""

import argparse
import asyncio
import fcntl
import io
import json
from pathlib import Path

import pytest

from orchestra import cli
from orchestra.serve import options as serve_options
from orchestra.serve import supervisor
from orchestra.serve.console import Console
from orchestra.serve.options import ServeOptions, UsageError
from orchestra.serve.restarts import BACKOFF_MAX_S, Restarts
from orchestra.serve.router import Addresses
from orchestra.serve.run_directory import PREFIX, run_directory
from orchestra.serve.supervisor import Supervisor, has_chat_template


def parse(*arguments: str) -> ServeOptions:
    parser = argparse.ArgumentParser()
    serve_options.add_arguments(parser)
    return serve_options.from_arguments(parser.parse_args(arguments))


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


# === restarts ===


def test_three_failed_starts_are_enough() -> None:
    restarts = Restarts()
    assert [restarts.failed(1, ran_s=5.0) for _ in range(3)] == [0.5, 1.0, None]


def test_wrong_configuration_is_not_tried_again() -> None:
    assert Restarts().failed(64, ran_s=5.0) is None


def test_what_was_ready_is_started_for_ever_with_a_capped_delay() -> None:
    restarts = Restarts()
    restarts.ready()
    delays = [restarts.failed(-9, ran_s=1.0) for _ in range(20)]
    assert delays[:3] == [0.5, 1.0, 2.0]
    assert delays[-1] == BACKOFF_MAX_S
    assert restarts.failed(64, ran_s=1.0) == BACKOFF_MAX_S


def test_a_long_healthy_run_forgives() -> None:
    restarts = Restarts()
    restarts.ready()
    for _ in range(5):
        restarts.failed(1, ran_s=1.0)
    assert restarts.failed(1, ran_s=61.0) == 0.5


# === options ===


def test_only_given_worker_options_are_passed_on() -> None:
    assert parse("models/demo").worker_arguments == ()
    options = parse("models/demo", "--max-num-seqs", "8", "--no-prefix-cache")
    assert options.worker_arguments == ("--max-num-seqs", "8", "--no-prefix-cache")


def test_model_name_is_the_directory_unless_given() -> None:
    assert parse("models/demo/").model_name == "demo"
    assert parse("models/demo", "--served-model-name", "tiny").model_name == "tiny"


@pytest.mark.parametrize(
    ("arguments", "ports"),
    [
        ([], (8000, 8001)),
        (["--port", "9000"], (9000, 9001)),
        (["--port", "0"], (0, 0)),
        (["--port", "65535"], (65535, 0)),
        (["--port", "9000", "--grpc-port", "0"], (9000, 0)),
    ],
)
def test_grpc_port_follows_the_port(arguments: list[str], ports: tuple[int, int]) -> None:
    options = parse("m", *arguments)
    assert (options.port, options.grpc_port) == ports


@pytest.mark.parametrize(
    ("visible", "arguments", "devices"),
    [
        ("", ["--replicas", "2"], [None, None]),
        ("0,1,2,3", ["--tp", "2", "--replicas", "2"], ["0,1", "2,3"]),
        ("GPU-a,GPU-b", ["--replicas", "2"], ["GPU-a", "GPU-b"]),
        ("0,1,2", ["--prefill", "1", "--decode", "2"], ["0", "1", "2"]),
        ("0", ["--tp", "4", "--device", "cpu"], [None]),
        ("0,1,2,3,4", ["--tp", "2", "--pp", "2"], ["0,1,2,3"]),
        ("0,1,2,3,4", ["--tp", "2", "--cp", "2"], ["0,1,2,3"]),
    ],
)
def test_each_worker_gets_its_own_gpus(
    visible: str, arguments: list[str], devices: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert serve_options.group_devices(parse("m", *arguments)) == devices


def test_too_few_gpus_is_said_with_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    with pytest.raises(UsageError, match="--tp 2 and --replicas 2 need 4 GPUs, there are 3"):
        serve_options.group_devices(parse("m", "--tp", "2", "--replicas", "2"))
    with pytest.raises(UsageError, match="--tp 2, --pp 2 and --replicas 1 need 4 GPUs"):
        serve_options.group_devices(parse("m", "--tp", "2", "--pp", "2"))
    with pytest.raises(UsageError, match="--tp 1, --cp 4 and --replicas 1 need 4 GPUs"):
        serve_options.group_devices(parse("m", "--cp", "4"))


def test_prefill_workers_come_first() -> None:
    options = parse("m", "--prefill", "1", "--decode", "2")
    assert [options.arguments_of(index) for index in range(options.replicas)] == [
        ["--role", "prefill"],
        ["--role", "decode"],
        ["--role", "decode"],
    ]
    assert parse("m", "--replicas", "2").arguments_of(0) == []


def test_a_lone_worker_keeps_its_kv_to_itself() -> None:
    assert parse("m").arguments_of(0) == ["--kv-transfer", "off"]
    assert parse("m", "--kv-transfer", "tcp").arguments_of(0) == ["--kv-transfer", "tcp"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prefill", "1"], "--prefill needs --decode"),
        (["--decode", "1"], "--decode needs --prefill"),
        (["--prefill", "1", "--decode", "1", "--replicas", "2"], "--replicas does not go with"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse("m", *arguments)


# === stopping ===


async def test_each_worker_stops_in_order_though_others_are_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopped = []
    all_run = asyncio.Event()

    class Part:
        """What the supervisor runs: takes some turns of the loop to stop, each group more than the one before."""

        child = None
        children = ()
        is_ready = False
        loaded = 0.0

        def __init__(self, *given: object, **_: object) -> None:
            self._turns = 10 * given[0] if isinstance(given[0], int) else 0

        async def addresses(self) -> Addresses:
            return Addresses("127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3")

        async def run(self) -> None:
            if self._turns == 20:
                all_run.set()
            try:
                await asyncio.Event().wait()
            finally:
                for _ in range(self._turns):
                    await asyncio.sleep(0)
                stopped.append(self._turns)

    for name in ("RouterProcess", "ForkServer", "WorkerGroup"):
        monkeypatch.setattr(supervisor, name, Part)
    running = Supervisor(parse("m", "--replicas", "3"), Console(Terminal()), Console(Terminal()))
    exit_code = asyncio.create_task(running.run())
    await all_run.wait()
    running._stop.set()
    assert await exit_code == 0
    # The router, then the fork server and the first group, then the slower ones.
    assert stopped == [0, 0, 0, 10, 20]


# === run directory ===


def test_run_directory_is_private_and_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with run_directory() as path:
        assert path.stat().st_mode & 0o077 == 0
        (path / "file").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_abandoned_run_directories_are_removed_and_living_ones_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    abandoned, living = tmp_path / f"{PREFIX}abandoned", tmp_path / f"{PREFIX}living"
    for path in (abandoned, living):
        path.mkdir()
        (path / "lock").touch()
    with (living / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with run_directory():
            assert not abandoned.exists()
            assert living.exists()


# === console ===


def test_progress_off_a_terminal_is_one_line_per_change() -> None:
    stream = io.StringIO()
    console = Console(stream)
    for text in ("loading 0 %", "loading 0 %", "loading 50 %", ""):
        console.progress(text)
    console.line("ready")
    assert stream.getvalue() == "loading 0 %\nloading 50 %\nready\n"


def test_progress_on_a_terminal_stays_below_the_lines() -> None:
    stream = Terminal()
    console = Console(stream)
    console.progress("loading")
    console.line("a log line")
    console.progress("")
    console.line("ready")
    clear = "\r\x1b[K"
    assert stream.getvalue() == f"{clear}loading{clear}a log line\nloading{clear}ready\n"


def test_console_without_a_reader_is_silent() -> None:
    stream = io.StringIO()
    console = Console(stream)
    stream.close()
    console.line("nobody reads this")


# === chat template ===


def test_chat_template_is_found_in_both_places(tmp_path: Path) -> None:
    assert not has_chat_template(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "{{ messages }}"}))
    assert has_chat_template(tmp_path)
    config.unlink()
    (tmp_path / "chat_template.jinja").touch()
    assert has_chat_template(tmp_path)


# === command line ===


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {command}" in listed for command in cli.COMMANDS)


@pytest.mark.parametrize("arguments", [[], ["no-such-command"]])
def test_wrong_command_is_a_usage_error(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 64
    assert "orchestra" in "".join(capsys.readouterr())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version"]) == 0
    assert capsys.readouterr().out.startswith("orchestra ")
