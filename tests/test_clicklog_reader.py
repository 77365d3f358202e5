"""Raw click logs: every format, and what is malformed."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from autoint_fast.clicklog import reader
from autoint_fast.clicklog.reader import CRITEO, CRITEO_CATEGORICAL, CRITEO_NUMERIC, Columns, Malformed, read

from .clicklogs import COLUMNS, COMPRESSED, HEADER, compress, criteo_line, csv_text, read_all, write_lines

ALL_CRITEO = Columns("label", CRITEO_CATEGORICAL, CRITEO_NUMERIC)
# The smallest chunks that rows of tests fit into, so that there are many.
CHUNK = 1 << 12

reused_fixtures = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def check(rows: reader.Rows, expected: Sequence[tuple[float, Sequence[float], Sequence[bytes | None]]]) -> None:
    """Rows as `read_all` gives them, against label, numbers and categories of each."""
    np.testing.assert_array_equal(rows.label, [label for label, _, _ in expected])
    width = rows.numeric.shape[1]
    np.testing.assert_array_equal(rows.numeric, np.reshape([numbers for _, numbers, _ in expected], (-1, width)))
    for i, column in enumerate(rows.categorical):
        assert column == [categories[i] for _, _, categories in expected]


def as_number(text: str) -> float | None:
    """What a number is, in Python's own words; None for anything else."""
    if not text:
        return math.nan
    if not re.fullmatch(r"-?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", text, re.ASCII):
        return None
    return float(text) if abs(float(text)) <= reader.LARGEST else None


# --- text -------------------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.just(""),
    st.integers(-(10**45), 10**45).map(str),
    st.integers(-5, 300).map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.text("0123456789.eE+-infNA \"'", max_size=8),
)
LABELS = st.sampled_from(["0", "1", "0", "1", "", "2", "1.0", "x", "-1", "01"])
# Of any characters but those that a row or a column ends at.
TSV_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t\r\n"), max_size=12)
CSV_TEXT = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=12),
    st.text('",\n \t', max_size=4),
)


@st.composite
def criteo_rows(draw: st.DrawFn) -> list[list[str]]:
    """Lists of columns, not always 40."""
    text = st.one_of(st.just(""), st.text('0123456789abcdef"', max_size=8), TSV_TEXT)
    row = st.one_of(
        st.builds(
            lambda label, numbers, categories, rest: [label, *numbers, *[""] * 10, *categories, *[rest] * 22],
            LABELS,
            st.lists(NUMBERS, min_size=3, max_size=3),
            st.lists(text, min_size=4, max_size=4),
            text,
        ),
        st.lists(TSV_TEXT, min_size=1, max_size=45),
    )
    return draw(st.lists(row, max_size=25))


@reused_fixtures
@given(criteo_rows(), st.sampled_from(["\n", "\r\n", "\r"]), st.booleans(), st.sampled_from(COMPRESSED))
def test_criteo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[list[str]], end: str, ended: bool, ending: str
) -> None:
    monkeypatch.setattr(reader, "CHUNK_BYTES", CHUNK)
    content = end.join("\t".join(row) for row in rows) + (end if ended and rows else "")
    if content.startswith("\ufeff"):
        return
    # A last line that is empty and not ended is no line.
    if rows and rows[-1] == [""] and not ended:
        rows = rows[:-1]
    path = tmp_path / f"log.tsv{ending}"
    path.write_bytes(compress(content.encode(), ending))

    expected, bad = [], []
    for number, row in enumerate(rows, start=1):
        numbers = [as_number(text) for text in row[1:14]]
        label = as_number(row[0])
        if len(row) != 40 or label not in (0, 1) or None in numbers:
            bad.append(number)
        else:
            expected.append((label, numbers, [text.encode() or None for text in row[14:]]))
    malformed = Malformed()
    check(read_all(path, ALL_CRITEO, malformed), expected)
    assert malformed.count == len(bad)
    prefix = f"{path}, line "
    assert [int(said.removeprefix(prefix).partition(":")[0]) for said in malformed.examples] == bad[: reader.EXAMPLES]


