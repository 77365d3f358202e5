"""`python -m benchmarks prepare`: how fast a log is prepared, and in how much memory."""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
from rich import box
from rich.table import Table

from autoint_fast.clicklog.prepare import prepare
from autoint_fast.clicklog.reader import CRITEO, CRITEO_CATEGORICAL, CRITEO_NUMERIC

from . import command
from .command import at_least
from .memory import MIB, STATUS

# Distinct ids of each categorical column of the whole Criteo log, and its rows.
# fmt: off
CARDINALITIES = np.array([
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306, 10, 5652,
    2173, 4, 7046547, 18, 15, 286181, 105, 142572,
])
# fmt: on
CRITEO_ROWS = 45_840_617
# Values that come up ten times or more in it, and how often they shall here.
FREQUENT = 998_960
FREQUENT_COUNT = 20
DRAWN_ROWS = 10_000
CHUNK_ROWS = 100_000
SAMPLED_EVERY_SECONDS = 0.01


@dataclass(frozen=True)
class Measured:
    """One run. Sizes in bytes; libraries: resident before it; vocabulary: what counting values took at most."""

    rows: int
    log: int
    distinct: int
    ids: int
    counting_seconds: float
    encoding_seconds: float
    libraries: int
    vocabulary: int
    peak: int
    written: int


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> int:
    """Prepares logs of the lengths that the arguments ask for; gives the exit status."""
    parser.add_argument(
        "--rows",
        type=at_least(1000, int),
        nargs="+",
        default=[500_000, 2_000_000],
        metavar="N",
        help="of a log each (default: 500000 2000000)",
    )
    parser.add_argument("--criteo", type=Path, metavar="FILE", help="the rows of this Criteo log instead of drawn ones")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="for the logs, which are removed (default: TMPDIR)")
    options = parser.parse_args(arguments)
    console, errors = command.consoles()
    try:
        base = _sample(options.criteo) if options.criteo else _drawn()
        results = []
        for rows in options.rows:
            with tempfile.TemporaryDirectory(dir=options.folder) as folder, errors.status(f"{rows:,} rows"):
                results.append(_measured(base, rows, Path(folder)))
    except (OSError, ValueError) as error:
        parser.error(str(error))
    console.print(_table(results))
    return 0


def _table(results: Sequence[Measured]) -> Table:
    title = "logs with new ids at Criteo's rate; peak memory of a fresh process by what takes it"
    result = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left")
    names = ["rows", "log,\nMiB", "distinct\nvalues", "ids", "counting,\nrows/s", "encoding,\nrows/s", "both,\nrows/s"]
    names += ["peak,\nMiB", "libraries,\nMiB", "vocabulary,\nMiB", "the rest,\nMiB", "written,\nbytes/row"]
    for name in names:
        result.add_column(name, justify="right", no_wrap=True)
    for run in results:
        seconds = (run.counting_seconds, run.encoding_seconds)
        sizes = (run.peak, run.libraries, run.vocabulary, run.peak - run.libraries - run.vocabulary)
        result.add_row(
            f"{run.rows:,}",
            f"{run.log / MIB:,.0f}",
            f"{run.distinct:,}",
            f"{run.ids:,}",
            *(f"{run.rows / s:,.0f}" for s in (*seconds, sum(seconds))),
            *(f"{size / MIB:,.0f}" for size in sizes),
            f"{run.written / run.rows:.0f}",
        )
    return result


# --- logs -------------------------------------------------------------------------------------------------------------


def _sample(path: Path) -> pa.Table:
    """The first block of a Criteo log, as text."""
    read = pa.csv.open_csv(
        path,
        pa.csv.ReadOptions(column_names=CRITEO, block_size=16 << 20),
        pa.csv.ParseOptions(delimiter="\t", quote_char=False),
        pa.csv.ConvertOptions(column_types=dict.fromkeys(CRITEO, pa.string())),
    )
    return pa.table(read.read_next_batch())


def _drawn() -> pa.Table:
    """Rows with about as much to distinguish as Criteo's."""
    draw = np.random.default_rng(0)
    numbers = draw.exponential(1.0, (len(CRITEO_NUMERIC), DRAWN_ROWS)) ** 4 * 10
    ids = draw.random((len(CRITEO_CATEGORICAL), DRAWN_ROWS)) ** 4 * np.minimum(CARDINALITIES, DRAWN_ROWS)[:, None]
    columns = [draw.integers(0, 2, DRAWN_ROWS), *numbers.astype(np.int64)]
    text = [pc.cast(pa.array(column), pa.string()) for column in columns]
    return pa.table([*text, *(_hex(column.astype(np.uint32)) for column in ids)], names=CRITEO)


def _write_log(base: pa.Table, rows: int, path: Path) -> None:
    """Rows of `base` in which each column has new ids as often as Criteo's log has distinct ones, and others that come
    up often enough to get an id."""
    draw = np.random.default_rng(0)
    share = CARDINALITIES / CARDINALITIES.sum()
    fresh = CARDINALITIES / CRITEO_ROWS
    frequent = share * FREQUENT * FREQUENT_COUNT / CRITEO_ROWS
    pools = np.ceil(share * FREQUENT * rows / CRITEO_ROWS).astype(np.int64)
    options = pa.csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
    schema = pa.schema([(name, pa.string()) for name in CRITEO])
    with pa.csv.CSVWriter(path, schema, write_options=options) as writer:
        for start in range(0, rows, CHUNK_ROWS):
            n = min(CHUNK_ROWS, rows - start)
            chunk = base.take(pa.array(draw.integers(0, len(base), n)))
            columns = {name: chunk[name] for name in CRITEO}
            for i, name in enumerate(CRITEO_CATEGORICAL):
                at = draw.random(n)
                # An odd factor makes each number another one; high and low ones for the two kinds.
                new = np.arange(start, start + n) * 2654435761 % (1 << 31) + (1 << 31)
                known = draw.integers(0, pools[i], n) * 2654435761 % (1 << 31)
                ids = _hex(np.where(at < fresh[i], new, known).astype(np.uint32))
                columns[name] = pc.if_else(pa.array(at < fresh[i] + frequent[i]), ids, columns[name].combine_chunks())
            writer.write_table(pa.table(columns, schema=schema))


def _hex(numbers: np.ndarray) -> pa.Array:
    """Eight digits each, as text."""
    digits = np.array([f"{byte:02x}" for byte in range(256)], "S2")
    text = digits[numbers.astype(">u4").view(np.uint8)].view("S8")
    return pc.cast(pa.array(text, pa.binary()), pa.string())


# --- measuring --------------------------------------------------------------------------------------------------------


def _measured(base: pa.Table, rows: int, folder: Path) -> Measured:
    log = folder / "log.tsv"
    _write_log(base, rows, log)
    # A fresh process, so that nothing is counted that others left.
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_prepare, (log, folder / "out"))


def _prepare(log: Path, out: Path) -> Measured:
    libraries = _resident()
    peak, done = libraries, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(SAMPLED_EVERY_SECONDS):
            peak = max(peak, _resident())

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        report = prepare([log], out)
    finally:
        done.set()
        watching.join()
    return Measured(
        rows=sum(report.rows.values()),
        log=log.stat().st_size,
        distinct=sum(report.distinct),
        ids=sum(report.schema.cardinalities) - len(report.schema.cardinalities),
        counting_seconds=report.seconds["counting"],
        encoding_seconds=report.seconds["encoding"],
        libraries=libraries,
        vocabulary=report.vocabulary_bytes,
        peak=peak,
        written=sum(file.stat().st_size for file in out.iterdir()),
    )


def _resident() -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) << 10
