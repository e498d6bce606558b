"""What arguments of the commands may be: functions for `argparse`, which say what is wrong."""

import argparse
import ipaddress
import re
from typing import Any

_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", re.IGNORECASE)


def parse_layer_split(text: str) -> tuple[int, ...]:
    """Reads what `--layer-split` accepts, such as `10,6`."""
    return tuple(map(int, text.split(",")))


def parse_bytes(text: str) -> int:
    """Reads a size such as `4GiB`, `500MB` or `1048576`."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size like 4GiB or 500MB")
    return int(float(match[1]) * _UNITS[(match[2] or "").lower()])


def layer_split(text: str) -> str:
    """An argument type: whole numbers with commas between them."""
    if re.fullmatch(r"[1-9]\d{0,5}(,[1-9]\d{0,5})*", text) is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers like 10,6")
    return text


def address(text: str) -> str:
    """An argument type: an IP address."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not an IP address") from error


def integer(least: int) -> Any:
    """An argument type: a whole number of at least `least`."""

    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return value

    parse.__name__ = "whole number"
    return parse
