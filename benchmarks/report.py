"""The results: a row per contestant and case, kept in one CSV and shown as tables."""

from __future__ import annotations

import csv
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby, zip_longest
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

CSV_NAME = "results.csv"
OK, FAILED = "ok", "failed"

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


@dataclass(frozen=True)
class Row:
    """One contestant in one case. None: not measured; `notes` say why.

    parity: "ok", "failed", or "" where it did not come to that. x_reference, x_sdpa: how many times faster
    than those (the faster of the two SDPA layers) in the same rounds. gflops: what the folded form has to
    compute, per second, whatever the contestant does for it; sgemm_gflops: torch's product of two matrices in the
    same rounds.
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
    gflops: float | None = None
    sgemm_gflops: float | None = None
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


class ResultsError(ValueError):
    """A file that holds no results; the message names it."""


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a results file as text. Raises ResultsError for any other file, OSError as `open` does."""
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file, restval="")
        try:
            missing = [name for name in KEY if name not in (reader.fieldnames or ())]
            # A file of an earlier version lacks the columns that came later.
            rows = [dict.fromkeys(COLUMNS, "") | row for row in reader]
        except csv.Error as error:
            raise ResultsError(f"{path}: expected a {CSV_NAME}: {error}") from None
    if missing:
        raise ResultsError(f"{path}: expected a {CSV_NAME}, but it has no column {missing[0]!r}")
    return rows


def update_csv(path: Path, rows: Iterable[Row]) -> None:
    """Puts `rows` into the file, in place of those with the same key.

    Raises ResultsError where the file is there and holds something else.
    """
    new = {row.key(): {name: _text(value) for name, value in asdict(row).items()} for row in rows}
    old = read_csv(path) if path.exists() else []
    kept = [row for row in old if tuple(row[name] for name in KEY) not in new]
    path.parent.mkdir(parents=True, exist_ok=True)
    # Replaced as a whole, so that a run that is cut off leaves the file as it was.
    partial = path.with_suffix(".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        writer.writerows([*kept, *new.values()])
    os.replace(partial, path)


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def present(rows: Iterable[Row]) -> set[str]:
    """The contestants that came to be judged in some case."""
    return {row.contestant for row in rows if row.p50_ms is not None or row.parity}


def table(rows: Sequence[Row], ours: Collection[str]) -> Table:
    """The rows of one mode, case by case; contestants named in `ours` stand out."""
    first = rows[0]
    title = f"{first.mode}, {first.dtype}, {first.device}, {first.data} data"
    result = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    for name in ("case", "contestant"):
        result.add_column(name, no_wrap=True)
    for name in ("p50 ms", "p20 - p80", "samples/s", "x reference", "x SDPA", "extra MiB"):
        result.add_column(name, justify="right", no_wrap=True)
    result.add_column("notes", overflow="fold")
    for _, group in groupby(rows, key=lambda row: (row.shape, row.fields, row.emb_size, row.n_head, row.batch)):
        case = list(group)
        for label, row in zip_longest(_labels(case[0]), case):
            if row is None:
                result.add_row(label)
                continue
            bad = row.parity == FAILED or row.p50_ms is None
            result.add_row(
                label,
                row.contestant,
                number(row.p50_ms),
                f"{number(row.p20_ms)} - {number(row.p80_ms)}" if row.p50_ms is not None else "",
                f"{row.samples_per_s:,.0f}" if row.samples_per_s is not None else "",
                ratio(row.x_reference),
                ratio(row.x_sdpa),
                number(row.peak_extra_mib),
                Text(f"WRONG: {row.notes}" if row.parity == FAILED else row.notes),
                style="red" if bad else "bold green" if row.contestant in ours else None,
            )
        result.add_section()
    return result


def _labels(row: Row) -> list[Text]:
    """What the first column says beside the rows of a case."""
    threads = [f"{row.threads} thread{'s' if row.threads > 1 else ''}"] if row.device == "cpu" else []
    return [
        *map(Text, [f"{row.shape} {row.fields}x{row.emb_size}x{row.n_head}", f"B = {row.batch:,}", *threads]),
        *(Text(warning, style="yellow") for warning in row.warning.split("; ") if warning),
    ]


def number(value: float | None) -> str:
    """With three digits that count, and no exponent."""
    if value is None:
        return ""
    return f"{value:,.{3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0}f}"


def ratio(value: float | None) -> str:
    """With two digits behind the point."""
    return "" if value is None else f"{value:.2f}"
