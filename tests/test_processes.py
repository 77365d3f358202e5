"""Tests that need a process of their own: Triton's interpreter is on or off for a whole process, and one that
interprets cannot compile."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="Triton runs on Linux"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
]


FOLDERS = {
    "interpreted": {"TRITON_INTERPRET": "1"},  # the kernels, run by Triton's interpreter on the CPU
    "compiled": {},  # the kernels, compiled for GPUs that need not be there
}


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder(folder: str) -> None:
    """Fails with what a pytest of its own printed."""
    others = ("TRITON_INTERPRET", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT")
    variables = {name: value for name, value in os.environ.items() if name not in others}
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", f"tests/{folder}"],
        cwd=ROOT,
        env={**variables, **FOLDERS[folder]},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if child.returncode != 0:
        pytest.fail(f"pytest tests/{folder} ended with {child.returncode}:\n{child.stdout}", pytrace=False)
