"""`python -m benchmarks`: the comparison, or a command."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

INTRODUCTION = """\
Compares autoint_fast's engines with the layers people have. Every contestant is checked against its formula
in float64 first, then timed in interleaved rounds. Prints tables, writes a CSV and a picture, and exits
with 1 when an engine of autoint_fast computes wrong numbers.
"""
CPU = """\
Measures autoint_fast's native engine on this CPU against einsum, scaled_dot_product_attention, the PyTorch engine and
the rate at which torch multiplies large matrices in the same rounds, and tells where its time goes. Every contestant
is checked against its formula in float64 first. Prints a table, writes a CSV, and exits with 1 when an engine of
autoint_fast computes wrong numbers.
"""
FAMILIES = """\
Measures the interacting layers of other libraries against themselves after autoint_fast.accelerate, on a CPU or a GPU.
Every layer is checked against itself in float64 first. Prints a table, writes a CSV, and exits with 1 when an
accelerated layer computes wrong numbers.
"""
FLATTENED = """\
Measures FlattenedInteractingLayer, plain and frozen, against the Keras function as PyTorch spells it, with the same
weights. Every contestant is checked against float64 first. Prints a table, and exits with 1 when one computes wrong
numbers.
"""
MODEL = """\
Measures whole AutoInt models, from ids and numbers to the click: ours, the same model with the einsum layer,
DeepCTR-Torch's and torch-rechub's as far as they are installed; forward, training step, and single calls as in serving.
Ours is checked against float64 first. Prints a table, writes a CSV and a picture, and exits with 1 when ours is wrong.
"""
GPU = """\
Compiles the launches a layer really makes for GPUs that need not be there, follows them through their machine code
and counts: registers, warp-instructions by pipe, bytes, bank conflicts. Models from published figures what a GPU could
do at best, and counts what PyTorch's layers launch and move. With a CUDA device, measures beside it. Prints tables,
draws a roofline. --check compares with the table that is checked in, and exits with 1 where something is worse.
"""
PREPARE = """\
Makes a Criteo log of many rows from a small one, with new ids mixed in at Criteo's rate, prepares it, and tells rows
per second and the memory that it took, by part.
"""
PLOT = "Draws the results of an earlier run."
ABOUT = {
    "cpu": CPU,
    "families": FAMILIES,
    "flattened": FLATTENED,
    "gpu": GPU,
    "model": MODEL,
    "prepare": PREPARE,
    "plot": PLOT,
}
COMMANDS = """\
commands:
  python -m benchmarks cpu         the native engine against the limit of this CPU
  python -m benchmarks families    the layers of other libraries, accelerated
  python -m benchmarks flattened   the Keras function's layer against its plain spelling
  python -m benchmarks gpu         what the launches cost on GPUs that need not be there
  python -m benchmarks model       whole models, from ids and numbers to the click
  python -m benchmarks prepare     a click log of millions of rows, encoded
  python -m benchmarks plot CSV    draw the results of an earlier run
"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; gives the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    command = arguments[0] if arguments and arguments[0] in ABOUT else ""
    parser = Parser(
        f"python -m benchmarks {command}".strip(),
        description=ABOUT.get(command, INTRODUCTION),
        epilog=None if command else COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    try:
        # Only what is asked for: the GPU report needs Triton, which is not everywhere.
        module = importlib.import_module(f".{command or 'speed'}", __package__)
    except ModuleNotFoundError as error:
        extras = "bench,train" if command == "prepare" else "bench"
        parser.error(f"{error}; the benchmarks need autoint_fast[{extras}]")
    return module.main(arguments[bool(command) :], parser)  # type: ignore[no-any-return]


if __name__ == "__main__":
    sys.exit(main())
