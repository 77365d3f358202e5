"""Encoded rows on disk: a record per row, in .npy files that are mapped into memory.

A row is one record, so that a row drawn at random costs one page. Within it, the ids of all categorical columns that
fit the same unsigned type lie together.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..files import write_durably
from .schema import Schema, read_json

SPLITS = ("train", "validation", "test")
# How many rows each shard has, by split, so that a shard that is missing does not go unnoticed.
MANIFEST_FILE = "shards.json"
VERSION = 1
SHARD_ROWS = 1 << 21
ID_TYPES = (np.uint8, np.uint16, np.uint32)


class Batch(NamedTuple):
    """B rows."""

    categorical: Tensor  # (B, C) int64, id 0: missing or not in the vocabulary
    numeric: Tensor  # (B, N) float32, transformed, NaN: missing
    label: Tensor  # (B,) float32, 0 or 1, NaN where a raw file has none


def id_columns(schema: Schema) -> dict[str, np.ndarray]:
    """Positions of the categorical columns, by the name of the record's part that holds their ids."""
    types = [next(t for t in ID_TYPES if size - 1 <= np.iinfo(t).max) for size in schema.cardinalities]
    columns = {f"ids_{np.dtype(t).name}": np.flatnonzero([other is t for other in types]) for t in ID_TYPES}
    return {name: positions for name, positions in columns.items() if len(positions)}


def record_dtype(schema: Schema) -> np.dtype:
    """Of a row on disk, little-endian and without gaps."""
    ids = [
        (name, np.dtype(name.removeprefix("ids_")).newbyteorder("<"), len(positions))
        for name, positions in id_columns(schema).items()
    ]
    return np.dtype([*((n, t, (k,)) for n, t, k in ids), ("numeric", "<f4", (len(schema.numeric),)), ("label", "u1")])


class ShardWriter:
    """Writes the rows of one split into `directory`, in order, as shards of up to `shard_rows` rows.

    Nothing is mapped while it is written: a full disk is an OSError and not a signal.
    """

    def __init__(
        self, directory: str | os.PathLike[str], split: str, schema: Schema, shard_rows: int = SHARD_ROWS
    ) -> None:
        """Raises ValueError for an unknown split or a `shard_rows` below 1."""
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        if shard_rows < 1:
            raise ValueError(f"shard_rows: expected at least 1, got {shard_rows}")
        self._directory, self._split, self._shard_rows = Path(directory), split, shard_rows
        self._columns, self._dtype = id_columns(schema), record_dtype(schema)
        self._file: BinaryIO | None = None
        self.rows: list[int] = []
        """How many rows each shard has so far."""

    def append(self, batch: Batch, rows: np.ndarray | slice = slice(None)) -> None:
        """Rows of a batch by their positions, or all. Raises OSError, for a full disk among others, and ValueError for
        a label that is neither 0 nor 1."""
        # By numpy: on rows this few, torch's threads would mostly wait for one another.
        categorical, numeric, label = (part.numpy()[rows] for part in batch)
        if not ((label == 0) | (label == 1)).all():
            raise ValueError("label: expected 0 or 1 in every row")
        records = np.empty(len(label), self._dtype)
        for name, positions in self._columns.items():
            records[name] = categorical[:, positions]
        records["numeric"] = numeric
        records["label"] = label
        while len(records):
            if self._file is None or self.rows[-1] == self._shard_rows:
                self._open_next()
            part, records = np.split(records, [self._shard_rows - self.rows[-1]])
            self._file.write(part.view(np.uint8).data)
            self.rows[-1] += len(part)

    def close(self) -> None:
        """Completes the last shard; all that was appended is on the disk then. Raises OSError."""
        if self._file is None:
            return
        file, self._file = self._file, None
        with file:
            file.seek(0)
            self._write_header(file, self.rows[-1])
            file.flush()
            os.fsync(file.fileno())

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Closes; after an error, without completing the shard."""
        if kind is None:
            self.close()
        elif self._file is not None:
            # A full disk would complain again.
            with contextlib.suppress(OSError):
                self._file.close()

    def _open_next(self) -> None:
        self.close()
        self._file = (self._directory / shard_name(self._split, len(self.rows))).open("wb")
        # The number of rows is known at the end only; every header is as long as that of a full shard.
        self._write_header(self._file, self._shard_rows)
        self.rows.append(0)

    def _write_header(self, file: BinaryIO, rows: int) -> None:
        header = {"descr": np.lib.format.dtype_to_descr(self._dtype), "fortran_order": False, "shape": (rows,)}
        np.lib.format.write_array_header_2_0(file, header)


def shard_name(split: str, index: int) -> str:
    """Of a shard's file."""
    return f"{split}-{index:05d}.npy"


