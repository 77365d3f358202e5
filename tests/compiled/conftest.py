"""Kernels compiled for GPUs that need not be there."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def compiles() -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1: kernels are interpreted, not compiled")
