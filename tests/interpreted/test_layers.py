"""The layers of our own on the Triton kernels, at shapes for an interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.layers import FlattenedShape, PaperShape, assert_flattened, assert_paper

MASKS = (None, "(B,F,F)")


@pytest.mark.parametrize("form", ["folded", "factored"])
@pytest.mark.parametrize("shape", [PaperShape(2, 5, 8, 4, 2), PaperShape(2, 5, 4, 12, 2)], ids=str)
def test_paper(shape: PaperShape, form: str) -> None:
    assert_paper(shape, torch.float64, MASKS, 1, form, backend="triton", scaling=True)


@pytest.mark.parametrize("shape", [FlattenedShape(2, 5, 4, 2), FlattenedShape(5, 2, 2, 2)], ids=str)
def test_flattened(shape: FlattenedShape) -> None:
    assert_flattened(shape, torch.float64, MASKS, 1, backend="triton")
