"""Switches Triton's interpreter to honest arithmetic before the first kernel is decorated."""

from __future__ import annotations

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("these tests run with TRITON_INTERPRET=1 only, set before Python starts")

from tests.honest_interpreter import install

install()
