"""What a figure was measured on: the machine, the versions, and how busy it was."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

import autoint_fast

# In cores: an idle machine is below it, anybody else's computation above.
BUSY_LOAD = 0.5
# (p80 - p20) / p50, the median over the contestants of a case.
WIDE_SPREAD = 0.3


class Machine(NamedTuple):
    """Columns of the results. Empty: not there, or not known."""

    machine: str
    processor: str
    python: str
    torch: str
    triton: str
    autoint_fast: str
    commit: str


@functools.lru_cache
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


def busy(load: float | None) -> str:
    """A warning where others were computing, by the load average before the run, else ""."""
    return f"load average {load:.1f}" if load is not None and load > BUSY_LOAD else ""


def unsteady(spreads: Iterable[float]) -> str:
    """A warning where the rounds of a case lie far apart, else ""."""
    ordered = sorted(spreads)
    middle = ordered[len(ordered) // 2]
    return f"rounds spread by {middle:.0%}" if middle > WIDE_SPREAD else ""
