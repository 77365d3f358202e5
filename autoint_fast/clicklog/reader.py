"""Raw logs, chunk by chunk: Criteo's format, CSV and Parquet, through Arrow.

In Criteo's format, a row is a line: label, 13 numbers, 26 strings, tabs between, no header; a quote is a character like
any other. CSV has a header and commas, and quotes may hold commas, line breaks and doubled quotes. Either is plain or
compressed (.gz, .zst), has what is empty for missing, and may end its lines in CRLF or CR. A category is its text, in
Parquet what a number or date would be as text, so that a log has the same categories in any format.
"""

from __future__ import annotations

import bisect
import codecs
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from .schema import FORMATS
from .vocabulary import hash_values

CRITEO_LABEL = "label"
CRITEO_NUMERIC = tuple(f"I{i}" for i in range(1, 14))
CRITEO_CATEGORICAL = tuple(f"C{i}" for i in range(1, 27))
CRITEO = (CRITEO_LABEL, *CRITEO_NUMERIC, *CRITEO_CATEGORICAL)

# About 17,000 rows of Criteo's log; also the longest row that can be read. Arrow reads 32 chunks ahead.
CHUNK_BYTES = 4 << 20
CHUNK_ROWS = 1 << 14
PARQUET_BUFFER_BYTES = 1 << 20
COMPRESSIONS = MappingProxyType({".gz": "gzip", ".zst": "zstd"})
ENDINGS = MappingProxyType({".csv": "csv", ".parquet": "parquet", ".tsv": "criteo", ".txt": "criteo"})

# What Arrow's conversion to a float takes, but for "nan" and "inf".
NUMBER = r"^-?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$"
LARGEST = float(np.finfo(np.float32).max)
EXAMPLES = 20
SHOWN = 40
# Rows of another number of columns one after another, beyond which a file is taken for no such log.
MOST_SKIPPED = 1 << 20

# Kinds of values that are no text but bytes, text, and numbers.
BYTES = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
TEXTS = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
NUMBERS = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read. time: of one to order rows by."""

    label: str
    categorical: tuple[str, ...]
    numeric: tuple[str, ...]
    time: str | None = None


class Category(NamedTuple):
    """A categorical column: d distinct values, some of which no row may have, and which each of n rows has."""

    codes: np.ndarray  # (n,) int32, -1: missing
    values: pa.Array  # (d,) binary
    hashes: np.ndarray  # (d,) uint64


class Rows(NamedTuple):
    """n well-formed rows of a log."""

    label: np.ndarray  # (n,) float64, 0 or 1, NaN: the file has none
    numeric: np.ndarray  # (n, N) float64, NaN: missing
    categorical: list[Category]
    time: np.ndarray | None  # (n,) float64; microseconds since 1970 for dates
    dated: bool  # the times are dates

    def __len__(self) -> int:
        return len(self.label)


@dataclass
class Malformed:
    """Counts rows that cannot be read, and keeps the first ones.

    Lines are counted from 1, a CSV file's header included; a row whose quotes hold line breaks counts as one.
    """

    strict: bool = False
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, path: Path, unit: str, bad: Sequence[tuple[int, Callable[[], str]]]) -> None:
        """bad: numbers of lines (or rows, says `unit`), ascending, each with what says why. Raises ValueError in strict
        mode."""
        self.count += len(bad)
        for number, why in bad[: EXAMPLES - len(self.examples)]:
            self.examples.append(f"{path}, {unit} {number}: {why()}")
            if self.strict:
                raise ValueError(self.examples[-1])


def check_files(files: Sequence[str | os.PathLike[str]]) -> None:
    """`files` are one or more paths. Raises TypeError for a single path, ValueError for none."""
    if isinstance(files, (str, bytes, os.PathLike)):
        raise TypeError(f"files: expected a sequence of paths, got {files!r}")
    if not files:
        raise ValueError("files: expected at least one, got none")


def format_of(path: str | os.PathLike[str], format: str | None = None) -> str:
    """The format of a file: the one given, else what its name ends in. Raises ValueError for any other name."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        suffixes.pop()
    found = format or ENDINGS.get(suffixes[-1] if suffixes else "")
    if found not in FORMATS:
        endings = ", ".join(f"{name}: {ending}" for ending, name in ENDINGS.items())
        raise ValueError(f"{path}: expected a format, one of {', '.join(FORMATS)}, or a name that tells it ({endings})")
    return found