def write_manifest(directory: str | os.PathLike[str], rows: Mapping[str, list[int]]) -> None:
    """Tells how many rows each shard of each split has. Raises OSError."""
    content = {"version": VERSION, **{split: rows[split] for split in SPLITS}}
    write_durably(Path(directory) / MANIFEST_FILE, json.dumps(content).encode())


class Split:
    """The rows of one split of a prepared folder, mapped into memory; copies in other processes map them anew."""

    def __init__(self, directory: str | os.PathLike[str], split: str) -> None:
        """split: "train", "validation" or "test".

        Raises OSError where a file cannot be read, ValueError for an unknown split and files that `prepare` did not
        write.
        """
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        self.directory, self.split = Path(directory), split
        self.schema = Schema.load(directory)
        self._columns, dtype = id_columns(self.schema), record_dtype(self.schema)
        path = self.directory / MANIFEST_FILE
        manifest = read_json(path)
        rows = manifest.get(split)
        if manifest.get("version") != VERSION or not isinstance(rows, list) or any(type(n) is not int for n in rows):
            raise ValueError(f"{path}: expected a list of shards of version {VERSION}, got {manifest}")
        self._shards = [_map(self.directory / shard_name(split, i), dtype, n) for i, n in enumerate(rows)]
        self._starts = np.cumsum([0, *rows])

    def __len__(self) -> int:
        """The number of rows."""
        return int(self._starts[-1])

    def __reduce__(self) -> tuple[type[Split], tuple[Path, str]]:
        return Split, (self.directory, self.split)

    def batch(self, rows: np.ndarray | slice) -> Batch:
        """Copies of the rows at positions 0 to len - 1: a (B,) integer array, in any order, or a slice.

        Raises TypeError for anything else, IndexError for a position out of range.
        """
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            records = self._span(start, stop) if step == 1 else self._gather(np.arange(start, stop, step))
        elif isinstance(rows, np.ndarray) and rows.ndim == 1 and np.issubdtype(rows.dtype, np.integer):
            records = self._gather(rows)
        else:
            got = f"{rows.dtype} array of shape {rows.shape}" if isinstance(rows, np.ndarray) else repr(rows)
            raise TypeError(f"rows: expected a one-dimensional integer array or a slice, got {got}")
        categorical = np.empty((len(records), len(self.schema.categorical)), np.int64)
        for name, positions in self._columns.items():
            categorical[:, positions] = records[name]
        numeric, label = (records[name].astype(np.float32) for name in ("numeric", "label"))
        return Batch(torch.from_numpy(categorical), torch.from_numpy(numeric), torch.from_numpy(label))

    def _span(self, start: int, stop: int) -> np.ndarray:
        parts = [
            shard[max(start - first, 0) : max(stop - first, 0)]
            for shard, first in zip(self._shards, self._starts[:-1], strict=True)
        ]
        parts = [part for part in parts if len(part)]
        return parts[0] if len(parts) == 1 else np.concatenate([*parts, self._empty()])

    def _gather(self, rows: np.ndarray) -> np.ndarray:
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise IndexError(f"rows: expected positions of 0 to {len(self) - 1}, got {rows.min()} to {rows.max()}")
        if len(self._shards) == 1:
            return self._shards[0][rows]
        records = np.empty(len(rows), self._empty().dtype)
        shard_of = np.searchsorted(self._starts, rows, side="right") - 1
        for i in np.unique(shard_of):
            here = np.flatnonzero(shard_of == i)
            records[here] = self._shards[i][rows[here] - self._starts[i]]
        return records

    def _empty(self) -> np.ndarray:
        return np.empty(0, record_dtype(self.schema))


def _map(path: Path, dtype: np.dtype, rows: int) -> np.ndarray:
    """The records of a shard. Raises OSError and ValueError."""
    try:
        shard = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"{path}: expected a whole .npy file: {error}") from None
    if shard.dtype != dtype or shard.shape != (rows,):
        raise ValueError(f"{path}: expected {rows} rows of {dtype}, got {shard.shape} of {shard.dtype}")
    # As a plain array: each slice of a memmap would be a Python object with attributes of its own.
    return np.asarray(shard)
