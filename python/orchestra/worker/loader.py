"""Reads this rank's slices of memory-mapped safetensors files, and nothing else of them."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from orchestra.errors import ConfigError
from orchestra.worker.sharding import Span

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
NAMED_IN_ERRORS_MAX = 5

Progress = Callable[[int, int], None]
"""Called with (parts loaded, parts in all)."""


class WeightReader:
    """The tensors of a checkpoint directory by name. A context manager: leaving it closes the files.

    Args:
        model_dir: holds `model.safetensors`, or several files and their index.

    Raises:
        ConfigError: there are no weights, or a file is not in the safetensors format.
    """

    def __init__(self, model_dir: Path) -> None:
        self.bytes_read = 0
        self._read: set[str] = set()
        # safetensors is typed loosely; a handle is kept per file, and the file stays mapped while it lives.
        self._handles: list[Any] = []
        self._files: dict[str, Any] = {}
        paths = _weight_files(model_dir)
        states = ((path.name, path.stat()) for path in paths)
        self.fingerprint = tuple((name, it.st_size, it.st_mtime_ns) for name, it in states)
        """Differs where a file was written since."""
        for path in paths:
            try:
                handle: Any = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ConfigError(f"{path.name} is not a safetensors file: {error}") from error
            self._handles.append(handle)
            self._files.update(dict.fromkeys(handle.keys(), handle))

    def __enter__(self) -> "WeightReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._files.clear()
        self._handles.clear()

    def copy_rows(
        self, name: str, shape: Sequence[int], rows: Iterable[Span], target: Tensor
    ) -> None:
        """Fills `target` with some rows of a weight, one run after the other.

        Args:
            name: of the tensor in the checkpoint.
            shape: that the whole tensor must have.
            rows: runs along the first dimension.
            target: `[sum of the runs, *shape[1:]]`, of any dtype and device.

        Raises:
            ConfigError: the checkpoint has no such tensor, or its shape differs.
        """
        source = self._slice(name, shape)
        filled = 0
        for run in filter(len, rows):
            piece = source[run.start : run.stop]
            target[filled : filled + len(run)].copy_(piece)
            filled += len(run)
            self.bytes_read += piece.nbytes
        assert filled == target.shape[0]

    def copy_columns(self, name: str, shape: Sequence[int], columns: Span, target: Tensor) -> None:
        """Fills `target` (`[shape[0], len(columns)]`) with a run of columns; see `copy_rows`."""
        piece = self._slice(name, shape)[:, columns.start : columns.stop]
        target.copy_(piece)
        self.bytes_read += piece.nbytes

    def count_numbers(self, prefix: str) -> int:
        """How many numbers the weights have whose names begin so."""
        slices = (
            handle.get_slice(name)
            for name, handle in self._files.items()
            if name.startswith(prefix)
        )
        return sum(math.prod(it.get_shape()) for it in slices)

    def leave(self, name: str, shape: Sequence[int]) -> None:
        """Checks a weight that other ranks read and this one has no part of; see `copy_rows`."""
        self._slice(name, shape)

    def finish(self, ignored: Callable[[str], bool]) -> None:
        """Checks that nothing of the checkpoint was left unread, which would mean another model than its config says.

        Raises:
            ConfigError: tensors were left that `ignored` does not accept.
        """
        left = sorted(name for name in self._files.keys() - self._read if not ignored(name))
        if left:
            names = ", ".join(left[:NAMED_IN_ERRORS_MAX])
            more = len(left) - NAMED_IN_ERRORS_MAX
            tail = f" and {more} more" if more > 0 else ""
            raise ConfigError(f"the checkpoint has weights that the model does not: {names}{tail}")

    def _slice(self, name: str, shape: Sequence[int]) -> Any:
        handle = self._files.get(name)
        if handle is None:
            raise ConfigError(f"the checkpoint has no weight {name}")
        source = handle.get_slice(name)
        found = tuple(source.get_shape())
        if found != tuple(shape):
            raise ConfigError(f"{name} has shape {list(found)}, config.json means {list(shape)}")
        self._read.add(name)
        return source


def empty_weight(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for a weight that `WeightReader` fills."""
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def _weight_files(model_dir: Path) -> list[Path]:
    index = model_dir / INDEX_FILE
    if not index.exists():
        single = model_dir / SINGLE_FILE
        if single.exists():
            return [single]
        raise ConfigError(f"{model_dir.name} has neither {SINGLE_FILE} nor {INDEX_FILE}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConfigError(f"{INDEX_FILE} has no readable weight_map: {error}") from error
    files = [model_dir / name for name in names]
    missing = [path.name for path in files if not path.exists()]
    if missing:
        raise ConfigError(f"{INDEX_FILE} names files that are missing: {', '.join(missing)}")
    return files
