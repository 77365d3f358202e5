"""From raw logs to prepared folders, and the same encoding of raw files later."""

from __future__ import annotations

import argparse
import collections
import errno
import math
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch

from autoint_fast.clicklog import prepare as module
from autoint_fast.clicklog import reader, vocabulary
from autoint_fast.clicklog.encode import Encoder, ahead
from autoint_fast.clicklog.prepare import Report, add_arguments, prepare
from autoint_fast.clicklog.reader import CRITEO, CRITEO_CATEGORICAL, CRITEO_NUMERIC, Columns, Malformed, read
from autoint_fast.clicklog.schema import Schema
from autoint_fast.clicklog.shards import SPLITS, Batch, Split

from .clicklogs import compress, criteo_line, draw_log, write_lines

ROOT = Path(__file__).parent.parent
ROWS = 1000


@pytest.fixture(scope="module")
def lines() -> list[str]:
    return draw_log(ROWS)


@pytest.fixture
def log(tmp_path: Path, lines: list[str]) -> Path:
    return write_lines(tmp_path / "log.tsv", lines)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def everything(folder: Path) -> dict[str, Batch]:
    return {split: Split(folder, split).batch(slice(None)) for split in SPLITS}


def assert_same(found: Batch, expected: Batch) -> None:
    for got, part in zip(found, expected, strict=True):
        torch.testing.assert_close(got, part, rtol=0, atol=0, equal_nan=True)


def take(batch: Batch, rows: object) -> Batch:
    return Batch(*(part[rows] for part in batch))


def together(batches: Sequence[Batch]) -> Batch:
    return Batch(*(torch.cat(part) for part in zip(*batches, strict=True)))


def by_hand(lines: Sequence[str], train: Sequence[str], minimum_count: int) -> Batch:
    """Rows of Criteo's format, encoded by a vocabulary of `train`, in plain Python."""
    rows, training = [line.split("\t") for line in lines], [line.split("\t") for line in train]
    ids = []
    for column in range(14, 40):
        counts = collections.Counter(row[column] for row in training if row[column])
        frequent = [value for value, count in counts.items() if count >= minimum_count]
        hashes = vocabulary.hash_values(pa.array([value.encode() for value in frequent], pa.binary()))
        order = sorted(zip([-counts[value] for value in frequent], hashes.tolist(), frequent, strict=True))
        known = {value: i for i, (_, _, value) in enumerate(order, start=1)}
        ids.append([known.get(row[column], 0) for row in rows])

    def number(text: str) -> float:
        x = float(text) if text else math.nan
        return math.log(x) ** 2 if x > 2 else x

    numeric = [[number(text) for text in row[1:14]] for row in rows]
    return Batch(torch.tensor(ids).T, torch.tensor(numeric), torch.tensor([float(row[0]) for row in rows]))


# --- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("minimum_count", [1, 3, 10])
def test_rows_are_what_they_are_by_hand(tmp_path: Path, log: Path, lines: list[str], minimum_count: int) -> None:
    report = prepare([log], tmp_path / "out", split="order", minimum_count=minimum_count, shard_rows=300)
    assert report.rows == {"train": 800, "validation": 100, "test": 100} and not report.malformed
    expected = by_hand(lines, lines[:800], minimum_count)
    for split, part in (("train", slice(800)), ("validation", slice(800, 900)), ("test", slice(900, None))):
        found = Split(tmp_path / "out", split)
        assert found.schema == report.schema
        batch = found.batch(slice(None))
        assert torch.equal(batch.categorical, expected.categorical[part]) and torch.equal(
            batch.label, expected.label[part]
        )
        torch.testing.assert_close(batch.numeric, expected.numeric[part], rtol=1e-6, atol=0, equal_nan=True)
    sizes = [int(column.max()) + 1 for column in expected.categorical[:800].T]
    assert report.schema.cardinalities == tuple(sizes)
    assert report.schema.fields == (*CRITEO_CATEGORICAL, *CRITEO_NUMERIC)
    assert report.distinct[25] == len({line.split("\t")[39] for line in lines[:800]} - {""})


def test_minimum_count_is_ten(tmp_path: Path, log: Path) -> None:
    assert prepare([log], tmp_path / "out").schema.minimum_count == 10
    counts = pq.read_table(tmp_path / "out" / "vocabulary.parquet")["count"].to_numpy()
    assert counts.min() == 10


