"""Training: what it learns, that a killed run ends in the same bits, several processes, what it refuses."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as nnf

from autoint_fast.clicklog.shards import Split
from autoint_fast.clicklog.vocabulary import VOCABULARY_FILE
from autoint_fast.files import replacing
from autoint_fast.training import NonFiniteLoss, Outcome, Progress, Settings, evaluate, train
from autoint_fast.training.evaluate import measure
from autoint_fast.training.run import BEST_FILE, STATE_FILE, Run
from tests import train_worker
from tests.clicks import prepared
from tests.train_worker import KILL_IN_CHECKPOINT, KILL_IN_STEP

ROOT = Path(__file__).parents[1]
SMALL = Settings(emb_size=8, n_layers=2, backend="torch", batch_size=100, learning_rate=0.01, epochs=3, patience=3)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("log"), 3000)


def state(run: Path) -> dict[str, Any]:
    return torch.load(run / STATE_FILE, weights_only=True)


def assert_same(one: Any, other: Any, at: str = "state") -> None:
    """Bit for bit."""
    assert type(one) is type(other), at
    if isinstance(one, dict):
        assert one.keys() == other.keys(), at
        for key in one:
            assert_same(one[key], other[key], f"{at}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), at
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{at}[{i}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), at
    else:
        assert one == other, at


def test_it_learns(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    outcome = train(data, tmp_path / "run", dataclasses.replace(SMALL, epochs=12, patience=12))
    assert torch.equal(torch.get_rng_state(), before)
    assert outcome.best.auc > 0.7 and outcome.best.rows == len(Split(data, "validation"))
    assert outcome.rows_per_second > 0
    assert evaluate(tmp_path / "run", data, split="validation") == pytest.approx(outcome.best, abs=1e-6)
    test = evaluate(tmp_path / "run", data)
    assert test.auc > 0.7 and test.rows == len(Split(data, "test"))


@pytest.mark.parametrize(
    "options",
    [
        {"layer": "paper", "att_size": 12},
        {"mlp": (8,), "dropout": 0.2},
        {"sparse": True},
        {"amp": True},
        pytest.param({"compile": True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_kinds_of_models(options: dict[str, Any], data: Path, tmp_path: Path) -> None:
    outcome = train(data, tmp_path / "run", dataclasses.replace(SMALL, epochs=12, patience=12, **options))
    assert outcome.best.auc > 0.7
    assert evaluate(tmp_path / "run", data, split="validation") == pytest.approx(outcome.best, abs=1e-6)


def test_each_epoch_sees_every_row_once_in_an_order_of_its_own(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[np.ndarray] = []
    batch = Split.batch

    def noting(self: Split, rows: Any) -> Any:
        if self.split == "train":
            seen.append(rows)
        return batch(self, rows)

    monkeypatch.setattr(Split, "batch", noting)
    train(data, tmp_path / "run", dataclasses.replace(SMALL, epochs=2))
    rows = len(Split(data, "train"))
    orders = np.concatenate(seen).reshape(2, rows)
    assert all(np.array_equal(np.sort(order), np.arange(rows)) for order in orders)
    assert (orders[0] != orders[1]).any() and (orders[0] != np.arange(rows)).any()


def test_early_stopping(data: Path, tmp_path: Path) -> None:
    outcome = train(data, tmp_path / "run", dataclasses.replace(SMALL, epochs=100, patience=2, learning_rate=0.05))
    assert outcome.stopped_early
    lines = logged(tmp_path / "run", "logloss/validation")
    best = min(lines, key=lambda line: line[1])
    assert outcome.best.logloss == pytest.approx(best[1], abs=1e-6)
    # Two evaluations after the best one, and no more.
    assert lines.index(best) == len(lines) - 3


def test_evaluations_within_an_epoch(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "run", dataclasses.replace(SMALL, epochs=2, evaluate_every=7, patience=100))
    per_epoch = -(-len(Split(data, "train")) // SMALL.batch_size)
    steps = {*range(7, 2 * per_epoch + 1, 7), per_epoch, 2 * per_epoch}
    assert [step for step, _ in logged(tmp_path / "run", "auc/validation")] == sorted(steps)


def logged(run: Path, name: str) -> list[tuple[int, float]]:
    """What TensorBoard reads."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run)).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


