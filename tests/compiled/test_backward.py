"""No cut of the resident backward that is chosen spills."""

from __future__ import annotations

import pytest

from autoint_fast.weights import BARE, CONCATENATED, IDENTITY, MERGED, NO_RESIDUAL, PROJECTION, Layout
from benchmarks.offline import compile_launch
from tests.compiled.test_launches import CRITEO, Shape, backward
from tests.layouts import describe

CONCATENATED_HEADS = Layout(2, 16, 16, 32, 0, CONCATENATED, PROJECTION)
BARE_HEADS = Layout(2, 16, 16, 32, 0, BARE, NO_RESIDUAL)
BARE_IDENTITY = Layout(1, 16, 16, 16, 0, BARE, IDENTITY)
MERGED_IDENTITY = Layout(2, 16, 16, 16, 0, MERGED, IDENTITY, 0)


@pytest.mark.parametrize(
    ("shape", "precision", "mask"),
    [(CRITEO, "bf16", "none"), (CRITEO, "fp16", "none"), (CRITEO, "bf16", "keys"), ((24, 16, 2), "bf16", "none")],
    ids=str,
)
def test_resident_samples_do_not_spill(shape: Shape, precision: str, mask: str) -> None:
    launch = backward(shape, precision, "sm_90", mask)
    assert launch.kernel.fn.__name__ == "backward_resident"
    assert compile_launch(launch, "sm_90").stack == 0


@pytest.mark.parametrize(
    ("shape", "mask"),
    [
        ((39, CONCATENATED_HEADS), "none"),
        ((39, BARE_HEADS), "none"),
        ((39, BARE_IDENTITY), "keys"),
        ((33, MERGED_IDENTITY), "none"),
        ((32, 10, 2), "none"),
        ((32, 16, 4), "pairs"),
        ((16, 10, 3), "pairs"),
    ],
    ids=lambda value: f"{value[0]}-{describe(value[1])}" if len(value) == 2 else str(value),
)
def test_resident_layouts_do_not_spill(shape: Shape, mask: str) -> None:
    launch = backward(shape, "bf16", "sm_90", mask)
    assert launch.kernel.fn.__name__ == "backward_resident"
    assert compile_launch(launch, "sm_90").stack == 0
