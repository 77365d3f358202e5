"""Attention as pictures and tables."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from autoint_fast.clicklog.shards import Split
from autoint_fast.reference import attention_probabilities
from autoint_fast.training import Settings, explain, train
from autoint_fast.training.explain import Pair, strongest
from autoint_fast.training.run import Run
from tests.clicks import CATEGORICAL, NUMERIC, prepared

FIELDS = (*CATEGORICAL, *NUMERIC)
LAYERS, HEADS, ROW = 2, 2, 5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("log"))


@pytest.fixture(scope="module", params=["standard", "paper"])
def run(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(data, folder, Settings(n_layers=LAYERS, layer=request.param, backend="torch", batch_size=200, epochs=1))
    return folder


def table(path: Path) -> np.ndarray:
    header, *lines = csv.reader(path.open(encoding="utf-8"))
    assert header == ["field", *FIELDS] and [line[0] for line in lines] == list(FIELDS)
    return np.array([line[1:] for line in lines], float)


def test_pictures_and_tables(run: Path, data: Path, tmp_path: Path) -> None:
    found = explain(run, data, tmp_path / "out", row=ROW)
    stems = [
        f"{name}-layer-{i}-head-{j}"
        for name in (f"row-{ROW}", "mean")
        for i in range(1, LAYERS + 1)
        for j in range(1, HEADS + 1)
    ]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        f"{stem}.{kind}" for stem in stems for kind in ("csv", "png")
    )
    assert sorted(found.files) == sorted((tmp_path / "out").iterdir())
    assert found.fields == FIELDS
    # By the definition, layer by layer.
    model, split = Run.open(run).model(), Split(data, "test")
    categorical, numeric, _ = split.batch(slice(0, len(split)))
    with torch.no_grad():
        x = model.embed(categorical, numeric)
        for i, layer in enumerate(model.layers):
            expected = attention_probabilities(x, layer.interaction(), None).double().numpy()  # [H, B, F, F]
            np.testing.assert_allclose(found.one[i], expected[:, ROW], atol=1e-6)
            np.testing.assert_allclose(found.mean[i], expected.mean(1), atol=1e-6)
            x = layer(x)
        assert found.probability == pytest.approx(float(model(categorical, numeric)[ROW].sigmoid()), abs=1e-6)
    assert found.rows == len(split)
    for name, values in ((f"row-{ROW}", found.one), ("mean", found.mean)):
        np.testing.assert_allclose(values.sum(-1), 1, atol=1e-6)
        for i in range(LAYERS):
            for j in range(HEADS):
                path = tmp_path / "out" / f"{name}-layer-{i + 1}-head-{j + 1}.csv"
                np.testing.assert_allclose(table(path), values[i, j], atol=1e-5)
                assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_mean_is_over_as_many_rows_as_asked_for(run: Path, data: Path, tmp_path: Path) -> None:
    found = explain(run, data, tmp_path / "out", most_rows=1, split="validation")
    assert found.rows == 1
    np.testing.assert_allclose(found.one, found.mean, atol=1e-6)


def test_strongest_pairs() -> None:
    attention = np.zeros((2, 3, 3, 3))
    attention[0, 0] = [[0.6, 0.3, 0.1], [0.9, 0.05, 0.05], [0.2, 0.8, 0.0]]
    attention[1, 2] = [[1.0, 0.0, 0.0], [0.2, 0.2, 0.6], [0.1, 0.9, 0.0]]
    expected = [
        Pair("b", "a", 0.9, 1, 1),
        Pair("c", "b", 0.9, 2, 3),
        Pair("b", "c", 0.6, 2, 3),
        Pair("a", "b", 0.3, 1, 1),
    ]
    assert strongest(attention, ("a", "b", "c"), 4) == expected


def test_names_that_matplotlib_would_take_for_a_formula(tmp_path: Path) -> None:
    from autoint_fast.training.explain import _write

    _write(tmp_path, "one", np.full((1, 1, 2, 2), 0.5), ("cost in $", r"a$\frac"), "row $1")
    assert len(list(tmp_path.iterdir())) == 2


def test_bad_arguments(run: Path, data: Path, tmp_path: Path) -> None:
    rows = len(Split(data, "test"))
    for row in (-1, rows):
        with pytest.raises(ValueError, match=f"row: expected a row of the split test, 0 to {rows - 1}, got {row}"):
            explain(run, data, tmp_path / "out", row=row)
    with pytest.raises(ValueError, match="most_rows"):
        explain(run, data, tmp_path / "out", most_rows=0)
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileExistsError, match="--force"):
        explain(run, data, tmp_path / "full")
    explain(run, data, tmp_path / "full", force=True)
