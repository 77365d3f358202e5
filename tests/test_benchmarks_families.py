"""`python -m benchmarks families`: who takes part, that wrong numbers get no time, and what it prints and records."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import nn

from autoint_fast import Report, accelerate
from autoint_fast.kernels import torch_engine
from autoint_fast.libraries import CALLERS
from benchmarks import families, installed, timing
from benchmarks.__main__ import main
from benchmarks.cases import FORWARD, TRAINING, Case, Shape

TINY = Case(Shape("tiny", 5, 8, 2), 20, FORWARD, threads=1)
SMALL = ["--shapes", "5x8x2", "--batch", "20", "--rounds", "2", "--backend", "torch"]


@pytest.fixture
def no_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> NoReturn:
        raise installed.Unable("not installed", name.partition(".")[0])

    monkeypatch.setattr(installed, "load", load)


def lines_of(text: str) -> list[list[str]]:
    """The lines of the table, cell by cell."""
    return [line.split() for line in text.splitlines() if " x 5x8x2" in line]


@pytest.mark.usefixtures("no_libraries")
def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def race(steps: Mapping[str, timing.Step], *args: object, **options: object) -> dict[str, list[float]]:
        return {name: [2e-3 if name.endswith("accelerated") else 5e-3] * 5 for name in steps}

    monkeypatch.setattr(timing, "race", race)
    assert main(["families", *SMALL, "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    lines = lines_of(shown)
    assert [line[3:5] for line in lines] == [
        *([FORWARD, "fuxictr"], [FORWARD, "fuxictr-norm"]),
        *([TRAINING, "fuxictr"], [TRAINING, "fuxictr-norm"]),
    ]
    assert all(line[:3] == ["20", "x", "5x8x2"] and line[5:8] == ["5.00", "2.00", "2.50"] for line in lines)
    assert all("factored, rank 4" in " ".join(line) for line in lines)
    for name in ("deepctr", "rechub", "torchfm", "recbole", "tabular", "widedeep"):
        assert f"not measured: {name}: not installed" in shown
    with (tmp_path / families.CSV_NAME).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["p50_ms"]]
    assert len(rows) == 8 and all(row["parity"] == "ok" for row in rows)


@pytest.mark.usefixtures("no_libraries")
def test_it_measures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["families", *SMALL, "--layers", "fuxictr", "--mode", TRAINING, "--out", str(tmp_path)]) == 0
    (line,) = lines_of(capsys.readouterr().out)
    assert float(line[5]) > 0 and float(line[6]) > 0


@pytest.mark.usefixtures("no_libraries")
def test_wrong_numbers_get_no_time_and_fail_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    interact = torch_engine.interact
    monkeypatch.setattr(torch_engine, "interact", lambda *arguments: interact(*arguments) * 1.001)
    assert main(["families", *SMALL, "--layers", "fuxictr", "--mode", FORWARD, "--out", str(tmp_path)]) == 1
    (line,) = lines_of(capsys.readouterr().out)
    assert line[6:8] == ["WRONG:", "out:"], line


def test_a_layer_that_is_left_alone_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "accelerate", lambda layer, backend: Report())
    contestant = families.field("torch")["fuxictr accelerated"]
    with pytest.raises(installed.Unable, match="not accelerated: not recognised"):
        families.contestants.set_up(contestant, TINY)


def test_both_have_the_same_weights() -> None:
    every = families.field("torch")
    plain, ours = (families.contestants.set_up(every[name], TINY) for name in ("fuxictr", "fuxictr accelerated"))
    assert plain.x is ours.x
    for p, q in zip(plain.module.parameters(), ours.module.parameters(), strict=True):
        assert torch.equal(p, q)
    torch.testing.assert_close(ours.step(), plain.step())


@pytest.mark.parametrize("caller", CALLERS)
def test_attention_stands_where_its_model_has_it(caller: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of the model is not built, and what would build it is not called."""

    def fail(*args: Any) -> NoReturn:
        raise AssertionError("built")

    module, _, name = caller.rpartition(".")
    methods = dict.fromkeys(CALLERS[caller].methods, fail)
    known = type(name, (nn.Module,), {"__module__": module, "__init__": fail, **methods})
    monkeypatch.setattr(installed, "load", lambda name: type("Loaded", (), {known.__name__: known}))
    layer = families.InModel(8, 2, caller)
    x = torch.randn(3, 5, 8)
    expected = layer(x)
    for sample in range(3):
        torch.testing.assert_close(layer(x[sample : sample + 1]), expected[sample : sample + 1])
    assert [replaced.name for replaced in accelerate(layer, backend="torch").replaced] == [
        f"model.{CALLERS[caller].stack}.0"
    ]
    torch.testing.assert_close(layer(x), expected)


def test_every_default_has_a_size() -> None:
    options = type("Options", (), {"shapes": None, "batch": None, "mode": "both", "threads": 2})
    options.dtype, options.device = "fp32", "cpu"
    sizes = [(case.batch, *case.shape[1:], case.mode) for case in families._cases(options)]
    assert sizes == [
        *((4096, 39, 16, 2, FORWARD), (1024, 39, 64, 4, FORWARD)),
        *((4096, 39, 16, 2, TRAINING), (1024, 39, 64, 4, TRAINING)),
    ]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--shapes", "39x16"], "argument --shapes: expected FxExH"),
        (["--layers", "nobody"], "argument --layers: invalid choice: 'nobody'"),
        (["--device", "tpu"], "argument --device: expected cpu, cuda or cuda:N"),
        (["--out", __file__], "File exists"),
    ],
)
def test_bad_arguments_get_one_line(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["families", *arguments])
    captured = capsys.readouterr()
    assert caught.value.code == 2 and captured.out == ""
    assert captured.err.startswith("python -m benchmarks families: error: ") and complaint in captured.err


def test_flattened(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flattened", "--shape", "3x4x2", "--batch", "5", "40", "--seconds", "0"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "3x4x2" in line]
    assert len(lines) == 10 and sum("ours, frozen" in line for line in lines) == 2
