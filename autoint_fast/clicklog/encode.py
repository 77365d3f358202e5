"""Raw rows as ids and numbers: what a model is trained on and what it predicts from are encoded here, both."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from .reader import Columns, Malformed, Rows, check_files, read
from .schema import SCHEMA_FILE, TRANSFORMS, Schema
from .shards import Batch
from .vocabulary import VOCABULARY_FILE, Vocabulary

T = TypeVar("T")


class Encoder:
    """Encodes raw files as `prepare` encoded those that the vocabulary is of."""

    FILES = (SCHEMA_FILE, VOCABULARY_FILE)
    """What it consists of, in a prepared folder and wherever it was copied."""

    def __init__(self, schema: Schema, vocabulary: Vocabulary) -> None:
        """Raises ValueError where the two are not of the same log."""
        if schema.cardinalities != vocabulary.cardinalities:
            raise ValueError(
                f"vocabulary: expected the schema's {schema.cardinalities} ids, got {vocabulary.cardinalities}"
            )
        self.schema, self.vocabulary = schema, vocabulary

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Encoder:
        """Of a prepared folder, or one that it was copied to. Raises OSError and ValueError."""
        schema = Schema.load(directory)
        try:
            return cls(schema, Vocabulary.load(directory, schema.categorical))
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from None

    @classmethod
    def copy(cls, source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
        """Copies the files of an encoder from one folder into another. Raises OSError."""
        for name in cls.FILES:
            shutil.copyfile(Path(source) / name, Path(target) / name)

    def batches(
        self, files: Sequence[str | os.PathLike[str]], batch_size: int, *, format: str | None = None
    ) -> Iterator[Batch]:
        """All rows of raw files, in order, `batch_size` at a time (the last ones: what is left), in constant memory.

        format: "criteo", "csv" or "parquet"; None: the schema's, or else what the names end in. A label may be missing,
        in all rows or in some; Criteo's format has 39 columns then. Raises OSError where a file cannot be read,
        ValueError for one that is no such log or lacks a column, and for the first malformed row: a prediction for
        each row is what they are read for.
        """
        check_files(files)
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        columns = Columns(self.schema.label, self.schema.categorical, self.schema.numeric)
        rest: list[Batch] = []
        for rows in ahead(
            rows
            for path in files
            for rows in read(
                path, columns, Malformed(strict=True), format=format or self.schema.format, label_required=False
            )
        ):
            rest.append(self.encode(rows))
            if sum(len(part.label) for part in rest) >= batch_size:
                *full, last = _split(rest, batch_size)
                yield from full
                rest = [last]
        if rest:
            yield from _split(rest, batch_size)

    def encode(self, rows: Rows) -> Batch:
        """Of n raw rows, in their order."""
        return self.assemble(rows, self.lookup(rows))

    def lookup(self, rows: Rows) -> list[np.ndarray]:
        """Per categorical column (d,) int64: the id of each of its distinct values."""
        return [self.vocabulary.ids(i, column.hashes) for i, column in enumerate(rows.categorical)]

    def assemble(self, rows: Rows, ids: Sequence[np.ndarray]) -> Batch:
        """Of n raw rows, in their order. ids: as `lookup` gives them."""
        categorical = np.empty((len(rows), len(ids)), np.int64)
        for i, (column, of_value) in enumerate(zip(rows.categorical, ids, strict=True)):
            # The last is what a code of -1 finds.
            categorical[:, i] = np.append(of_value, 0)[column.codes]
        numeric = TRANSFORMS[self.schema.transform](rows.numeric).astype(np.float32)
        label = rows.label.astype(np.float32)
        return Batch(torch.from_numpy(categorical), torch.from_numpy(numeric), torch.from_numpy(label))


def _split(parts: Sequence[Batch], size: int) -> list[Batch]:
    """The same rows, `size` at a time and the rest."""
    whole = Batch(*(torch.cat(part) for part in zip(*parts, strict=True)))
    return [Batch(*part) for part in zip(*(part.split(size) for part in whole), strict=True)]


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each computed on another thread while the one before is used."""
    end = object()

    def following() -> T | object:
        return next(items, end)

    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(following)
        while (item := future.result()) is not end:
            future = thread.submit(following)
            yield item