def test_transforms(tmp_path: Path) -> None:
    numbers = ["-3", "0", "1", "2", "2.5", "3", "1000000", "", "1e30"]
    path = write_lines(tmp_path / "log.tsv", [criteo_line("1", [n], [str(i)]) for n in numbers for i in range(30)])
    prepare([path], tmp_path / "a", minimum_count=1)
    prepare([path], tmp_path / "b", minimum_count=1, transform="none")
    for folder, transform in (("a", lambda x: math.log(x) ** 2 if x > 2 else x), ("b", lambda x: x)):
        found = {float(x) for batch in everything(tmp_path / folder).values() for x in batch.numeric[:, 0]}
        expected = {float(np.float32(transform(float(n)))) for n in numbers if n}
        assert {x for x in found if x == x} == expected and len(found) > len(expected)


def test_values_are_kept_with_their_ids(tmp_path: Path, log: Path, lines: list[str]) -> None:
    prepare([log], tmp_path / "out", split="order", minimum_count=2)
    table = pq.read_table(tmp_path / "out" / "vocabulary.parquet").to_pylist()
    counts = collections.Counter(line.split("\t")[20] for line in lines[:800])
    rows = [row for row in table if row["field"] == "C7"]
    assert {row["value"].decode(): row["count"] for row in rows} == {
        value: n for value, n in counts.items() if n >= 2 and value
    }
    assert [row["id"] for row in rows] == list(range(1, len(rows) + 1))
    assert [row["count"] for row in rows] == sorted((row["count"] for row in rows), reverse=True)


def test_one_kind_of_fields(tmp_path: Path, log: Path) -> None:
    assert prepare([log], tmp_path / "a", categorical=["C3", "C9"]).schema.fields == ("C3", "C9")
    assert prepare([log], tmp_path / "b", numeric=["I2"]).schema.fields == ("I2",)
    assert Split(tmp_path / "b", "train").batch(slice(3)).categorical.shape == (3, 0)
    assert Encoder.load(tmp_path / "b").schema.cardinalities == ()


# --- the same whatever the chunks, files and formats ------------------------------------------------------------------


