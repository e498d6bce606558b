"""`python -m orchestra.worker MODEL_DIR …`: one rank of a worker."""

import os
import sys
from collections.abc import Sequence

# Turns that an idle OpenMP thread takes before it sleeps, about as long as one small kernel. libgomp's own value is
# 300 times that: with the router on the same cores, threads then wait spinning for one that cannot run, and a decode
# step of 2 ms takes 20 to 60.
SPIN_COUNT = 1000


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one rank until it is told to stop; returns the process's exit code."""
    # Before torch is imported: libgomp reads it when it is loaded.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPIN_COUNT))
    from orchestra.worker.command_line import parse_arguments

    config = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    if config.is_spare:
        from orchestra.worker.spare import await_assignment

        assigned = await_assignment(config)
        if assigned is None:
            return 0
        config = parse_arguments(assigned)
    from orchestra.worker.runtime import run

    return run(config)


if __name__ == "__main__":
    sys.exit(main())
