"""On real rows: the Criteo log that AUTOINT_FAST_CRITEO names."""

from __future__ import annotations

import os
import statistics
from pathlib import Path

import pytest

from autoint_fast.clicklog.prepare import prepare
from autoint_fast.training import Settings, evaluate, train

SEEDS = range(5)


@pytest.mark.slow
@pytest.mark.skipif("AUTOINT_FAST_CRITEO" not in os.environ, reason="AUTOINT_FAST_CRITEO names no Criteo log")
def test_auc_is_that_of_the_einsum_model(tmp_path: Path) -> None:
    """Means over five seeds, on test rows; the log is small, so the seeds differ by a hundredth themselves."""
    prepare([os.environ["AUTOINT_FAST_CRITEO"]], tmp_path / "data", format="criteo")
    means = {}
    for backend in ("auto", "reference"):
        aucs = []
        for seed in SEEDS:
            run = tmp_path / f"{backend}-{seed}"
            train(tmp_path / "data", run, Settings(backend=backend, seed=seed, batch_size=256, patience=2))
            aucs.append(evaluate(run, tmp_path / "data").auc)
        means[backend] = statistics.mean(aucs)
        print(f"{backend}: AUC {means[backend]:.4f}, by seed {', '.join(f'{auc:.4f}' for auc in aucs)}")
    assert min(means.values()) > 0.7
    assert abs(means["auto"] - means["reference"]) < 0.01, means
