"""What the columns of a log are and how they are encoded."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from ..files import write_durably

SCHEMA_FILE = "schema.json"
VERSION = 1
FORMATS = ("criteo", "csv", "parquet")


def _log_squared(x: np.ndarray) -> np.ndarray:
    return np.where(x > 2, np.log(np.maximum(x, 2)) ** 2, x)


# Of float64 to float64, NaN to NaN.
TRANSFORMS: Mapping[str, Callable[[np.ndarray], np.ndarray]] = MappingProxyType(
    {"log-squared": _log_squared, "none": lambda x: x}
)


@dataclass(frozen=True)
class Schema:
    """The columns of a log and their encoding.

    label: name of the column of clicks. categorical, numeric: names of the C and N columns that are the model's fields.
    cardinalities: of the categorical columns, ids 0 to cardinality - 1; id 0 is what is missing or not in the
    vocabulary. format: one of FORMATS, whatever a file is called; None: what its name ends in. minimum_count: how often
    a value came up in the training rows to have an id. transform: of numbers, one of TRANSFORMS; "log-squared" is the
    AutoInt paper's, log(x)^2 for x > 2 (natural logarithm), x below.
    """

    label: str
    categorical: tuple[str, ...]
    numeric: tuple[str, ...]
    cardinalities: tuple[int, ...]
    format: str | None = None
    minimum_count: int = 10
    transform: str = "log-squared"

    def __post_init__(self) -> None:
        """Raises ValueError for what does not fit together, TypeError for other types."""
        for name in ("categorical", "numeric", "cardinalities"):
            if isinstance(getattr(self, name), str):
                raise TypeError(f"{name}: expected a sequence, got {getattr(self, name)!r}")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in (self.label, *self.fields):
            if not isinstance(name, str):
                raise TypeError(f"expected names of columns, got {name!r}")
        columns = (self.label, *self.fields)
        if twice := [name for name in dict.fromkeys(columns) if columns.count(name) > 1]:
            raise ValueError(f"column {twice[0]!r}: expected one use of a column, got {columns.count(twice[0])}")
        if not self.fields:
            raise ValueError("expected at least one categorical or numeric column, got none")
        if len(self.cardinalities) != len(self.categorical):
            raise ValueError(
                f"cardinalities: expected one for each of {len(self.categorical)} categorical columns, "
                f"got {len(self.cardinalities)}"
            )
        for name, cardinality in zip(self.categorical, self.cardinalities, strict=True):
            if type(cardinality) is not int or not 1 <= cardinality <= 1 << 32:
                raise ValueError(f"cardinality of {name!r}: expected an int of 1 to 2**32, got {cardinality!r}")
        if self.format not in (None, *FORMATS):
            raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {self.format!r}")
        if type(self.minimum_count) is not int or self.minimum_count < 1:
            raise ValueError(f"minimum_count: expected an int of at least 1, got {self.minimum_count!r}")
        if self.transform not in TRANSFORMS:
            raise ValueError(f"transform: expected one of {', '.join(TRANSFORMS)}, got {self.transform!r}")

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the model's fields in its order, categorical ones first."""
        return (*self.categorical, *self.numeric)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes schema.json into the folder. Raises OSError."""
        content = {"version": VERSION, **asdict(self)}
        write_durably(Path(directory) / SCHEMA_FILE, json.dumps(content, indent=1, ensure_ascii=False).encode())

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> Schema:
        """Of a folder with a schema.json. Raises OSError where there is none, ValueError for another content."""
        path = Path(directory) / SCHEMA_FILE
        content = read_json(path)
        version = content.pop("version", None)
        if version != VERSION:
            raise ValueError(f"{path}: expected a schema of version {VERSION}, got {version!r}")
        if set(content) != {field.name for field in fields(cls)}:
            raise ValueError(f"{path}: expected {[field.name for field in fields(cls)]}, got {list(content)}")
        try:
            return cls(**content)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises OSError, and ValueError for a file that holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content
