"""The results: a row per contestant and case, kept in one CSV and shown as tables."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

CSV_NAME = "results.csv"

# A run replaces the rows that agree with one of its own in these, and no others.
KEY = (
    "machine",
    "processor",
    "device",
    "dtype",
    "threads",
    "data",
    "shape",
    "fields",
    "emb_size",
    "n_head",
    "batch",
    "mode",
    "contestant",
)

OK, FAILED = "ok", "failed"


@dataclass(frozen=True)
class Row:
    """One contestant in one case. None: not measured, `notes` say why.

    x_reference, x_sdpa: how many times faster than those were in the same rounds. parity: "ok", "failed", or "" where
    it did not come to that.
    """

    data: str
    shape: str
    fields: int
    emb_size: int
    n_head: int
    batch: int
    mode: str
    contestant: str
    dtype: str
    device: str
    threads: int
    parity: str = ""
    rounds: int = 0
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    samples_per_s: float | None = None
    x_reference: float | None = None
    x_sdpa: float | None = None
    peak_extra_mib: float | None = None
    notes: str = ""
    warning: str = ""
    load_average: float | None = None
    machine: str = ""
    processor: str = ""
    python: str = ""
    torch: str = ""
    triton: str = ""
    autoint_fast: str = ""
    commit: str = ""
    date: str = ""

    def key(self) -> tuple[str, ...]:
        return tuple(str(getattr(self, name)) for name in KEY)


COLUMNS = tuple(field.name for field in fields(Row))


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a results file as text. Raises ValueError for a file that is none."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        missing = [name for name in KEY if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(
                f"{path}: expected results of this benchmark, but it has no column {missing[0]!r}"
            )
        return list(reader)


def update_csv(path: Path, rows: Iterable[Row]) -> None:
    """Puts `rows` into the file, in place of those with the same key."""
    rows = list(rows)
    new = {row.key() for row in rows}
    kept = [
        row
        for row in (read_csv(path) if path.exists() else [])
        if tuple(row[name] for name in KEY) not in new
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    # Replaced as a whole, so that a run that is cut off leaves the file as it was.
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows([*kept, *({name: _text(v) for name, v in asdict(row).items()} for row in rows)])
    os.replace(partial, path)


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[Row], ours: Sequence[str]) -> Table:
    """The rows of one mode, case by case; contestants named in `ours` stand out."""
    title = f"{rows[0].mode}, {rows[0].dtype}, {rows[0].device}, {rows[0].data} data"
    result = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("shape", "batch", "contestant"):
        result.add_column(name, no_wrap=True)
    for name in ("p50 ms", "p20 - p80", "samples/s", "x reference", "x SDPA", "extra MiB"):
        result.add_column(name, justify="right", no_wrap=True)
    result.add_column("notes", overflow="fold")
    previous = None
    for row in rows:
        case = (row.shape, row.batch)
        shape = f"{row.shape} {row.fields}x{row.emb_size}x{row.n_head}"
        batch = f"{row.batch:,} on {row.threads} thread{'s' * (row.threads > 1)}"
        if previous is not None and case != previous:
            result.add_section()
        bad = row.parity == FAILED or row.p50_ms is None
        result.add_row(
            *((shape, batch) if case != previous else ("", "")),
            row.contestant,
            _number(row.p50_ms),
            f"{_number(row.p20_ms)} - {_number(row.p80_ms)}" if row.p50_ms is not None else "",
            f"{row.samples_per_s:,.0f}" if row.samples_per_s is not None else "",
            _ratio(row.x_reference),
            _ratio(row.x_sdpa),
            _number(row.peak_extra_mib),
            Text("; ".join(note for note in (row.notes, row.warning) if note)),
            style="red" if bad else "bold green" if row.contestant in ours else None,
        )
        previous = case
    return result


def _number(value: float | None) -> str:
    """With three digits that count, and no exponent."""
    if value is None:
        return ""
    return f"{value:,.{max(0, 2 - len(str(int(abs(value)))) + (abs(value) < 1) + 1)}f}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
