"""`python -m benches.router.trained`: the router as one would ship it, optimised with a profile of itself at work.

Builds a router that counts what it does, puts the load of the bench on it, and builds the one to ship with the counts
(profile-guided optimisation, https://doc.rust-lang.org/rustc/profile-guided-optimization.html). Most of what a request
costs a router is code that is not in the processor's caches; the profile puts what runs together side by side.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benches.router.processes import (
    ROUTER_CORE,
    STOP_TIMEOUT_S,
    free_port,
    load,
    mock_engines,
    orchestra_flags,
    pinned,
)
from tests.faults.processes import ROOT, build, call, eventually

TRAINED = ROOT / "target" / "trained"
# Each part of the training: body, words of an answer, whether it is a stream.
LOADS = [(4096, 8, False), (512, 8, False), (4096, 64, True), (32768, 8, False)]
CONCURRENCIES = (1, 16, 128)
SECONDS = 3.0


def program() -> Path:
    """The trained router; built, and trained anew, where its sources have changed.

    Raises:
        RuntimeError: the toolchain lacks the tool that reads profiles.
    """
    counting = _build("counting", f"-Cprofile-generate={TRAINED / 'counts'}")
    profile = _profile(counting)
    return _build("shipped", f"-Cprofile-use={profile}")


def _build(name: str, flag: str) -> Path:
    # With a target of its own, so that the flag is for the router alone and not for what its build runs.
    command = ["cargo", "build", "--profile", "dist", "--locked", "--quiet"]
    command += ["-p", "orchestra-router", "--target", _host(), "--target-dir", str(TRAINED / name)]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "RUSTFLAGS": flag}, check=True)
    return TRAINED / name / _host() / "dist" / "orchestra-router"


def _profile(counting: Path) -> Path:
    """What the counting router saw; its name changes with the program, so that cargo sees a change."""
    digest = hashlib.sha256(counting.read_bytes()).hexdigest()[:16]
    profile = TRAINED / f"{digest}.profdata"
    if not profile.exists():
        for old in [*TRAINED.glob("*.profdata"), *(TRAINED / "counts").glob("*.profraw")]:
            old.unlink()
        _train(counting)
        subprocess.run([_reader(), "merge", "-o", profile, TRAINED / "counts"], check=True)
    return profile


def _train(counting: Path) -> None:
    build()
    with tempfile.TemporaryDirectory() as name:
        flags = ["--ports", "0:4", "--print-ports"]
        with mock_engines(flags, Path(name)) as engines:
            port = free_port()
            urls = [f"http://127.0.0.1:{engine}" for engine in engines]
            command = [str(counting), *orchestra_flags(port, urls), "--log", "warn"]
            router = subprocess.Popen(pinned(ROUTER_CORE, command))
            try:
                eventually(lambda: _is_ready(port))
                _work(port)
            finally:
                # It writes its counts when it ends by itself.
                router.terminate()
                router.wait(STOP_TIMEOUT_S)


def _work(port: int) -> None:
    for body, words, streams in LOADS:
        for concurrency in CONCURRENCIES:
            flags = ["--body-bytes", str(body), "--words", str(words), "-c", str(concurrency)]
            flags += ["--seconds", str(SECONDS), *(["--stream"] if streams else [])]
            report = load([port], flags)
            print(f"training: {report['requests']} requests, c={concurrency}", file=sys.stderr)


def _is_ready(port: int) -> bool:
    try:
        return call(port, "GET", "/ready")[0] == 200
    except OSError:
        return False


def _rustc(*question: str) -> str:
    command = ["rustc", *question]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout


def _host() -> str:
    lines = _rustc("-vV").splitlines()
    return next(line.removeprefix("host: ") for line in lines if line.startswith("host: "))


def _reader() -> Path:
    sysroot = Path(_rustc("--print", "sysroot").strip())
    found = sysroot / "lib" / "rustlib" / _host() / "bin" / "llvm-profdata"
    if not found.exists():
        raise RuntimeError("llvm-profdata is missing: rustup component add llvm-tools")
    return found


if __name__ == "__main__":
    print(program())
