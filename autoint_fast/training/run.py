"""A training run's folder: settings, schema and vocabulary, the state to resume from, the best weights, logs."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..files import make_folder, remove_unfinished, replacing
from ..model import AutoInt
from .settings import Settings

if TYPE_CHECKING:
    from ..clicklog.schema import Schema

SETTINGS_FILE, STATE_FILE, BEST_FILE, BAD_BATCH_FILE = "settings.json", "checkpoint.pt", "best.pt", "nonfinite.pt"


@dataclasses.dataclass(frozen=True)
class Run:
    """A folder with a training run.

    settings.json, schema.json and the vocabulary; checkpoint.pt, what `train` resumes from; best.pt, the weights with
    the lowest validation logloss; events.out.tfevents.*, for TensorBoard. Every file is replaced as a whole.
    """

    folder: Path
    settings: Settings

    @classmethod
    def create(cls, folder: Path, settings: Settings, data: Path, force: bool = False, resume: bool = False) -> Run:
        """A new run on prepared data.

        resume: a folder with the beginnings of a run, whose making was killed, will do. Raises FileExistsError for
        prepared data, and for any other folder that is not empty, unless with `force`.
        """
        from ..clicklog.encode import Encoder
        from ..clicklog.shards import MANIFEST_FILE

        Encoder.load(data)
        if (folder / MANIFEST_FILE).exists():
            raise FileExistsError(f"{folder}: expected a folder for the run, got prepared data")
        begun = resume and folder.is_dir() and {path.name for path in folder.iterdir()} <= set(Encoder.FILES)
        make_folder(folder, force or begun)
        # The settings go first and come last: only with them a folder is a run.
        for name in (SETTINGS_FILE, STATE_FILE, BEST_FILE, BAD_BATCH_FILE):
            (folder / name).unlink(missing_ok=True)
        for log in folder.glob("events.out.tfevents.*"):
            log.unlink()
        Encoder.copy(data, folder)
        with replacing(folder / SETTINGS_FILE, "w", encoding="utf-8") as file:
            json.dump(dataclasses.asdict(settings), file, indent=2)
        return cls(folder, settings)

    @classmethod
    def open(cls, folder: Path) -> Run:
        """The run in a folder. Raises FileNotFoundError where there is none, ValueError for settings that are none."""
        path = folder / SETTINGS_FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder}: expected a training run's folder, found no {SETTINGS_FILE} there")
        try:
            return cls(folder, Settings(**json.loads(path.read_text(encoding="utf-8"))))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: not the settings of a training run: {error}") from None

    @property
    def schema(self) -> Schema:
        from ..clicklog.schema import Schema

        return Schema.load(self.folder)

    def check(self, data: Path) -> None:
        """Raises ValueError where prepared data is not what this run is trained on."""
        from ..clicklog.encode import Encoder

        mine, theirs = Encoder.load(self.folder), Encoder.load(data)
        if mine.schema != theirs.schema or not mine.vocabulary.equals(theirs.vocabulary):
            raise ValueError(
                f"{data}: expected the data that {self.folder} is trained on, got other columns or another vocabulary"
            )

    def clean(self) -> None:
        """Removes what a kill left of files that were being written."""
        for name in (SETTINGS_FILE, STATE_FILE, BEST_FILE, BAD_BATCH_FILE):
            remove_unfinished(self.folder / name)

    def save(self, name: str, state: dict[str, Any]) -> None:
        """Raises OSError, and leaves what was there, where the disk is full."""
        with replacing(self.folder / name) as file:
            try:
                torch.save(state, file)
            except RuntimeError as error:
                # What torch makes of a full disk.
                raise OSError(f"{self.folder / name}: it could not be written: {error}") from error

    def state(self) -> dict[str, Any] | None:
        """What was saved to resume from; None before the first checkpoint. Raises ValueError for a damaged file."""
        path = self.folder / STATE_FILE
        return _load(path) if path.is_file() else None

    def model(self, device: torch.device | str = "cpu") -> AutoInt:
        """The best model so far, in eval mode and frozen.

        Raises FileNotFoundError before the first evaluation, ValueError for a damaged file.
        """
        path = self.folder / BEST_FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{self.folder}: expected a run with an evaluated model, found no {BEST_FILE} there"
            )
        model = self.settings.model(self.schema)
        model.load_state_dict(_load(path))
        return model.to(device).eval().freeze()


def _load(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)  # type: ignore[no-any-return]
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path}: expected a whole file of this run: {error}") from error


def device_for(device: torch.device | str | None) -> torch.device:
    """Where to compute; None: on the accelerator, if torch finds one, else on the CPU. Raises ValueError."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device: expected one that torch knows, such as cpu or cuda:0, got {device!r}") from None
    if found.type not in ("cpu", "cuda", "xpu"):
        raise ValueError(f"device: expected cpu, cuda or xpu, got {device!r}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device: torch finds {torch.cuda.device_count()} CUDA devices, got {device!r}")
    return found
