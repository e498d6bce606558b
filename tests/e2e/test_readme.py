"""What the README says to type works, word for word; only ports and addresses are replaced."""

import io
import json
import re
import shlex
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from tests.e2e.stack import DEMO, Serve, eventually
from tests.e2e.test_lifecycle import completes

ROOT = Path(__file__).parents[2]


def block(language: str, containing: str) -> str:
    """The README's code block of a language that contains a text."""
    fences = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)
    (found,) = (body for kind, body in fences if kind == language and containing in body)
    return str(found)


def test_library_quick_start() -> None:
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(block("python", "orchestra.Scheduler"), {})
    promised = re.findall(r"# prints: (.*)", block("python", "orchestra.Scheduler"))
    assert printed.getvalue().splitlines() == promised


def test_openai_quick_start(serve: Serve) -> None:
    code = block("python", "from openai import OpenAI")
    code = code.replace("http://127.0.0.1:8000", serve.url)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip()


def test_curl_line_that_serve_prints(serve: Serve) -> None:
    line = next(line for line in block("", "curl -N").splitlines() if "curl -N" in line)
    command = shlex.split(line.replace("http://127.0.0.1:8000", serve.url))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith("data: {")
    assert done.stdout.rstrip().endswith("data: [DONE]")


@pytest.mark.timeout(180)
def test_router_and_worker_quick_starts() -> None:
    prefix = [sys.executable, "-m"]
    router_line = shlex.split(block("sh", "orchestra router"))
    router_line = [re.sub(r"^0\.0\.0\.0:\d+$", "127.0.0.1:0", word) for word in router_line]
    router = subprocess.Popen(
        [*prefix, *router_line, "--print-addresses"], stdout=subprocess.PIPE, text=True
    )
    with router:
        assert router.stdout is not None
        addresses = json.loads(router.stdout.readline())
        worker_line = shlex.split(
            block("sh", "orchestra worker").replace("127.0.0.1:8002", addresses["workers"])
        )
        worker = subprocess.Popen([*prefix, *worker_line], cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            serve = Serve(router, addresses["http"], "", "", DEMO.name, Path())
            eventually(lambda: completes(serve), 120)
        finally:
            for process in (router, worker):
                process.send_signal(signal.SIGTERM)
            assert [worker.wait(60), router.wait(60)] == [0, 0]


def test_make_serve_serves_the_demonstration_model() -> None:
    done = subprocess.run(
        ["make", "--dry-run", "serve"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    last = done.stdout.strip().splitlines()[-1].split()
    assert last == [".venv/bin/orchestra", "serve", str(DEMO.relative_to(ROOT))]
