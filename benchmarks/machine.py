"""What a figure was measured on: the machine, the versions, and how busy it was."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

import autoint_fast

# Of one core: what an idle desktop or a run that has just ended leaves is below.
BUSY_LOAD = 0.5
# (p80 - p20) / p50, the median over the contestants of a case.
WIDE_SPREAD = 0.3


class Machine(NamedTuple):
    machine: str
    processor: str
    python: str
    torch: str
    triton: str
    autoint_fast: str
    commit: str


def describe(device: str) -> Machine:
    """The machine and the versions, for figures measured on `device`."""
    on_cpu = torch.device(device).type == "cpu"
    return Machine(
        machine=platform.node(),
        processor=_cpu() if on_cpu else torch.cuda.get_device_name(device),
        python=platform.python_version(),
        torch=str(torch.__version__),
        triton=_version("triton"),
        autoint_fast=autoint_fast.__version__,
        commit=_commit(),
    )


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        run = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return run.stdout.strip()


def load_average() -> float | None:
    """Of the last minute; None where the system has none."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def busy_before(load: float | None) -> str:
    """A warning where others were computing before the run, else ""."""
    if load is None or load <= BUSY_LOAD:
        return ""
    return f"load average {load:.1f} before the run"


def unsteady(spreads: Iterable[float]) -> str:
    """A warning where the rounds of a case lie far apart, else ""."""
    ordered = sorted(spreads)
    if not ordered or ordered[len(ordered) // 2] <= WIDE_SPREAD:
        return ""
    return f"rounds spread by {ordered[len(ordered) // 2]:.0%}"
