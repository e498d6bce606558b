"""Typed values out of a checkpoint's JSON files; what is wrong is named by its key."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from orchestra.errors import ConfigError


def read_json(path: Path) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Raises:
        ConfigError: it does not, or cannot be read.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path.name} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path.name} must hold a JSON object")
    return content


def positive(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A whole number above 0; `default` where the key is missing or null."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{key}: must be a positive integer, is {value!r}")
    return value


def natural(config: Mapping[str, Any], key: str, default: int) -> int:
    """A whole number, 0 too; `default` where the key is missing or null."""
    is_zero = config.get(key, default) == 0
    return 0 if is_zero else positive(config, key, default)


def number(config: Mapping[str, Any], key: str, default: Any, within: str = "") -> float:
    """A number above 0; `within` names the object that holds the key, for the error."""
    value = config.get(key)
    value = default if value is None else value
    name = f"{within}.{key}" if within else key
    if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
        raise ConfigError(f"{name}: must be a positive number, is {value!r}")
    return float(value)


def optional_number(config: Mapping[str, Any], key: str, within: str = "") -> float | None:
    """A number above 0; None where the key is missing or null."""
    return None if config.get(key) is None else number(config, key, None, within)


def numbers(config: Mapping[str, Any], key: str, count: int, within: str) -> tuple[float, ...]:
    """A list of exactly `count` numbers above 0."""
    values = config.get(key)
    if not isinstance(values, list) or len(values) != count:
        raise ConfigError(f"{within}.{key}: must be a list of {count} numbers")
    named = {f"{key}[{index}]": value for index, value in enumerate(values)}
    return tuple(number(named, name, None, within) for name in named)