def test_chunks_memory_and_shards_do_not_matter(
    tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    expected = prepare([log], tmp_path / "a", minimum_count=2)
    monkeypatch.setattr(reader, "CHUNK_BYTES", 1 << 13)
    small = prepare([log], tmp_path / "b", minimum_count=2, memory=1, shard_rows=7)
    assert small.schema == expected.schema and small.distinct == expected.distinct
    for split, batch in everything(tmp_path / "a").items():
        assert_same(Split(tmp_path / "b", split).batch(slice(None)), batch)
    name = "vocabulary.parquet"
    assert pq.read_table(tmp_path / "a" / name) == pq.read_table(tmp_path / "b" / name)


def test_two_runs_write_the_same_bytes(tmp_path: Path, log: Path) -> None:
    prepare([log], tmp_path / "a")
    prepare([log], tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def rows_of(batch: Batch) -> collections.Counter[tuple[float, ...]]:
    every = torch.cat((batch.categorical, batch.numeric.nan_to_num(-99.0), batch.label[:, None]), 1)
    return collections.Counter(tuple(row) for row in every.tolist())


def test_the_order_of_files_does_not_matter_to_hashes(tmp_path: Path, lines: list[str]) -> None:
    parts = [write_lines(tmp_path / f"{i}.tsv", lines[i * 300 : (i + 1) * 300]) for i in range(4)]
    prepare(parts, tmp_path / "a", minimum_count=2)
    prepare(parts[::-1], tmp_path / "b", minimum_count=2)
    assert Schema.load(tmp_path / "a") == Schema.load(tmp_path / "b")
    assert (tmp_path / "a" / "vocabulary.parquet").read_bytes() == (tmp_path / "b" / "vocabulary.parquet").read_bytes()
    for split in SPLITS:
        one, two = (Split(tmp_path / name, split).batch(slice(None)) for name in "ab")
        assert rows_of(one) == rows_of(two)


def as_table(lines: Sequence[str]) -> pa.Table:
    columns = zip(*(line.split("\t") for line in lines), strict=True)
    table = {name: [value or None for value in column] for name, column in zip(CRITEO, columns, strict=True)}
    return pa.table(table)


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("format", ["criteo", "csv", "parquet"])
def test_formats_do_not_matter(tmp_path: Path, log: Path, lines: list[str], format: str, compression: str) -> None:
    expected = prepare([log], tmp_path / "a")
    table, path = as_table(lines), tmp_path / f"log.{'tsv' if format == 'criteo' else format}{compression}"
    if format == "parquet":
        path = tmp_path / "log.parquet"
        typed = {
            name: table[name].cast(pa.int64() if name in ("label", *CRITEO_NUMERIC) else pa.string()) for name in CRITEO
        }
        pq.write_table(pa.table(typed), path, compression={"": "none", ".gz": "gzip", ".zst": "zstd"}[compression])
    elif format == "csv":
        # In another order, and with a column of no use.
        sink = pa.BufferOutputStream()
        pa.csv.write_csv(table.append_column("note", pa.array(["a,\n"] * ROWS)).select([*CRITEO[::-1], "note"]), sink)
        path.write_bytes(compress(sink.getvalue().to_pybytes(), compression))
    else:
        path.write_bytes(compress("\r\n".join(lines).encode(), compression))
    fields = {} if format == "criteo" else {"categorical": CRITEO_CATEGORICAL, "numeric": CRITEO_NUMERIC}
    found = prepare([path], tmp_path / "b", **fields)
    assert (found.schema, found.rows) == (expected.schema, expected.rows)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


# --- splits -----------------------------------------------------------------------------------------------------------


def test_hashes_split_eight_to_one_to_one(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "log.tsv", [criteo_line("1", [str(i)]) for i in range(20_000)])
    rows = prepare([path], tmp_path / "out").rows
    for n, share in zip(rows.values(), (0.8, 0.1, 0.1), strict=True):
        assert abs(n - 20_000 * share) < 4 * math.sqrt(20_000 * share * (1 - share))


def test_equal_rows_are_in_one_split(tmp_path: Path) -> None:
    """With another label, too; and what differs in one field alone is elsewhere."""
    rows = [([str(i % 7), "", str(i % 5)], [f"{i % 11}", "", f"{i % 3}"]) for i in range(7 * 5 * 11 * 3)]
    lines = [criteo_line(label, *row) for label in "01" for row in rows]
    prepare([write_lines(tmp_path / "log.tsv", lines)], tmp_path / "out", transform="none", minimum_count=1)
    seen: dict[tuple[float, ...], str] = {}
    for split, batch in everything(tmp_path / "out").items():
        for row in torch.cat((batch.categorical, batch.numeric.nan_to_num(-99.0)), 1).tolist():
            assert seen.setdefault(tuple(row), split) == split


def test_hashes_of_rows(tmp_path: Path) -> None:
    """They tell columns apart, missing from zero, and nothing else from what is equal."""
    columns = Columns("click", ("site", "user"), ("age", "price"))
    rows = [
        "1,a,b,3,4",
        "1,b,a,3,4",
        "1,a,b,4,3",
        "1,,b,3,4",
        "1,a,,3,4",
        "1,a,b,0,4",
        "1,a,b,,4",
        "1,a,b,3,",
        "1,ab,,3,4",
    ]
    same = ["0,a,b,3,4", "1,a,b,3.0,4e0", "1,a,b,-0,4"]
    path = tmp_path / "log.csv"
    path.write_text("\n".join(["click,site,user,age,price", *rows, *same]))
    (chunk,) = read(path, columns, Malformed())
    found = module._row_hashes(chunk, columns).tolist()
    assert len(set(found[: len(rows)])) == len(rows)
    assert found[len(rows) :] == [found[0], found[0], found[5]]
    other = Columns("click", ("user", "site"), ("price", "age"))
    (chunk,) = read(path, other, Malformed())
    assert module._row_hashes(chunk, other).tolist() == found


def timed_csv(path: Path, times: Sequence[object]) -> Path:
    path.write_text("label,x,at\n" + "".join(f"{i % 2},{i},{at}\n" for i, at in enumerate(times)))
    return path


def split_by_time(tmp_path: Path, times: Sequence[object], memory: int = 1 << 30) -> dict[str, list[int]]:
    path, timing = timed_csv(tmp_path / "log.csv", times), {"split": "time", "time_column": "at"}
    prepare([path], tmp_path / "out", numeric=["x"], transform="none", force=True, memory=memory, **timing)
    return {split: batch.numeric[:, 0].int().tolist() for split, batch in everything(tmp_path / "out").items()}


@pytest.mark.parametrize("memory", [1, 1 << 30])
def test_split_by_time(tmp_path: Path, memory: int) -> None:
    draw = random.Random(0)
    for times in (range(-50, 50), [draw.uniform(-5, 5) for _ in range(100)]):
        shuffled = list(times)
        draw.shuffle(shuffled)
        found = split_by_time(tmp_path, shuffled, memory)
        order = sorted(range(100), key=lambda i: shuffled[i])
        assert [sorted(found[split]) for split in SPLITS] == [
            sorted(order[a:b]) for a, b in ((0, 80), (80, 90), (90, 100))
        ]


def test_rows_of_one_time_stay_together(tmp_path: Path) -> None:
    days = [f"2024-01-{1 + i // 7:02d}" for i in range(70)]
    assert {split: len(rows) for split, rows in split_by_time(tmp_path, days).items()} == {
        "train": 56,
        "validation": 7,
        "test": 7,
    }
    with pytest.raises(ValueError, match="expected rows in each split, got 56 train, 0 validation, 14 test"):
        split_by_time(tmp_path, [f"2024-01-{1 + i // 14:02d}" for i in range(70)])


def test_times_of_two_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "CHUNK_BYTES", 1 << 10)
    with pytest.raises(ValueError, match="column 'at': expected numbers or dates, got both"):
        split_by_time(tmp_path, [*range(1000), *["2024-01-01"] * 1000])


def test_time_may_be_a_field(tmp_path: Path) -> None:
    path = timed_csv(tmp_path / "log.csv", range(10, 60))
    prepare([path], tmp_path / "out", numeric=["at"], split="time", time_column="at", transform="none")
    assert Split(tmp_path / "out", "train").batch(slice(None)).numeric.max() == 49


def test_vocabulary_is_of_the_training_rows(tmp_path: Path) -> None:
    lines = [criteo_line("1", [], ["early" if i < 80 else "late"]) for i in range(100)]
    prepare([write_lines(tmp_path / "log.tsv", lines)], tmp_path / "out", split="order", minimum_count=1)
    found = everything(tmp_path / "out")
    assert found["train"].categorical[:, 0].unique().tolist() == [1]
    assert found["validation"].categorical[:, 0].unique().tolist() == [0]


# --- malformed rows ---------------------------------------------------------------------------------------------------


def test_malformed_rows_are_left_out(tmp_path: Path, lines: list[str]) -> None:
    spoilt = [
        line for i, line in enumerate(lines) for line in ([line, "1\t2", criteo_line("2")] if i % 10 == 0 else [line])
    ]
    expected = prepare([write_lines(tmp_path / "good.tsv", lines)], tmp_path / "a")
    path = write_lines(tmp_path / "log.tsv", spoilt)
    found = prepare([path], tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert (expected.malformed, found.malformed, len(found.examples)) == (0, 200, reader.EXAMPLES)
    assert found.examples[:3] == (
        f"{path}, line 2: expected 40 columns, got 2",
        f"{path}, line 3: column 'label': expected 0 or 1, got '2'",
        f"{path}, line 14: expected 40 columns, got 2",
    )
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2: expected 40 columns, got 2")):
        prepare([path], tmp_path / "c", strict=True)
    assert not (tmp_path / "c").exists()


def test_nothing_is_well_formed(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "log.tsv", ["nonsense"] * 30)
    with pytest.raises(
        ValueError, match="expected rows in each split, got 0 train, 0 validation, 0 test; 30 malformed"
    ):
        prepare([path], tmp_path / "out")
    with pytest.raises(ValueError, match="expected rows in each split, got 0 train"):
        prepare([write_lines(tmp_path / "log.tsv", [])], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.tsv"]


def test_files_that_change_are_noticed(
    tmp_path: Path, log: Path, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = module._encode
    for changed in (lines[:-1], [line.replace("\t", "\tx", 39).replace("\tx", "\t", 13) for line in lines]):

        def change_first(*arguments: object, changed: list[str] = changed) -> list[int]:
            write_lines(log, changed)
            return encode(*arguments)

        monkeypatch.setattr(module, "_encode", change_first)
        with pytest.raises(ValueError, match="expected files that stay as they are, got other "):
            prepare([log], tmp_path / "out")
        write_lines(log, lines)
    assert not (tmp_path / "out").exists()


# --- the encoder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 64, ROWS, 5 * ROWS])
def test_raw_files_are_encoded_as_they_were(
    tmp_path: Path, lines: list[str], batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [write_lines(tmp_path / f"{i}.tsv", lines[i * 300 : (i + 1) * 300]) for i in range(4)]
    prepare(parts, tmp_path / "out", split="order", minimum_count=3)
    (tmp_path / "copy").mkdir()
    Encoder.copy(tmp_path / "out", tmp_path / "copy")
    assert sorted(contents(tmp_path / "copy")) == sorted(Encoder.FILES)
    monkeypatch.setattr(reader, "CHUNK_BYTES", 1 << 13)
    batches = list(Encoder.load(tmp_path / "copy").batches(parts, batch_size))
    sizes = [len(batch.label) for batch in batches]
    assert sizes == [batch_size] * (ROWS // batch_size) + [ROWS % batch_size] * bool(ROWS % batch_size)
    assert_same(together(batches), together(list(everything(tmp_path / "out").values())))
    assert [part.dtype for part in batches[0]] == [torch.int64, torch.float32, torch.float32]


def test_encoding_without_labels(tmp_path: Path, log: Path, lines: list[str]) -> None:
    prepare([log], tmp_path / "out")
    encoder = Encoder.load(tmp_path / "out")
    (labelled,) = encoder.batches([log], ROWS)
    (found,) = encoder.batches([write_lines(tmp_path / "new.tsv", [line[2:] for line in lines])], ROWS)
    assert found.label.isnan().all()
    assert_same(found._replace(label=labelled.label), labelled)


def test_values_that_were_never_seen(tmp_path: Path, log: Path) -> None:
    prepare([log], tmp_path / "out")
    path = write_lines(tmp_path / "new.tsv", [criteo_line("", [], [f"new {i}" for i in range(26)])])
    (found,) = Encoder.load(tmp_path / "out").batches([path], 10)
    assert not found.categorical.any() and found.numeric.isnan().all() and found.label.isnan().all()


def test_the_format_of_the_schema(tmp_path: Path, log: Path) -> None:
    os.rename(log, tmp_path / "day_0")
    with pytest.raises(ValueError, match="day_0: expected a format, one of criteo, csv, parquet, or a name"):
        prepare([tmp_path / "day_0"], tmp_path / "out")
    prepare([tmp_path / "day_0"], tmp_path / "out", format="criteo")
    encoder = Encoder.load(tmp_path / "out")
    assert sum(len(batch.label) for batch in encoder.batches([tmp_path / "day_0"], 64)) == ROWS
    with pytest.raises(ValueError, match="day_0: expected a column "):
        list(encoder.batches([tmp_path / "day_0"], 64, format="csv"))


def test_a_malformed_row_cannot_be_predicted(tmp_path: Path, log: Path) -> None:
    prepare([log], tmp_path / "out")
    path = write_lines(tmp_path / "new.tsv", [criteo_line(), "nonsense"])
    with pytest.raises(ValueError, match=re.escape(f"{path}, line 2: expected 40 columns, got 1")):
        list(Encoder.load(tmp_path / "out").batches([path], 10))


def test_encoders_that_do_not_fit(tmp_path: Path, log: Path) -> None:
    prepare([log], tmp_path / "a", minimum_count=1)
    prepare([log], tmp_path / "b", minimum_count=2)
    with pytest.raises(ValueError, match="batch_size: expected at least 1, got 0"):
        list(Encoder.load(tmp_path / "a").batches([log], 0))
    (tmp_path / "a" / "vocabulary.parquet").write_bytes((tmp_path / "b" / "vocabulary.parquet").read_bytes())
    with pytest.raises(ValueError, match=f"{tmp_path / 'a'}: vocabulary: expected the schema's "):
        Encoder.load(tmp_path / "a")
    with pytest.raises(OSError, match=r"schema\.json"):
        Encoder.load(tmp_path)


def test_memory_is_constant(tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than two chunks are read before the first batch is given."""
    prepare([log], tmp_path / "out")
    monkeypatch.setattr(reader, "CHUNK_BYTES", 1 << 13)
    chunks = 0
    rows = reader._rows

    def counted(*arguments: object) -> object:
        nonlocal chunks
        chunks += 1
        return rows(*arguments)

    monkeypatch.setattr(reader, "_rows", counted)
    batches = Encoder.load(tmp_path / "out").batches([log], 8)
    next(batches)
    time.sleep(0.1)
    assert chunks <= 2
    batches.close()
    assert chunks <= 2


def test_ahead() -> None:
    def items() -> Iterator[int]:
        yield from range(5)
        raise ValueError("stop")

    found = []
    with pytest.raises(ValueError, match="stop"):
        for item in ahead(items()):
            found.append(item)
    assert found == list(range(5)) and list(ahead(iter(()))) == []


# --- the folder -------------------------------------------------------------------------------------------------------


def test_an_output_is_replaced_by_force_only(tmp_path: Path, log: Path) -> None:
    prepare([log], tmp_path / "out", minimum_count=1)
    before = contents(tmp_path / "out")
    with pytest.raises(FileExistsError, match="out is there already"):
        prepare([log], tmp_path / "out")
    assert contents(tmp_path / "out") == before
    prepare([log], tmp_path / "out", force=True)
    assert contents(tmp_path / "out") != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.tsv", "out"]


def test_other_folders_are_not_replaced(tmp_path: Path, log: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis").write_text("dear")
    for force in (False, True):
        with pytest.raises(FileExistsError, match="home"):
            prepare([log], tmp_path / "home", force=force)
        with pytest.raises(FileExistsError, match="expected a folder, got something else"):
            prepare([log], log, force=force)
    assert contents(tmp_path / "home") == {"thesis": b"dear"} and log.is_file()
    prepare([log], tmp_path / "out")
    inside = tmp_path / "out" / "log.tsv"
    inside.write_bytes(log.read_bytes())
    with pytest.raises(ValueError, match=f"{inside}: expected a file outside of "):
        prepare([inside], tmp_path / "out", force=True)
    assert inside.exists()


def test_empty_folders_and_links(tmp_path: Path, log: Path) -> None:
    (tmp_path / "empty").mkdir()
    prepare([log], tmp_path / "empty")
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    prepare([log], tmp_path / "link", force=True, minimum_count=1)
    assert (tmp_path / "link").is_symlink() and Split(tmp_path / "empty", "train").schema.minimum_count == 1
    assert prepare([log], tmp_path / "new" / "deep" / "out").out == tmp_path / "new" / "deep" / "out"


@pytest.mark.parametrize(
    ("options", "error", "complaint"),
    [
        ({"files": []}, ValueError, "files: expected at least one, got none"),
        ({"files": ["none.tsv"]}, OSError, "none.tsv"),
        ({"files": ["log.unknown"]}, ValueError, "log.unknown: expected a format"),
        ({"split": "random"}, ValueError, "split: expected one of hash, order, time, got 'random'"),
        ({"split": "time"}, ValueError, "time_column: expected a name where split is 'time' and only there, got None"),
        ({"time_column": "I1"}, ValueError, "time_column: expected a name"),
        ({"categorical": "C1"}, TypeError, "categorical: expected a sequence of names, got 'C1'"),
        ({"categorical": [], "numeric": []}, ValueError, "expected at least one categorical or numeric column"),
        ({"categorical": ["C1", "C1"]}, ValueError, "column 'C1': expected one use of a column, got 2"),
        ({"categorical": ["C27"]}, ValueError, "expected a column 'C27'"),
        ({"label": "C1"}, ValueError, "column 'C1': expected one use of a column, got 2"),
        ({"minimum_count": 0}, ValueError, "minimum_count: expected an int of at least 1, got 0"),
        ({"transform": "log"}, ValueError, "transform: expected one of log-squared, none, got 'log'"),
        ({"format": "json"}, ValueError, "expected a format"),
        ({"memory": 0}, ValueError, "memory, shard_rows: expected at least 1, got 0 and"),
        ({"shard_rows": 0}, ValueError, "memory, shard_rows: expected at least 1, got "),
    ],
)
def test_bad_arguments(
    tmp_path: Path, log: Path, options: dict[str, object], error: type[Exception], complaint: str
) -> None:
    files = [tmp_path / name for name in options.pop("files", ["log.tsv"])]
    with pytest.raises(error, match=complaint):
        prepare(files, tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.tsv"]


def test_files_are_read_twice(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.tsv")
    for path in (tmp_path / "pipe.tsv", tmp_path):
        with pytest.raises(ValueError, match=f"{path}: expected a file that can be read more than once"):
            prepare([path], tmp_path / "deep" / "out", format="criteo")
    assert not (tmp_path / "deep").exists()


def test_a_single_path_is_no_sequence(tmp_path: Path, log: Path) -> None:
    prepare([log], tmp_path / "out")
    for path in (log, str(log)):
        with pytest.raises(TypeError, match="files: expected a sequence of paths, got "):
            prepare(path, tmp_path / "other")
        with pytest.raises(TypeError, match="files: expected a sequence of paths, got "):
            next(Encoder.load(tmp_path / "out").batches(path, 10))


# --- full disks and kills ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0, 100, 5_000, 40_000, 70_000])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, log: Path, limit: int) -> None:
    """At any size of a file, as a limit on it stands in for the disk's."""
    prepare([log], tmp_path / "old", minimum_count=2)
    before = contents(tmp_path / "old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        for name in ("old", "new"):
            with pytest.raises(OSError) as raised:
                prepare([log], tmp_path / name, minimum_count=1, force=True, memory=1 if limit == 100 else 1 << 30)
            assert raised.value.errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(tmp_path / "old") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.tsv", "old"]


def test_an_interrupt_leaves_what_was_there(tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare([log], tmp_path / "out")
    before = contents(tmp_path / "out")

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_manifest", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare([log], tmp_path / "out", force=True, minimum_count=1)
    assert contents(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.tsv", "out"]


def test_a_rename_that_fails_is_undone(tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare([log], tmp_path / "out")
    before, rename = contents(tmp_path / "out"), os.rename

    def refuse(source: Path, target: Path) -> None:
        if Path(source).name == "new":
            raise PermissionError(errno.EACCES, "refused")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(PermissionError, match="refused"):
        prepare([log], tmp_path / "out", force=True, minimum_count=1)
    assert contents(tmp_path / "out") == before


# Prepares over and over, and kills itself at the n-th call of a function of os; without one, somebody else does.
KILLED = """
import os, signal, sys
from autoint_fast.clicklog.prepare import prepare
log, out, name, n = sys.argv[1:]
if name:
    calls, function = 0, getattr(os, name)
    def kill(*arguments):
        global calls
        calls += 1
        if calls == int(n):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    setattr(os, name, kill)
print("ready", flush=True)
while True:
    prepare([log], out, minimum_count=2, force=True)
"""


def start(log: Path, out: Path, name: str = "", n: int = 0) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", KILLED, str(log), str(out), name, str(n)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def killed_outputs(tmp_path: Path, log: Path) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """What stands in the output before, and what the process that is killed writes."""
    prepare([log], tmp_path / "expected", minimum_count=2)
    prepare([log], tmp_path / "out", minimum_count=1)
    return contents(tmp_path / "out"), contents(tmp_path / "expected")


@pytest.mark.parametrize(
    ("name", "n"), [("rename", 1), ("rename", 2), ("fsync", 1), ("fsync", 4), ("fsync", 7), ("fsync", 8)]
)
def test_a_kill_at_a_bad_moment(tmp_path: Path, log: Path, name: str, n: int) -> None:
    old, new = killed_outputs(tmp_path, log)
    with start(log, tmp_path / "out", name, n) as process:
        assert process.wait(timeout=120) == -signal.SIGKILL
    check_after_kill(tmp_path, log, old, new)


def test_kills_at_random(tmp_path: Path, log: Path) -> None:
    old, new = killed_outputs(tmp_path, log)
    draw = random.Random()
    for _ in range(5):
        with start(log, tmp_path / "out") as process:
            assert process.stdout.readline() == "ready\n"
            time.sleep(draw.uniform(0, 0.5))
            process.kill()
        check_after_kill(tmp_path, log, old, new)


def check_after_kill(tmp_path: Path, log: Path, old: dict[str, bytes], new: dict[str, bytes]) -> None:
    """The output is the old one or the new one, or there is none; the next run puts back what had been moved away,
    and leaves nothing of the killed one."""
    out = tmp_path / "out"
    assert not out.exists() or contents(out) in (old, new)
    with pytest.raises(ValueError, match="nonsense, line 1"):
        prepare([write_lines(tmp_path / "nonsense", ["?"])], out, format="criteo", strict=True, force=True)
    assert contents(out) in (old, new)
    assert not list(tmp_path.glob(".out.*"))


def test_a_run_leaves_another_that_goes_on(tmp_path: Path, log: Path) -> None:
    with module._replacing(tmp_path / "out", force=False) as work:
        (work / "new").mkdir()
        prepare([log], tmp_path / "out")
        assert work.is_dir()
        (tmp_path / "out").rename(tmp_path / "other")
    assert (tmp_path / "out").is_dir()


# --- the command ------------------------------------------------------------------------------------------------------


def run(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parsed = parser.parse_args([str(argument) for argument in arguments])
    return parsed.run(parsed)


def test_the_command(tmp_path: Path, lines: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    path = write_lines(tmp_path / "log.tsv", [*lines, "nonsense"])
    assert run(path, "--out", tmp_path / "out") == 0
    streams = capsys.readouterr()
    rows = {split: len(Split(tmp_path / "out", split)) for split in SPLITS}
    first, *rest = streams.out.splitlines()
    assert re.fullmatch(r"1,000 rows in \d+\.\d s, [\d,]+ per second: (.*)", first)
    assert first.endswith(", ".join(f"{n} {split}" for split, n in rows.items()))
    kept = sum(Split(tmp_path / "out", "train").schema.cardinalities) - 26
    assert rest[:2] == ["1 malformed rows left out:", f"  {path}, line 1001: expected 40 columns, got 1"]
    assert rest[2].startswith(f"26 categorical columns: {kept:,} values with an id, of ")
    assert rest[3:] == ["13 numeric columns: log-squared", f"wrote {tmp_path / 'out'}"]
    # Bars are for terminals.
    assert not streams.err


def test_options_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, object] = {}

    def record(files: list[Path], out: Path, **options: object) -> Report:
        given.update(options, files=files, out=out)
        schema = Schema("click", ("a",), (), (2,))
        return Report(out, schema, dict.fromkeys(SPLITS, 1), 0, (), (1,), 0, {"counting": 1.0})

    monkeypatch.setattr(module, "prepare", record)
    run(
        *("a.csv", "b.csv", "--out", "out", "--format", "csv", "--label", "click", "--categorical", "a", "b"),
        *("--numeric", "c", "--min-count", "3", "--transform", "none", "--split", "time", "--time-column", "t"),
        *("--strict", "--force", "--memory", "0.5"),
    )
    assert given == {
        "files": [Path("a.csv"), Path("b.csv")],
        "out": Path("out"),
        "format": "csv",
        "label": "click",
        "categorical": ["a", "b"],
        "numeric": ["c"],
        "minimum_count": 3,
        "transform": "none",
        "split": "time",
        "time_column": "t",
        "strict": True,
        "force": True,
        "memory": 1 << 29,
        "progress": True,
    }
    for memory in ("0", "-1", "nan", "inf"):
        with pytest.raises(ValueError, match="--memory: expected a number above zero"):
            run("a.csv", "--out", "out", "--memory", memory)


# --- the real log -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif("AUTOINT_FAST_CRITEO" not in os.environ, reason="AUTOINT_FAST_CRITEO names no Criteo log")
def test_the_real_log(tmp_path: Path) -> None:
    path = Path(os.environ["AUTOINT_FAST_CRITEO"])
    report = prepare([path], tmp_path / "out", format="criteo", split="order")
    assert not report.malformed
    lines = path.read_text().splitlines()
    expected = by_hand(lines, lines[: report.rows["train"]], 10)
    found = together(list(everything(tmp_path / "out").values()))
    assert torch.equal(found.categorical, expected.categorical) and torch.equal(found.label, expected.label)
    torch.testing.assert_close(found.numeric, expected.numeric, rtol=1e-6, atol=0, equal_nan=True)
    assert_same(together(list(Encoder.load(tmp_path / "out").batches([path], 777, format="criteo"))), found)