def read(
    path: str | os.PathLike[str],
    columns: Columns,
    malformed: Malformed,
    *,
    format: str | None = None,
    label_required: bool = True,
    advance: Callable[[int], None] = lambda n: None,
) -> Iterator[Rows]:
    """The rows of a file in order, in chunks, each of at least one row.

    label_required: a row without a label is malformed; else a file may lack the column, and a row the value. advance is
    told how many bytes of the file were read since it was last called. Raises OSError where the file cannot be read,
    ValueError for one that is no such log or lacks a column, and for a malformed row where `malformed` is strict.
    """
    path = Path(path)
    chunks, unit = (_parquet, "row") if format_of(path, format) == "parquet" else (_text, "line")
    try:
        for chunk in chunks(path, columns, format, label_required, advance):
            rows, bad = _rows(path, chunk, columns, label_required)
            malformed.add(path, unit, bad)
            if len(rows):
                yield rows
    except pa.ArrowMemoryError:
        raise
    except pa.ArrowException as error:
        what = " ".join(str(error).split())
        if "straddling" in what:
            what = f"expected rows of up to {CHUNK_BYTES:,} bytes, got a longer one"
        elif wrong := re.search("Expected ([0-9]+) columns, got ([0-9]+)", what):
            what = f"expected rows of {wrong[1]} columns, got {MOST_SKIPPED:,} others, the last of {wrong[2]}"
        raise ValueError(f"{path}: {what}") from None
    except OSError as error:
        # Arrow's own, of compressed files.
        if error.errno is None:
            raise OSError(f"{path}: {error}") from None
        raise


# --- files ------------------------------------------------------------------------------------------------------------


class _Chunk(NamedTuple):
    """Columns by name, the numbers of the rows, and those of rows that have too many or too few columns."""

    columns: dict[str, pa.Array]
    numbers: np.ndarray
    bad: list[tuple[int, str]]


