"""A worker under a limit of the kernel refuses at start or fits; it does not die in the middle of a step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import make_checkpoint
from tests.worker.limited_process import BLOCKS_NEEDED

# Weights of 16 MB; 1 KB of KV a token and layer, of which 96 sequences behind a shared prefix could gather 190 MB.
SHAPE = {
    "vocab_size": 4096,
    "num_key_value_heads": 4,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "head_dim": 32,
    "num_hidden_layers": 2,
}


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("kind", "runner"), [("llama", "native"), ("granite", "hf")])
def test_refuses_or_fits(kind: str, runner: str, tmp_path: Path) -> None:
    model_dir = make_checkpoint(kind, tmp_path / kind, seed=1, **SHAPE)
    limits = ["4", "70", "150"]
    command = [sys.executable, "-m", "tests.worker.limited_process", str(model_dir), runner]
    done = subprocess.run(
        [*command, *limits],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *results, swapping = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(limits)
    # What the cache leaves is for the steps.
    assert swapping["refused"].startswith("num_host_blocks: 64 blocks")
    # The first has no room for the weights, the second none for what a step needs beside them.
    assert "model_dir: to load it takes" in results[0]["refused"]
    assert "free memory: not enough for one KV block" in results[1]["refused"]
    assert results[2]["blocks"] >= BLOCKS_NEEDED
