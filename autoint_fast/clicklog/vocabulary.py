"""Which values of a categorical column have an id: counting distinct values of a log larger than memory, and looking
them up.

A value is known by a 64-bit hash while it is counted: two values of one column share it with a probability of 3e-6 for
ten million values, and never where all values have the same length of up to eight bytes, as Criteo's.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

VOCABULARY_FILE = "vocabulary.parquet"

# Longer values are digested first, so that no single one is walked word by word.
LONGEST = 256
WORD = 8
# Of the first 0 to 8 bytes of a little-endian word.
MASKS = np.array([(1 << 8 * n) - 1 for n in range(WORD + 1)], np.uint64)
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 whose every output bit depends on every input bit (the finaliser of SplitMix64)."""
    x = x + GOLDEN
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_values(values: pa.Array) -> np.ndarray:
    """(n,) uint64 of a binary array without nulls; the same on every machine and in every version."""
    if not len(values):
        return np.empty(0, np.uint64)
    offsets = np.frombuffer(values.buffers()[1], np.int32)[values.offset : values.offset + len(values) + 1]
    content = values.buffers()[2]
    data = np.frombuffer(content, np.uint8)[: offsets[-1]] if content else np.empty(0, np.uint8)
    # Words are read beyond the last value's end.
    windows = np.lib.stride_tricks.sliding_window_view(np.append(data, np.zeros(WORD, np.uint8)), WORD)
    starts, lengths = offsets[:-1], np.diff(offsets)
    hashes = mix(lengths.astype(np.uint64))
    for start in range(0, min(int(lengths.max()), LONGEST), WORD):
        here = np.flatnonzero((lengths > start) & (lengths <= LONGEST))
        words = windows[starts[here] + start].view("<u8")[:, 0]
        hashes[here] = mix(hashes[here] ^ (words & MASKS[np.minimum(lengths[here] - start, WORD)]))
    for i in np.flatnonzero(lengths > LONGEST):
        digest = hashlib.blake2b(data[starts[i] : offsets[i + 1]].tobytes(), digest_size=WORD).digest()
        hashes[i] = int.from_bytes(digest, "little")
    return hashes


