"""Training: Adam on the log loss, until validation stops to improve.

A step's rows are a function of seed and step, and so are its random draws. So the state to resume from is the weights,
the optimizers and a few numbers, and a run that was killed ends in the same bits as one that was not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ..model import AutoInt
from .distributed import Processes, processes
from .evaluate import Metrics, evaluate_split
from .run import BAD_BATCH_FILE, BEST_FILE, SETTINGS_FILE, STATE_FILE, Run, device_for
from .settings import Settings

if TYPE_CHECKING:
    from ..clicklog.shards import Batch, Split

# Steps between what TensorBoard is told of the training loss.
LOG_EVERY = 50


class NonFiniteLoss(RuntimeError):
    """A loss that is infinite or NaN, before it has touched the weights; the message tells where its batch is."""


class Outcome(NamedTuple):
    """How training ended."""

    best: Metrics  # of the best model, on the validation rows
    steps: int
    rows_per_second: float  # in training, of this call; 0 where there was none
    stopped_early: bool


class Progress:
    """What a caller may show while training; this one shows nothing."""

    def begin(self, what: str, total: int, done: int = 0) -> None:
        """Another pass over rows, some of them done."""

    def advance(self, rows: int, loss: float | None = None) -> None:
        """Rows of the pass are done."""

    def say(self, line: str) -> None:
        """Something to keep on the screen."""


def train(
    data: str | os.PathLike[str],
    run: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    resume: bool = False,
    force: bool = False,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Outcome:
    """Trains AutoInt on prepared data, into the folder `run`.

    Started by torchrun, each process takes its share of every batch, on a device of its own; `batch_size` is that of
    all together, and the result that of one process up to the order of sums. All of them read `data` and `run`, the
    first one writes.

    settings: None: the defaults, or with `resume` those of the run, which others must equal but for `epochs` and
        `patience`. resume: goes on from the run's last checkpoint; `run` may also be new. force: whether a folder that
        is not empty may be written into; an earlier run in it is lost.

    Raises NonFiniteLoss, FileExistsError, other OSErrors for files that cannot be read or written, and ValueError for
    other data or settings than the run's.
    """
    from ..clicklog.shards import Split

    with processes(device_for(device)) as among:
        training, validation = Split(data, "train"), Split(data, "validation")
        for name, split in (("train", training), ("validation", validation)):
            if len(split) == 0:
                raise ValueError(f"{data}: expected rows in the split {name}, got none")
        opened = _open(Path(data), Path(run), settings, resume, force, among)
        if among.first:
            opened.clean()
        with _own_random_numbers(among.device):
            trainer = _Trainer(
                opened, training, validation, among, progress if among.first and progress else Progress()
            )
            return trainer.run()


def _open(data: Path, folder: Path, settings: Settings | None, resume: bool, force: bool, among: Processes) -> Run:
    """The run to go on with, or a new one, made by the first process."""
    # As the first process sees it: by the time that another one looks, the first may have made it.
    begun = among.gather((folder / SETTINGS_FILE).exists())[0]
    if resume and begun:
        opened = Run.open(folder)
        opened.check(data)
        if settings is None:
            return opened
        free = {"epochs": settings.epochs, "patience": settings.patience}
        if dataclasses.replace(opened.settings, **free) != settings:
            mine, theirs = dataclasses.asdict(settings), dataclasses.asdict(opened.settings)
            other = ", ".join(name for name in mine if name not in free and mine[name] != theirs[name])
            raise ValueError(f"{folder}: a run is resumed with the settings it was begun with, got another {other}")
        return Run(folder, settings)
    error: Exception | None = None
    if among.first:
        try:
            Run.create(folder, settings or Settings(), data, force, resume)
        except Exception as caught:
            error = caught
    error = among.gather(error)[0]
    if error is not None:
        raise error
    return Run.open(folder)


@contextlib.contextmanager
def _own_random_numbers(device: torch.device) -> Iterator[None]:
    """The caller's generators are left as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


class _Position:
    """Where training stands: all that the next step depends on, beside weights and optimizers."""

    def __init__(self, known: dict[str, Any] | None) -> None:
        known = known or {}
        self.epoch: int = known.get("epoch", 0)
        self.step: int = known.get("step", 0)  # of the epoch
        self.steps: int = known.get("steps", 0)  # of all epochs
        self.best: tuple[float, float, int] | None = known.get("best")
        self.since_best: int = known.get("since_best", 0)
        # Of the rows since TensorBoard was last told.
        self.loss: float = known.get("loss", 0.0)
        self.rows: int = known.get("rows", 0)