@st.composite
def csv_rows(draw: st.DrawFn) -> list[list[str]]:
    row = st.tuples(LABELS, CSV_TEXT, CSV_TEXT, NUMBERS, NUMBERS).map(list)
    return draw(st.lists(st.one_of(row, row, row, st.lists(CSV_TEXT, min_size=2, max_size=7)), max_size=25))


@reused_fixtures
@given(
    csv_rows(),
    st.permutations(HEADER),
    st.sampled_from(["\n", "\r\n"]),
    st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    st.sampled_from(COMPRESSED),
)
def test_csv(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[list[str]],
    header: list[str],
    end: str,
    quoting: int,
    ending: str,
) -> None:
    monkeypatch.setattr(reader, "CHUNK_BYTES", CHUNK)
    path = tmp_path / f"log.csv{ending}"
    path.write_bytes(compress(csv_text([header, *rows], end, quoting), ending))

    expected, bad = [], []
    for number, row in enumerate(rows, start=2):
        cells = dict(zip(header, row, strict=False))
        numbers = [as_number(cells.get(name, "")) for name in ("age", "price")]
        label = as_number(cells.get("click", ""))
        if len(row) != len(header) or label not in (0, 1) or None in numbers:
            bad.append(number)
        else:
            expected.append((label, numbers, [cells[name].encode() or None for name in ("site", "user")]))
    malformed = Malformed()
    check(read_all(path, malformed=malformed), expected)
    assert malformed.count == len(bad)
    prefix = f"{path}, line "
    assert [int(said.removeprefix(prefix).partition(":")[0]) for said in malformed.examples] == bad[: reader.EXAMPLES]


@given(st.text("0123456789.eE+-", max_size=10))
@example("1e999")
@example("9" * 400)
@example("-.5E-3")
@example("1.")
def test_numbers_are_those_of_python(text: str) -> None:
    (found,) = reader._parsed(pa.array([text.encode()], pa.binary()))
    expected = as_number(text) if text else None
    np.testing.assert_array_equal(found, math.nan if expected is None else expected)


def test_quotes_are_data_in_criteo_and_quoting_in_csv(tmp_path: Path) -> None:
    write_lines(tmp_path / "log.tsv", [criteo_line("1", ["2"], ['"a', 'b"', '""'])])
    assert read_all(tmp_path / "log.tsv", ALL_CRITEO).categorical[:4] == [[b'"a'], [b'b"'], [b'""'], [None]]
    (tmp_path / "log.csv").write_bytes(
        b'click,site,user,age,price\r\n1,"a,""b""\nc",""," 5",2\r\n1,"a,""b""\nc","",5,2'
    )
    malformed = Malformed()
    rows = read_all(tmp_path / "log.csv", malformed=malformed)
    assert rows.categorical == [[b'a,"b"\nc'], [None]] and rows.numeric.tolist() == [[5, 2]]
    assert malformed.examples == [
        f"{tmp_path / 'log.csv'}, line 2: column 'age': expected a number or nothing, got ' 5'"
    ]


def test_line_breaks_in_quotes_across_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "CHUNK_BYTES", CHUNK)
    rows = [["1", f"{i}\n" * (i % 50), f'"{i},\r\n', "1", "2"] for i in range(1000)]
    (tmp_path / "log.csv").write_bytes(csv_text([HEADER, *rows]))
    check(read_all(tmp_path / "log.csv"), [(1, [1, 2], [row[1].encode() or None, row[2].encode()]) for row in rows])


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    """In well-formed rows and in others."""
    lines = [criteo_line("1", [], ["?"]), criteo_line("?"), "?\t?", criteo_line("0", [], ["ü"])]
    path = tmp_path / "log.tsv"
    path.write_bytes("\n".join(lines).encode().replace(b"?", b"\xff\xfe"))
    malformed = Malformed()
    assert read_all(path, ALL_CRITEO, malformed).categorical[0] == ["\ufffd\ufffd".encode(), "ü".encode()]
    assert malformed.examples == [
        f"{path}, line 2: column 'label': expected 0 or 1, got '\ufffd\ufffd'",
        f"{path}, line 3: expected 40 columns, got 2",
    ]


