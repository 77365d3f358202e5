"""`python -m benchmarks`: the comparison, or a command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

INTRODUCTION = """\
Compares autoint_fast's engines with the layers people have. Every contestant is checked against its formula
in float64 first, then timed in interleaved rounds. Prints tables, writes a CSV and a picture, and exits
with 1 when an engine of autoint_fast computes wrong numbers.
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
    """Runs the command line; gives the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    plotting = arguments[:1] == ["plot"]
    parser = Parser(
        "python -m benchmarks plot" if plotting else "python -m benchmarks",
        description="Draws the results of an earlier run." if plotting else INTRODUCTION,
        epilog=None if plotting else COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    try:
        from . import plot, speed
    except ModuleNotFoundError as error:
        parser.error(f"{error}; the benchmarks need autoint_fast[bench]")
    return plot.main(arguments[1:], parser) if plotting else speed.main(arguments, parser)


if __name__ == "__main__":
    sys.exit(main())
