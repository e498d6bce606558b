"""What deploy/ names exists: flags, settings and metrics."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.faults.processes import RELEASE, ROOT, build

DEPLOY = ROOT / "deploy"
PROMTOOL = shutil.which("promtool")
# What a program of another project is told.
FOREIGN_FLAGS = {"docker", "apt-get", "cargo", "pip", "maturin", "useradd", "python3"}


def documented_metrics() -> set[str]:
    page = (ROOT / "docs/metrics.md").read_text()
    names = set(re.findall(r"`(orchestra_\w+)`", page))
    parts = ("_bucket", "_sum", "_count")
    return names | {name + part for name in names if name.endswith("_seconds") for part in parts}


@pytest.mark.parametrize("path", ["prometheus/orchestra.rules.yaml", "grafana/orchestra.json"])
def test_metrics_exist(path: str) -> None:
    named = set(re.findall(r"orchestra_\w+", (DEPLOY / path).read_text()))
    assert len(named) > 10
    assert named - documented_metrics() == set()


def test_flags_exist() -> None:
    known = set(re.findall(r"`(--[a-z-]+)`", (ROOT / "docs/configuration.md").read_text()))
    files = [*DEPLOY.glob("systemd/*"), *DEPLOY.glob("kubernetes/*"), *DEPLOY.glob("docker/*")]
    ours: set[str] = set()
    for path in files:
        for line in path.read_text().splitlines():
            if not FOREIGN_FLAGS & set(re.findall(r"[\w-]+", line)) and "COPY" not in line:
                ours |= set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", line))
    assert len(ours) > 6
    assert ours - known == set()


def test_the_router_takes_its_settings(tmp_path: Path) -> None:
    build()
    manifest = (DEPLOY / "kubernetes/router.yaml").read_text()
    block = re.search(r"  router\.toml: \|\n((?:    .*\n)+)", manifest)
    assert block is not None
    keys = tmp_path / "clients"
    keys.write_text("sk-1\n")
    settings = tmp_path / "router.toml"
    settings.write_text(block.group(1).replace("    ", "").replace("/keys/clients", str(keys)))
    command = [str(RELEASE / "orchestra-router"), "--config", str(settings), "--check"]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stderr


def test_the_dashboard_has_no_two_panels_in_one_place() -> None:
    panels = json.loads((DEPLOY / "grafana/orchestra.json").read_text())["panels"]
    places = [
        (column, row)
        for panel in panels
        for column in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for row in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(places) == len(set(places))
    assert len({panel["id"] for panel in panels}) == len(panels)


@pytest.mark.skipif(PROMTOOL is None, reason="there is no promtool here")
def test_alerts_fire_when_they_should() -> None:
    assert PROMTOOL is not None
    command = [PROMTOOL, "test", "rules", "orchestra.rules.test.yaml"]
    tried = subprocess.run(
        command, cwd=DEPLOY / "prometheus", capture_output=True, text=True, check=False
    )
    assert tried.returncode == 0, tried.stdout + tried.stderr
