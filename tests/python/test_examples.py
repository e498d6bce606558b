"""The examples and the code of the pages run as they are."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
DOCS = ROOT / "docs"


def test_embed_scheduler() -> None:
    script = EXAMPLES / "embed_scheduler.py"
    command = [sys.executable, str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "still held: 0" in done.stdout
    served = re.findall(r"'gpu-\d': (\d+)", done.stdout)
    assert sum(map(int, served)) == 64
    assert len(served) == 4
    hits = re.search(r"found in a cache: (\d+) of 40960", done.stdout)
    assert hits is not None
    # Each engine computes a system prompt at most once per wave, so later waves find it.
    assert int(hits.group(1)) > 0


@pytest.mark.parametrize("heading", ["Routing", "Waiting for room", "Placing", "Registered memory"])
def test_python_api_page(heading: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = (DOCS / "python_api.md").read_text()
    section = page.split(f"## {heading}\n")[1].split("\n## ")[0]
    examples = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert examples
    # A later example of a section goes on from the one before.
    names: dict[str, object] = {}
    for code in examples:
        exec(code, names)
        assert capsys.readouterr().out.splitlines() == re.findall(r"# prints: (.*)", code)
