"""Processes of test_train.py that are killed while they train."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch

from autoint_fast.training import Settings, train
from autoint_fast.training import run as runs

KILL_IN_STEP, KILL_IN_CHECKPOINT = "step", "checkpoint"


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def work(data: Path, run: Path, settings: Settings, where: str | None, after: int) -> None:
    """Trains on, from the last checkpoint if there is one.

    where: KILL_IN_STEP: the process is killed in the step after so many, its weights half updated;
    KILL_IN_CHECKPOINT: while it writes a checkpoint, half of it written; None: it is not.
    """
    torch.set_num_threads(1)
    left = after

    def counting_down(function: Any, last: Any) -> Any:
        def called(*arguments: Any, **named: Any) -> Any:
            nonlocal left
            if left == 0:
                last(*arguments, **named)
                kill()
            left -= 1
            return function(*arguments, **named)

        return called

    if where == KILL_IN_STEP:
        # The step of the first optimizer is done, the second's, if there is one, is not.
        optimizer = torch.optim.Adam
        optimizer.step = counting_down(optimizer.step, optimizer.step)  # type: ignore[method-assign]
    elif where == KILL_IN_CHECKPOINT:

        def half(state: Any, file: Any) -> None:
            save(state, file)
            file.flush()
            os.truncate(file.fileno(), file.tell() // 2)

        save = torch.save
        runs.torch.save = counting_down(save, half)
    train(data, run, settings, resume=True)
