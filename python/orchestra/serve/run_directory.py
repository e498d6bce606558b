"""A private directory for the files of one `orchestra serve`, which also goes when its owner was killed."""

import contextlib
import fcntl
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

PREFIX = "orchestra-serve-"


@contextlib.contextmanager
def run_directory() -> Iterator[Path]:
    """Makes a directory that only this user can read, and removes it at the end.

    The owner holds a lock inside it as long as it lives. A supervisor that was killed cannot clean up; the next
    one does, for every directory whose lock nobody holds.
    """
    _sweep(Path(tempfile.gettempdir()))
    path = Path(tempfile.mkdtemp(prefix=PREFIX))
    try:
        with (path / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _sweep(parent: Path) -> None:
    for path in parent.glob(f"{PREFIX}*"):
        # Another user's directory, or one that another sweep is just removing.
        with contextlib.suppress(OSError), (path / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
