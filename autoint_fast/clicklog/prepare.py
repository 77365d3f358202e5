"""`prepare`: from raw logs to a folder of encoded rows. One pass over the files counts values, another one encodes;
where rows are split by their order or time, one before them finds where the splits end."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import glob
import math
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from ..files import sync_folder
from .encode import Encoder, ahead
from .reader import (
    CRITEO_CATEGORICAL,
    CRITEO_LABEL,
    CRITEO_NUMERIC,
    Columns,
    Malformed,
    Rows,
    check_files,
    format_of,
    read,
)
from .schema import FORMATS, SCHEMA_FILE, TRANSFORMS, Schema
from .shards import MANIFEST_FILE, SHARD_ROWS, SPLITS, ShardWriter, write_manifest
from .vocabulary import Counter, Vocabulary, hash_values, mix

try:
    import fcntl
except ModuleNotFoundError:
    # Not on Windows; what a killed run leaves there is left.
    fcntl = None

# Of train, validation and test; where the second and the third begin, in tenths.
BOUNDS = (8, 9)
SPLIT_BY = ("hash", "order", "time")
GIB = 1 << 30
MEMORY = 2 * GIB
SIGN = np.uint64(1 << 63)

# Of rows and how many came before them: (n,) positions in SPLITS.
Assign = Callable[[Rows, int], np.ndarray]


@dataclass(frozen=True)
class Report:
    """What `prepare` did."""

    out: Path
    schema: Schema
    rows: dict[str, int]
    """By split."""
    malformed: int
    """Rows that were left out."""
    examples: tuple[str, ...]
    """The first of them: file, row, and what is wrong."""
    distinct: tuple[int, ...]
    """Different values in the training rows, by categorical column."""
    vocabulary_bytes: int
    """The most that counting them took."""
    seconds: dict[str, float]
    """By pass over the files."""


def prepare(
    files: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    format: str | None = None,
    label: str | None = None,
    categorical: Sequence[str] | None = None,
    numeric: Sequence[str] | None = None,
    minimum_count: int = 10,
    transform: str = "log-squared",
    split: str = "hash",
    time_column: str | None = None,
    strict: bool = False,
    force: bool = False,
    memory: int = MEMORY,
    shard_rows: int = SHARD_ROWS,
    progress: bool = False,
) -> Report:
    """Encodes a log into a new folder `out`: schema, vocabulary and the rows of three splits, 8:1:1.

    files: one or more, of one log; each is read two or three times, in order. format: "criteo", "csv" or "parquet";
    None: what the names end in. label, categorical, numeric: names of columns; in Criteo's format label, C1 to C26 and
    I1 to I13, and all of them where no fields are named. minimum_count: a value that comes up less often in the
    training rows has no id. transform: of numbers, see `Schema`. split: "hash" of what a row says but for its label, so
    that equal rows are in one split whatever the order of rows and files; "order" in which rows are read, the last ones
    for the test; "time", by that of `time_column` (numbers or ISO dates), rows of the same time in one split. strict:
    the first malformed row is an error; else they are left out, counted and reported. force: replaces a folder that
    `prepare` wrote. memory: bytes for counting values, beyond which it goes through files beside `out`. shard_rows:
    rows per file. progress: shows a bar on stderr.

    `out` appears whole, or not at all: after an error, a full disk or a kill, what was there is there. Raises
    ValueError for bad arguments and files, OSError where a file cannot be read or written or `out` is there already.
    """
    check_files(files)
    files, out = [Path(file) for file in files], Path(os.path.realpath(out))
    if split not in SPLIT_BY:
        raise ValueError(f"split: expected one of {', '.join(SPLIT_BY)}, got {split!r}")
    if (split == "time") != (time_column is not None):
        raise ValueError(f"time_column: expected a name where split is 'time' and only there, got {time_column!r}")
    if memory < 1 or shard_rows < 1:
        raise ValueError(f"memory, shard_rows: expected at least 1, got {memory} and {shard_rows}")
    columns = _columns(files, format, label, categorical, numeric, time_column)
    cardinalities = (1,) * len(columns.categorical)
    # Known after the count; the rest of it is checked now.
    schema = Schema(
        columns.label, columns.categorical, columns.numeric, cardinalities, format, minimum_count, transform
    )
    for file in files:
        if not stat.S_ISREG(file.stat().st_mode):
            raise ValueError(f"{file}: expected a file that can be read more than once")
    _check_out(out, files, force)
    with _replacing(out, force) as work, _Log(files, columns, format, strict, progress) as log:
        spilled, new = work / "spilled", work / "new"
        spilled.mkdir()
        new.mkdir()
        assign = _assigner(log, split, spilled, memory)
        rows, vocabulary, distinct, peak = _count(log, assign, schema, spilled, memory)
        if not all(rows):
            raise ValueError(f"expected rows in each split, got {_counts(rows)}; {log.malformed.count:,} malformed")
        encoder = Encoder(dataclasses.replace(schema, cardinalities=vocabulary.cardinalities), vocabulary)
        if _encode(log, assign, encoder, new, shard_rows) != rows:
            raise ValueError("expected files that stay as they are, got other rows when they were read again")
        shutil.rmtree(spilled)
    return Report(
        out=out,
        schema=encoder.schema,
        rows=dict(zip(SPLITS, rows, strict=True)),
        malformed=log.malformed.count,
        examples=tuple(log.malformed.examples),
        distinct=tuple(distinct),
        vocabulary_bytes=peak,
        seconds=log.seconds,
    )


def _columns(
    files: Sequence[Path],
    format: str | None,
    label: str | None,
    categorical: Sequence[str] | None,
    numeric: Sequence[str] | None,
    time_column: str | None,
) -> Columns:
    """The columns to read. Raises ValueError for a file of an unknown format, TypeError for one name for several."""
    for name, value in (("categorical", categorical), ("numeric", numeric)):
        if isinstance(value, str):
            raise TypeError(f"{name}: expected a sequence of names, got {value!r}")
    criteo = [format_of(file, format) == "criteo" for file in files]
    if all(criteo) and categorical is None and numeric is None:
        categorical, numeric = CRITEO_CATEGORICAL, CRITEO_NUMERIC
    return Columns(label or CRITEO_LABEL, tuple(categorical or ()), tuple(numeric or ()), time_column)


class _Log:
    """The files, read in passes that are timed and shown."""

    def __init__(
        self, files: Sequence[Path], columns: Columns, format: str | None, strict: bool, progress: bool
    ) -> None:
        self.columns, self.malformed, self.seconds = columns, Malformed(), {}
        self._files, self._format, self._strict = files, format, strict
        self._size = sum(file.stat().st_size for file in files)
        parts = (
            TextColumn("{task.description:<8}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[rows]:,} rows, {task.fields[rate]:,.0f} per second"),
            TimeRemainingColumn(),
        )
        console = Console(stderr=True)
        self._bar = Progress(*parts, console=console, disable=not (progress and console.is_terminal))

    def __enter__(self) -> _Log:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def rows(self, name: str) -> Iterator[tuple[Rows, int]]:
        """All rows, and how many came before; one pass."""
        self.malformed = Malformed(self._strict)
        task = self._bar.add_task(name, total=self._size, rows=0, rate=0)
        start, before = time.perf_counter(), 0

        def advance(n_bytes: int) -> None:
            rate = before / (time.perf_counter() - start)
            self._bar.update(task, advance=n_bytes, rows=before, rate=rate)

        def chunks() -> Iterator[Rows]:
            for file in self._files:
                yield from read(file, self.columns, self.malformed, format=self._format, advance=advance)

        for rows in ahead(chunks()):
            yield rows, before
            before += len(rows)
        advance(0)
        self.seconds[name] = time.perf_counter() - start


# --- splits -----------------------------------------------------------------------------------------------------------


def _assigner(log: _Log, split: str, folder: Path, memory: int) -> Assign:
    """What tells the split of each row; where it hangs on the order of all rows, they are read for it."""
    if split == "hash":
        places = np.array([(bound << 64) // 10 for bound in BOUNDS], np.uint64)
        return lambda rows, before: np.searchsorted(places, _row_hashes(rows, log.columns), side="right")
    if split == "order":
        total = sum(len(rows) for rows, _ in log.rows("ordering"))
        places = np.array([total * bound // 10 for bound in BOUNDS])
        return lambda rows, before: np.searchsorted(places, np.arange(before, before + len(rows)), side="right")
    times = _time_bounds(log, folder, memory)
    return lambda rows, before: np.searchsorted(times, rows.time, side="right")


def _row_hashes(rows: Rows, columns: Columns) -> np.ndarray:
    """(n,) uint64 of the fields of each row, by their names and values, in whatever order and format they came."""
    names = pa.array([name.encode() for name in (*columns.categorical, *columns.numeric)], pa.binary())
    salts = hash_values(names)
    total = np.zeros(len(rows), np.uint64)
    for column, salt in zip(rows.categorical, salts, strict=False):
        # The last is what a code of -1 finds.
        total += mix(np.append(column.hashes, np.uint64(0)) ^ salt)[column.codes]
    for column, salt in zip(rows.numeric.T, salts[len(columns.categorical) :], strict=True):
        # One zero, and one NaN.
        bits = np.where(np.isnan(column), np.nan, column + 0.0).view(np.uint64)
        total += mix(mix(bits) ^ salt)
    return mix(total)


def _time_bounds(log: _Log, folder: Path, memory: int) -> list[float]:
    """The times at which the second and the third split begin. Raises ValueError for numbers and dates together."""
    counter, total, kinds = Counter(1, folder, memory), 0, set()
    for rows, _ in log.rows("ordering"):
        times, counts = np.unique(rows.time, return_counts=True)
        counter.add(0, _as_ordered(times), counts)
        total += len(rows)
        kinds.add(rows.dated)
    if len(kinds) == 2:
        raise ValueError(f"column {log.columns.time!r}: expected numbers or dates, got both")
    found: list[float] = []
    before = 0
    for keys, counts in counter.merged(0):
        ends = before + np.cumsum(counts)
        while len(found) < len(BOUNDS) and total * BOUNDS[len(found)] // 10 < ends[-1]:
            at = np.searchsorted(ends, total * BOUNDS[len(found)] // 10, side="right")
            found.append(float(_from_ordered(keys[at : at + 1])[0]))
        before = int(ends[-1])
    return found


def _as_ordered(times: np.ndarray) -> np.ndarray:
    """(n,) uint64 in the order of the float64."""
    bits = (times + 0.0).view(np.uint64)
    return np.where(bits & SIGN, ~bits, bits | SIGN)


def _from_ordered(keys: np.ndarray) -> np.ndarray:
    """The float64 that `_as_ordered` made these of."""
    return np.where(keys & SIGN, keys ^ SIGN, ~keys).view(np.float64)


# --- passes -----------------------------------------------------------------------------------------------------------


def _count(
    log: _Log, assign: Assign, schema: Schema, folder: Path, memory: int
) -> tuple[list[int], Vocabulary, list[int], int]:
    """Rows by split, and of the training rows the vocabulary, how many distinct values each column has, and the most
    bytes that counting them took."""
    rows_of = np.zeros(len(SPLITS), np.int64)
    counter = Counter(len(schema.categorical), folder, memory)
    for rows, before in log.rows("counting"):
        split = assign(rows, before)
        rows_of += np.bincount(split, minlength=len(SPLITS))
        train = split == 0
        for i, column in enumerate(rows.categorical):
            counts = np.bincount(column.codes[train] + 1, minlength=len(column.hashes) + 1)[1:]
            there = counts > 0
            counter.add(i, column.hashes[there], counts[there])
    vocabulary, distinct = Vocabulary.of(counter, len(schema.categorical), schema.minimum_count)
    return rows_of.tolist(), vocabulary, distinct, counter.peak_bytes


def _encode(log: _Log, assign: Assign, encoder: Encoder, new: Path, shard_rows: int) -> list[int]:
    """Writes everything; gives the rows by split."""
    values = [_Values(size) for size in encoder.schema.cardinalities]
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(ShardWriter(new, split, encoder.schema, shard_rows)) for split in SPLITS]
        for rows, before in log.rows("encoding"):
            ids = encoder.lookup(rows)
            for collected, column, of_value in zip(values, rows.categorical, ids, strict=True):
                collected.add(column.values, of_value)
            batch, split = encoder.assemble(rows, ids), assign(rows, before)
            for i, writer in enumerate(writers):
                writer.append(batch, np.flatnonzero(split == i))
    encoder.schema.save(new)
    encoder.vocabulary.save(new, encoder.schema.categorical, [collected.in_order() for collected in values])
    write_manifest(new, {split: writer.rows for split, writer in zip(SPLITS, writers, strict=True)})
    return [sum(writer.rows) for writer in writers]


class _Values:
    """The value that each id of a column is of, as they come up."""

    def __init__(self, cardinality: int) -> None:
        self._unseen = np.ones(cardinality, bool)
        self._unseen[0] = False
        self._values: list[pa.Array] = [pa.array([], pa.binary())]
        self._ids: list[np.ndarray] = [np.empty(0, np.int64)]

    def add(self, values: pa.Array, ids: np.ndarray) -> None:
        new = np.flatnonzero(self._unseen[ids])
        if len(new):
            self._values.append(values.take(pa.array(new)))
            self._ids.append(ids[new])
            self._unseen[ids[new]] = False

    def in_order(self) -> pa.Array:
        """Those of the ids from 1 on. Raises ValueError where one never came up."""
        if self._unseen.any():
            raise ValueError("expected files that stay as they are, got other values when they were read again")
        _, first = np.unique(np.concatenate(self._ids), return_index=True)
        return pa.concat_arrays(self._values).take(pa.array(first))


# --- the folder -------------------------------------------------------------------------------------------------------


def _check_out(out: Path, files: Sequence[Path], force: bool) -> None:
    """Finds now what would keep `out` from being written later. Raises OSError and ValueError."""
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise FileExistsError(f"{out}: expected a folder, got something else")
    if os.path.ismount(out):
        raise ValueError(f"{out}: expected a folder that can be replaced as a whole, got a mount point")
    if not any(out.iterdir()):
        return
    if not force:
        raise FileExistsError(f"{out} is there already; force (--force) replaces it")
    if not all((out / name).is_file() for name in (SCHEMA_FILE, MANIFEST_FILE)):
        raise FileExistsError(f"{out}: expected a folder that `prepare` wrote, got another, which is not replaced")
    if inside := [file for file in files if Path(os.path.realpath(file)).is_relative_to(out)]:
        raise ValueError(f"{inside[0]}: expected a file outside of {out}, which is replaced")


@contextlib.contextmanager
def _replacing(out: Path, force: bool) -> Iterator[Path]:
    """A folder beside `out`; what is in its `new` takes the place of `out` in the end, unless there is an error.

    A kill between the two renames leaves what was there in the folder; the next run puts it back.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix, suffix = f".{out.name}.", ".partial"
    if fcntl is not None:
        for left in out.parent.glob(f"{glob.escape(prefix)}*{suffix}"):
            _clean_up(left, out)
    work = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=out.parent))
    try:
        with _locked(work):
            yield work
            new, old = work / "new", work / "old"
            sync_folder(new)
            if force and out.is_dir() and any(out.iterdir()):
                os.rename(out, old)
            try:
                os.rename(new, out)
            except OSError:
                if old.is_dir():
                    os.rename(old, out)
                raise
            sync_folder(out.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _clean_up(left: Path, out: Path) -> None:
    """Removes what a killed run left, and puts back what it had moved away."""
    with contextlib.suppress(OSError), _locked(left):
        if (left / "old").is_dir() and not out.exists():
            os.rename(left / "old", out)
        shutil.rmtree(left)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a folder for this process, where there are locks. Raises OSError where another one has it."""
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


# --- the command ------------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command line of `prepare`; sets `run` to a function from the parsed arguments to the exit status."""
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="of one log, in the order of its rows")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="criteo: tab-separated label, 13 numbers, 26 categories, no header; csv and parquet: named columns "
        "(default: by the files' names: .tsv or .txt is criteo, .csv, .parquet; text may be compressed, .gz or .zst)",
    )
    parser.add_argument("--label", metavar="NAME", help=f"column of clicks, 0 or 1 (default: {CRITEO_LABEL})")
    parser.add_argument("--categorical", nargs="+", metavar="NAME", help="columns that become ids (criteo: C1 to C26)")
    parser.add_argument("--numeric", nargs="+", metavar="NAME", help="columns of numbers (criteo: I1 to I13)")
    parser.add_argument(
        "--min-count",
        type=int,
        default=10,
        metavar="N",
        help="a value that comes up less often in the training rows counts as unseen (default: %(default)s)",
    )
    parser.add_argument(
        "--transform",
        choices=TRANSFORMS,
        default="log-squared",
        help="of numbers; log-squared: log(x)^2 for x > 2, x below (default: %(default)s)",
    )
    parser.add_argument(
        "--split",
        choices=SPLIT_BY,
        default="hash",
        help="how rows come into training, validation and test, 8:1:1: by a hash of their fields, in the order in "
        "which they are read, or by time (default: %(default)s)",
    )
    parser.add_argument("--time-column", metavar="NAME", help="numbers or ISO dates, for --split time")
    parser.add_argument("--strict", action="store_true", help="stop at the first malformed row")
    parser.add_argument("--force", action="store_true", help="replace a folder that prepare wrote")
    parser.add_argument(
        "--memory",
        type=float,
        default=MEMORY / GIB,
        metavar="GIB",
        help="for counting values, beyond which it goes through files beside DIR (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """The command `prepare`: prints what it did and where; gives the exit status. Raises as `prepare`."""
    if not 0 < arguments.memory < math.inf:
        raise ValueError(f"--memory: expected a number above zero, got {arguments.memory}")
    report = prepare(
        arguments.files,
        arguments.out,
        format=arguments.format,
        label=arguments.label,
        categorical=arguments.categorical,
        numeric=arguments.numeric,
        minimum_count=arguments.min_count,
        transform=arguments.transform,
        split=arguments.split,
        time_column=arguments.time_column,
        strict=arguments.strict,
        force=arguments.force,
        memory=max(int(arguments.memory * GIB), 1),
        progress=True,
    )
    print("\n".join(_summary(report)))
    return 0


def _summary(report: Report) -> Iterator[str]:
    total, seconds = sum(report.rows.values()), sum(report.seconds.values())
    yield f"{total:,} rows in {seconds:.1f} s, {total / seconds:,.0f} per second: {_counts(report.rows.values())}"
    if report.malformed:
        shown = "" if report.malformed == len(report.examples) else f", the first {len(report.examples)}"
        yield f"{report.malformed:,} malformed rows left out{shown}:"
        yield from (f"  {example}" for example in report.examples)
    schema = report.schema
    if schema.categorical:
        kept = sum(schema.cardinalities) - len(schema.categorical)
        yield (
            f"{len(schema.categorical)} categorical columns: {kept:,} values with an id, of {sum(report.distinct):,} "
            f"in the training rows ({schema.minimum_count} times at least)"
        )
    if schema.numeric:
        yield f"{len(schema.numeric)} numeric columns: {schema.transform}"
    yield f"wrote {report.out}"


def _counts(rows: Iterable[int]) -> str:
    return ", ".join(f"{n:,} {split}" for n, split in zip(rows, SPLITS, strict=True))
