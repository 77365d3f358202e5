"""Click probabilities of raw rows."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ..files import check_absent, replacing
from .run import Run, device_for

# Of raw rows held at a time.
PREDICTION_BATCH = 8192
HEADER = "probability"


def predict(
    run: str | os.PathLike[str],
    files: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    device: torch.device | str | None = None,
    advance: Callable[[int], object] = lambda rows: None,
) -> int:
    """Writes the click probability of every row of raw files to `out`, in order, as CSV with a header; gives the rows.

    The files are in the format of the log that the run was prepared from; a column of labels is not needed. Memory does
    not grow with them. `out` is there only when all of it is. `advance` is told how many rows are done.

    Raises FileExistsError where `out` exists, unless with `force`; OSError and ValueError for a bad file.
    """
    from ..clicklog.encode import Encoder

    opened, out = Run.open(Path(run)), Path(out)
    check_absent(out, force)
    where = device_for(device)
    model, encoder = opened.model(where), Encoder.load(opened.folder)
    rows = 0
    with (
        replacing(out, "w", encoding="ascii", newline="\n") as file,
        torch.inference_mode(),
        torch.autocast(where.type, torch.bfloat16, enabled=opened.settings.amp),
    ):
        file.write(f"{HEADER}\n")
        for categorical, numeric, _ in encoder.batches([Path(f) for f in files], PREDICTION_BATCH):
            logits = model(categorical.to(where), numeric.to(where) if numeric.shape[1] else None)
            # Nine digits tell any two numbers of single precision apart.
            file.writelines(f"{p:.9g}\n" for p in logits.float().sigmoid().tolist())
            rows += len(logits)
            advance(len(logits))
    return rows
