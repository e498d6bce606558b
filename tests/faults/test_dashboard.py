"""The operators' page in a real browser, over a real router; and its arithmetic alone, which needs no browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.faults.clients import Asked, is_right
from tests.faults.processes import ROOT, eventually

if TYPE_CHECKING:
    from tests.faults.conftest import StartFleet

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NODE = shutil.which("node")
FIGURES = ROOT / "rust/router/src/http/admin/dashboard/figures.js"
# Of the page's own clock, which does not run while it waits for answers.
PAGE_MS = 5000


def rendered(url: str, folder: Path) -> str:
    """The page's elements after a few seconds."""
    assert CHROMIUM is not None
    quiet = ["disable-gpu", "no-sandbox", "no-first-run", "disable-background-networking"]
    quiet += ["disable-quic", "disable-component-update", "disable-sync"]
    command = [CHROMIUM, "--headless", *(f"--{flag}" for flag in quiet)]
    command += [f"--user-data-dir={folder / 'browser'}", f"--virtual-time-budget={PAGE_MS}"]
    shown = subprocess.run(
        [*command, "--dump-dom", url], capture_output=True, text=True, timeout=120, check=True
    )
    return shown.stdout


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")
def test_the_page_shows_engines_and_what_became_of_requests(
    start: StartFleet, tmp_path: Path
) -> None:
    fleet = start(2)
    assert is_right(fleet.router, Asked(5))
    gone = fleet.engines[1]
    gone.kill()
    eventually(lambda: fleet.router.metric("orchestra_engine_up") == 1)
    page = rendered(f"http://{fleet.router.admin}/", tmp_path)
    text = re.sub(r"<[^>]+>", " ", page)
    assert re.search(r"Orchestra\s+\d+\.\d+\.\d+\s+serving", text), text
    assert re.search(rf"{re.escape(fleet.engines[0].url)}\S*\s+\w+\s+mock\s+up\s+closed", text)
    assert re.search(rf"{re.escape(gone.url)}\S*\s+\w+\s+mock\s+down", text)
    assert re.search(r"attempts at engines\s+answered\s+1", text)
    assert "undefined" not in text
    assert "NaN" not in text


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")
def test_the_page_asks_for_the_key(start: StartFleet, tmp_path: Path) -> None:
    fleet = start(0, router=("--admin-key", "sesame"))
    page = rendered(f"http://{fleet.router.admin}/", tmp_path)
    assert "the admin key is missing or wrong" in page
    assert '<form id="key-form">' in page


READINGS = (
    """\
# TYPE orchestra_requests counter
orchestra_requests_total{reason="a \\"b\\""} 5
orchestra_ttft_bucket{le="0.1"} 1
orchestra_ttft_bucket{le="1.0"} 1
orchestra_ttft_bucket{le="+Inf"} 1
""",
    """\
orchestra_requests_total{reason="a \\"b\\""} 25
orchestra_requests_total{reason="c"} 10 # {} 1
orchestra_ttft_bucket{le="0.1"} 11
orchestra_ttft_bucket{le="1.0"} 21
orchestra_ttft_bucket{le="+Inf"} 22
# EOF
""",
)


@pytest.mark.skipif(NODE is None, reason="there is no node here")
def test_rates_and_quantiles_are_those_of_the_time_between_two_readings() -> None:
    assert NODE is not None
    script = f"""
    const {{ Reading, rate, quantile, share }} = require({json.dumps(str(FIGURES))});
    const [before, now] = {json.dumps(READINGS)}.map((text, at) => new Reading(text, 2000 * at));
    const anew = new Reading("orchestra_requests_total 1", 9000);
    console.log(JSON.stringify({{
      label: before.all("requests_total")[0].labels.reason,
      rate: rate(before, now, "requests_total"),
      alone: rate(undefined, now, "requests_total"),
      restarted: rate(now, anew, "requests_total"),
      quarter: quantile(before, now, "ttft", 0.25),
      most: quantile(before, now, "ttft", 0.999),
      nothing: quantile(now, now, "ttft", 0.5),
      share: share(before, now, "ttft_bucket", "requests_total"),
    }}));
    """
    answer = subprocess.run([NODE, "-e", script], capture_output=True, text=True, check=True)
    # 21 new observations: 10 below 0.1, 10 below 1, one above.
    assert json.loads(answer.stdout) == {
        "label": 'a "b"',
        "rate": 15,
        "alone": None,
        "restarted": None,
        "quarter": pytest.approx(0.0525),
        "most": 1,
        "nothing": None,
        "share": pytest.approx(51 / 30),
    }
