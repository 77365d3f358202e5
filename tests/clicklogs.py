"""Click logs for tests: small files in every format, and what stands in them."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from autoint_fast.clicklog import reader
from autoint_fast.clicklog.reader import CRITEO, Columns, Malformed, Rows

COLUMNS = Columns("click", ("site", "user"), ("age", "price"))
HEADER = ("click", "site", "user", "age", "price")
COMPRESSED = ("", ".gz", ".zst")


def compress(content: bytes, ending: str) -> bytes:
    """In two parts, as concatenated files are, where it is compressed."""
    half = len(content) // 2
    parts = (content[:half], content[half:])
    if ending == ".gz":
        return b"".join(gzip.compress(part) for part in parts)
    if ending == ".zst":
        return b"".join(pa.compress(part, "zstd", asbytes=True) for part in parts)
    return content


def csv_text(rows: Iterable[Sequence[str]], end: str = "\n", quoting: int = csv.QUOTE_MINIMAL) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=end, quoting=quoting).writerows(rows)
    return text.getvalue().encode()


def criteo_line(label: str = "0", numbers: Sequence[str] = (), categories: Sequence[str] = ()) -> str:
    """A row of Criteo's format; what is not given is missing."""
    parts = [label, *numbers, *[""] * (13 - len(numbers)), *categories, *[""] * (26 - len(categories))]
    assert len(parts) == len(CRITEO)
    return "\t".join(parts)


def draw_log(rows: int, seed: int = 0) -> list[str]:
    """Lines in Criteo's format: columns of few, some and very many values, with gaps, and clicks that hang on them."""
    draw = np.random.default_rng(seed)
    sizes = np.geomspace(2, 4 * rows, 26)
    lines = []
    for _ in range(rows):
        ids = (draw.random(26) ** 3 * sizes).astype(int)
        categories = [f"{id * 2654435761 % (1 << 32):08x}" if draw.random() > 0.1 else "" for id in ids]
        numbers = [str(int(draw.exponential(1.0) ** 3 * 10) - 1) if draw.random() > 0.2 else "" for _ in range(13)]
        lines.append(criteo_line(str(int(ids[3] % 4 == 0)), numbers, categories))
    return lines


def write_lines(path: Path, lines: Iterable[str]) -> Path:
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())
    return path


def read_all(path: Path, columns: Columns = COLUMNS, malformed: Malformed | None = None, **options: object) -> Rows:
    """All rows of a file as one, with a column's values in place of codes (None: missing)."""
    chunks = list(reader.read(path, columns, Malformed() if malformed is None else malformed, **options))
    categorical = [
        [value for chunk in chunks for value in values_of(chunk, i)] for i in range(len(columns.categorical))
    ]
    if not chunks:
        return Rows(np.empty(0), np.empty((0, len(columns.numeric))), categorical, None, False)
    time = np.concatenate([chunk.time for chunk in chunks]) if columns.time else None
    return Rows(
        np.concatenate([chunk.label for chunk in chunks]),
        np.concatenate([chunk.numeric for chunk in chunks]),
        categorical,
        time,
        chunks[0].dated,
    )


def values_of(rows: Rows, i: int) -> list[bytes | None]:
    """The values of a categorical column, row by row."""
    column = rows.categorical[i]
    return [None if code < 0 else column.values[int(code)].as_py() for code in column.codes]
