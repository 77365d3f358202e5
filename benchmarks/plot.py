"""The results as a picture: samples per second over the batch size, a panel for every shape and mode."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path

from .cases import MODES
from .contestants import CONTESTANTS
from .report import read_csv

# Of the rows of a file, what one picture can show together.
GROUP = ("machine", "processor", "device", "dtype", "data")


def plot_csv(path: Path, folder: Path) -> list[Path]:
    """Draws the results of a file, a PNG for every machine, device, dtype and kind of data; gives their paths.

    Raises ValueError for a file without any timings.
    """
    rows = [row for row in read_csv(path) if row["p50_ms"]]
    if not rows:
        raise ValueError(f"{path}: expected results of this benchmark, but there is no timing in it")

    def group(row: Mapping[str, str]) -> tuple[str, ...]:
        return tuple(row[name] for name in GROUP)

    groups = [list(members) for _, members in groupby(sorted(rows, key=group), key=group)]
    folder.mkdir(parents=True, exist_ok=True)
    return [_draw(members, folder / f"{_name(members[0], len(groups) > 1)}.png") for members in groups]


def _name(row: Mapping[str, str], several: bool) -> str:
    parts = [row[name] for name in GROUP] if several else []
    return "-".join(["results", *(re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-") for part in parts)])


def _draw(rows: Sequence[Mapping[str, str]], target: Path) -> Path:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = list(dict.fromkeys(_shape(row) for row in rows))
    modes = [mode for mode in MODES if any(row["mode"] == mode for row in rows)]
    colours = pyplot.get_cmap("tab20")
    names = _ordered({row["contestant"] for row in rows})
    # By their place among all contestants, so that each keeps its colour from picture to picture.
    colour = {name: colours(i % 20) for i, name in enumerate(_ordered({*names, *CONTESTANTS}))}
    figure, axes = pyplot.subplots(
        len(modes),
        len(shapes),
        figsize=(1.5 + 3.2 * len(shapes), 1.5 + 3.0 * len(modes)),
        squeeze=False,
        layout="constrained",
    )
    for panels, mode in zip(axes, modes, strict=True):
        for panel, shape in zip(panels, shapes, strict=True):
            for name in names:
                here = (
                    row
                    for row in rows
                    if (row["mode"], _shape(row), row["contestant"]) == (mode, shape, name)
                )
                points = sorted(_point(row) for row in here)
                if not points:
                    continue
                batch, middle, low, high = zip(*points, strict=True)
                ours = name.startswith("ours")
                line, width = ("-", 2.2) if ours else ("--", 1.2)
                panel.plot(
                    batch, middle, line, color=colour[name], linewidth=width, marker="o", ms=4, label=name
                )
                panel.fill_between(batch, low, high, color=colour[name], alpha=0.15, linewidth=0)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.set_title(f"{shape}, {mode}", fontsize=9)
            panel.grid(alpha=0.3, which="both")
    for panels in axes:
        panels[0].set_ylabel("samples / s")
    for panel in axes[-1]:
        panel.set_xlabel("batch size")
    handles = {
        label: handle for panel in axes.flat for handle, label in zip(*panel.get_legend_handles_labels())
    }
    figure.legend([handles[name] for name in names], names, loc="outside right upper", fontsize=9)
    first = rows[0]
    figure.suptitle(
        f"{first['processor']}, {first['device']}, {first['dtype']}, {first['data']} data: median of interleaved "
        "rounds, band from p20 to p80",
        fontsize=10,
    )
    figure.savefig(target, dpi=130)
    pyplot.close(figure)
    return target


def _shape(row: Mapping[str, str]) -> str:
    return f"{row['shape']} {row['fields']}x{row['emb_size']}x{row['n_head']}"


def _point(row: Mapping[str, str]) -> tuple[float, float, float, float]:
    batch = float(row["batch"])
    return (batch, *(batch / float(row[name]) * 1e3 for name in ("p50_ms", "p80_ms", "p20_ms")))  # type: ignore[return-value]


def _ordered(names: Iterable[str]) -> list[str]:
    """In the order of the contestants' table, unknown names last."""
    known = list(CONTESTANTS)
    return sorted(names, key=lambda name: (known.index(name) if name in known else len(known), name))


def main(arguments: Sequence[str], parser: argparse.ArgumentParser) -> int:
    parser.add_argument("csv", type=Path, help="a results.csv")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where the pictures go (default: beside the CSV)"
    )
    options = parser.parse_args(arguments)
    try:
        pictures = plot_csv(options.csv, options.out or options.csv.parent)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for picture in pictures:
        print(picture)
    return 0
