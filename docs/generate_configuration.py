"""Writes `configuration.md` from the commands' own help, so that no option is described twice.

`python docs/generate_configuration.py` writes the page; with `--check` it only says whether the page is up to date.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from orchestra.serve import options as serve_options
from orchestra.worker.command_line import build_parser

PAGE = Path(__file__).parent / "configuration.md"

HEAD = """\
# Configuration

<!-- Written by `make docs` from the commands' own help. -->

A flag wins over its environment variable, which wins over the router's file, which wins over the default. Sizes are
written like `16MiB`, times like `250ms` or `10m`.

The router's file is TOML, named by `--config`: each of its long flags is a key, with underscores for hyphens
(`max_body_size = "16MiB"`), a flag that may be repeated is a list. `--print-config` prints every setting in effect as
such a file, each with where it comes from; `--check` says by its exit status (0 or 64) whether a router would start.
"""

SECTIONS = {
    "orchestra serve": "Router and workers on one machine. What is not listed here, its router takes from the"
    " environment.",
    "orchestra worker": "One rank of a worker.",
    "orchestra router": "The same options as the standalone `orchestra-router`.",
}


def main() -> int:
    """Writes or checks the page; returns the exit code."""
    tables = {
        "orchestra serve": _of_parser(_serve_parser()),
        "orchestra worker": _of_parser(build_parser()),
        "orchestra router": _of_router(),
    }
    sections = [f"## `{name}`\n\n{SECTIONS[name]}\n\n{table}" for name, table in tables.items()]
    page = "\n".join([HEAD, *sections])
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(page)
        return 0
    if PAGE.exists() and PAGE.read_text() == page:
        return 0
    print(f"{PAGE.name} is out of date: run `make docs`", file=sys.stderr)
    return 1


def _serve_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    serve_options.add_arguments(parser)
    return parser


def _of_parser(parser: argparse.ArgumentParser) -> str:
    rows = []
    for action in parser._actions:
        if action.dest == "help" or action.help == argparse.SUPPRESS:
            continue
        name = action.option_strings[0] if action.option_strings else str(action.metavar)
        takes_value = action.nargs != 0
        default = action.default if takes_value and action.option_strings else None
        # What the help says in brackets about the default has a column of its own.
        text, _, said = (action.help or "").partition("(default: ")
        default = said.removesuffix(")") or default
        rows.append((f"`{name}`", "" if default is None else str(default), _cell(text, action)))
    return _table(("option", "default", "meaning"), rows)


def _cell(text: str, action: argparse.Action) -> str:
    choices = ", ".join(f"`{choice}`" for choice in action.choices or ())
    return ": ".join(part for part in (text.strip(), choices) if part)


def _of_router() -> str:
    command = [sys.executable, "-m", "orchestra", "router", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = []
    for entry in re.split(r"\n\n(?=\s+(?:-\w, )?--)", text.split("Options:\n")[1]):
        flag = re.match(r"\s+(--[a-z-]+)", entry)
        if flag is None:  # --help and --version, which have short forms
            continue
        variable = re.search(r"\[env: (\w+)", entry)
        default = re.search(r"\[default: (.*?)\]", entry)
        values = re.findall(r"- (\w+): (.*)", entry)
        meaning = " ".join(line.strip() for line in entry.splitlines()[1:2])
        meaning += "".join(f"; `{value}`: {what}" for value, what in values)
        rows.append(
            (
                f"`{flag[1]}`",
                f"`{variable[1]}`" if variable else "",
                default[1] if default else "",
                meaning,
            )
        )
    return _table(("option", "environment", "default", "meaning"), rows)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


if __name__ == "__main__":
    sys.exit(main())