@pytest.mark.parametrize("size", [2, 3, 5, 7, 1000])
@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\r", "?"])
@pytest.mark.parametrize("text", ["aü€😀" * 7, "abcdefg" * 5, "ab?c?defg" * 5, "a\r\nb\rc\n\r\n\r" * 7, ""])
def test_blocks_of_text(text: str, end: str, size: int) -> None:
    """None is longer than was asked for or ends between CR and LF; the last line is ended."""
    content = (text + end).encode().replace(b"?", "€".encode()[:2])
    stream = reader._Utf8(pa.BufferReader(content))
    assert stream.empty == (not content)
    blocks = []
    while block := stream.read(size):
        blocks.append(block)
    expected = content.decode(errors="replace")
    assert b"".join(blocks).decode() == expected + ("" if expected.endswith(("\n", "\r")) or not content else "\n")
    assert all(len(block) <= size for block in blocks)
    assert not any(block.endswith(b"\r") and more.startswith(b"\n") for block, more in pairwise(blocks))


def test_mark_of_utf8(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_bytes(b"\xef\xbb\xbf" + csv_text([HEADER, ["1", "a", "b", "2", "3"]]))
    assert read_all(tmp_path / "log.csv").label.tolist() == [1]


def test_blank_lines_are_malformed(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "log.tsv", [criteo_line("1"), "", criteo_line("x" * 50)])
    malformed = Malformed()
    assert len(read_all(path, ALL_CRITEO, malformed)) == 1
    assert malformed.examples == [
        f"{path}, line 2: column 'label': expected 0 or 1, got nothing",
        f"{path}, line 3: column 'label': expected 0 or 1, got '{'x' * 40}...'",
    ]


def test_examples_are_bounded_and_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "CHUNK_BYTES", CHUNK)
    lines = [criteo_line("1") if i % 3 == 0 else criteo_line("2") if i % 3 == 1 else "1\t2" for i in range(3000)]
    path = write_lines(tmp_path / "log.tsv", lines)
    malformed = Malformed()
    assert len(read_all(path, ALL_CRITEO, malformed)) == 1000
    assert malformed.count == 2000
    numbers = [i + 1 for i in range(3000) if i % 3][: reader.EXAMPLES]
    assert [said.split(":")[0] for said in malformed.examples] == [f"{path}, line {n}" for n in numbers]


@pytest.mark.parametrize("chunk", [CHUNK, 1 << 20])
def test_strict_stops_at_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(reader, "CHUNK_BYTES", chunk)
    lines = [criteo_line("1")] * 500 + [criteo_line("1", ["1", "two"]), "1", *[criteo_line("1")] * 500, "1"]
    path = write_lines(tmp_path / "log.tsv", lines)
    with pytest.raises(
        ValueError, match=re.escape(f"{path}, line 501: column 'I2': expected a number or nothing, got 'two'")
    ):
        read_all(path, ALL_CRITEO, Malformed(strict=True))


def test_a_row_beyond_any_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "CHUNK_BYTES", CHUNK)
    path = write_lines(tmp_path / "log.tsv", [criteo_line("1"), criteo_line("1", [], ["x" * 3 * CHUNK])])
    with pytest.raises(ValueError, match=f"{path}: expected rows of up to "):
        read_all(path, ALL_CRITEO)


