"""Shards on disk, and the schema beside them."""

from __future__ import annotations

import dataclasses
import json
import pickle
import resource
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoint_fast.clicklog.schema import Schema
from autoint_fast.clicklog.shards import (
    SPLITS,
    Batch,
    ShardWriter,
    Split,
    id_columns,
    record_dtype,
    shard_name,
    write_manifest,
)

SCHEMA = Schema("click", ("a", "b", "c", "d"), ("x", "y"), (2, 70_000, 256, 257))


def draw(rows: int, schema: Schema = SCHEMA) -> Batch:
    """With the largest id of each column, and gaps."""
    ids = [torch.randint(0, size, (rows,)) for size in schema.cardinalities]
    for column, size in zip(ids, schema.cardinalities, strict=True):
        column[:1] = size - 1
    numeric = torch.randn(rows, len(schema.numeric)).masked_fill(torch.rand(rows, len(schema.numeric)) < 0.3, torch.nan)
    categorical = torch.stack(ids, 1) if ids else torch.empty(rows, 0, dtype=torch.int64)
    return Batch(categorical, numeric, torch.randint(0, 2, (rows,)).float())


def write(directory: Path, batches: Sequence[Batch], shard_rows: int, schema: Schema = SCHEMA) -> Split:
    schema.save(directory)
    rows = {}
    for split in SPLITS:
        with ShardWriter(directory, split, schema, shard_rows) as writer:
            for batch in batches if split == "train" else ():
                writer.append(batch)
        rows[split] = writer.rows
    write_manifest(directory, rows)
    return Split(directory, "train")


def assert_same(found: Batch, expected: Batch) -> None:
    assert [part.dtype for part in found] == [torch.int64, torch.float32, torch.float32]
    for got, part in zip(found, expected, strict=True):
        assert got.shape == part.shape and got.is_contiguous()
        torch.testing.assert_close(got, part, rtol=0, atol=0, equal_nan=True)


def take(batch: Batch, rows: object) -> Batch:
    return Batch(*(part[rows] for part in batch))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 9), max_size=5), st.integers(1, 20), st.data())
