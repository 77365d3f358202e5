"""`python -m benchmarks model`: who takes part, that wrong numbers get no time, what it prints and records."""

from __future__ import annotations

import csv
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from autoint_fast import AutoInt, ReferenceInteractingLayer
from autoint_fast.kernels import torch_engine
from benchmarks import installed, model, timing
from benchmarks.__main__ import main
from benchmarks.cases import FORWARD
from benchmarks.model import CONTESTANTS, EINSUM, OURS, SERVING, TRAINING, Sizes, rows_of, step_of

TINY = Sizes(categorical=3, ids=9, numeric=2, emb_size=8, n_layers=2)
SMALL = ["--categorical=3", "--ids=9", "--numeric=2", "--emb-size=8", "--layers=2", "--batch", "20", "--serving", "1"]
SMALL += ["--seconds=0", "--no-memory", "--backend=torch"]


@pytest.fixture
def no_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> NoReturn:
        raise installed.Unable("not installed", name.partition(".")[0])

    monkeypatch.setattr(installed, "load", load)


def test_einsum_and_ours_are_the_same_model() -> None:
    ids, numbers, _ = rows_of(TINY, 20)
    ours = AutoInt([9, 9, 9], 2, 8, 2, backend="torch")
    torch.nn.init.normal_(ours.embedding.weight)
    einsum = model.einsum_of(ours)
    assert all(type(layer) is ReferenceInteractingLayer for layer in einsum.layers)
    assert ours.state_dict().keys() == einsum.state_dict().keys()
    torch.testing.assert_close(einsum(ids, numbers), ours(ids, numbers), rtol=0, atol=1e-5)
    assert numbers.isnan().any() and ids.max() == 8


@pytest.mark.parametrize("name", CONTESTANTS)
def test_every_contestant_learns_in_its_step_and_not_in_its_forward(name: str) -> None:
    kept: list[torch.nn.Module] = []

    def keep(*arguments: object) -> object:
        prepared = CONTESTANTS[name].prepare(*arguments)
        kept.append(prepared[0])
        return prepared

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "CONTESTANTS", {name: CONTESTANTS[name]._replace(prepare=keep)})
        try:
            forward, train = (step_of(name, mode, TINY, 20, "torch") for mode in (FORWARD, TRAINING))
        except installed.Unable as error:
            pytest.skip(str(error))
    before = [[p.clone() for p in module.parameters()] for module in kept]
    out = forward()
    assert isinstance(out, torch.Tensor) and out.numel() == 20 and not out.requires_grad
    train()
    changed = [
        sum(not torch.equal(p, old) for p, old in zip(module.parameters(), olds, strict=True))
        for module, olds in zip(kept, before, strict=True)
    ]
    assert changed[0] == 0 and changed[1] > 4


@pytest.mark.parametrize("name", CONTESTANTS)
def test_every_contestant_interacts_among_so_many_fields(name: str) -> None:
    """Same sizes: three layers of two heads over all fields, but for the one that says otherwise."""
    ids, numbers, _ = rows_of(TINY, 4)
    try:
        module, arguments = CONTESTANTS[name].prepare(TINY, ids, numbers, "torch")
    except installed.Unable as error:
        pytest.skip(str(error))
    seen: list[torch.Size] = []
    layers = [m for m in module.modules() if type(m).__name__.endswith("InteractingLayer")]
    for layer in layers:
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    module(*arguments)
    assert seen == [(4, 3 if name == "deepctr" else 5, 8)] * 2


@pytest.mark.usefixtures("no_libraries")
def test_table_csv_and_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def race(steps: Mapping[str, timing.Step], *args: object, **options: object) -> dict[str, list[float]]:
        return {name: [2e-3 if name == OURS else 5e-3] * 5 for name in steps}

    def latencies(steps: Mapping[str, timing.Step], seconds: float) -> dict[str, list[float]]:
        return {name: [1e-3] * 98 + [4e-3] * 2 for name in steps}

    monkeypatch.setattr(timing, "race", race)
    monkeypatch.setattr(model, "latencies", latencies)
    assert main(["model", *SMALL, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for name in ("deepctr", "deepctr-all", "rechub"):
        assert f"not measured: {name}: not installed" in shown
    lines = [line.split() for line in shown.splitlines() if f" {OURS} " in line]
    assert lines == [
        [FORWARD, OURS, "20", "2.00", "10,000", "2.50"],
        ["training", "step", OURS, "20", "2.00", "10,000", "2.50"],
        [SERVING, OURS, "1", "1.00", "4.00", "1,000", "1.00"],
    ]
    with (tmp_path / model.CSV_NAME).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["contestant"], row["mode"]) for row in rows] == [
        (name, mode) for mode in (FORWARD, TRAINING, SERVING) for name in (EINSUM, OURS)
    ]
    assert all(row["ids"] == "9" and row["torch"] == torch.__version__ for row in rows)
    assert (tmp_path / model.PICTURE_NAME).read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("no_libraries")
def test_a_real_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["model", *[word for word in SMALL if word != "--no-memory"], "--out", str(tmp_path)]) == 0
    with (tmp_path / model.CSV_NAME).open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert float(row["p99"]) >= float(row["p50"]) > 0
        assert float(row["rows_per_second"]) == pytest.approx(float(row["batch"]) / float(row["p50"]))
        assert (row["peak_mib"] != "") == (row["mode"] != SERVING) or "not measured" in row["notes"]
    assert "WRONG" not in capsys.readouterr().out


def test_wrong_numbers_get_no_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interact = torch_engine.interact
    monkeypatch.setattr(torch_engine, "interact", lambda *arguments: interact(*arguments) * 1.001)
    assert main(["model", *SMALL, "--out", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert shown.startswith("WRONG: logits are off") and not list(tmp_path.iterdir())


def test_each_call_is_a_sample_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    steps = {name: functools.partial(calls.append, name) for name in ("a", "b")}
    samples = model.latencies(steps, 0.0)
    turns = model.LEAST_TURNS
    assert {name: len(taken) for name, taken in samples.items()} == dict.fromkeys("ab", turns * model.CALLS_PER_TURN)
    assert all(taken > 0 for values in samples.values() for taken in values)
    # The one that comes first in a turn is not always the same.
    rest = calls[2 * model.CALLS_PER_TURN :: model.CALLS_PER_TURN + 1]
    assert len({tuple(rest[i : i + 2]) for i in range(0, len(rest), 2)}) == 2


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["model", "--layers", "0"])
    assert raised.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
