"""The Triton kernels, compiled for GPUs that are not here: that they can be, and what they take."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "compile_kernels.py"
ROOT = Path(__file__).resolve().parents[2]
# Of a program on the smallest GPUs that the worker takes: compute capability 8.6 and 8.9.
SHARED_MEMORY_MAX = 99 << 10
OTHERS = [(80, 128, "bfloat16"), (90, 96, "float16"), (80, 256, "bfloat16"), (90, 128, "float32")]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="Triton has its assembler there")
@pytest.mark.parametrize(
    ("capability", "head_dim", "dtype"),
    [
        (90, 128, "bfloat16"),
        # Minutes on a busy machine, all together.
        *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS),
    ],
)
def test_kernels_compile(capability: int, head_dim: int, dtype: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    environment["PYTHONPATH"] = str(ROOT / "python")
    command = [sys.executable, str(SCRIPT), str(capability), str(head_dim), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    taken = json.loads(done.stdout)
    attention = {"attend", "attend_split", "combine", "write_kv"}
    sums = {"add_up", "add_up_shares"}
    experts = {"project_few", "project_many", "mix"}
    assert taken.keys() == attention | {"rms_norm", "gate", "rotate"} | sums | experts
    for kernel, figures in taken.items():
        assert figures["shared"] <= SHARED_MEMORY_MAX, kernel
        assert figures["spilled"] == 0, kernel
