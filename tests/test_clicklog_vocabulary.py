"""Counting values, and the ids that they get."""

from __future__ import annotations

import collections
import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoint_fast.clicklog.vocabulary import LONGEST, Counter, Vocabulary, hash_values, mix

ALL = (1 << 64) - 1


def mix_one(x: int) -> int:
    """The finaliser of SplitMix64, in whole numbers."""
    x = (x + 0x9E3779B97F4A7C15) & ALL
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & ALL
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & ALL
    return x ^ (x >> 31)


def hash_one(value: bytes) -> int:
    if len(value) > LONGEST:
        return int.from_bytes(hashlib.blake2b(value, digest_size=8).digest(), "little")
    result = mix_one(len(value))
    for start in range(0, len(value), 8):
        result = mix_one(result ^ int.from_bytes(value[start : start + 8], "little"))
    return result


@given(st.lists(st.binary(max_size=40)), st.integers(0, 3))
def test_hashes(values: list[bytes], offset: int) -> None:
    values = [*values, b"x" * LONGEST, b"x" * (LONGEST + 1), b"", b"12345678", b"123456789"]
    found = hash_values(pa.array(values, pa.binary())[offset:])
    assert found.dtype == np.uint64 and found.tolist() == [hash_one(value) for value in values[offset:]]


def test_hashes_stay_what_they_are() -> None:
    """Vocabularies on disk and splits hang on them."""
    found = hash_values(pa.array([b"", b"68fd1e64", b"autoint_fast"], pa.binary()))
    assert [f"{value:016x}" for value in found] == ["e220a8397b1dcdaf", "afd2ea734b8e1a17", "278226ae1d0cfdcc"]


def test_equal_lengths_of_eight_bytes_never_collide() -> None:
    """mix is a bijection: here over all numbers of 16 bits, in each of four places."""
    for shift in (0, 16, 32, 48):
        numbers = np.arange(1 << 16, dtype=np.uint64) << np.uint64(shift)
        assert len(np.unique(mix(numbers))) == len(numbers)


counted = st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 60), max_size=30)), max_size=40)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(counted, st.sampled_from([1, 100, 1000, 1 << 30]), st.booleans())
def test_counts(tmp_path: Path, chunks: list[tuple[int, list[int]]], limit: int, spread: bool) -> None:
    """Whatever the memory, each key is counted once, in ascending order."""
    counter, expected = Counter(3, tmp_path, limit), [collections.Counter() for _ in range(3)]
    for column, numbers in chunks:
        keys = np.array(numbers, np.uint64)
        keys = mix(keys) if spread else keys
        counts = np.arange(1, len(keys) + 1)
        counter.add(column, keys, counts)
        for key, n in zip(keys.tolist(), counts.tolist(), strict=True):
            expected[column][key] += n
    for column in range(3):
        parts = list(counter.merged(column))
        keys, counts = (np.concatenate(part) for part in zip(*parts, strict=True)) if parts else ([], [])
        assert list(zip(keys, counts, strict=True)) == sorted(expected[column].items())
    if limit == 1 and sum(len(numbers) for _, numbers in chunks):
        assert any(path.is_file() for path in tmp_path.rglob("*"))


def test_memory_is_kept_to(tmp_path: Path) -> None:
    limit, draw = 1 << 18, np.random.default_rng(0)
    counter = Counter(2, tmp_path, limit)
    every = []
    for _ in range(100):
        for column in range(2):
            keys = np.unique(draw.integers(0, 1 << 63, 1000, dtype=np.uint64))
            every.append((column, keys))
            counter.add(column, keys, np.ones(len(keys), np.int64))
    assert counter.peak_bytes < 3 * limit
    for column in range(2):
        parts = [keys for keys, _ in counter.merged(column)]
        assert max(map(len, parts)) * 16 < limit
        expected = np.unique(np.concatenate([keys for at, keys in every if at == column]))
        np.testing.assert_array_equal(np.concatenate(parts), expected)


