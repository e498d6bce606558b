"""`python -m orchestra.worker MODEL_DIR …`: one rank of a worker."""

import os
import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one rank until it is told to stop; returns the process's exit code."""
    # Before torch loads OpenMP: its threads would else spin for milliseconds at every barrier, and one neighbour on
    # the same cores (the router, a client) then makes each step some ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    from orchestra.worker.config import parse_arguments
    from orchestra.worker.runtime import run

    return run(parse_arguments(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    sys.exit(main())