def _parquet(
    path: Path, columns: Columns, format: str | None, label_required: bool, advance: Callable[[int], None]
) -> Iterator[_Chunk]:
    # Otherwise whole columns of a row group are read at once, and a file may be one row group.
    with pq.ParquetFile(path, buffer_size=PARQUET_BUFFER_BYTES, pre_buffer=False) as file:
        needed = _needed(path, columns, file.schema_arrow.names, label_required)
        size, total, end = path.stat().st_size, file.metadata.num_rows, 0
        for batch in file.iter_batches(CHUNK_ROWS, columns=needed):
            start, end = end, end + len(batch)
            advance(size * end // total - size * start // total)
            yield _Chunk(dict(zip(batch.schema.names, batch.columns, strict=True)), np.arange(start + 1, end + 1), [])


def _text(
    path: Path, columns: Columns, format: str | None, label_required: bool, advance: Callable[[int], None]
) -> Iterator[_Chunk]:
    names, header = _names(path, format, label_required)
    needed = _needed(path, columns, names, label_required)
    skipped: list[tuple[int, str]] = []

    def skip(row: pyarrow.csv.InvalidRow) -> str:
        if len(skipped) == MOST_SKIPPED:
            return "error"
        skipped.append((row.number, f"expected {row.expected_columns} columns, got {row.actual_columns}"))
        return "skip"

    with pa.OSFile(str(path)) as raw:
        next_number, position = 2 if header else 1, 0
        for batch in _open(path, raw, not header, None if header else names, needed, skip) or ():
            # The i-th skipped row came after the j-th of the others just when its number less i is greater than j's
            # would be without any skipped.
            numbers = np.arange(next_number, next_number + len(batch))
            numbers += np.searchsorted([n - i for i, (n, _) in enumerate(skipped)], numbers, side="right")
            past = bisect.bisect(skipped, (int(numbers[-1]), "")) if len(batch) else 0
            bad, skipped[:past] = skipped[:past], []
            next_number += len(batch) + past
            start, position = position, raw.tell()
            advance(position - start)
            yield _Chunk(dict(zip(batch.schema.names, batch.columns, strict=True)), numbers, bad)
    if skipped:
        yield _Chunk({name: pa.nulls(0, pa.binary()) for name in needed}, np.empty(0, np.int64), skipped)


def _names(path: Path, format: str | None, label_required: bool) -> tuple[list[str], bool]:
    """The names of a text file's columns, and whether its first line has them."""
    criteo = format_of(path, format) == "criteo"
    if criteo and label_required:
        return list(CRITEO), False
    with pa.OSFile(str(path)) as raw:
        first = _open(path, raw, criteo, column_names=None)
    if criteo:
        return list(CRITEO[1:] if first and len(first.schema) == len(CRITEO) - 1 else CRITEO), False
    if first is None:
        raise ValueError(f"{path}: expected a header, got an empty file")
    return first.schema.names, True


def _needed(path: Path, columns: Columns, names: Sequence[str], label_required: bool) -> list[str]:
    """The names of the columns to read. Raises ValueError for one that is not there, or there twice."""
    needed = [columns.label, *columns.categorical, *columns.numeric, *((columns.time,) if columns.time else ())]
    for name in dict.fromkeys(needed):
        if names.count(name) != 1 and (label_required or name != columns.label or name in names):
            what = "a column" if name not in names else "one column"
            raise ValueError(f"{path}: expected {what} {name!r}, got {', '.join(map(repr, names))}")
    return [name for name in dict.fromkeys(needed) if name in names]


def _open(
    path: Path,
    raw: pa.NativeFile,
    criteo: bool,
    column_names: Sequence[str] | None,
    needed: Sequence[str] = (),
    skip: Callable[[pyarrow.csv.InvalidRow], str] = lambda row: "skip",
) -> pyarrow.csv.CSVStreamingReader | None:
    """None for an empty file. needed: the columns to read, all of them for none."""
    compression = COMPRESSIONS.get(path.suffix.lower())
    stream = pa.CompressedInputStream(raw, compression) if compression else raw
    text = _Utf8(stream)
    if text.empty:
        return None
    return pyarrow.csv.open_csv(
        pa.PythonFile(text, mode="r"),
        # Numbers of rows are known on one thread only.
        read_options=pyarrow.csv.ReadOptions(
            use_threads=False,
            block_size=CHUNK_BYTES,
            column_names=column_names,
            autogenerate_column_names=criteo and not column_names,
        ),
        parse_options=pyarrow.csv.ParseOptions(
            delimiter="\t" if criteo else ",",
            quote_char=False if criteo else '"',
            double_quote=not criteo,
            newlines_in_values=not criteo,
            # A blank line counts, and is a row without a label.
            ignore_empty_lines=False,
            invalid_row_handler=skip,
        ),
        convert_options=pyarrow.csv.ConvertOptions(
            check_utf8=False,
            column_types=dict.fromkeys(needed, pa.dictionary(pa.int32(), pa.binary())),
            null_values=[""],
            strings_can_be_null=True,
            include_columns=needed,
        ),
    )


class _Utf8:
    """A stream as UTF-8 whose last line is ended.

    What is no UTF-8 is U+FFFD: Arrow shows malformed rows as text, and stops where they are none. No block ends between
    CR and LF: Arrow forgets an LF that comes first in the next one, in quotes too.
    """

    closed = False

    def __init__(self, stream: pa.NativeFile) -> None:
        self._stream, self._decoder = stream, codecs.getincrementaldecoder("utf-8")("replace")
        self._ready = self._next(1)
        self._ended = self.empty = not self._ready
        self._last = self._ready[-1:]

    def read(self, size: int) -> bytes:
        """At most so many bytes, none at the end only."""
        while len(self._ready) < size and not self._ended:
            more = self._next(size - len(self._ready))
            if not more:
                self._ended = True
                more = b"" if self._last in b"\r\n" else b"\n"
            self._ready += more
            self._last = more[-1:]
        end = size
        if size > 1 and len(self._ready) >= size and self._ready[size - 1 : size] == b"\r":
            end -= 1
        found, self._ready = self._ready[:end], self._ready[end:]
        return found

    def close(self) -> None:
        self.closed = True

    def _next(self, size: int) -> bytes:
        """About as much, and nothing at the end only."""
        while True:
            block = self._stream.read(size)
            if block.isascii() and block and not self._decoder.getstate()[0]:
                return block
            text = self._decoder.decode(block, not block)
            if text or not block:
                return text.encode()


# --- rows -------------------------------------------------------------------------------------------------------------


def _rows(
    path: Path, chunk: _Chunk, columns: Columns, label_required: bool
) -> tuple[Rows, list[tuple[int, Callable[[], str]]]]:
    """The well-formed rows of a chunk, and the numbers of the others, each with what says why."""
    n = len(chunk.numbers)
    wrong: list[tuple[np.ndarray, str, str]] = []  # rows, their column, and what was expected there

    def checked(name: str, good: np.ndarray, expected: str) -> None:
        if not good.all():
            wrong.append((np.flatnonzero(~good), name, expected))

    label = np.full(n, np.nan)
    if columns.label in chunk.columns:
        label, is_number = _numbers(path, columns.label, chunk.columns[columns.label])
        missing_is_good = is_number & np.isnan(label) & (not label_required)
        checked(columns.label, missing_is_good | (label == 0) | (label == 1), "0 or 1")
    numeric = np.empty((n, len(columns.numeric)))
    for i, name in enumerate(columns.numeric):
        numeric[:, i], is_number = _numbers(path, name, chunk.columns[name])
        checked(name, is_number, "a number or nothing")
    time, dated = None, False
    if columns.time:
        time, dated = _times(path, columns.time, chunk.columns[columns.time])
        checked(columns.time, ~np.isnan(time), "a number or a date as in 2024-05-31 or 2024-05-31 23:59:59")
    categorical = [_category(path, name, chunk.columns[name]) for name in columns.categorical]
    if not (wrong or chunk.bad):
        return Rows(label, numeric, categorical, time, dated), []

    good = np.ones(n, bool)
    for rows, _, _ in wrong:
        good[rows] = False
    bad = [(number, partial(str, why)) for number, why in chunk.bad]
    for row in np.flatnonzero(~good):
        bad.append((int(chunk.numbers[row]), partial(_complaint, chunk, row, wrong)))
    rows = Rows(
        label[good],
        numeric[good],
        [column._replace(codes=column.codes[good]) for column in categorical],
        None if time is None else time[good],
        dated,
    )
    return rows, sorted(bad, key=lambda entry: entry[0])


def _complaint(chunk: _Chunk, row: int, wrong: Sequence[tuple[np.ndarray, str, str]]) -> str:
    """What is wrong with a row, by its first column that is."""
    name, expected = next((name, expected) for rows, name, expected in wrong if row in rows)
    value = chunk.columns[name][row].as_py()
    text = value.decode(errors="replace") if isinstance(value, bytes) else "" if value is None else str(value)
    got = repr(text if len(text) <= SHOWN else text[:SHOWN] + "...") if text else "nothing"
    return f"column {name!r}: expected {expected}, got {got}"


def _category(path: Path, name: str, column: pa.Array) -> Category:
    """What is empty or no number is missing."""
    if pa.types.is_nested(_kind(column)):
        raise ValueError(f"{path}: column {name!r}: expected numbers, text or dates, got {_kind(column)}")
    if not pa.types.is_dictionary(column.type):
        column = column.dictionary_encode()
    values = column.dictionary
    if pa.types.is_floating(values.type):
        values = pc.if_else(pc.is_nan(values), None, values)
    if not pa.types.is_binary(values.type):
        values = pc.cast(
            values if any(is_kind(values.type) for is_kind in BYTES) else pc.cast(values, pa.string()), pa.binary()
        )
    codes = pc.fill_null(column.indices, -1).to_numpy(zero_copy_only=False).astype(np.int32, copy=False)
    values = pc.fill_null(values, b"")
    empty = pc.equal(pc.binary_length(values), 0).to_numpy(zero_copy_only=False)
    if empty.any():
        codes = np.where(np.append(empty, False)[codes], np.int32(-1), codes)
    return Category(codes, values, hash_values(values))


def _numbers(path: Path, name: str, column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """(n,) float64, NaN for what is missing or no number, and whether each is missing or a number."""
    kind = _kind(column)
    if _is_text(kind):
        category = _category(path, name, column)
        values = np.append(_parsed(category.values), np.nan)
        good = np.append(~np.isnan(values[:-1]), True)
        return values[category.codes], good[category.codes]
    if not (kind == pa.bool_() or any(is_kind(kind) for is_kind in NUMBERS)):
        raise ValueError(f"{path}: column {name!r}: expected numbers, got {kind}")
    if kind == pa.bool_():
        column = pc.cast(column, pa.uint8())
    values = pc.cast(column, pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    large = np.abs(values) > LARGEST
    return np.where(large, np.nan, values), ~large


def _parsed(values: pa.Array) -> np.ndarray:
    """(d,) float64 of binary values, NaN for what is no number."""
    text = pc.if_else(pc.match_substring_regex(values, NUMBER), values, None)
    numbers = pc.cast(pc.cast(text, pa.string()), pa.float64()).to_numpy(zero_copy_only=False)
    return np.where(np.abs(numbers) > LARGEST, np.nan, numbers)


def _times(path: Path, name: str, column: pa.Array) -> tuple[np.ndarray, bool]:
    """(n,) float64, NaN for what is missing or no time, and whether they are dates. Raises ValueError for both."""
    kind = _kind(column)
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        column = pc.cast(column, pa.timestamp("us", getattr(kind, "tz", None)), safe=False)
        return pc.cast(pc.cast(column, pa.int64()), pa.float64(), safe=False).to_numpy(zero_copy_only=False), True
    if not _is_text(kind):
        return _numbers(path, name, column)[0], False
    category = _category(path, name, column)
    numbers = _parsed(category.values)
    dates = np.array([_microseconds(value.as_py()) for value in category.values], np.float64)
    dates[~np.isnan(numbers)] = np.nan
    dated = not np.isnan(dates).all()
    if dated and not np.isnan(numbers).all():
        raise ValueError(f"{path}: column {name!r}: expected numbers or dates, got both")
    return np.append(dates if dated else numbers, np.nan)[category.codes], dated


def _microseconds(value: bytes) -> float:
    """Of a date in ISO format since 1970, in UTC where it has no time zone; NaN for anything else."""
    try:
        # Python 3.10 does not know "Z".
        date = datetime.fromisoformat(re.sub("[zZ]$", "+00:00", value.decode()))
        return (date if date.tzinfo else date.replace(tzinfo=timezone.utc)).timestamp() * 1e6
    except (ValueError, OverflowError):
        return math.nan


def _kind(column: pa.Array) -> pa.DataType:
    """The type of the values of a column."""
    return column.type.value_type if pa.types.is_dictionary(column.type) else column.type


def _is_text(kind: pa.DataType) -> bool:
    return any(is_kind(kind) for is_kind in (*BYTES, *TEXTS))