def vocabulary(tmp_path: Path, values: dict[bytes, int], minimum_count: int = 2) -> Vocabulary:
    counter = Counter(1, tmp_path)
    counter.add(0, hash_values(pa.array(list(values), pa.binary())), np.array(list(values.values()), np.int64))
    found, distinct = Vocabulary.of(counter, 1, minimum_count)
    assert distinct == [len(values)]
    return found


def ids(found: Vocabulary, *values: bytes) -> list[int]:
    return found.ids(0, hash_values(pa.array(values, pa.binary()))).tolist()


def test_ids_go_by_count(tmp_path: Path) -> None:
    found = vocabulary(tmp_path, {b"a": 2, b"b": 9, b"c": 1, b"d": 5})
    assert found.cardinalities == (4,)
    assert ids(found, b"a", b"b", b"c", b"d", b"e", b"") == [3, 1, 0, 2, 0, 0]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations(range(8)))
def test_ties_do_not_go_by_order(tmp_path: Path, order: list[int]) -> None:
    names = [bytes([65 + i]) for i in range(8)]
    counts = np.array([5, 5, 5, 5, 7, 7, 1, 2])
    hashes = hash_values(pa.array(names, pa.binary()))
    results = []
    for permutation in (range(8), order):
        counter = Counter(1, tmp_path)
        counter.add(0, hashes[list(permutation)], counts[list(permutation)])
        results.append(ids(Vocabulary.of(counter, 1, 2)[0], *names))
    assert results[0] == results[1] and sorted(results[0]) == [0, 1, 2, 3, 4, 5, 6, 7]


def test_nothing_is_frequent(tmp_path: Path) -> None:
    found = vocabulary(tmp_path, {b"a": 1})
    assert found.cardinalities == (1,) and ids(found, b"a", b"b") == [0, 0]
    found = vocabulary(tmp_path, {})
    assert found.cardinalities == (1,) and ids(found, b"a") == [0]


def test_saved_and_loaded(tmp_path: Path) -> None:
    found = vocabulary(tmp_path, {b"a": 2, b"\xff": 9, b"d": 5})
    found.save(tmp_path, ["site"], [pa.array([b"\xff", b"d", b"a"], pa.binary())])
    table = pq.read_table(tmp_path / "vocabulary.parquet").to_pylist()
    assert table[0] == {"field": "site", "id": 1, "value": b"\xff", "count": 9} and len(table) == 3
    loaded = Vocabulary.load(tmp_path, ["site"])
    assert loaded.cardinalities == (4,) and loaded.counts[0].tolist() == [9, 5, 2]
    assert ids(loaded, b"a", b"\xff", b"d", b"e") == [3, 1, 2, 0]
    assert Vocabulary.load(tmp_path, ["other"]).cardinalities == (1,)


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([("a", 1), ("b", 3)], "expected the ids 1 to 2 for 'site', in order"),
        ([("a", 2), ("b", 1)], "expected the ids 1 to 2 for 'site', in order"),
        ([("a", 1), ("a", 2)], "expected each value of 'site' once"),
    ],
)
def test_other_vocabularies_are_refused(tmp_path: Path, rows: list[tuple[str, int]], complaint: str) -> None:
    content = [{"field": "site", "id": id, "value": value.encode(), "count": 1} for value, id in rows]
    pq.write_table(pa.Table.from_pylist(content), tmp_path / "vocabulary.parquet")
    with pytest.raises(ValueError, match=f"{tmp_path}/vocabulary.parquet: expected a vocabulary: {complaint}"):
        Vocabulary.load(tmp_path, ["site"])


def test_no_vocabulary(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="vocabulary"):
        Vocabulary.load(tmp_path, ["site"])
    (tmp_path / "vocabulary.parquet").write_bytes(b"no Parquet")
    with pytest.raises(ValueError, match="expected a vocabulary"):
        Vocabulary.load(tmp_path, ["site"])
    pq.write_table(pa.table({"field": ["site"]}), tmp_path / "vocabulary.parquet")
    with pytest.raises(ValueError, match="expected a vocabulary"):
        Vocabulary.load(tmp_path, ["site"])
