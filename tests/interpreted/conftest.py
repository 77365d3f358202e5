"""Switches Triton's interpreter to honest arithmetic before the first kernel is launched."""

from __future__ import annotations

import dataclasses
import os

import pytest
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("these tests run with TRITON_INTERPRET=1 only, set before Python starts")

from autoint_fast.kernels import triton_launch
from autoint_fast.kernels.triton_launch import Launch
from autoint_fast.weights import Layout
from tests.honest_interpreter import install

install()


@pytest.fixture(autouse=True)
def wide_reduction(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum over a backward's programs in tiles that suit an interpreter: those of a GPU, eight columns wide, would
    take more time than all other kernels together. test_reduction has them."""
    usual, rows, columns = triton_launch.reduce_launch, 16, 1024

    def reduce_launch(partial: Tensor, total: Tensor, layout: Layout, needs: int) -> Launch:
        launch = usual(partial, total, layout, needs)
        options = {**launch.options, "ROWS": rows, "COLUMNS": columns}
        return dataclasses.replace(launch, grid=(-(-layout.numel // columns),), options=options)

    monkeypatch.setattr(triton_launch, "reduce_launch", reduce_launch)
