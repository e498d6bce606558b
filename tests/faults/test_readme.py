"""What the README says to type in front of engines works; only ports and addresses are replaced."""

import re
import shlex
from pathlib import Path

from tests.faults.clients import Asked, is_right
from tests.faults.processes import ROOT, eventually, running_engine, running_router


def test_engines_quick_start(tmp_path: Path) -> None:
    (line,) = re.findall(
        r"^target/release/orchestra-router .*$", (ROOT / "README.md").read_text(), re.M
    )
    flags = shlex.split(line)[1:]
    with running_engine() as first, running_engine() as second:
        engines = dict(
            zip(("http://127.0.0.1:8100", "http://127.0.0.1:8101"), (first, second), strict=True)
        )
        for written, engine in engines.items():
            assert any(written in flag for flag in flags)
            flags = [flag.replace(written, engine.url) for flag in flags]
        with running_router(tmp_path, [], *flags) as router:
            eventually(router.is_ready)

            def both_are_asked() -> bool:
                assert is_right(router, Asked(5))
                return all(engine.counters()["requests"] for engine in engines.values())

            eventually(both_are_asked)
