"""`python -m benchmarks`: the comparison, or a command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

INTRODUCTION = """\
Compares the interacting layer's engines with each other and with the layers people have: every contestant is checked
against its formula in float64 first, then timed in interleaved rounds. Writes a CSV and a picture, prints tables.
Exits with 1 when an engine of autoint_fast fails its check.
"""
COMMANDS = """\
commands:
  python -m benchmarks plot CSV    draw the results of an earlier run
"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    command, rest = (arguments[0], arguments[1:]) if arguments[:1] == ["plot"] else ("", arguments)
    prog = f"python -m benchmarks {command}".rstrip()
    parser = Parser(
        prog,
        description=INTRODUCTION if not command else "Draws the results of an earlier run.",
        epilog=COMMANDS if not command else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    try:
        from . import plot, speed
    except ModuleNotFoundError as error:
        parser.error(f"{error}; the benchmarks need autoint_fast[bench]")
    return (plot if command else speed).main(rest, parser)


if __name__ == "__main__":
    sys.exit(main())
