"""The results as a picture: samples per second over the batch size, a panel for every shape and mode."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from .cases import MODES, SHAPES
from .contestants import CONTESTANTS
from .report import ResultsError, read_csv

# One picture shows what agrees in these.
GROUP = ("machine", "processor", "device", "dtype", "data")

ResultRow = Mapping[str, str]


def plot_csv(path: Path, folder: Path) -> list[Path]:
    """Draws a results file, a PNG for every machine, device, dtype and kind of data; gives their paths.

    Raises ResultsError for a file without any timings.
    """
    rows = [row for row in read_csv(path) if row["p50_ms"]]
    if not rows:
        raise ResultsError(f"{path}: expected results, but there is no timing in it")

    def group(row: ResultRow) -> tuple[str, ...]:
        return tuple(row[name] for name in GROUP)

    one_machine = len({row["machine"] for row in rows}) == 1
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    # Sorting is stable: cases stay in the order of the file.
    for _, members in groupby(sorted(rows, key=group), key=group):
        together = list(members)
        pictures.append(folder / _file_name(together[0], one_machine))
        _draw(together, pictures[-1])
    return pictures


def _file_name(row: ResultRow, one_machine: bool) -> str:
    text = "-".join(["results", *(row[name] for name in (GROUP[2:] if one_machine else GROUP))])
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()) + ".png"


def _draw(rows: Sequence[ResultRow], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    known = list(SHAPES)
    by_table = sorted(rows, key=lambda row: known.index(row["shape"]) if row["shape"] in known else len(known))
    shapes = list(dict.fromkeys(_shape(row) for row in by_table))
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in rows)]
    names = _ordered({row["contestant"] for row in rows})
    # By its place among all, so that a contestant keeps its colour from picture to picture.
    everybody = enumerate(_ordered({*names, *CONTESTANTS}))
    colour = {name: pyplot.get_cmap("Set1" if _is_ours(name) else "Set2")(i % 8) for i, name in everybody}
    size = (1.5 + 3.2 * len(shapes), 1.0 + 3.0 * len(modes))
    figure, axes = pyplot.subplots(len(modes), len(shapes), figsize=size, squeeze=False, layout="constrained")
    handles = {}
    for panels, mode in zip(axes, modes, strict=True):
        for panel, shape in zip(panels, shapes, strict=True):
            for name in names:
                batch, middle, low, high = _line(rows, mode, shape, name)
                if not batch:
                    continue
                line, width = ("-", 2.2) if _is_ours(name) else ("--", 1.2)
                style = {"color": colour[name], "linewidth": width, "marker": "o", "markersize": 4}
                (handles[name],) = panel.plot(batch, middle, line, **style)
                panel.fill_between(batch, low, high, color=colour[name], alpha=0.15, linewidth=0)
            panel.set_xscale("log", base=2)
            panel.set_xticks(sorted({int(row["batch"]) for row in rows if _shape(row) == shape}))
            panel.xaxis.set_major_formatter("{x:,.0f}")
            panel.set_yscale("log")
            panel.set_title(f"{shape}, {mode}", fontsize=9)
            panel.grid(alpha=0.3, which="both")
        panels[0].set_ylabel("samples / s")
    for panel in axes[-1]:
        panel.set_xlabel("batch size")
    figure.legend([handles[name] for name in names], names, loc="outside right upper", fontsize=9)
    first = rows[0]
    title = f"{first['processor']}, {first['device']}, {first['dtype']}, {first['data']} data"
    figure.suptitle(f"{title}\nmedian of interleaved rounds, band from p20 to p80", fontsize=10)
    figure.savefig(target, dpi=130)
    pyplot.close(figure)


def _line(
    rows: Sequence[ResultRow], mode: str, shape: str, name: str
) -> tuple[list[int], list[float], list[float], list[float]]:
    """Batch sizes, and samples per second at the median, at p80 and at p20 of the time."""
    points = {
        int(row["batch"]): row for row in rows if (row["mode"], _shape(row), row["contestant"]) == (mode, shape, name)
    }
    batch = sorted(points)
    speeds = ([b / float(points[b][column]) * 1e3 for b in batch] for column in ("p50_ms", "p80_ms", "p20_ms"))
    return batch, *speeds  # type: ignore[return-value]


def _is_ours(name: str) -> bool:
    return name in CONTESTANTS and CONTESTANTS[name].ours


def _shape(row: ResultRow) -> str:
    return f"{row['shape']} {row['fields']}x{row['emb_size']}x{row['n_head']}"


def _ordered(names: Iterable[str]) -> list[str]:
    """In the order of the contestants' table, unknown names last."""
    known = list(CONTESTANTS)
    return sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name))


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> int:
    """Draws the results file that the arguments name; gives the exit status."""
    parser.add_argument("csv", type=Path, help="a results.csv")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the pictures go (default: beside it)")
    options = parser.parse_args(arguments)
    try:
        pictures = plot_csv(options.csv, options.out or options.csv.parent)
    except (OSError, ResultsError) as error:
        parser.error(str(error))
    for picture in pictures:
        print(picture)
    return 0
