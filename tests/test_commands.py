"""From a log to a model on the command line."""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from autoint_fast.__main__ import main
from autoint_fast.clicklog.encode import Encoder
from autoint_fast.training import evaluate
from autoint_fast.training.predict import PREDICTION_BATCH
from autoint_fast.training.run import Run
from tests.clicks import CATEGORICAL, NUMERIC, prepared, write_log

ROOT = Path(__file__).parents[1]
COMMANDS = ("prepare", "train", "evaluate", "predict", "explain", "export")
OPTIONS = ("--backend=torch", "--emb-size=8", "--n-layers=2", "--batch-size=200", "--learning-rate=0.01", "--epochs=2")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("log"))


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    assert main(["train", str(data), "--out", str(folder), *OPTIONS]) == 0
    return folder


def status_of(*arguments: object) -> int:
    """The exit status, whether it is returned or raised."""
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as error:
        assert isinstance(error.code, int)
        return error.code


def test_from_a_log_to_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, data, out = write_log(tmp_path / "log.csv", 2000), tmp_path / "data", tmp_path / "run"
    columns = ("--label=click", "--categorical", *CATEGORICAL, "--numeric", *NUMERIC)
    assert status_of("prepare", log, "--out", data, *columns) == 0
    assert str(data) in capsys.readouterr().out
    assert status_of("train", data, "--out", out, *OPTIONS, "--mlp", 8, 4, "--dropout", 0.1) == 0
    said = capsys.readouterr().out
    assert "rows/s" in said and "AUC" in said and f"wrote {out}" in said
    assert Run.open(out).settings.mlp == (8, 4)
    assert status_of("evaluate", out, data) == 0
    assert capsys.readouterr().out == f"test: {evaluate(out, data)}\n"
    assert status_of("explain", out, data, "--out", tmp_path / "heat", "--row", 1) == 0
    said = capsys.readouterr().out
    assert "attends to" in said and all(field in said for field in (*CATEGORICAL, *NUMERIC))
    assert "row 1 of test" in said and f"wrote 16 files to {tmp_path / 'heat'}" in said
    assert status_of("export", out, "--out", tmp_path / "exported") == 0
    assert f"wrote {tmp_path / 'exported' / 'model.onnx'}" in capsys.readouterr().out


