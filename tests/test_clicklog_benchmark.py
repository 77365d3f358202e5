"""`python -m benchmarks prepare`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest

from autoint_fast.clicklog.reader import CRITEO_CATEGORICAL, CRITEO_NUMERIC, Columns, Malformed
from benchmarks import prepare as benchmark

from .clicklogs import draw_log, read_all, write_lines


def run(*arguments: object) -> int:
    return benchmark.main([str(argument) for argument in arguments], argparse.ArgumentParser(prog="benchmarks"))


def test_a_log_has_new_values_at_the_rate_of_criteo(tmp_path: Path) -> None:
    rows = 20_000
    benchmark._write_log(benchmark._drawn().slice(0, 100), rows, tmp_path / "log.tsv")
    malformed = Malformed()
    found = read_all(tmp_path / "log.tsv", Columns("label", CRITEO_CATEGORICAL, CRITEO_NUMERIC), malformed)
    assert len(found) == rows and not malformed.count
    for column, cardinality in zip(found.categorical, benchmark.CARDINALITIES, strict=True):
        values, counts = np.unique([value or b"" for value in column], return_counts=True)
        expected = rows * cardinality / benchmark.CRITEO_ROWS
        assert abs(np.sum(counts == 1) - expected) < 5 * np.sqrt(expected) + 5
        assert len(values) < expected * 1.2 + 300


@pytest.mark.parametrize("criteo", [False, True])
def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str], criteo: bool) -> None:
    log = write_lines(tmp_path / "log.tsv", draw_log(200))
    assert (
        run("--rows", 3000, *([] if criteo else [2000]), "--folder", tmp_path, *(("--criteo", log) if criteo else ()))
        == 0
    )
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = [line for line in lines if line[:1] in (["3,000"], ["2,000"])]
    assert [len(row) for row in rows] == ([12] if criteo else [12, 12])
    for row in rows:
        peak, libraries, vocabulary, rest = (int(cell.replace(",", "")) for cell in row[7:11])
        assert 0 < libraries < peak and vocabulary >= 0 and rest > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.tsv"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--rows", "10"], "expected a number of at least 1000, got '10'"),
        (["--criteo", "no-such-file"], "no-such-file"),
        (["--folder", "no-such-folder"], "no-such-folder"),
    ],
)
def test_bad_arguments(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        run("--rows", 1000, *arguments)
    assert raised.value.code == 2 and complaint in capsys.readouterr().err
