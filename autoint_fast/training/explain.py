"""Which fields attend to which: the paper's figure 7."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..files import make_folder, replacing
from .run import Run, device_for

# Attention is (B, H, F, F) for each layer.
EXPLANATION_BATCH = 512


class Pair(NamedTuple):
    """A field and one that it attends to."""

    query: str
    key: str
    weight: float
    layer: int  # from 1, where it is the strongest
    head: int


class Explanation(NamedTuple):
    """Attention in a model, and where its pictures and tables are.

    one, mean: (layers, heads, F, F) float64; a row is what one field attends to and sums to 1. `one` is of a single
    prediction, `mean` over `rows` rows.
    """

    fields: tuple[str, ...]
    probability: float  # of a click, of the single prediction
    one: np.ndarray
    mean: np.ndarray
    rows: int
    files: tuple[Path, ...]


def strongest(attention: np.ndarray, fields: Sequence[str], count: int = 10) -> list[Pair]:
    """The pairs of two fields with the most attention in any layer and head, of attention (layers, heads, F, F)."""
    layers, heads, n = attention.shape[:3]
    everywhere = attention.reshape(layers * heads, n, n)
    where, most = everywhere.argmax(axis=0), everywhere.max(axis=0)
    pairs = (divmod(int(i), n) for i in np.argsort(-most, axis=None, kind="stable"))
    chosen = [(query, key) for query, key in pairs if query != key][:count]
    return [
        Pair(fields[q], fields[k], float(most[q, k]), int(where[q, k]) // heads + 1, int(where[q, k]) % heads + 1)
        for q, k in chosen
    ]


def explain(
    run: str | os.PathLike[str],
    data: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    row: int = 0,
    split: str = "test",
    most_rows: int = 100_000,
    force: bool = False,
    device: torch.device | str | None = None,
    advance: Callable[[int], object] = lambda rows: None,
) -> Explanation:
    """Heat maps, PNG and CSV, of a run's best model: of one row of a split, and of the mean over its first `most_rows`.

    For each layer and head `out` gets row-<row>-layer-<i>-head-<j> and mean-layer-<i>-head-<j>, counted from 1.

    Raises FileExistsError for a folder that is not empty, unless with `force`; ValueError for other data than the
    run's, or a row that is not there.
    """
    from ..clicklog.shards import Split

    opened, rows = Run.open(Path(run)), Split(data, split)
    opened.check(Path(data))
    if not 0 <= row < len(rows):
        raise ValueError(f"row: expected a row of the split {split}, 0 to {len(rows) - 1}, got {row}")
    if most_rows < 1:
        raise ValueError(f"most_rows: expected at least 1, got {most_rows}")
    folder = Path(out)
    make_folder(folder, force)
    where = device_for(device)
    model = opened.model(where)

    def attention(part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        categorical, numeric, _ = rows.batch(part)
        arguments = (categorical.to(where), numeric.to(where) if numeric.shape[1] else None)
        logits, layers = model(*arguments, return_attention=True)
        return logits.sigmoid(), torch.stack(layers, dim=1)  # [B, layers, H, F, F]

    count = min(most_rows, len(rows))
    total: torch.Tensor | float = 0.0
    with torch.inference_mode():
        probability, one = attention(slice(row, row + 1))
        for start in range(0, count, EXPLANATION_BATCH):
            part = slice(start, min(start + EXPLANATION_BATCH, count))
            total = total + attention(part)[1].double().sum(dim=0)
            advance(part.stop - part.start)
    assert isinstance(total, torch.Tensor)
    kinds = {
        f"row-{row}": (one[0].double().cpu().numpy(), f"row {row} of {split}"),
        "mean": ((total / count).cpu().numpy(), f"mean of {count:,} rows of {split}"),
    }
    fields = opened.schema.fields
    files: list[Path] = []
    for name, (values, about) in kinds.items():
        files += _write(folder, name, values, fields, about)
    return Explanation(fields, float(probability), kinds[f"row-{row}"][0], kinds["mean"][0], count, tuple(files))


def _write(folder: Path, name: str, attention: np.ndarray, fields: Sequence[str], about: str) -> list[Path]:
    """The pictures and tables of one attention (layers, heads, F, F)."""
    written = []
    for i, heads in enumerate(attention, start=1):
        for j, values in enumerate(heads, start=1):
            path = folder / f"{name}-layer-{i}-head-{j}.csv"
            with replacing(path, "w", encoding="utf-8", newline="") as file:
                table = csv.writer(file)
                table.writerow(["field", *fields])
                table.writerows([field, *(f"{v:.6g}" for v in row)] for field, row in zip(fields, values, strict=True))
            written.append(path)
            path = path.with_suffix(".png")
            with replacing(path) as file:
                _draw(file, values, fields, f"layer {i}, head {j}: {about}")
            written.append(path)
    return written


def _draw(file: object, values: np.ndarray, fields: Sequence[str], title: str) -> None:
    # Without pyplot, which would look for a display and change the state of the user's own figures.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = 2.5 + 0.2 * len(fields)
    figure = Figure(figsize=(size + 0.8, size), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    # Pairs of fields set the scale; next to what a field attends to itself, all of them may be dark.
    others = values[~np.eye(len(fields), dtype=bool)] if len(fields) > 1 else values
    image = axes.imshow(values, cmap="viridis", vmin=others.min(), vmax=others.max())
    # A dollar sign would begin a formula.
    labels = [field.replace("$", r"\$") for field in fields]
    axes.set_xticks(range(len(fields)), labels, rotation=90, fontsize=8)
    axes.set_yticks(range(len(fields)), labels, fontsize=8)
    axes.set_xlabel("attends to")
    axes.set_ylabel("field")
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, ax=axes, fraction=0.046, extend="both", label="attention")
    figure.savefig(file, format="png", dpi=120)
