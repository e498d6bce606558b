"""Starting, dying, coming back and stopping: nothing is left behind, whatever happens to the processes."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.checkpoints import make_checkpoint
from tests.e2e.stack import Serve, eventually, start_serve

pytestmark = pytest.mark.timeout(240)

SMALL = ("--dtype", "float32", "--num-blocks", "64")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint: these tests start many processes and compute little."""
    return make_checkpoint("llama", tmp_path_factory.mktemp("lifecycle") / "tiny", seed=7)


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A temporary directory for the processes of a test; they must have left it empty at the end."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        assert list(Path(folder).iterdir()) == []


def run_serve(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs an `orchestra serve` that is expected to end by itself."""
    command = [sys.executable, "-m", "orchestra", "serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)


def complete(serve: Serve) -> dict[str, object]:
    """Asks for four tokens with the real curl; the answer of whichever status, empty where nobody listens."""
    body = {"model": serve.model, "prompt": "hello", "max_tokens": 4, "ignore_eos": True}
    command = ["curl", "-sS", f"{serve.url}/v1/completions", "-H", "content-type: application/json"]
    done = subprocess.run(
        [*command, "-d", json.dumps(body)], capture_output=True, text=True, timeout=60, check=False
    )
    answer = json.loads(done.stdout or "{}")
    assert isinstance(answer, dict)
    return answer


def completes(serve: Serve) -> bool:
    """Whether a request succeeds now."""
    answer = complete(serve)
    return "choices" in answer and answer["usage"] == {**answer["usage"], "completion_tokens": 4}  # type: ignore[dict-item]


def listens(address: str) -> bool:
    """Whether anything accepts connections there."""
    host, port = address.rsplit(":", 1)
    with socket.socket() as client:
        return client.connect_ex((host, int(port))) == 0


def shared_memory() -> set[str]:
    """The names of the shared memory of this machine."""
    return {path.name for path in Path("/dev/shm").iterdir()}


def test_interrupt_stops_everything(checkpoint: Path, scratch: Path) -> None:
    before = shared_memory()
    with start_serve(
        checkpoint, *SMALL, "--tp", "2", environment={"TMPDIR": str(scratch)}
    ) as serve:
        children = serve.children()
        roles = ("router", "fork-server", "worker")
        assert [len(serve.children(role)) for role in roles] == [1, 1, 2]
        # A fork takes one thread along: there must be no other.
        assert serve.children("fork-server")[0].num_threads() == 1
        assert completes(serve)
        serve.process.send_signal(signal.SIGINT)
        assert serve.process.wait(60) == 0
        assert [child for child in children if child.is_running()] == []
        assert not any(listens(address) for address in (serve.http, serve.grpc, serve.workers))
        assert "did not stop" not in serve.log.read_text()
    assert shared_memory() <= before


def test_running_request_finishes_when_stopped(checkpoint: Path) -> None:
    with start_serve(checkpoint, *SMALL) as serve:
        body = {
            "model": serve.model,
            "prompt": "a",
            "max_tokens": 200,
            "ignore_eos": True,
            "stream": True,
        }
        command = [
            "curl",
            "-sSN",
            f"{serve.url}/v1/completions",
            "-H",
            "content-type: application/json",
        ]
        with subprocess.Popen(
            [*command, "-d", json.dumps(body)], stdout=subprocess.PIPE, text=True
        ) as curl:
            assert curl.stdout is not None
            assert curl.stdout.readline().startswith("data: {")
            serve.process.send_signal(signal.SIGTERM)
            rest = curl.stdout.read()
        assert '"finish_reason":"length"' in rest.replace(" ", "")
        assert rest.rstrip().endswith("data: [DONE]")
        assert serve.process.wait(60) == 0


def test_second_interrupt_does_not_wait(checkpoint: Path) -> None:
    with start_serve(checkpoint, *SMALL, "--drain-timeout", "100") as serve:
        body = {
            "model": serve.model,
            "prompt": "a",
            "max_tokens": 1000,
            "ignore_eos": True,
            "stream": True,
        }
        command = [
            "curl",
            "-sSN",
            f"{serve.url}/v1/completions",
            "-H",
            "content-type: application/json",
        ]
        with subprocess.Popen(
            [*command, "-d", json.dumps(body)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as curl:
            assert curl.stdout is not None
            curl.stdout.readline()
            serve.process.send_signal(signal.SIGINT)
            eventually(lambda: "stopping" in serve.log.read_text())
            serve.process.send_signal(signal.SIGINT)
            assert serve.process.wait(5) == 0


def test_killed_worker_comes_back(checkpoint: Path) -> None:
    with start_serve(checkpoint, *SMALL, "--tp", "2") as serve:
        old = serve.children("worker")
        # Rank 0, which nobody replaces: the whole group goes.
        old[0].kill()
        psutil.wait_procs(old, timeout=30)
        assert [child for child in old if child.is_running()] == []
        eventually(lambda: completes(serve), 90)
        assert "was killed by SIGKILL" in serve.log.read_text()


def test_killed_router_comes_back_at_its_addresses(checkpoint: Path) -> None:
    with start_serve(checkpoint, *SMALL) as serve:
        workers = serve.children("worker")
        serve.children("router")[0].kill()
        eventually(lambda: completes(serve), 60)
        # The worker lost its router, not its weights.
        assert serve.children("worker") == workers


def test_killed_supervisor_leaves_no_orphans(checkpoint: Path, scratch: Path) -> None:
    environment = {"TMPDIR": str(scratch)}
    with start_serve(checkpoint, *SMALL, "--tp", "2", environment=environment) as serve:
        children = serve.children()
        assert len(children) == 4
        serve.process.kill()
        serve.process.wait()
        _, alive = psutil.wait_procs(children, timeout=10)
        assert alive == []
        assert not listens(serve.http)
    # What the dead one could not remove, the next one does.
    (left,) = scratch.glob("orchestra-serve-*")
    with start_serve(checkpoint, *SMALL, environment=environment):
        assert not left.exists()


def test_worker_started_before_its_router_waits(checkpoint: Path, tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        workers = f"127.0.0.1:{listener.getsockname()[1]}"
    base = [sys.executable, "-m", "orchestra"]
    log = tmp_path / "worker.log"
    with log.open("w") as stderr:
        worker = subprocess.Popen(
            [*base, "worker", str(checkpoint), *SMALL, "--router", f"http://{workers}"],
            stderr=stderr,
        )
    try:
        flags = ["--http", "127.0.0.1:0", "--grpc", "127.0.0.1:0", "--workers", workers]
        flags += ["--admin", "127.0.0.1:0"]
        eventually(lambda: "not attached, trying again" in log.read_text(), 60)
        router = subprocess.Popen(
            [*base, "router", *flags, "--print-addresses"], stdout=subprocess.PIPE, text=True
        )
        with router:
            try:
                assert router.stdout is not None
                http = json.loads(router.stdout.readline())["http"]
                serve = Serve(router, http, "", workers, checkpoint.name, Path(os.devnull))
                eventually(lambda: completes(serve), 90)
            finally:
                router.send_signal(signal.SIGTERM)
                assert router.wait(30) == 0
    finally:
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(30) == 0


def test_two_replicas_serve(checkpoint: Path) -> None:
    with start_serve(checkpoint, *SMALL, "--replicas", "2") as serve:
        assert len(serve.children("worker")) == 2
        serve.children("worker")[0].kill()
        # The other one takes what comes meanwhile.
        assert [completes(serve) for _ in range(4)] == [True] * 4


def test_unreadable_checkpoint_ends_with_its_reason(checkpoint: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    weights = next(broken.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    done = run_serve(str(broken), "--port", "0")
    assert done.returncode == 64
    assert "giving up" in done.stderr
    assert weights.name in done.stderr


def test_wrong_router_setting_ends_with_its_reason(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORCHESTRA_MAX_CONCURRENT_REQUESTS", "0")
    done = run_serve(str(checkpoint), "--port", "0")
    assert done.returncode == 64
    assert "giving up: router exited with 64" in done.stderr
    assert "max_concurrent_requests" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["MISSING"], "is not a directory"),
        (["EMPTY"], "has no config.json"),
        (["MODEL", "--tp", "3"], "--tp 3 does not divide the model's"),
        (["MODEL", "--tp", "0"], "--tp: must be at least 1"),
        (["MODEL", "--pp", "99"], "--pipeline-parallel: 99 stages for"),
        (["MODEL", "--pp", "2", "--layer-split", "40,1"], "--layer-split: 40,1 does not give"),
        (["MODEL", "--repartition", "auto"], "--repartition needs stages"),
        (["MODEL", "--layer-split", "40,"], "--layer-split: '40,' is not a list of layers"),
        (["MODEL", "--port", "70000"], "--port: must be between 0 and 65535"),
        (["MODEL", "--port", "9000", "--grpc-port", "9000"], "are both 9000"),
        (["MODEL", "--host", "no.such.host.invalid"], "--host no.such.host.invalid"),
        (["MODEL", "--no-such-flag"], "--no-such-flag"),
        ([], "MODEL_DIR"),
    ],
)
def test_wrong_arguments_get_one_line(
    arguments: list[str], words: str, checkpoint: Path, tmp_path: Path
) -> None:
    places = {
        "MODEL": str(checkpoint),
        "EMPTY": str(tmp_path),
        "MISSING": str(tmp_path / "missing"),
    }
    done = run_serve(*(places.get(argument, argument) for argument in arguments))
    assert done.returncode == 64
    assert re.fullmatch(r"orchestra serve: .*\n", done.stderr)
    assert words in done.stderr


def test_port_in_use_is_said_in_one_line(checkpoint: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        done = run_serve(str(checkpoint), "--port", str(port))
    assert done.returncode == 1
    expected = rf"orchestra serve: cannot listen on 127\.0\.0\.1 port {port}: .*--port\n"
    assert re.fullmatch(expected, done.stderr)


def test_a_router_alone_leaves_cleanly_on_interrupt() -> None:
    flags = [f"--{name}=127.0.0.1:0" for name in ("http", "grpc", "workers", "admin")]
    with subprocess.Popen(
        [sys.executable, "-m", "orchestra", "router", *flags, "--print-addresses"],
        stdout=subprocess.PIPE,
        text=True,
    ) as router:
        assert router.stdout is not None
        router.stdout.readline()  # listening, so its signal handlers are there
        router.send_signal(signal.SIGINT)
        assert router.wait(60) == 0