class Screen(Progress):
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.rows: dict[str, int] = {}

    def begin(self, what: str, total: int, done: int = 0) -> None:
        self.what = what
        self.rows.setdefault(what, 0)

    def advance(self, rows: int, loss: float | None = None) -> None:
        self.rows[self.what] += rows

    def say(self, line: str) -> None:
        self.lines.append(line)


def test_progress(data: Path, tmp_path: Path) -> None:
    screen = Screen()
    train(data, tmp_path / "run", dataclasses.replace(SMALL, epochs=2), progress=screen)
    rows, validated = len(Split(data, "train")), len(Split(data, "validation"))
    assert screen.rows == {"epoch 1": rows, "epoch 2": rows, "validation": 2 * validated}
    assert len(screen.lines) == 2 and "AUC" in screen.lines[0] and "the best so far" in screen.lines[0]


# --- killed and resumed -----------------------------------------------------------------------------------------------

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "sklearn.metrics", "torch.utils.tensorboard", "tests.train_worker"])


def trained(data: Path, run: Path, settings: Settings, where: str | None = None, after: int = 0) -> int:
    """The exit code of a process that trains, and may be killed."""
    process = FORKS.Process(target=train_worker.work, args=(data, run, settings, where, after))
    process.start()
    process.join(timeout=300)
    assert process.exitcode is not None
    return process.exitcode


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.parametrize("sparse", (False, True), ids=("dense", "sparse"))
def test_killed_at_random_steps_it_ends_in_the_same_bits(sparse: bool, data: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(
        SMALL, sparse=sparse, mlp=(8,), dropout=0.3, evaluate_every=11, checkpoint_every=3, patience=100
    )
    assert trained(data, tmp_path / "whole", settings) == 0
    expected = state(tmp_path / "whole")
    assert expected["position"]["steps"] == 3 * -(-len(Split(data, "train")) // 100)
    killed, draw = 0, random.Random()
    while True:
        where, after = draw.choice(((KILL_IN_STEP, draw.randrange(25)), (KILL_IN_CHECKPOINT, draw.randrange(8))))
        status = trained(data, tmp_path / "killed", settings, where, after)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        killed += 1
        assert killed < 100, "it does not get on"
    assert killed
    assert_same(state(tmp_path / "killed"), expected)
    best = [torch.load(tmp_path / name / BEST_FILE, weights_only=True) for name in ("whole", "killed")]
    assert_same(*best)
    # The logs of all attempts, read together, are those of the whole run.
    for name in ("logloss/validation", "auc/validation"):
        assert logged(tmp_path / "killed", name) == logged(tmp_path / "whole", name)


def test_resume_of_a_finished_run_trains_no_more_and_with_more_epochs_goes_on(data: Path, tmp_path: Path) -> None:
    first = train(data, tmp_path / "run", SMALL)
    again = train(data, tmp_path / "run", SMALL, resume=True)
    assert again == Outcome(first.best, first.steps, 0.0, False)
    assert train(data, tmp_path / "run", resume=True).steps == first.steps
    longer = dataclasses.replace(SMALL, epochs=4)
    whole = train(data, tmp_path / "whole", longer)
    resumed = train(data, tmp_path / "run", longer, resume=True)
    assert resumed[:2] == whole[:2]
    assert_same(state(tmp_path / "run"), state(tmp_path / "whole"))


def test_resume_with_other_settings(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "run", SMALL)
    other = dataclasses.replace(SMALL, n_head=1, batch_size=50)
    with pytest.raises(ValueError, match="begun with, got another n_head, batch_size"):
        train(data, tmp_path / "run", other, resume=True)


def test_no_overwriting_but_by_force(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "run", SMALL)
    expected = state(tmp_path / "run")
    with pytest.raises(FileExistsError, match="--force"):
        train(data, tmp_path / "run", SMALL)
    assert_same(state(tmp_path / "run"), expected)
    train(data, tmp_path / "run", dataclasses.replace(SMALL, seed=1), force=True)
    assert len(logged(tmp_path / "run", "auc/validation")) == 3
    other = state(tmp_path / "run")
    assert not torch.equal(other["model"]["embedding.weight"], expected["model"]["embedding.weight"])


def test_data_of_another_kind(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "run", SMALL)
    other = shutil.copytree(data, tmp_path / "other")
    schema = Run.open(tmp_path / "run").schema
    dataclasses.replace(schema, minimum_count=3).save(other)
    for call in (lambda: evaluate(tmp_path / "run", other), lambda: train(other, tmp_path / "run", SMALL, resume=True)):
        with pytest.raises(ValueError, match="other columns or another vocabulary"):
            call()


def test_data_with_another_vocabulary(data: Path, tmp_path: Path) -> None:
    """Of as many values, so that only the ids tell."""
    train(data, tmp_path / "run", SMALL)
    other = shutil.copytree(data, tmp_path / "other")
    table = pq.read_table(other / VOCABULARY_FILE)
    first = pc.equal(table["field"], "site")
    sites = table.filter(first)
    swapped = sites.set_column(2, "value", sites["value"].take([1, 0, *range(2, len(sites))]))
    pq.write_table(pa.concat_tables([swapped, table.filter(pc.invert(first))]), other / VOCABULARY_FILE)
    for call in (lambda: evaluate(tmp_path / "run", other), lambda: train(other, tmp_path / "run", SMALL, resume=True)):
        with pytest.raises(ValueError, match="other columns or another vocabulary"):
            call()


def test_prepared_data_is_no_place_for_a_run(data: Path, tmp_path: Path) -> None:
    other = shutil.copytree(data, tmp_path / "other")
    for folder in (other, data):
        with pytest.raises(FileExistsError, match="expected a folder for the run, got prepared data"):
            train(data, folder, SMALL, force=True)
    assert {path.name: path.read_bytes() for path in other.iterdir()} == {
        path.name: path.read_bytes() for path in data.iterdir()
    }


def test_damaged_files_of_a_run(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(data, run, SMALL)
    for name, call in (
        (BEST_FILE, lambda: evaluate(run, data)),
        (STATE_FILE, lambda: train(data, run, dataclasses.replace(SMALL, epochs=4), resume=True)),
    ):
        os.truncate(run / name, 3000)
        with pytest.raises(ValueError, match=f"{name}: expected a whole file of this run"):
            call()


def test_a_run_whose_making_was_killed(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(data / VOCABULARY_FILE, run)
    with pytest.raises(FileExistsError, match="an empty one"):
        train(data, run, SMALL)
    train(data, run, SMALL, resume=True)
    train(data, tmp_path / "other", SMALL)
    assert_same(state(run), state(tmp_path / "other"))


def test_what_a_kill_left_is_removed(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path, SMALL)
    left = tmp_path / f".{STATE_FILE}.abc"
    left.touch()
    train(data, tmp_path, dataclasses.replace(SMALL, epochs=4), resume=True)
    assert not left.exists()


def test_a_validation_row_that_is_too_much(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Split.batch

    def spoilt(self: Split, rows: Any) -> Any:
        found = batch(self, rows)
        if self.split == "validation":
            found.numeric[7] = 3e38
        return found

    monkeypatch.setattr(Split, "batch", spoilt)
    with pytest.raises(ValueError, match="row 7 of validation: expected a finite logit, got"):
        train(data, tmp_path / "run", SMALL)


@pytest.mark.parametrize("device", ["meta", "mps"])
def test_a_device_that_will_not_do(device: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"device: expected cpu, cuda or xpu, got '{device}'"):
        train(data, tmp_path / "run", SMALL, device=device)
    assert not (tmp_path / "run").exists()


def test_evaluate_where_there_is_no_model(data: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"expected a training run's folder, found no settings\.json"):
        evaluate(tmp_path, data)
    Run.create(tmp_path / "run", SMALL, data)
    with pytest.raises(FileNotFoundError, match=r"evaluated model, found no best\.pt"):
        evaluate(tmp_path / "run", data)
    (tmp_path / "run" / "settings.json").write_text('{"emb": 3}')
    with pytest.raises(ValueError, match=r"settings\.json: not the settings"):
        evaluate(tmp_path / "run", data)


def test_a_loss_that_is_not_finite_stops_with_the_batch_saved(data: Path, tmp_path: Path) -> None:
    settings = dataclasses.replace(SMALL, learning_rate=1e30, checkpoint_every=1)
    with pytest.raises(NonFiniteLoss, match=r"the loss is \S+ at step \d+ of epoch 1.*nonfinite\.pt"):
        train(data, tmp_path / "run", settings)
    saved = torch.load(tmp_path / "run" / "nonfinite.pt", weights_only=True)
    model = settings.model(Split(data, "train").schema)
    model.load_state_dict(saved["model"])
    logits = model(saved["categorical"], saved["numeric"])
    assert not nnf.binary_cross_entropy_with_logits(logits, saved["label"]).isfinite()
    # It tells which rows they were, and the weights are those of the last checkpoint.
    expected = Split(data, "train").batch(saved["rows"].numpy())
    assert torch.equal(expected.categorical, saved["categorical"]) and torch.equal(expected.label, saved["label"])
    assert saved["step"] == state(tmp_path / "run")["position"]["steps"]
    assert_same(dict(saved["model"]), dict(state(tmp_path / "run")["model"]))


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.parametrize("sparse", (False, True), ids=("dense", "sparse"))
def test_two_processes_train_as_one_does(sparse: bool, data: Path, tmp_path: Path) -> None:
    """With batches that do not divide evenly, the last of an epoch of another size."""
    settings = dataclasses.replace(SMALL, batch_size=101, epochs=2, sparse=sparse)
    one = train(data, tmp_path / "one", settings)
    options = ["--emb-size=8", "--n-layers=2", "--backend=torch", "--batch-size=101", "--epochs=2", "--patience=3"]
    options += ["--learning-rate=0.01", *(["--sparse"] if sparse else [])]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "autoint_fast",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"
    done = subprocess.run(
        [*command, "train", str(data), f"--out={tmp_path / 'two'}", *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("trained") == 1
    assert evaluate(tmp_path / "two", data, split="validation") == pytest.approx(one.best, abs=2e-5)
    for name in ("logloss/validation", "auc/validation"):
        (steps, values), (others, other_values) = (
            zip(*logged(tmp_path / run, name), strict=True) for run in ("one", "two")
        )
        assert steps == others
        assert other_values == pytest.approx(values, abs=2e-5)
    mine, theirs = (state(tmp_path / run)["model"] for run in ("one", "two"))
    for name, weight in mine.items():
        assert (weight - theirs[name]).abs().max() < 1e-3, name


# --- metrics and files ------------------------------------------------------------------------------------------------


def test_metrics() -> None:
    labels, logits = np.array([0, 1, 0, 1], np.float32), np.array([-1, 2, 3, 0.5], np.float32)
    found = measure(labels, logits)
    # Of the four pairs of a click and none, two are in order.
    assert found.auc == 0.5 and found.rows == 4
    p = 1 / (1 + np.exp(-logits.astype(float)))
    assert found.logloss == pytest.approx(-np.mean(np.log(np.where(labels == 1, p, 1 - p))), abs=1e-12)
    assert np.isnan(measure(labels[:1], logits[:1]).auc)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs"),
        ({"batch_size": -1}, "batch_size"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"seed": -1}, "seed"),
        ({"evaluate_every": 0}, "evaluate_every"),
        ({"n_head": 0}, "n_head"),
        ({"layer": "einsum"}, "layer"),
        ({"mlp": (0,)}, r"mlp\[0\]"),
    ],
    ids=str,
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}: expected"):
        Settings(**options)


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path, "w") as file:
        file.write("new")
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    with replacing(path, "w") as file:
        file.write("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
