"""The command line of the comparison: which cases and contestants, and where the results go."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from . import command, criteo, plot, report
from .cases import DEFAULT_BATCHES, DTYPES, MODES, SHAPES, Case, Shape, batches, threads_for
from .command import at_least
from .compare import Plan
from .contestants import CONTESTANTS, Contestant
from .report import Row
from .timing import LEAST_ROUNDS


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> int:
    """Runs the comparison that the arguments ask for; gives the exit status."""
    _add_arguments(parser)
    options = parser.parse_args(arguments)
    console, errors = command.consoles()
    written = [options.out / report.CSV_NAME]
    try:
        command.make_way(written[0])
        _prepare(options, parser, errors)
        cases = _cases(options)
        entry = functools.partial(_entry, options, cases)
        rows, interrupted = command.measure(cases, entry, written[0], errors)
        if not rows:
            parser.error("nothing was measured: none of the contestants takes part in any of the cases")
        if options.plot and any(row.p50_ms for row in rows):
            written += plot.plot_csv(written[0], options.out)
    except (OSError, criteo.CriteoError, report.ResultsError) as error:
        parser.error(str(error))
    _show(rows, console)
    return command.finish(rows, written, interrupted, console)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is compared")
    what.add_argument(
        "--shapes",
        nargs="+",
        type=command.shape,
        metavar="SHAPE",
        help=f"fields x embedding size x heads, as in 39x16x2, or one of {', '.join(SHAPES)} "
        f"(default: {', '.join(DEFAULT_BATCHES)})",
    )
    what.add_argument("--batch", nargs="+", type=at_least(1, int), metavar="B", help="batch sizes")
    what.add_argument("--mode", choices=(*MODES, "both"), default="both", help="default: both")
    what.add_argument(
        "--contestants",
        nargs="+",
        choices=tuple(CONTESTANTS),
        metavar="NAME",
        help="from the list below (default: all, though compile, which takes half a minute, only at the "
        "largest batch of criteo)",
    )
    what.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="default: fp32")
    what.add_argument("--full", action="store_true", help="every named shape, batches up to 65,536 (on a CPU: hours)")
    what.add_argument(
        "--criteo",
        metavar="FILE",
        help="run on the rows of this Criteo log: label, 13 integers, 26 hashes, tabs between",
    )
    how = parser.add_argument_group("how it is measured")
    how.add_argument("--device", default="cpu", type=command.device, help="cpu, cuda or cuda:N (default: cpu)")
    how.add_argument(
        "--threads",
        type=at_least(1, int),
        metavar="N",
        help="CPU threads (default: as many as torch takes, but one for batches of up to 512)",
    )
    how.add_argument("--rounds", type=at_least(1, int), metavar="N", help="rounds per case")
    how.add_argument(
        "--seconds",
        type=at_least(0.0, float),
        default=Plan().seconds,
        metavar="S",
        help=f"without --rounds: seconds of timing per case, and {LEAST_ROUNDS} rounds at least (default: %(default)s)",
    )
    how.add_argument(
        "--no-memory",
        dest="memory",
        action="store_false",
        help="leave out peak memory (it is measured at the largest batch of a shape)",
    )
    out = parser.add_argument_group("where the results go")
    out.add_argument("--out", type=Path, default=Path("results"), metavar="DIR", help="default: ./results")
    out.add_argument("--no-plot", dest="plot", action="store_false", help="leave out the picture")
    names = [f"  {contestant.name:<14}{contestant.about}" for contestant in CONTESTANTS.values()]
    parser.epilog = "\n".join(["contestants:", *names, "", parser.epilog or ""])


def _prepare(options: argparse.Namespace, parser: argparse.ArgumentParser, errors: Console) -> None:
    """Finds now what would end a run later. Raises OSError and CriteoError."""
    if options.device != "cpu":
        # Events and the cache flush belong to the current device.
        torch.cuda.set_device(options.device)
    options.shapes = list(dict.fromkeys(options.shapes or _default_shapes(options)))
    if options.criteo is None:
        return
    for shape in options.shapes:
        if shape.fields != criteo.FIELDS:
            parser.error(f"argument --criteo: its rows have {criteo.FIELDS} fields, which {shape} has not")
    rows = len(criteo.load(options.criteo, options.shapes[0].emb_size))
    if rows < max(case.batch for case in _cases(options)):
        errors.print(f"The file has {rows:,} rows; larger batches repeat them.", style="yellow")


def _default_shapes(options: argparse.Namespace) -> list[Shape]:
    if options.criteo is not None:
        return [SHAPES["criteo"]]
    return [SHAPES[name] for name in (SHAPES if options.full else DEFAULT_BATCHES)]


def _cases(options: argparse.Namespace) -> list[Case]:
    return [
        Case(
            shape,
            batch,
            mode,
            threads_for(batch, options.threads),
            options.dtype,
            options.device,
            options.criteo,
        )
        for mode in (MODES if options.mode == "both" else (options.mode,))
        for shape in options.shapes
        for batch in dict.fromkeys(options.batch or batches(shape, options.full))
    ]


def _entry(options: argparse.Namespace, cases: Sequence[Case], case: Case) -> tuple[list[Contestant], Plan]:
    # Memory grows with the batch, so the largest tells; compiling is worth it once.
    largest = case.batch == max(other.batch for other in cases if other.shape == case.shape)
    return _field(options, case, largest), Plan(options.rounds, options.seconds, options.memory and largest)


def _field(options: argparse.Namespace, case: Case, largest: bool) -> list[Contestant]:
    field = [contestant for contestant in CONTESTANTS.values() if case.mode in contestant.modes]
    if options.contestants:
        return [contestant for contestant in field if contestant.name in options.contestants]
    return [c for c in field if c.only_at is None or (largest and case.shape.name in c.only_at)]


def _show(rows: Sequence[Row], console: Console) -> None:
    present = report.present(rows)
    ours = [name for name, contestant in CONTESTANTS.items() if contestant.ours]
    for mode in MODES:
        shown = [row for row in rows if row.mode == mode and row.contestant in present]
        if shown:
            console.print(report.table(shown, ours))
