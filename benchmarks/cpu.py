"""`python -m benchmarks cpu`: the native engine against what people have and against what the CPU could do."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from types import MappingProxyType

import torch
from rich import box
from rich.table import Table
from rich.text import Text

from autoint_fast.dispatch import ENGINES
from autoint_fast.weights import Layout

from . import command, operations, report, timing
from .cases import FORWARD, SHAPES, TRAINING, Case, threads_for
from .command import at_least
from .compare import Plan
from .contestants import CONTESTANTS, SDPA, Contestant
from .report import FAILED, Row, number, ratio

CSV_NAME = "cpu.csv"

CASES = (
    ("criteo", 4096, FORWARD),
    ("criteo", 4096, TRAINING),
    ("criteo", 32, FORWARD),
    ("criteo", 1, FORWARD),
    ("movielens", 4096, FORWARD),
    ("wide", 512, FORWARD),
    ("criteo-e64", 1024, FORWARD),
    ("criteo-e64", 1024, TRAINING),
)
# A column of times for each; of several contestants the fastest counts.
TIMES: Mapping[str, Sequence[str]] = MappingProxyType(
    {"einsum": ("reference",), "SDPA": SDPA, "torch": ("ours-torch",), "native": ("ours-native",)}
)

# Of (fields, layout, dtype, batch, mode): the shares of the time by phase.
Profile = Callable[[int, Layout, torch.dtype, int, str], dict[str, float]]


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> int:
    """Measures the cases that the arguments ask for; gives the exit status."""
    _add_arguments(parser)
    options = parser.parse_args(arguments)
    console, errors = command.consoles()
    path = options.out / CSV_NAME
    cases = _cases(options, parser)
    field = [CONTESTANTS[name] for names in TIMES.values() for name in names]

    def entry(case: Case) -> tuple[list[Contestant], Plan]:
        return field, Plan(seconds=options.seconds, memory=False, sgemm=True)

    try:
        command.make_way(path)
        rows, interrupted = command.measure(cases, entry, path, errors)
    except (OSError, report.ResultsError) as error:
        parser.error(str(error))
    if not rows:
        parser.error("nothing was measured")
    console.print(_table(rows))
    if any(row.sgemm_gflops for row in rows):
        console.print(_sgemm(rows), highlight=False)
    # Not part of what every engine provides.
    profile: Profile | None = getattr(ENGINES.get("native"), "profile", None)
    timed = {(row.shape, row.batch, row.mode) for row in rows if row.contestant == "ours-native" and row.p50_ms}
    if profile and timed and not interrupted:
        console.print()
        console.print(_phases([case for case in cases if (case.shape.name, case.batch, case.mode) in timed], profile))
    return command.finish(rows, [path], interrupted, console)


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    known = dict.fromkeys(name for name, _, _ in CASES)
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=command.shape,
        metavar="SHAPE",
        help=f"only the lines of these: fields x embedding size x heads, or one of {', '.join(known)}",
    )
    parser.add_argument(
        "--threads",
        type=at_least(1, int),
        metavar="N",
        help="default: as many as torch takes, but one for batches of up to 512",
    )
    parser.add_argument(
        "--seconds",
        type=at_least(0.0, float),
        default=3.0,
        metavar="S",
        help=f"of timing per line, and {timing.LEAST_ROUNDS} rounds at least (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=Path("results"), metavar="DIR", help="default: ./results")


def _cases(options: argparse.Namespace, parser: argparse.ArgumentParser) -> list[Case]:
    every = [Case(SHAPES[name], batch, mode, threads_for(batch, options.threads)) for name, batch, mode in CASES]
    wanted = options.shapes or [case.shape for case in every]
    for shape in wanted:
        if shape not in {case.shape for case in every}:
            parser.error(f"argument --shapes: the table has no line for {shape}")
    return [case for case in every if case.shape in wanted]


def _table(rows: Sequence[Row]) -> Table:
    """A line per case: everybody's time, and what our fastest engine makes of the machine."""
    present = report.present(rows)
    ours = "ours-native" if "ours-native" in present else "ours-torch"
    title = f"fp32, medians of interleaved rounds; right of the times: {ours}"
    result = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("case", "mode"):
        result.add_column(name, no_wrap=True)
    for name in ("threads", *TIMES, "x einsum", "x SDPA", "GFLOP/s", "% sgemm"):
        result.add_column(name, justify="right", no_wrap=True)
    result.add_column("notes", overflow="fold")
    for (_, batch, mode), group in groupby(rows, key=lambda row: (row.shape, row.batch, row.mode)):
        case = {row.contestant: row for row in group}
        row = case[ours]
        result.add_row(
            f"{batch:,} x {row.fields}x{row.emb_size}x{row.n_head}",
            mode,
            str(row.threads),
            *(_time([case[name] for name in names]) for names in TIMES.values()),
            ratio(row.x_reference),
            ratio(row.x_sdpa),
            number(row.gflops),
            f"{row.gflops / row.sgemm_gflops:.0%}" if row.gflops and row.sgemm_gflops else "",
            _notes([other for other in case.values() if other.contestant in present]),
        )
    return result


def _time(rows: Sequence[Row]) -> Text:
    """The time of the fastest, in the unit that shows what a call of such a batch takes."""
    if all(row.parity == FAILED for row in rows):
        return Text("WRONG", style="red")
    fastest = min((row.p50_ms for row in rows if row.p50_ms is not None), default=None)
    if fastest is None:
        return Text("")
    return Text(f"{number(1e3 * fastest)} us" if rows[0].batch == 1 else f"{number(fastest)} ms")


def _notes(rows: Sequence[Row]) -> Text:
    wrong = [f"{row.contestant}: {row.notes}" for row in rows if row.p50_ms is None]
    warnings = dict.fromkeys(row.warning for row in rows if row.warning)
    return Text("; ".join((*wrong, *warnings)), style="red" if wrong else "yellow")


def _sgemm(rows: Sequence[Row]) -> str:
    """What the percentages are of."""
    rates = {
        threads: statistics.median(row.sgemm_gflops for row in rows if row.threads == threads and row.sgemm_gflops)
        for threads in sorted({row.threads for row in rows if row.sgemm_gflops})
    }
    on = (f"{number(rate)} GFLOP/s on {threads} thread{'s' if threads > 1 else ''}" for threads, rate in rates.items())
    return f"sgemm, {operations.SGEMM_SIZE:,} square by torch in the same rounds: {', '.join(on)}"


def _phases(cases: Sequence[Case], profile: Profile) -> Table:
    """A line per case: the share of the native engine's time that goes into each phase."""
    shares = {}
    for case in cases:
        with timing.on_threads(case.threads):
            shares[case] = profile(case.shape.fields, case.layout, case.torch_dtype, case.batch, case.mode)
    phases = list(dict.fromkeys(phase for share in shares.values() for phase in share))
    result = Table(title="where the native engine's time goes", box=box.SIMPLE_HEAD, title_justify="left")
    result.add_column("case", no_wrap=True)
    for phase in phases:
        result.add_column(phase, justify="right", no_wrap=True)
    for case, share in shares.items():
        result.add_row(str(case), *(f"{share[phase]:.0%}" if phase in share else "" for phase in phases))
    return result