def test_rows_come_back(tmp_path: Path, sizes: list[int], shard_rows: int, data: st.DataObject) -> None:
    whole = draw(sum(sizes))
    split = write(tmp_path, [Batch(*part) for part in zip(*(t.split(sizes) for t in whole), strict=True)], shard_rows)
    assert len(split) == sum(sizes) and split.schema == SCHEMA
    shards = sorted(path.name for path in tmp_path.glob("train-*.npy"))
    assert shards[: -(-sum(sizes) // shard_rows)] == [
        shard_name("train", i) for i in range(-(-len(split) // shard_rows))
    ]
    assert_same(split.batch(slice(None)), whole)
    part = data.draw(st.slices(len(split)))
    assert_same(split.batch(part), take(whole, list(range(len(split)))[part]))
    if len(split):
        rows = np.array(data.draw(st.lists(st.integers(0, len(split) - 1), max_size=30)), np.int64)
        assert_same(split.batch(rows), take(whole, torch.from_numpy(rows)))


@pytest.mark.parametrize("schema", [Schema("click", (), ("x",), ()), Schema("click", ("a",), (), (5,))])
def test_one_kind_of_fields(tmp_path: Path, schema: Schema) -> None:
    batch = draw(7, schema)
    assert_same(write(tmp_path, [batch], 3, schema).batch(np.arange(7)), batch)


def test_ids_take_what_they_need() -> None:
    assert {name: at.tolist() for name, at in id_columns(SCHEMA).items()} == {
        "ids_uint8": [0, 2],
        "ids_uint16": [3],
        "ids_uint32": [1],
    }
    assert record_dtype(SCHEMA).itemsize == 2 * 1 + 2 + 4 + 2 * 4 + 1


def test_largest_ids(tmp_path: Path) -> None:
    schema = Schema("click", ("a", "b", "c"), (), (1 << 8, 1 << 16, 1 << 32))
    ids = torch.tensor([[(1 << 8) - 1, (1 << 16) - 1, (1 << 32) - 1]])
    batch = Batch(ids, torch.empty(1, 0), torch.ones(1))
    assert_same(write(tmp_path, [batch], 3, schema).batch(slice(None)), batch)


def test_copies_do_not_alias_the_file(tmp_path: Path) -> None:
    split = write(tmp_path, [draw(5)], 10)
    for rows in (slice(None), np.arange(5)):
        before = split.batch(rows)
        for part in split.batch(rows):
            part.fill_(0)
        assert_same(split.batch(rows), before)


def test_a_split_is_pickled_by_its_folder(tmp_path: Path) -> None:
    split = write(tmp_path, [draw(50)], 10)
    content = pickle.dumps(split)
    assert len(content) < 500
    assert_same(pickle.loads(content).batch(slice(None)), split.batch(slice(None)))


@pytest.mark.parametrize("rows", [[0, 1], 3, np.zeros(2), np.zeros((1, 1), np.int64), np.array([True]), None])
def test_rows_of_another_kind(tmp_path: Path, rows: object) -> None:
    with pytest.raises(TypeError, match="rows: expected a one-dimensional integer array or a slice, got "):
        write(tmp_path, [draw(5)], 10).batch(rows)


@pytest.mark.parametrize("rows", [[-1], [5], [0, 1 << 40]])
@pytest.mark.parametrize("shard_rows", [2, 10])
def test_rows_out_of_range(tmp_path: Path, rows: list[int], shard_rows: int) -> None:
    with pytest.raises(IndexError, match="rows: expected positions of 0 to 4, got "):
        write(tmp_path, [draw(5)], shard_rows).batch(np.array(rows))


def test_labels_are_clicks(tmp_path: Path) -> None:
    for label in (0.5, 2.0, float("nan")):
        with pytest.raises(ValueError, match="label: expected 0 or 1 in every row"):
            write(tmp_path, [draw(5)._replace(label=torch.full((5,), label))], 10)


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="split: expected one of train, validation, test, got 'valid'"):
        ShardWriter(tmp_path, "valid", SCHEMA)
    with pytest.raises(ValueError, match="split: expected one of train, validation, test, got 'valid'"):
        Split(tmp_path, "valid")
    with pytest.raises(ValueError, match="shard_rows: expected at least 1, got 0"):
        ShardWriter(tmp_path, "train", SCHEMA, 0)


def test_files_that_do_not_belong(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"schema\.json"):
        Split(tmp_path, "train")
    write(tmp_path, [draw(25)], 10)
    shard = tmp_path / shard_name("train", 2)
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=f"{shard}: expected a whole"):
        Split(tmp_path, "train")
    np.save(shard, np.zeros(5))
    with pytest.raises(ValueError, match=f"{shard}: expected 5 rows of "):
        Split(tmp_path, "train")
    shard.unlink()
    with pytest.raises(OSError, match=f"{shard}"):
        Split(tmp_path, "train")
    shard.write_bytes(whole)
    for manifest in ({"version": 2, "train": [10, 10, 5]}, {"version": 1}, {"version": 1, "train": ["10"]}, []):
        (tmp_path / "shards.json").write_text(json.dumps(manifest))
        with pytest.raises(ValueError, match=r"shards\.json: expected a "):
            Split(tmp_path, "train")


def test_a_shard_that_is_not_closed_is_none(tmp_path: Path) -> None:
    """After an error, its header is not that of the rows in it."""
    SCHEMA.save(tmp_path)
    with pytest.raises(RuntimeError, match="stop"), ShardWriter(tmp_path, "train", SCHEMA, 10) as writer:
        writer.append(draw(5))
        raise RuntimeError("stop")
    write_manifest(tmp_path, {"train": [5], "validation": [], "test": []})
    with pytest.raises(ValueError, match="expected a whole"):
        Split(tmp_path, "train")


def test_a_full_disk_is_an_error(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError), ShardWriter(tmp_path, "train", SCHEMA) as writer:
            for _ in range(100):
                writer.append(draw(100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# --- schema -----------------------------------------------------------------------------------------------------------


def test_schema_comes_back(tmp_path: Path) -> None:
    schema = dataclasses.replace(SCHEMA, label="Klick\n", categorical=tuple("äbcd"), format="csv", transform="none")
    schema.save(tmp_path)
    assert Schema.load(tmp_path) == schema and hash(Schema.load(tmp_path)) == hash(schema)
    assert schema.fields == ("ä", "b", "c", "d", "x", "y")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"label": "a"}, "column 'a': expected one use of a column, got 2"),
        ({"numeric": ("x", "x")}, "column 'x': expected one use of a column, got 2"),
        (
            {"categorical": (), "numeric": (), "cardinalities": ()},
            "expected at least one categorical or numeric column",
        ),
        ({"cardinalities": (1, 2)}, "cardinalities: expected one for each of 4 categorical columns, got 2"),
        ({"cardinalities": (1, 2, 3, 0)}, r"cardinality of 'd': expected an int of 1 to 2\*\*32, got 0"),
        ({"cardinalities": (1, 2, 3, 4.0)}, r"cardinality of 'd': expected an int"),
        ({"format": "tsv"}, "format: expected one of criteo, csv, parquet, got 'tsv'"),
        ({"minimum_count": 0}, "minimum_count: expected an int of at least 1, got 0"),
        ({"minimum_count": True}, "minimum_count: expected an int of at least 1, got True"),
        ({"transform": "log"}, "transform: expected one of log-squared, none, got 'log'"),
    ],
)
def test_schemas_that_do_not_fit(changes: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        dataclasses.replace(SCHEMA, **changes)


@pytest.mark.parametrize("changes", [{"categorical": "abcd"}, {"label": None}, {"numeric": ("x", 1)}])
def test_names_are_text(changes: dict[str, object]) -> None:
    with pytest.raises(TypeError, match="expected "):
        dataclasses.replace(SCHEMA, **changes)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "expected JSON"),
        ("[]", "expected a JSON object, got list"),
        ('{"version": 2}', "expected a schema of version 1, got 2"),
        ('{"version": 1, "label": "click"}', r"expected \['label', "),
    ],
)
def test_files_that_are_no_schemas(tmp_path: Path, content: str, complaint: str) -> None:
    (tmp_path / "schema.json").write_text(content)
    with pytest.raises(ValueError, match=rf"schema\.json: {complaint}"):
        Schema.load(tmp_path)


def test_a_schema_with_a_wrong_value(tmp_path: Path) -> None:
    SCHEMA.save(tmp_path)
    content = json.loads((tmp_path / "schema.json").read_text()) | {"minimum_count": "10"}
    (tmp_path / "schema.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"schema\.json: minimum_count: expected an int"):
        Schema.load(tmp_path)
