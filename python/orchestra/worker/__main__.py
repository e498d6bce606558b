"""`python -m orchestra.worker MODEL_DIR …`: one rank of a worker."""

import gc
import os
import sys
from collections.abc import Sequence

# Turns that an idle OpenMP thread takes before it sleeps, about as long as one small kernel. libgomp's own value is
# 300 times that: with the router on the same cores, threads then wait spinning for one that cannot run, and a decode
# step of 2 ms takes 20 to 60.
SPIN_COUNT = 1000


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one rank until it is told to stop; returns the process's exit code."""
    prepare_to_import()
    from orchestra.worker.command_line import parse_arguments

    config = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    from orchestra.worker.runtime import run

    return run(config)


def prepare_to_import() -> None:
    """What has to be settled in a process before torch is imported."""
    # Importing torch makes some 200,000 objects that stay; looking through them again and again for garbage takes a
    # seventh of the time that it needs. `run` switches the collector on.
    gc.disable()
    # libgomp reads it when it is loaded.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))


if __name__ == "__main__":
    sys.exit(main())
