"""The command line of the comparison: which cases and contestants, and where the results go."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from . import criteo, machine, plot, report
from .cases import DEFAULT_BATCHES, DTYPES, MODES, SHAPES, Case, Shape, batches, parse_shape, threads_for
from .compare import Plan, compare
from .contestants import CONTESTANTS, Contestant
from .report import FAILED, Row
from .timing import LEAST_ROUNDS

T = TypeVar("T", int, float)

# A pipe has no width of its own, and rows that wrap cannot be read.
PIPE_WIDTH = 150
# As a shell has it for a process that ended by SIGINT.
INTERRUPTED = 130


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> int:
    """Runs the comparison that the arguments ask for; gives the exit status."""
    _add_arguments(parser)
    options = parser.parse_args(arguments)
    console, errors = Console(), Console(stderr=True)
    if not console.is_terminal:
        console = Console(width=PIPE_WIDTH)
    written = [options.out / report.CSV_NAME]
    rows: list[Row] = []
    interrupted = False
    try:
        _prepare(options, parser, errors)
        try:
            rows.extend(_run(options, errors))
        except KeyboardInterrupt:
            interrupted = True
            errors.print("Interrupted; what follows is what was measured until then.", style="yellow")
        if not rows:
            parser.error("nothing was measured: none of the contestants takes part in any of the cases")
        if options.plot and any(row.p50_ms for row in rows):
            written += plot.plot_csv(written[0], options.out)
    except (OSError, criteo.CriteoError, report.ResultsError) as error:
        parser.error(str(error))
    _show(rows, console)
    for path in written:
        console.print(str(path), style="dim", highlight=False, soft_wrap=True)
    if interrupted:
        return INTERRUPTED
    return 1 if any(row.parity == FAILED and CONTESTANTS[row.contestant].ours for row in rows) else 0


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is compared")
    what.add_argument(
        "--shapes",
        nargs="+",
        type=_shape,
        metavar="SHAPE",
        help=f"fields x embedding size x heads, as in 39x16x2, or one of {', '.join(SHAPES)} "
        f"(default: {', '.join(DEFAULT_BATCHES)})",
    )
    what.add_argument("--batch", nargs="+", type=_at_least(1, int), metavar="B", help="batch sizes")
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
    how.add_argument("--device", default="cpu", type=_device, help="cpu, cuda or cuda:N (default: cpu)")
    how.add_argument(
        "--threads",
        type=_at_least(1, int),
        metavar="N",
        help="CPU threads (default: as many as torch takes, but one for batches of up to 512)",
    )
    how.add_argument("--rounds", type=_at_least(1, int), metavar="N", help="rounds per case")
    how.add_argument(
        "--seconds",
        type=_at_least(0.0, float),
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


def _shape(text: str) -> Shape:
    try:
        return parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _at_least(least: T, kind: Callable[[str], T]) -> Callable[[str], T]:
    def parse(text: str) -> T:
        try:
            value = kind(text)
        except ValueError:
            value = least - 1
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"expected a number of at least {least}, got {text!r}")
        return value

    return parse


def _device(text: str) -> str:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    if device.type == "cpu":
        return "cpu"
    if (device.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"torch sees {torch.cuda.device_count()} CUDA devices, got {text!r}")
    return text


def _prepare(options: argparse.Namespace, parser: argparse.ArgumentParser, errors: Console) -> None:
    """Finds now what would end a run later. Raises OSError, CriteoError and ResultsError."""
    options.out.mkdir(parents=True, exist_ok=True)
    if (options.out / report.CSV_NAME).exists():
        report.read_csv(options.out / report.CSV_NAME)
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


def _run(options: argparse.Namespace, errors: Console) -> Iterator[Row]:
    """The rows, case by case; each is in the CSV before it is given."""
    load = machine.load_average() if options.device == "cpu" else None
    if busy := machine.busy(load):
        errors.print(f"This machine is busy ({busy}): do not trust the timings.", style="yellow")
    cases = _cases(options)
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task("", total=len(cases))
        for i, case in enumerate(cases):

            def advance(what: str, share: float, i: int = i, case: Case = case) -> None:
                bar.update(task, completed=i + share, description=f"{case}: {what}")

            # Memory grows with the batch, so the largest tells; compiling is worth it once.
            largest = case.batch == max(other.batch for other in cases if other.shape == case.shape)
            plan = Plan(options.rounds, options.seconds, options.memory and largest)
            rows = compare(case, _field(options, case, largest), plan, advance, load=load)
            report.update_csv(options.out / report.CSV_NAME, rows)
            yield from rows


def _field(options: argparse.Namespace, case: Case, largest: bool) -> list[Contestant]:
    field = [contestant for contestant in CONTESTANTS.values() if case.mode in contestant.modes]
    if options.contestants:
        return [contestant for contestant in field if contestant.name in options.contestants]
    return [c for c in field if c.only_at is None or (largest and case.shape.name in c.only_at)]


def _show(rows: Sequence[Row], console: Console) -> None:
    """The tables, and in a line each who never took part."""
    present = {row.contestant for row in rows if row.p50_ms is not None or row.parity}
    ours = [name for name, contestant in CONTESTANTS.items() if contestant.ours]
    for mode in MODES:
        shown = [row for row in rows if row.mode == mode and row.contestant in present]
        if shown:
            console.print(report.table(shown, ours))
    for name, why in {row.contestant: row.notes for row in rows if row.contestant not in present}.items():
        console.print(f"not measured: {name}: {why}", highlight=False, markup=False)
    first = rows[0]
    known = [name for name in ("torch", "triton", "python", "autoint_fast", "commit") if getattr(first, name)]
    versions = ", ".join(f"{name} {getattr(first, name)}" for name in known)
    console.print(f"{first.processor} ({first.machine}), {versions}", highlight=False, markup=False)