def test_a_file_of_other_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log of another format is not read to its end."""
    monkeypatch.setattr(reader, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(reader, "MOST_SKIPPED", 6000)
    path = write_lines(tmp_path / "log.tsv", [criteo_line("1")] + ["1,2,3"] * 6001)
    with pytest.raises(ValueError, match=f"{path}: expected rows of 40 columns, got 6,000 others, the last of 1"):
        read_all(path, ALL_CRITEO)
    write_lines(path, ([criteo_line("1")] + ["1,2,3"] * 300) * 60)
    malformed = Malformed()
    assert len(read_all(path, ALL_CRITEO, malformed)) == 60 and malformed.count == 18_000


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "format", "expected"),
    [
        ("a.csv", None, "csv"),
        ("a.CSV.GZ", None, "csv"),
        ("day.0.tsv.zst", None, "criteo"),
        ("train.txt", None, "criteo"),
        ("a.parquet", None, "parquet"),
        ("day_0", "criteo", "criteo"),
        ("a.csv", "criteo", "criteo"),
    ],
)
def test_format(name: str, format: str | None, expected: str) -> None:
    assert reader.format_of(name, format) == expected


@pytest.mark.parametrize("name", ["day_0", "a.json", ".gz", "csv", "a.csv.bz2"])
def test_unknown_format(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected a format, one of criteo, csv, parquet, or a name"):
        reader.format_of(name)


@pytest.mark.parametrize(
    ("header", "complaint"),
    [
        ("click,site,age,price", "expected a column 'user', got 'click', 'site', 'age', 'price'"),
        ("click,site,user,age,price,user", "expected one column 'user'"),
        ("site,user,age,price", "expected a column 'click'"),
        ("", "expected a column 'click'"),
    ],
)
def test_missing_and_repeated_columns(tmp_path: Path, header: str, complaint: str) -> None:
    (tmp_path / "log.csv").write_text(f"{header}\n1,a,b,2,3\n")
    with pytest.raises(ValueError, match=complaint):
        read_all(tmp_path / "log.csv")


def test_other_columns_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("note,price,click,user,age,note,site\nx,3,1,b,2,y,a\n")
    check(read_all(tmp_path / "log.csv"), [(1, [2, 3], [b"a", b"b"])])


@pytest.mark.parametrize("content", ["click,site,user,age,price", "click,site,user,age,price\n"])
def test_header_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / "log.csv").write_text(content)
    assert len(read_all(tmp_path / "log.csv")) == 0


def test_empty_files(tmp_path: Path) -> None:
    for name in ("log.tsv", "log.csv", "log.tsv.gz"):
        (tmp_path / name).write_bytes(compress(b"", name[7:]))
    assert len(read_all(tmp_path / "log.tsv", ALL_CRITEO)) == 0
    assert len(read_all(tmp_path / "log.tsv.gz", ALL_CRITEO)) == 0
    with pytest.raises(ValueError, match=r"log\.csv: expected a header, got an empty file"):
        read_all(tmp_path / "log.csv")


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_broken_compression(tmp_path: Path, ending: str) -> None:
    content = compress("\n".join([criteo_line("1", [str(i) for i in range(13)])] * 1000).encode(), ending)
    path = tmp_path / f"log.tsv{ending}"
    for broken in (content[:-5], content[: len(content) // 3], b"no compression"):
        path.write_bytes(broken)
        with pytest.raises((ValueError, OSError), match=f"{path}"):
            read_all(path, ALL_CRITEO)


@pytest.mark.parametrize("name", ["log.tsv", "log.csv", "log.parquet"])
def test_no_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(OSError, match=f"{tmp_path / name}"):
        read_all(tmp_path / name, ALL_CRITEO if name == "log.tsv" else COLUMNS)


def test_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "log.parquet").write_bytes(b"click,site\n1,a\n")
    with pytest.raises(ValueError, match=r"log\.parquet"):
        read_all(tmp_path / "log.parquet")


# --- without labels ---------------------------------------------------------------------------------------------------


def test_labels_may_be_absent(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("site,user,age,price\na,b,2,3\n")
    check(read_all(tmp_path / "log.csv", label_required=False), [(math.nan, [2, 3], [b"a", b"b"])])
    (tmp_path / "some.csv").write_text("click,site,user,age,price\n,a,b,2,3\n1,a,b,,\n")
    some = read_all(tmp_path / "some.csv", label_required=False)
    check(some, [(math.nan, [2, 3], [b"a", b"b"]), (1, [math.nan, math.nan], [b"a", b"b"])])
    line = criteo_line("1", ["5"], ["a"])
    with_label = read_all(write_lines(tmp_path / "with.tsv", [line]), ALL_CRITEO, label_required=False)
    without = read_all(write_lines(tmp_path / "without.tsv", [line[2:]] * 2), ALL_CRITEO, label_required=False)
    assert with_label.label.tolist() == [1] and np.isnan(without.label).tolist() == [True, True]
    assert without.numeric[0, 0] == 5 and without.categorical[0] == [b"a", b"a"]
    malformed = Malformed()
    read_all(tmp_path / "without.tsv", ALL_CRITEO, malformed)
    assert malformed.examples[0].endswith("line 1: expected 40 columns, got 39")


def test_a_label_that_is_there_has_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("click,site,user,age,price\n2,a,b,2,3\n")
    malformed = Malformed()
    assert len(read_all(tmp_path / "log.csv", malformed=malformed, label_required=False)) == 0
    assert malformed.examples[0].endswith("column 'click': expected 0 or 1, got '2'")


# --- Parquet ----------------------------------------------------------------------------------------------------------

CATEGORIES = (
    pa.array(["a", "", None, "ü"], pa.string()),
    pa.array(["a", "", None, "ü"], pa.large_string()),
    pa.array([b"a", b"", None, b"\xff"], pa.binary()),
    pa.array(["a", "b", None, "a"]).dictionary_encode(),
    pa.array([1, -(2**63), None, 2**63 - 1], pa.int64()),
    pa.array([1, 0, None, 2**64 - 1], pa.uint64()),
    pa.array([1.0, math.nan, None, -2.5], pa.float64()),
    pa.array([True, False, None, True]),
)


@pytest.mark.parametrize("column", CATEGORIES, ids=lambda column: str(column.type))
def test_parquet_categories_are_those_of_their_text(tmp_path: Path, column: pa.Array) -> None:
    table = pa.table({"click": [0, 1, 1, 0], "site": column, "user": column, "age": [1.0] * 4, "price": [1] * 4})
    pq.write_table(table, tmp_path / "log.parquet")
    found = read_all(tmp_path / "log.parquet").categorical[0]
    words = {True: "true", False: "false"}

    def text(value: object) -> bytes | None:
        if isinstance(value, bool):
            value = words[value]
        if value is None or value == "" or value == b"" or value != value:
            return None
        return value if isinstance(value, bytes) else str(int(value) if value == 1.0 else value).encode()

    assert found == [text(value) for value in column.to_pylist()]


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, 300, None, -5], pa.int16()),
        pa.array([1, 2**63, None, 2**64 - 1], pa.uint64()),
        pa.array([1.5, math.nan, None, -5.0], pa.float32()),
        pa.array(["1.5", "", None, "-5"]),
        pa.array(["1.5", "2", None, "1.5"]).dictionary_encode(),
        pa.array([True, False, None, True]),
        pa.nulls(4),
    ],
    ids=lambda column: str(column.type),
)
def test_parquet_numbers(tmp_path: Path, column: pa.Array) -> None:
    table = pa.table({"click": [0, 1, 1, 0], "site": ["a"] * 4, "user": ["b"] * 4, "age": column, "price": column})
    pq.write_table(table, tmp_path / "log.parquet")
    found = read_all(tmp_path / "log.parquet").numeric[:, 0]
    np.testing.assert_array_equal(found, [float(v) if v not in (None, "") else math.nan for v in column.to_pylist()])


def test_a_row_group_is_not_read_at_once(tmp_path: Path) -> None:
    rows = 1 << 20
    numbers = np.random.default_rng(0).random(rows)
    table = pa.table({"click": np.ones(rows, np.int8), "age": numbers, "price": numbers[::-1]})
    path = tmp_path / "log.parquet"
    pq.write_table(table, path, row_group_size=rows, use_dictionary=False, compression="none")
    del table, numbers
    before, most, found = pa.total_allocated_bytes(), 0, 0
    for chunk in read(path, Columns("click", (), ("age", "price")), Malformed()):
        most = max(most, pa.total_allocated_bytes() - before)
        found += len(chunk)
    assert found == rows and most < path.stat().st_size / 3


@pytest.mark.parametrize("label", [[0, 1], [0.0, 1.0], [False, True], ["0", "1"]], ids=lambda v: type(v[0]).__name__)
def test_parquet_labels(tmp_path: Path, label: list[object]) -> None:
    table = pa.table({"click": label, "site": ["a"] * 2, "user": ["b"] * 2, "age": [1, 2], "price": [1, 2]})
    pq.write_table(table, tmp_path / "log.parquet")
    assert read_all(tmp_path / "log.parquet").label.tolist() == [0, 1]


def test_malformed_parquet(tmp_path: Path) -> None:
    ages = [1.0, math.inf, 3.0, 4.0]
    table = pa.table({"click": [0, 1, None, 3], "site": ["a"] * 4, "user": ["b"] * 4, "age": ages, "price": [1] * 4})
    path = tmp_path / "log.parquet"
    pq.write_table(table, path)
    malformed = Malformed()
    assert len(read_all(path, malformed=malformed)) == 1
    assert malformed.examples == [
        f"{path}, row 2: column 'age': expected a number or nothing, got 'inf'",
        f"{path}, row 3: column 'click': expected 0 or 1, got nothing",
        f"{path}, row 4: column 'click': expected 0 or 1, got '3'",
    ]


@pytest.mark.parametrize(
    ("name", "values", "complaint"),
    [
        ("age", pa.array([[1]]), "column 'age': expected numbers, got list"),
        ("age", pa.array([0], pa.timestamp("s")), "column 'age': expected numbers, got timestamp"),
        ("site", pa.array([[1]]), "column 'site': expected numbers, text or dates, got list"),
    ],
)
def test_parquet_types_that_do_not_fit(tmp_path: Path, name: str, values: pa.Array, complaint: str) -> None:
    table = {"click": [1], "site": ["a"], "user": ["b"], "age": [1], "price": [1]} | {name: values}
    pq.write_table(pa.table(table), tmp_path / "log.parquet")
    with pytest.raises(ValueError, match=complaint):
        read_all(tmp_path / "log.parquet")


# --- times ------------------------------------------------------------------------------------------------------------

TIMED = Columns("click", ("site",), (), "at")


def times(tmp_path: Path, *values: str) -> np.ndarray:
    (tmp_path / "log.csv").write_text("".join(["click,site,at\n", *(f"1,a,{value}\n" for value in values)]))
    return read_all(tmp_path / "log.csv", TIMED).time


def test_times(tmp_path: Path) -> None:
    assert times(tmp_path, "5", "-2.5", "14102100").tolist() == [5, -2.5, 14102100]
    dates = ("1970-01-01", "1970-01-01 00:00:01.5", "1970-01-01T02:00:00+02:00", "1970-01-02T00:00:00Z")
    assert times(tmp_path, *dates).tolist() == [0, 1.5e6, 0, 86400e6]
    assert times(tmp_path, "5", "", "2024-02-31").tolist() == [5]
    with pytest.raises(ValueError, match="column 'at': expected numbers or dates, got both"):
        times(tmp_path, "5", "2024-01-31")


@pytest.mark.parametrize(
    "kind", [pa.timestamp("ns"), pa.timestamp("s", "Europe/Paris"), pa.date32(), pa.int64()], ids=str
)
def test_parquet_times(tmp_path: Path, kind: pa.DataType) -> None:
    at = pa.array([0, 86400, None], pa.int64())
    if kind == pa.date32():
        at = pa.array([0, 1, None], pa.int32()).cast(kind)
    elif kind != pa.int64():
        at = at.cast(pa.timestamp("s")).cast(kind)
    pq.write_table(pa.table({"click": [1, 1, 1], "site": ["a"] * 3, "at": at}), tmp_path / "log.parquet")
    malformed = Malformed()
    found = read_all(tmp_path / "log.parquet", TIMED, malformed).time
    assert (found - found[0]).tolist() == [0, 86400 if kind == pa.int64() else 86400e6] and malformed.count == 1


def test_progress_is_the_size_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "CHUNK_BYTES", CHUNK)
    lines = [criteo_line("1", [str(i % 7)], [f"{i}"]) for i in range(1000)]
    for ending in COMPRESSED:
        path = tmp_path / f"log.tsv{ending}"
        path.write_bytes(compress("\n".join(lines).encode(), ending))
        steps: list[int] = []
        assert sum(len(rows) for rows in read(path, ALL_CRITEO, Malformed(), advance=steps.append)) == 1000
        assert sum(steps) == path.stat().st_size and min(steps) >= 0
    assert len(CRITEO) == 40
