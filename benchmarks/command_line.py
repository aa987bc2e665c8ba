"""How benchmarks read their command lines: `--help` says what one does, and starts nothing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """A parser that shows a module's own docstring as it is written."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def take_no_options(description: str | None, arguments: Sequence[str] | None = None) -> None:
    """For a program that takes none (`arguments`: the process's own): what it is given all the same is refused."""
    parser_of(description).parse_args(arguments)
