"""What the commands that measure have in common: types of arguments, the run over all cases, and how it ends."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from . import machine, report
from .cases import Case, Shape, parse_shape
from .compare import Plan, compare
from .contestants import CONTESTANTS, Contestant
from .report import FAILED, Row

T = TypeVar("T", int, float)
# Who takes part in a case, and how it is measured.
Entry = Callable[[Case], tuple[Iterable[Contestant], Plan]]

# A pipe has no width of its own, and rows that wrap cannot be read.
PIPE_WIDTH = 150
# As a shell has it for a process that ended by SIGINT.
INTERRUPTED = 130


def shape(text: str) -> Shape:
    """An argument's type: a shape by name or numbers."""
    try:
        return parse_shape(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def at_least(least: T, kind: Callable[[str], T]) -> Callable[[str], T]:
    """An argument's type: a finite number from `least` on."""

    def parse(text: str) -> T:
        try:
            value = kind(text)
        except ValueError:
            value = least - 1
        if not least <= value < math.inf:
            raise argparse.ArgumentTypeError(f"expected a number of at least {least}, got {text!r}")
        return value

    return parse


def device(text: str) -> str:
    """An argument's type: a device that is here."""
    try:
        found = torch.device(text)
    except RuntimeError:
        found = torch.device("meta")
    if found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:N, got {text!r}")
    if found.type == "cpu":
        return "cpu"
    if (found.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"torch sees {torch.cuda.device_count()} CUDA devices, got {text!r}")
    return text


def consoles() -> tuple[Console, Console]:
    """For the results, and for what happens meanwhile."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH), Console(stderr=True)


def make_way(path: Path) -> None:
    """Finds now what would keep the results from being written to `path` later. Raises OSError and ResultsError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        report.read_csv(path)


def measure(cases: Sequence[Case], entry: Entry, path: Path, errors: Console) -> tuple[list[Row], bool]:
    """The rows of all cases, those up to an interrupt if there was one, and whether there was."""
    rows: list[Row] = []
    try:
        rows.extend(_run(cases, entry, path, errors))
    except KeyboardInterrupt:
        errors.print("Interrupted; what follows is what was measured until then.", style="yellow")
        return rows, True
    return rows, False


def _run(cases: Sequence[Case], entry: Entry, path: Path, errors: Console) -> Iterator[Row]:
    """The rows, case by case; each is in the CSV before it is given."""
    load = machine.load_average() if cases[0].device_type == "cpu" else None
    if busy := machine.busy(load):
        errors.print(f"This machine is busy ({busy}): do not trust the timings.", style="yellow")
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    # Drawn between turns: a thread that draws would take the interpreter from what is timed.
    with Progress(*columns, console=errors, transient=True, auto_refresh=False) as bar:
        task = bar.add_task("", total=len(cases))
        for i, case in enumerate(cases):

            def advance(what: str, share: float, i: int = i, case: Case = case) -> None:
                bar.update(task, completed=i + share, description=f"{case}: {what}", refresh=True)

            rows = compare(case, *entry(case), advance, load=load)
            report.update_csv(path, rows)
            yield from rows


def finish(
    rows: Sequence[Row],
    written: Iterable[Path],
    interrupted: bool,
    console: Console,
    field: Mapping[str, Contestant] = CONTESTANTS,
) -> int:
    """Says who never took part, where this was and what was written; gives the exit status.

    field: the contestants by name.
    """
    present = report.present(rows)
    for name, why in {row.contestant: row.notes for row in rows if row.contestant not in present}.items():
        console.print(f"not measured: {name}: {why}", highlight=False, markup=False)
    first = rows[0]
    known = [name for name in ("torch", "triton", "python", "autoint_fast", "commit") if getattr(first, name)]
    versions = ", ".join(f"{name} {getattr(first, name)}" for name in known)
    console.print(f"{first.processor} ({first.machine}), {versions}", highlight=False, markup=False)
    for path in written:
        console.print(str(path), style="dim", highlight=False, soft_wrap=True)
    if interrupted:
        return INTERRUPTED
    return 1 if any(row.parity == FAILED and field[row.contestant].ours for row in rows) else 0