def test_predict(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows in order, over several batches and files, with labels and without."""
    rows = PREDICTION_BATCH + 7
    log, out = write_log(tmp_path / "new.csv", rows, seed=1), tmp_path / "out.csv"
    lines = [line.split(",", 1) for line in log.read_text().splitlines()]
    bare = tmp_path / "bare.csv"
    bare.write_text("\n".join(line[1] for line in lines[:4]))
    assert status_of("predict", run, log, bare, "--out", out) == 0
    said = capsys.readouterr().out
    assert f"predicted {rows + 3:,} rows" in said and f"wrote {out}" in said
    header, *values = csv.reader(out.open())
    assert header == ["probability"]
    got = np.array(values, float)[:, 0]
    (batch,) = Encoder.load(run).batches([log], rows)
    with torch.no_grad():
        expected = Run.open(run).model()(batch.categorical, batch.numeric).sigmoid().numpy()
    np.testing.assert_allclose(got[:rows], expected, atol=1e-6)
    np.testing.assert_array_equal(got[rows:], got[:3])
    assert len(set(got.tolist())) > 100


def test_predict_leaves_what_is_there(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log, out = write_log(tmp_path / "new.csv", 20), tmp_path / "out.csv"
    out.write_text("old")
    assert status_of("predict", run, log, "--out", out) == 2
    assert "--force" in capsys.readouterr().err and out.read_text() == "old"
    broken = tmp_path / "broken.csv"
    broken.write_text(log.read_text() + "1,site 3\n")
    assert status_of("predict", run, broken, "--out", out, "--force") == 2
    assert out.read_text() == "old" and sorted(os.listdir(tmp_path)) == ["broken.csv", "new.csv", "out.csv"]
    assert status_of("predict", run, log, "--out", out, "--force") == 0
    assert out.read_text().startswith("probability\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of(command, "--help") == 0
    said = capsys.readouterr().out
    assert f"usage: python -m autoint_fast {command}" in said and ("RUN" in said or "FILE" in said)


def test_every_command_is_in_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of("--help") == 0
    said = capsys.readouterr().out
    assert all(f"\n    {command} " in said for command in ("info", "build", *COMMANDS))


BAD = {
    "no log": (["prepare", "{tmp}/none.csv", "--out", "{tmp}/out", "--numeric", "age"], "none.csv"),
    "no data": (["train", "{tmp}/none", "--out", "{tmp}/out"], "schema.json"),
    "no run": (["evaluate", "{data}", "{data}"], "expected a training run's folder"),
    "a file for a folder": (["train", "{data}", "--out", "{data}/schema.json"], "schema.json"),
    "argument": (["train", "{data}", "--out", "{tmp}/out", "--n-head", "0"], "n_head: expected an int of at least 1"),
    "word": (["train", "{data}", "--out", "{tmp}/out", "--epochs", "many"], "--epochs"),
    "layer": (["train", "{data}", "--out", "{tmp}/out", "--layer", "einsum"], "--layer"),
    "device": (["evaluate", "{run}", "{data}", "--device", "toaster"], "toaster"),
    "no out": (["train", "{data}"], "--out"),
    "overwriting": (["train", "{data}", "--out", "{run}"], "--force"),
    "row": (["explain", "{run}", "{data}", "--out", "{tmp}/out", "--row", "-1"], "row: expected"),
    "no file": (["predict", "{run}", "{tmp}/none.csv", "--out", "{tmp}/out.csv"], "none.csv"),
    "nowhere": (["predict", "{run}", "{data}/../log.csv", "--out", "{tmp}/no/out.csv"], "no"),
    "not a run": (["export", "{tmp}", "--out", "{tmp}/out"], "settings.json"),
    "another run's settings": (["train", "{data}", "--out", "{run}", "--resume", "--n-head", "1"], "n_head"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_and_files(
    case: str, run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, status 2, nothing written."""
    words, message = BAD[case]
    arguments = [word.format(run=run, data=data, tmp=tmp_path) for word in words]
    assert status_of(*arguments) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and message in said.err, said.err
    assert said.err.startswith(f"python -m autoint_fast {words[0]}: ")
    assert not any(tmp_path.iterdir())


def test_non_finite_loss(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status_of("train", data, "--out", tmp_path / "run", *OPTIONS, "--learning-rate=1e30") == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "nonfinite.pt" in said


def test_interrupted_and_resumed(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", str(data), f"--out={tmp_path / 'run'}", *OPTIONS, "--checkpoint-every=1"]
    # What a shell runs in the background ignores interrupts, and its children would.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-m", "autoint_fast", *command, "--epochs=100000", "--patience=100000"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    signal.signal(signal.SIGINT, before)
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "run" / "checkpoint.pt").exists() and time.monotonic() < until:
            time.sleep(0.05)
        for patience in (30, 60):
            process.send_signal(signal.SIGINT)
            # Python drops an interrupt that comes while it finalises an object; people press again.
            with contextlib.suppress(subprocess.TimeoutExpired):
                _, said = process.communicate(timeout=patience)
                break
    finally:
        process.kill()
    assert process.returncode == 130
    assert said.splitlines()[-1].endswith("interrupted; --resume goes on from the last checkpoint")
    assert status_of("train", data, "--out", tmp_path / "run", "--resume", "--epochs=1", "--patience=100000") == 0
    assert "trained" in capsys.readouterr().out


def test_a_library_that_is_missing(data: Path, tmp_path: Path) -> None:
    training = ["train", str(data), "--out", str(tmp_path / "run"), *OPTIONS]
    for library, arguments in (("sklearn", training), ("pyarrow", ["prepare", "x.csv", "--out", "y"])):
        code = (
            f"import sys; sys.modules[{library!r}] = None\n"
            f"from autoint_fast.__main__ import main\nsys.exit(main({arguments!r}))"
        )
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and "the command needs autoint_fast[train]" in done.stderr, done.stderr
