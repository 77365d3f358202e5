"""The layers of our own on the Triton kernels, at shapes for an interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.layers import FlattenedShape, PaperShape, assert_flattened, assert_paper

MASKS = (None, "(F,F)", "(B,1,F)", "(B,F,F)")


@pytest.mark.parametrize("form", ["folded", "factored"])
@pytest.mark.parametrize("shape", [PaperShape(3, 7, 16, 8, 2), PaperShape(3, 6, 16, 48, 2)], ids=str)
def test_paper(shape: PaperShape, form: str) -> None:
    for use_res in (False, True):
        assert_paper(shape, torch.float64, MASKS, 1, form, backend="triton", use_res=use_res)
        assert_paper(shape, torch.float32, MASKS, 2, form, backend="triton", use_res=use_res, scaling=True)


@pytest.mark.parametrize("shape", [FlattenedShape(3, 7, 16, 2), FlattenedShape(5, 1, 4, 2)], ids=str)
def test_flattened(shape: FlattenedShape) -> None:
    assert_flattened(shape, torch.float64, MASKS, 1, backend="triton")
    assert_flattened(shape, torch.float32, MASKS, 2, backend="triton")
