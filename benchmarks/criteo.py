"""Rows of the Criteo display-advertising log, embedded as AutoInt embeds them."""

from __future__ import annotations

import functools
import re
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor

NUMERIC = 13
CATEGORICAL = 26
FIELDS = NUMERIC + CATEGORICAL
# The whole log has 45 million rows; this is more than the largest batch, and seconds of reading.
MOST_ROWS = 100_000

# Of trained embeddings, about: numbers then reach logits that matter, without drowning the categories.
EMBEDDING_STD = 0.1


class CriteoError(ValueError):
    """A file that is no Criteo log; the message has its name and the number of the line."""


class Rows(NamedTuple):
    """N rows of the log, without their labels."""

    numeric: Tensor  # [N, 13] fp64, NaN where missing
    categorical: Tensor  # [N, 26] int64, the 32-bit hashes, -1 where missing


def read(path: str, most: int = MOST_ROWS) -> Rows:
    """The first `most` rows of a log.

    A row is a label, 13 integers and 26 hashes of eight hexadecimal digits, tabs between, empty where
    missing. Raises CriteoError for a malformed row or a file without any, OSError as `open` does.
    """
    numeric, categorical = [], []
    with open(path, encoding="ascii", errors="replace", newline="\n") as file:
        for number, line in enumerate(islice(file, most), start=1):
            try:
                integers, hashes = _parse(line.rstrip("\r\n").split("\t"))
            except ValueError as error:
                raise CriteoError(f"{path}, line {number}: {error}") from None
            numeric.append(integers)
            categorical.append(hashes)
    if not numeric:
        raise CriteoError(f"{path}, line 1: expected rows of a Criteo log, got an empty file")
    return Rows(torch.tensor(numeric, dtype=torch.float64), torch.tensor(categorical))


def _parse(columns: list[str]) -> tuple[list[float], list[int]]:
    if len(columns) != 1 + FIELDS:
        raise ValueError(f"expected {1 + FIELDS} tab-separated columns, got {len(columns)}")
    label, numeric, categorical = columns[0], columns[1 : 1 + NUMERIC], columns[1 + NUMERIC :]
    if label not in ("0", "1"):
        raise ValueError(f"expected a label of 0 or 1, got {label[:40]!r}")
    for column, text in enumerate(numeric, start=2):
        if text and not re.fullmatch(r"-?\d{1,18}", text, re.ASCII):
            raise ValueError(f"expected an integer or nothing in column {column}, got {text[:40]!r}")
    for column, text in enumerate(categorical, start=2 + NUMERIC):
        if text and not re.fullmatch(r"[0-9a-fA-F]{8}", text):
            raise ValueError(f"expected eight hexadecimal digits or nothing in column {column}, got {text[:40]!r}")
    return (
        [float(text) if text else float("nan") for text in numeric],
        [int(text, 16) if text else -1 for text in categorical],
    )


def embed(rows: Rows, emb_size: int) -> Tensor:
    """x (N, 39, emb_size), fp32, from tables drawn with a fixed seed: 13 numeric fields, then 26 categorical.

    A number z is the vector of its field times log(1 + |z|), with z's sign; a category has a row of its own
    in the table of its field; and so has what is missing, in fields of either kind.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(vectors: int) -> Tensor:
        return torch.randn(vectors, emb_size, generator=generator) * EMBEDDING_STD

    field, missing = draw(NUMERIC), draw(NUMERIC)
    z = rows.numeric.unsqueeze(2)
    value = z.sign() * z.abs().log1p()
    numeric = torch.where(value.isnan(), missing, value.float().nan_to_num() * field)
    # One vocabulary for all fields: the same hash in two columns is two categories.
    keys = rows.categorical + torch.arange(CATEGORICAL) * (1 << 33)
    vocabulary, ids = keys.unique(return_inverse=True)
    return torch.cat([numeric, draw(len(vocabulary))[ids]], dim=1)


@functools.lru_cache(maxsize=1)
def load(path: str, emb_size: int) -> Tensor:
    """`embed` of `read`."""
    return embed(read(path), emb_size)
