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


def run_pytest(folder: str, environment: dict[str, str]) -> None:
    """Runs the tests of a folder in a child and fails with what it printed."""
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        f"tests/{folder}",
    ]
    result = subprocess.run(
        command,
        cwd=ROOT,
        env={**variables, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        pytest.fail(
            f"{' '.join(command[1:])} ended with {result.returncode}:\n{result.stdout}", pytrace=False
        )


def test_interpreted() -> None:
    """The Triton kernels, run by Triton's interpreter on the CPU."""
    run_pytest("interpreted", {"TRITON_INTERPRET": "1"})


def test_compiled() -> None:
    """The Triton kernels, compiled for GPUs that need not be there."""
    run_pytest("compiled", {})