class Counter:
    """How often each 64-bit key was seen, for several columns.

    Keys are kept sorted, 16 bytes each with their counts, and new ones are merged in when they are half as many. Where
    all columns together take more than `limit` bytes, they go to files in `folder` as sorted runs, which are merged
    range by range in the end.
    """

    def __init__(self, columns: int, folder: str | os.PathLike[str], limit: int = 2 << 30) -> None:
        self._folder, self._limit = Path(tempfile.mkdtemp(dir=folder)), limit
        self._tables = [_Table() for _ in range(columns)]
        self._runs: list[list[Path]] = [[] for _ in range(columns)]
        self.peak_bytes = 0
        """The most that tables and one merge took at a time."""

    def add(self, column: int, keys: np.ndarray, counts: np.ndarray) -> None:
        """Counts (n,) uint64 keys, in any order, (n,) int64 times each. Raises OSError where the disk is full."""
        table = self._tables[column]
        table.add(keys, counts)
        used = sum(table.nbytes for table in self._tables)
        if table.overdue or used > self._limit:
            self.peak_bytes = max(self.peak_bytes, used + 2 * table.nbytes)
            table.merge()
        if used > self._limit and sum(table.nbytes for table in self._tables) > self._limit // 2:
            self._spill()

    def merged(self, column: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All keys, in ascending order and each once, with their counts, range by range. Raises OSError."""
        table = self._tables[column]
        table.merge()
        runs = [*map(_run, self._runs[column]), (table.keys, table.counts)]
        if len(runs) == 1:
            yield runs[0]
            return
        # Of a range, in keys: what is merged and its copies stay below the limit.
        size = max(self._limit // 64, 1)
        step = max(size // len(runs), 1)
        bounds = np.sort(np.concatenate([keys[::step] for keys, _ in runs]))[:: len(runs)]
        places = [[0, *np.searchsorted(keys, bounds), len(keys)] for keys, _ in runs]
        for i in range(len(bounds) + 1):
            parts = [slice(at[i], at[i + 1]) for at in places]
            keys, counts = merge(
                [keys[part] for (keys, _), part in zip(runs, parts, strict=True)],
                [counts[part] for (_, counts), part in zip(runs, parts, strict=True)],
            )
            if len(keys):
                yield keys, counts

    def _spill(self) -> None:
        for table, runs in zip(self._tables, self._runs, strict=True):
            table.merge()
            if len(table.keys):
                handle, path = tempfile.mkstemp(dir=self._folder)
                with open(handle, "wb") as file:
                    file.write(table.keys.data)
                    file.write(table.counts.data)
                runs.append(Path(path))
                table.clear()


def _run(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Keys and counts in a file, mapped."""
    keys, counts = np.memmap(path, np.uint64, "r").reshape(2, -1)
    return np.asarray(keys), np.asarray(counts).view(np.int64)


class _Table:
    """Sorted keys with their counts, and what has not been merged into them yet."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.keys, self.counts = np.empty(0, np.uint64), np.empty(0, np.int64)
        self._new: list[tuple[np.ndarray, np.ndarray]] = []
        self._n_new = 0

    @property
    def nbytes(self) -> int:
        return 16 * (len(self.keys) + self._n_new)

    @property
    def overdue(self) -> bool:
        return self._n_new > max(len(self.keys) // 2, 1 << 16)

    def add(self, keys: np.ndarray, counts: np.ndarray) -> None:
        self._new.append((keys, counts))
        self._n_new += len(keys)

    def merge(self) -> None:
        if self._new:
            new, self._new, self._n_new = [(self.keys, self.counts), *self._new], [], 0
            self.keys, self.counts = merge([keys for keys, _ in new], [counts for _, counts in new])


def merge(keys: Sequence[np.ndarray], counts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """All keys, in ascending order and each once, and the sums of their counts; copies take twice what these do."""
    all_keys = np.concatenate(keys)
    order = np.argsort(all_keys)
    all_keys = all_keys[order]
    all_counts = np.concatenate(counts)
    all_counts = all_counts[order]
    del order
    first = np.flatnonzero(np.append(True, all_keys[1:] != all_keys[:-1])[: len(all_keys)])
    if len(first) == len(all_keys):
        return all_keys, all_counts
    return all_keys[first], np.add.reduceat(all_counts, first)


class Vocabulary:
    """The values of each categorical column that have an id: 1 is the most frequent, ties go by hash."""

    def __init__(self, hashes: Sequence[np.ndarray], counts: Sequence[np.ndarray]) -> None:
        """hashes: per column (n,) uint64, of the values with ids 1 to n. counts: (n,) int64, how often each came up."""
        orders = [np.argsort(column) for column in hashes]
        self._hashes = [column[order] for column, order in zip(hashes, orders, strict=True)]
        # The last one is for what would be sorted behind the last hash.
        self._ids = [np.append(order + 1, 0) for order in orders]
        self.counts = counts

    @classmethod
    def of(cls, counter: Counter, columns: int, minimum_count: int) -> tuple[Vocabulary, list[int]]:
        """What came up at least so often, and how many distinct values each column has. Raises OSError."""
        hashes, counts, distinct = [], [], []
        for column in range(columns):
            frequent, total = [], 0
            for keys, n in counter.merged(column):
                total += len(keys)
                enough = n >= minimum_count
                frequent.append((keys[enough], n[enough]))
            keys, n = (np.concatenate(part) for part in zip(*frequent, strict=True))
            order = np.lexsort((keys, -n))
            hashes.append(keys[order])
            counts.append(n[order])
            distinct.append(total)
        return cls(hashes, counts), distinct

    @property
    def cardinalities(self) -> tuple[int, ...]:
        """Per column the number of ids, 0 counted in."""
        return tuple(len(counts) + 1 for counts in self.counts)

    def equals(self, other: Vocabulary) -> bool:
        """Whether both give every value the same id, and count it alike: then they are of the same training rows."""
        mine, theirs = ((*v._hashes, *v._ids, *v.counts) for v in (self, other))
        return len(mine) == len(theirs) and all(map(np.array_equal, mine, theirs))

    def ids(self, column: int, hashes: np.ndarray) -> np.ndarray:
        """(n,) int64: the ids of values by their hashes, 0 for what has none."""
        known = self._hashes[column]
        if not len(known):
            return np.zeros(len(hashes), np.int64)
        at = np.searchsorted(known, hashes)
        found = known[np.minimum(at, len(known) - 1)] == hashes
        return np.where(found, self._ids[column][at], 0)

    def save(self, directory: str | os.PathLike[str], names: Sequence[str], values: Sequence[pa.Array]) -> None:
        """Writes vocabulary.parquet: columns field, id, value, count.

        names: of the columns. values: per column the binary values of the ids 1 to n. Raises OSError.
        """
        fields = pa.schema([("field", pa.string()), ("id", pa.int64()), ("value", pa.binary()), ("count", pa.int64())])
        path = Path(directory) / VOCABULARY_FILE
        with path.open("wb") as file:
            with pq.ParquetWriter(file, fields, compression="zstd") as writer:
                for name, column, counts in zip(names, values, self.counts, strict=True):
                    n = len(counts)
                    arrays = [pa.repeat(name, n), pa.array(np.arange(1, n + 1)), column, pa.array(counts)]
                    writer.write_table(pa.table(arrays, schema=fields))
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def load(cls, directory: str | os.PathLike[str], names: Sequence[str]) -> Vocabulary:
        """Of a folder with a vocabulary.parquet for these columns. Raises OSError, ValueError for another content."""
        path = Path(directory) / VOCABULARY_FILE
        try:
            table = pq.read_table(path, columns=["field", "id", "value", "count"])
            hashes, counts = [], []
            fields = table["field"].dictionary_encode().combine_chunks()
            for name in names:
                part = table.filter(pc.equal(fields, name))
                if not pc.equal(part["id"], pa.array(np.arange(1, len(part) + 1))).to_numpy().all():
                    raise ValueError(f"expected the ids 1 to {len(part)} for {name!r}, in order")
                hashes.append(hash_values(part["value"].combine_chunks()))
                counts.append(part["count"].to_numpy())
                if len(np.unique(hashes[-1])) < len(part):
                    raise ValueError(f"expected each value of {name!r} once")
        except (pa.ArrowException, ValueError) as error:
            raise ValueError(f"{path}: expected a vocabulary: {error}") from None
        return cls(hashes, counts)
