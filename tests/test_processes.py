"""Tests that need a process of their own: Triton's interpreter is on or off for a whole process."""

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


def test_interpreted_kernels() -> None:
    """The folder of that name; fails with what a pytest of its own printed."""
    others = ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT")
    variables = {name: value for name, value in os.environ.items() if name not in others}
    child = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", "tests/interpreted"],
        cwd=ROOT,
        env={**variables, "TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if child.returncode != 0:
        pytest.fail(f"pytest tests/interpreted ended with {child.returncode}:\n{child.stdout}", pytrace=False)
