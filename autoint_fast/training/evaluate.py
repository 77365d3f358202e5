"""AUC and logloss of a model on rows it was not trained on."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ..model import AutoInt
from .distributed import Processes
from .run import Run, device_for

if TYPE_CHECKING:
    from ..clicklog.shards import Split

# Without gradients nothing is kept, and a batch of this size fills any machine.
EVALUATION_BATCH = 16384


class Metrics(NamedTuple):
    """Of predictions on `rows` rows. auc: NaN where all labels are the same. logloss: mean, in nats."""

    auc: float
    logloss: float
    rows: int

    def __str__(self) -> str:
        return f"AUC {self.auc:.5f}, logloss {self.logloss:.5f} on {self.rows:,} rows"


def measure(labels: np.ndarray, logits: np.ndarray) -> Metrics:
    """labels: (n,) 0 or 1; logits: (n,)."""
    from sklearn.metrics import log_loss, roc_auc_score

    probabilities = 1 / (1 + np.exp(-logits.astype(np.float64)))
    both = bool((labels != labels[0]).any())
    auc = float(roc_auc_score(labels, probabilities)) if both else float("nan")
    return Metrics(auc, float(log_loss(labels, probabilities, labels=[0, 1])), len(labels))


def logits_of(
    model: torch.nn.Module,
    split: Split,
    rows: range,
    device: torch.device,
    amp: bool = False,
    advance: Callable[[int], object] = lambda rows: None,
) -> tuple[np.ndarray, np.ndarray]:
    """Labels and logits of some rows of a split; `advance` is told how many are done.

    Raises ValueError for a logit that is not finite.
    """
    labels, logits = np.empty(len(rows), np.float32), np.empty(len(rows), np.float32)
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=amp):
        for start in range(0, len(rows), EVALUATION_BATCH):
            part = slice(start, min(start + EVALUATION_BATCH, len(rows)))
            categorical, numeric, label = split.batch(slice(rows.start + part.start, rows.start + part.stop))
            arguments = (categorical.to(device), numeric.to(device) if numeric.shape[1] else None)
            labels[part] = label.numpy()
            logits[part] = model(*arguments).float().cpu().numpy()
            finite = np.isfinite(logits[part])
            if not finite.all():
                row = rows.start + start + int(np.argmin(finite))
                raise ValueError(f"row {row} of {split.split}: expected a finite logit, got {logits[part][~finite][0]}")
            advance(part.stop - part.start)
    return labels, logits


def evaluate_split(
    model: torch.nn.Module,
    split: Split,
    among: Processes,
    amp: bool = False,
    advance: Callable[[int], object] = lambda rows: None,
) -> Metrics:
    """Each process takes its part of the rows, and each gets the metrics of all."""
    if len(split) == 0:
        raise ValueError("expected rows to evaluate on, got none")
    share = -(-len(split) // among.world)
    rows = range(min(len(split), among.rank * share), min(len(split), (among.rank + 1) * share))
    found = among.gather(logits_of(model, split, rows, among.device, amp, advance))
    return measure(*(np.concatenate(parts) for parts in zip(*found, strict=True)))


def evaluate(
    run: str | os.PathLike[str],
    data: str | os.PathLike[str],
    *,
    split: str = "test",
    device: torch.device | str | None = None,
    advance: Callable[[int], object] = lambda rows: None,
) -> Metrics:
    """The metrics of a run's best model on a split of prepared data: "train", "validation" or "test".

    Raises ValueError for data of another kind than the run was trained on, OSError for files that are not there.
    """
    from ..clicklog.shards import Split

    opened, rows = Run.open(Path(run)), Split(data, split)
    opened.check(Path(data))
    where = device_for(device)
    model: AutoInt = opened.model(where)
    return evaluate_split(model, rows, Processes(0, 1, where), opened.settings.amp, advance)