class _Trainer:
    def __init__(self, run: Run, training: Split, validation: Split, among: Processes, progress: Progress) -> None:
        self.settings, self.among, self.progress = run.settings, among, progress
        self.store, self.training, self.validation = run, training, validation
        self.model = run.settings.model(run.schema, among.device)
        self.optimizers = _optimizers(self.model, run.settings)
        state = run.state()
        self.at = _Position(state and state["position"])
        if state is not None:
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        self.called = _called(self.model, run.settings, among)
        self.seconds, self.trained = 0.0, 0

    def run(self) -> Outcome:
        settings, at = self.settings, self.at
        with self._tensorboard() as log:
            while at.epoch < settings.epochs and at.since_best < settings.patience:
                self._epoch(log)
        best = Metrics(*at.best)  # type: ignore[misc]
        speed = self.trained / self.seconds if self.seconds else 0.0
        return Outcome(best, at.steps, speed, at.since_best >= settings.patience)

    def _epoch(self, log: Any) -> None:
        """What is left of the epoch, or as much of it as patience allows."""
        from ..clicklog.encode import ahead

        settings, at, rows = self.settings, self.at, len(self.training)
        steps = -(-rows // settings.batch_size)
        self.progress.begin(f"epoch {at.epoch + 1}", rows, at.step * settings.batch_size)
        self.model.train()
        begun = time.perf_counter()
        for count, mine, batch in ahead(self._batches()):
            loss = self._step(count, mine, batch)
            # With the wait for the batch, without what stands below.
            self.seconds += time.perf_counter() - begun
            self.trained += count
            at.step, at.steps = at.step + 1, at.steps + 1
            at.loss, at.rows = at.loss + loss, at.rows + count
            self.progress.advance(count, at.loss / at.rows * self.among.world)
            if at.steps % LOG_EVERY == 0:
                log("loss/train", sum(self.among.gather(at.loss)) / at.rows)
                at.loss, at.rows = 0.0, 0
            if at.step == steps or (settings.evaluate_every and at.steps % settings.evaluate_every == 0):
                if at.step == steps:
                    at.epoch, at.step = at.epoch + 1, 0
                self._evaluate(log)
                self._save()
                if at.step == 0 or at.since_best >= settings.patience:
                    return
                self.progress.begin(f"epoch {at.epoch + 1}", rows, at.step * settings.batch_size)
                self.model.train()
            elif at.steps % settings.checkpoint_every == 0:
                self._save()
            begun = time.perf_counter()

    def _batches(self) -> Iterator[tuple[int, np.ndarray, Batch]]:
        """For each step left of the epoch: its rows in all processes, which of them are this one's, and these."""
        size, among = self.settings.batch_size, self.among
        order = np.random.default_rng((self.settings.seed, self.at.epoch)).permutation(len(self.training))
        for start in range(self.at.step * size, len(order), size):
            rows = order[start : start + size]
            mine = rows[among.rank :: among.world]
            yield len(rows), mine, self.training.batch(mine)

    def _step(self, count: int, mine: np.ndarray, batch: Batch) -> float:
        """One step, on `count` rows in all processes; the sum of the losses of this one's."""
        settings, among = self.settings, self.among
        # Every process has draws of its own.
        torch.manual_seed((settings.seed << 32) + self.at.steps * among.world + among.rank)
        categorical, numeric, label = (part.to(among.device, non_blocking=True) for part in batch)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        with torch.autocast(among.device.type, torch.bfloat16, enabled=settings.amp):
            logits = self.called(categorical, numeric if numeric.shape[1] else None)
        loss = nnf.binary_cross_entropy_with_logits(logits.float(), label, reduction="sum")
        total = float(loss.detach())
        if not math.isfinite(total):
            self._give_up(total, mine, batch)
        # Gradients are averaged over the processes; they are to be those of the mean over all rows.
        (loss * (among.world / count)).backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return total

    def _give_up(self, loss: float, rows: np.ndarray, batch: Batch) -> None:
        name = BAD_BATCH_FILE if self.among.first else f"{self.among.rank}-{BAD_BATCH_FILE}"
        self.store.save(
            name,
            {
                **batch._asdict(),
                "rows": torch.from_numpy(rows.copy()),
                "epoch": self.at.epoch,
                "step": self.at.step,
                "model": self.model.state_dict(),
            },
        )
        raise NonFiniteLoss(
            f"the loss is {loss} at step {self.at.step} of epoch {self.at.epoch + 1}; the batch, its positions in the "
            f"split train, and the weights it met are in {self.store.folder / name}"
        )

    def _evaluate(self, log: Any) -> None:
        at = self.at
        self.model.eval()
        share = -(-len(self.validation) // self.among.world)
        self.progress.begin("validation", share)
        metrics = evaluate_split(self.model, self.validation, self.among, self.settings.amp, self.progress.advance)
        log("auc/validation", metrics.auc)
        log("logloss/validation", metrics.logloss)
        better = at.best is None or metrics.logloss < at.best[1]
        at.since_best = 0 if better else at.since_best + 1
        self.progress.say(f"step {at.steps:,}: validation {metrics}{', the best so far' if better else ''}")
        if better:
            at.best = tuple(metrics)
            if self.among.first:
                # Before the state that says so: what is done again after a kill gives the same.
                self.store.save(BEST_FILE, self.model.state_dict())

    def _save(self) -> None:
        if self.among.first:
            optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
            state = {"position": vars(self.at), "model": self.model.state_dict(), "optimizers": optimizers}
            self.store.save(STATE_FILE, state)

    @contextlib.contextmanager
    def _tensorboard(self) -> Iterator[Callable[[str, float], None]]:
        if not self.among.first:
            yield lambda name, value: None
            return
        from torch.utils.tensorboard import SummaryWriter

        # What was logged after the checkpoint is about to be logged again.
        with SummaryWriter(str(self.store.folder), purge_step=self.at.steps + 1) as writer:
            yield lambda name, value: writer.add_scalar(name, value, self.at.steps)


def _optimizers(model: AutoInt, settings: Settings) -> list[torch.optim.Optimizer]:
    parameters = list(model.parameters())
    optimizers: list[torch.optim.Optimizer] = []
    if settings.sparse:
        optimizers.append(torch.optim.SparseAdam([model.embedding.weight], lr=settings.learning_rate))
        parameters = [p for p in parameters if p is not model.embedding.weight]
    # On a CPU, a third of the time of the default one.
    return [torch.optim.Adam(parameters, lr=settings.learning_rate, fused=True), *optimizers]


def _called(model: AutoInt, settings: Settings, among: Processes) -> Callable[..., Tensor]:
    called: nn.Module = model
    if among.world > 1:
        ids = [among.device.index] if among.device.type == "cuda" else None
        called = nn.parallel.DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False)
    return torch.compile(called, dynamic=True) if settings.compile else called  # type: ignore[return-value]
