"""Tests that need a process of their own: Triton's interpreter is on or off for a whole process, and one that
interprets cannot compile."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
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


@pytest.fixture(scope="module")
def children() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """A pytest of its own per folder, all at once: each keeps one core busy for minutes."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    running = {
        folder: subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", f"tests/{folder}"],
            cwd=ROOT,
            env={**variables, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for folder, environment in FOLDERS.items()
    }
    yield running
    for child in running.values():
        child.kill()


@pytest.mark.parametrize("folder", FOLDERS)
def test_folder(folder: str, children: dict[str, subprocess.Popen[str]]) -> None:
    """Fails with what the child printed."""
    output, _ = children[folder].communicate()
    if children[folder].returncode != 0:
        pytest.fail(f"pytest tests/{folder} ended with {children[folder].returncode}:\n{output}", pytrace=False)
